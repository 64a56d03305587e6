"""Messages that pass a wire at the same time, against what can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cl_compiler.plan.clock import Clock, Links
from cl_compiler.plan.wires import Wires

RANKS = 4


def hops(places: int, wire: int = 0, ranks: int = RANKS, s_per_byte=1.0) -> Links:
    after = (np.arange(ranks) + places) % ranks
    each = np.full(ranks, s_per_byte) if np.isscalar(s_per_byte) else np.asarray(s_per_byte)
    return Links(each, np.zeros(ranks), after, wires=np.full(ranks, wire))


def started(*links: Links) -> tuple[Clock, Wires]:
    clock = Clock(links[0], np.ones(links[0].ranks), drawn=1)
    return clock, Wires(clock, links)


@pytest.mark.parametrize(("other_wire", "ends"), [(0, (2.0, 3.0)), (1, (1.0, 2.0))])
def test_what_two_ranks_are_sent_shares_a_wire_unless_each_has_its_own(other_wire, ends):
    """1 s to the one, 2 s to the other: half each until the first has ended."""
    to, back = hops(1), hops(-1, other_wire)
    clock, wires = started(to, back)
    first, second = wires.exchange(1.0, "send", to), wires.exchange(2.0, "send", back)
    assert wires.end(first).tolist() == pytest.approx([ends[0]] * RANKS)
    assert wires.end(second).tolist() == pytest.approx([ends[1]] * RANKS)
    assert [(e.start_s, e.end_s) for e in clock.events] == [(0.0, end) for end in ends]


def test_what_one_rank_is_sent_goes_message_by_message():
    to = hops(1)
    _, wires = started(to)
    sent = [wires.exchange(size, "send", to) for size in (1.0, 2.0, 0.0)]
    assert [wires.end(m)[0] for m in sent] == pytest.approx([1.0, 3.0, 3.0])


def test_a_message_that_begins_later_slows_the_one_that_passes():
    """3 s and, after 1 s of products, 1 s: from then on half each, so it ends after 2 s more."""
    to, back = hops(1), hops(-1)
    clock, wires = started(to, back)
    first = wires.exchange(3.0, "send", to)
    clock.compute(1.0)
    second = wires.exchange(1.0, "send", back)
    assert wires.end(second)[0] == pytest.approx(3.0)
    clock.wait(wires.end(second))
    third = wires.exchange(1.0, "send", back)  # beside the last second of the first
    assert wires.end(first)[0] == pytest.approx(5.0)
    assert wires.end(third)[0] == pytest.approx(5.0)


def test_ranks_share_what_they_send_each_by_itself():
    """Rank 1 sends at half the rate, both ways; its neighbours wait for it."""
    slow = [1.0, 2.0, 1.0, 1.0]
    to, back = hops(1, s_per_byte=slow), hops(-1, s_per_byte=slow)
    _, wires = started(to, back)
    first, second = wires.exchange(1.0, "send", to), wires.exchange(1.0, "send", back)
    assert wires.end(first).tolist() == pytest.approx([2.0, 4.0, 4.0, 2.0])
    assert wires.end(second).tolist() == pytest.approx([4.0, 4.0, 2.0, 2.0])


def alone_on_its_rank(messages: list, same: np.ndarray, rank: int) -> list[float]:
    """When each of a rank's messages (queue, ready, seconds alone) ends, all of them known."""
    left = [float(seconds[rank]) for *_, seconds in messages]
    ends, now = [np.inf] * len(messages), 0.0
    while np.inf in ends:
        heads: dict[int, int] = {}
        for at, (queue, *_) in enumerate(messages):
            if ends[at] == np.inf:
                heads.setdefault(queue, at)
        ready = {at: float(messages[at][1][rank]) for at in heads.values()}
        passing = [at for at in heads.values() if ready[at] <= now]
        turns = {
            at: sum(same[messages[at][0], messages[other][0], rank] for other in passing)
            for at in passing
        }
        events = [now + left[at] * turns[at] for at in passing]
        then = min(events + [t for t in ready.values() if t > now])
        for at in passing:
            if now + left[at] * turns[at] <= then:
                ends[at] = then
            left[at] -= (then - now) / turns[at]
        now = then
    return ends


@pytest.mark.parametrize("seed", range(12))
def test_any_program_of_ranks_sends_as_if_all_of_it_were_known(seed):
    """Uneven sizes, rates, speeds and wires; empty messages; waits in any order.  All messages."""
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(4, 7))
    each = [hops(d, 0, ranks, rng.choice([1.0, 2.0], ranks)) for d in (1, -1, 2)[: 1 + seed % 3]]
    links = [replace(to, wires=rng.integers(0, 2, ranks)) for to in each]
    clock = Clock(links[0], rng.choice([1.0, 0.5], ranks))
    wires, posted, sent, waiting = Wires(clock, links), [], [], []
    for _ in range(40):
        act = rng.random()
        if act < 0.4:
            clock.compute(rng.random(ranks) * 2)
        elif act < 0.75 or not waiting:
            queue, size = int(rng.integers(len(links))), rng.random(ranks) * 3
            message = wires.exchange(size * (rng.random(ranks) < 0.8), "send", links[queue])
            posted.append((queue, message.ready.copy(), message.left.copy()))
            sent.append(message)
            waiting.append(message)
        else:
            clock.wait(wires.end(waiting.pop(int(rng.integers(len(waiting))))))
            assert (wires._now <= clock.now + 1e-12).all()
    for message in waiting:
        wires.end(message)
    same = np.array([[a.wires == b.wires for b in links] for a in links])
    for rank in range(ranks):
        found = [message.end[rank] for message in sent]
        assert len(found) > 5
        assert found == pytest.approx(alone_on_its_rank(posted, same, rank), rel=1e-9)
