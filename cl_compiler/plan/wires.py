"""Wires of simulated ranks that several messages pass at the same time.

What a rank sends to one other rank goes message by message, in the order in which it was posted.
What it sends to several at once over the same wire shares it evenly, as connections of a network
card do: of two messages, both come late.  A message's latency is shared like its bytes.  What a
rank receives is not shared out: where each sends as much as it receives, that is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from cl_compiler.plan.clock import Clock, Links, Vector


@dataclass(eq=False)
class Message:
    """One exchange of every rank: from when it may begin, and seconds that are left of it on a wire
    that it has to itself; when it began and ended, infinity until it has."""

    what: str
    links: Links
    ready: Vector
    left: Vector
    begin: Vector = field(init=False)
    end: Vector = field(init=False)

    def __post_init__(self) -> None:
        self.begin = np.full_like(self.ready, np.inf)
        self.end = np.full_like(self.ready, np.inf)


class Wires:
    """What every rank sends to some others; ``links``: the hops to each of them.

    When a message ends depends on what is posted before it does, so it is asked for when ranks
    wait for it: nothing that is posted after that begins sooner.
    """

    def __init__(self, clock: Clock, links: Iterable[Links]) -> None:
        self.clock = clock
        self._at: dict[bytes, int] = {}  # whom every rank sends to
        wires: list[Vector] = []
        for hops in links:
            if hops.next_ranks.tobytes() not in self._at:
                self._at[hops.next_ranks.tobytes()] = len(wires)
                wires.append(np.zeros(hops.ranks) if hops.wires is None else hops.wires)
        self._queues: list[list[Message]] = [[] for _ in wires]
        every = np.array(wires)
        self._same = every[:, None] == every  # of two that are sent to, whether by the same wire
        self._now = np.zeros(clock.links.ranks)

    def exchange(self, sent_bytes: Vector | float, what: str, links: Links) -> Message:
        """Post to the rank after, and a receive from the one before."""
        ready = self.clock.post(links)
        message = Message(what, links, ready, np.array(links.seconds(sent_bytes)))
        self._queues[self._at[links.next_ranks.tobytes()]].append(message)
        return message

    def end(self, message: Message) -> Vector:
        """When every rank has sent its part of a message and has received the other.

        It is asked for by ranks that wait until then before they post anything more.
        """
        with np.errstate(invalid="ignore"):  # of ranks on which nothing is left to send
            while (going := np.isinf(message.end)).any():
                sent = [at for at, queue in enumerate(self._queues) if queue]
                if len(sent) == 1:
                    self._alone(self._queues[sent[0]], message)
                elif len(sent) == 2:
                    self._two(sent[0], sent[1], going)
                else:
                    self._advance(sent, going)
        for queue in self._queues:
            while queue and np.isfinite(queue[0].end).all():
                done = queue.pop(0)
                self.clock.draw(done.what, done.begin, done.end)
        end = message.end
        done_s: Vector = np.maximum(end, end.take(message.links.places[2]))
        return done_s

    def _alone(self, queue: list[Message], until: Message) -> None:
        """One message after the other: nothing else is sent."""
        for message in queue:
            due = np.isinf(message.end)
            start = np.maximum(message.ready, self._now)
            np.copyto(message.begin, np.minimum(message.begin, start), where=due)
            np.copyto(message.end, start + message.left, where=due)
            np.copyto(self._now, message.end, where=due)
            if message is until:
                return

    def _two(self, first: int, second: int, going: Vector) -> None:
        """To where the first of two messages ends, on the ranks that are ``going``."""
        ready, left = self._heads([first, second])
        start = np.maximum(ready, self._now)
        # what is left of each when the other begins, too
        rest = left - np.maximum(start[::-1] - start, 0.0)
        both, turns = rest.min(axis=0), np.where(self._same[first, second], 2.0, 1.0)
        ends = start + left
        then = np.where(both > 0.0, start.max(axis=0) + turns * both, ends.min(axis=0))
        rest = np.maximum(rest - np.maximum(both, 0.0), 0.0)
        for queue, begin, more in zip(
            (self._queues[first], self._queues[second]), start, rest, strict=True
        ):
            self._apply(queue, going & np.isfinite(begin), begin, more, then)
        np.copyto(self._now, then, where=going)

    def _advance(self, sent: list[int], going: Vector) -> None:
        """To the next message that begins or ends, on the ranks that are ``going``."""
        ready, left = self._heads(sent)
        starts = np.where(going, np.maximum(ready, self._now), 0.0)
        now = starts.min(axis=0)
        passes = going & (starts <= now)
        by_turns = np.maximum((self._same[np.ix_(sent, sent)] & passes).sum(axis=1), 1)
        ends = np.where(passes, now + left * by_turns, np.inf)
        then = np.minimum(ends.min(axis=0), np.where(passes, np.inf, starts).min(axis=0))
        rest = np.where(ends <= then, 0.0, np.maximum(left - (then - now) / by_turns, 0.0))
        for at, moved, more in zip(sent, passes, rest, strict=True):
            self._apply(self._queues[at], moved, now, more, then)
        np.copyto(self._now, then, where=going)

    def _heads(self, sent: list[int]) -> tuple[Vector, Vector]:
        """[queues, ranks]: of the first message that has not ended, when it is ready, and what is
        left of it; infinity where there is none."""
        ready, left = (np.full((len(sent), len(self._now)), np.inf) for _ in range(2))
        for row, at in enumerate(sent):
            for message in reversed(self._queues[at]):
                due = np.isinf(message.end)
                np.copyto(ready[row], message.ready, where=due)
                np.copyto(left[row], message.left, where=due)
        return ready, left

    def _apply(
        self, queue: list[Message], moved: Vector, begin: Vector, rest: Vector, then: Vector
    ) -> None:
        """On ranks that ``moved`` a queue's first message, so much of it is left then."""
        for message in queue:
            moves = moved & np.isinf(message.end)
            np.copyto(message.begin, np.minimum(message.begin, begin), where=moves)
            np.copyto(message.left, rest, where=moves)
            np.copyto(message.end, then, where=moves & (rest <= 0.0) & (begin <= then))
            moved = moved & ~moves
            if not moved.any():
                return


__all__ = ["Message", "Wires"]
