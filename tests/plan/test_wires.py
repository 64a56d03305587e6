"""Messages that pass a wire at the same time, against what can be worked out by hand."""

from __future__ import annotations

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


def test_a_wire_is_never_idle_while_something_waits_for_it():
    """Any messages to three ranks, of any sizes: all of them have ended when their sum has passed,
    and none before its own size has."""
    rng = np.random.default_rng(7)
    for _ in range(20):
        links = [hops(places) for places in (1, 2, 3)]
        _, wires = started(*links)
        sizes = rng.random((6, RANKS)) * 3
        sent = [wires.exchange(size, "send", links[rng.integers(3)]) for size in sizes]
        for message in sent:
            wires.end(message)
        ends = np.array([message.end for message in sent])
        assert ends.max(axis=0) == pytest.approx(sizes.sum(axis=0))
        assert (ends >= sizes - 1e-12).all()
