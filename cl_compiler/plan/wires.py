"""Wires of simulated ranks that several messages pass at the same time.

What a rank sends to one other rank goes message by message, in the order in which it was posted.
What it sends to several at once over the same wire shares it evenly, as connections of a network
card do: of two messages, both come late.  What a rank receives is not shared out: where each sends
as much as it receives, that is the same.
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

    When a message ends depends on what is posted before it does, so it is asked for when a rank
    waits: nothing that is posted later begins sooner.
    """

    def __init__(self, clock: Clock, links: Iterable[Links]) -> None:
        self.clock = clock
        self.queues: dict[bytes, list[Message]] = {}
        wires = []
        for hops in links:
            if hops.next_ranks.tobytes() not in self.queues:
                self.queues[hops.next_ranks.tobytes()] = []
                wires.append(np.zeros(hops.ranks) if hops.wires is None else hops.wires)
        every = np.array(wires)
        self._same = every[:, None] == every  # of two that are sent to, whether by the same wire
        self._now = np.zeros(clock.links.ranks)

    def exchange(self, sent_bytes: Vector | float, what: str, links: Links) -> Message:
        """Post to the rank after, and a receive from the one before."""
        ready = self.clock.post(links)
        message = Message(what, links, ready, np.array(links.seconds(sent_bytes)))
        self.queues[links.next_ranks.tobytes()].append(message)
        return message

    def end(self, message: Message) -> Vector:
        """When every rank has sent its part of a message and has received the other."""
        while (going := np.isinf(message.end)).any():
            self._advance(going)
        for queue in self.queues.values():
            while queue and np.isfinite(queue[0].end).all():
                done = queue.pop(0)
                self.clock.draw(done.what, done.begin, done.end)
        end = message.end
        done_s: Vector = np.maximum(end, end.take(message.links.places[2]))
        return done_s

    def _advance(self, going: Vector) -> None:
        """To the next message that begins or ends, on the ranks that are ``going``."""
        ready, left = (np.full(self._same.shape[1:], np.inf) for _ in range(2))
        for at, queue in enumerate(self.queues.values()):
            for message in reversed(queue):  # the first that has not ended
                is_due = np.isinf(message.end)
                np.copyto(ready[at], message.ready, where=is_due)
                np.copyto(left[at], message.left, where=is_due)
        starts = np.where(going, np.maximum(ready, self._now), 0.0)
        now = starts.min(axis=0)
        passes = going & (starts <= now)
        by_turns = np.maximum((self._same & passes).sum(axis=1), 1)
        ends = np.where(passes, now + left * by_turns, np.inf)
        then = np.minimum(ends.min(axis=0), np.where(passes, np.inf, starts).min(axis=0))
        for at, queue in enumerate(self.queues.values()):
            moved = passes[at]
            for message in queue:
                moves = moved & np.isinf(message.end)
                moved = moved & ~moves
                np.copyto(message.begin, np.minimum(message.begin, now), where=moves)
                passed = (then - now) / by_turns[at]
                np.copyto(message.left, np.maximum(message.left - passed, 0.0), where=moves)
                np.copyto(message.end, then, where=moves & (ends[at] <= then))
        np.copyto(self._now, then, where=going)


__all__ = ["Message", "Wires"]
