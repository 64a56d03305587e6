"""The clock of a simulated group of ranks: when each of them computes, sends and waits.

An operation takes resources for some seconds: a rank's device, the link that it sends on, the one
that it receives on.  Each resource serves in the order of issue.  All ranks do the same thing at
the same step, so one event of the simulation is a vector over ranks, and 1,024 ranks take seconds.

A transfer begins when both ends have posted it and the link is free, and takes its latency plus
bytes over bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from cl_compiler.hardware.graph import hardware_graph
from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.plan.exchange import levels_of
from cl_compiler.plan.machine import machine_of

Vector = np.ndarray
WIRES = 16
"""Kinds of wires of a rank, at most: two for each level around it."""
EVENTS = 400
"""Events of a rank that are kept for drawing: all of a small group's step."""


SHARD, GRADIENT, STATISTICS = "send", "gradient", "statistics"
"""Events that send a shard on, and what was accumulated back."""


@dataclass(frozen=True)
class Event:
    """One rank's use of one resource; ``what``: "compute", "send", "gradient", "statistics",
    "copy" or "wait"."""

    rank: int
    what: str
    start_s: float
    end_s: float


@dataclass(frozen=True, eq=False)
class Links:
    """One hop of every rank: seconds per byte and of latency, and the rank that it leads to.

    ``after``: left out, the next rank; ``members``: ranks of one circle, left out all of them.
    ``wires``: what each hop leaves its rank by, and arrives at the other by: any two transfers of
    one rank on the same wires come one after the other.
    """

    s_per_byte: Vector
    latency_s: Vector
    after: Vector | None = None
    members: int = 0
    wires: Vector | None = None

    @property
    def ranks(self) -> int:
        return len(self.latency_s)

    @cached_property
    def next_ranks(self) -> Vector:
        """The rank that each rank sends to."""
        return (np.arange(self.ranks) + 1) % self.ranks if self.after is None else self.after

    @cached_property
    def places(self) -> tuple[Vector, Vector, Vector]:
        """Of each rank, where its sends and the receives of the rank after are kept in a list of
        all wires' ranks; and the rank that sends to it."""
        every = np.arange(self.ranks)
        wires = np.zeros(self.ranks, dtype=int) if self.wires is None else self.wires
        before = np.empty_like(every)
        before[self.next_ranks] = every
        return wires * self.ranks + every, wires * self.ranks + self.next_ranks, before

    @cached_property
    def _seconds(self) -> dict[float, Vector]:
        return {}

    def seconds(self, sent_bytes: Vector | float) -> Vector:
        """Of as many bytes on every hop; of the same number, worked out once."""
        if isinstance(sent_bytes, np.ndarray):
            taken: Vector = self.latency_s + sent_bytes * self.s_per_byte
            return taken
        if sent_bytes not in self._seconds:
            self._seconds[sent_bytes] = self.latency_s + sent_bytes * self.s_per_byte
        return self._seconds[sent_bytes]

    @property
    def circle(self) -> int:
        """Ranks that one shard goes around."""
        return self.members or self.ranks


def links_of(spec: HardwareSpec, ranks: int, distance: int = 1) -> Links:
    """Hops from every rank to the one ``distance`` places on: inside a node, or to another."""
    s_per_byte, latency = np.zeros(ranks), np.zeros(ranks)
    wires = np.zeros(ranks, dtype=int)
    machine = machine_of(hardware_graph(spec))
    for level, outer in enumerate(machine.outer):  # from the outside in: an inner level replaces it
        if not outer.is_linked:
            continue
        group = outer.instances * outer.ranks_inside
        for rank in range(ranks):
            inside = rank // group == ((rank + distance) % ranks) // group
            if inside or group >= ranks:
                s_per_byte[rank] = 1.0 / outer.link_bytes_per_s
                latency[rank] = outer.link_latency_s
                own_wires = outer.point_to_point and outer.full_duplex and distance < 0
                wires[rank] = 2 * level + own_wires
    after = (np.arange(ranks) + distance) % ranks
    return Links(s_per_byte, latency, after, wires=wires)


def links_of_levels(spec: HardwareSpec, ranks: int) -> tuple[Links, Links]:
    """(to the same place on the next node, to the next rank of the node) for every rank."""
    two = levels_of(machine_of(hardware_graph(spec)), ranks)
    assert two is not None
    place, node = np.arange(ranks) % two.node, np.arange(ranks) // two.node
    nodes = ranks // two.node

    def every(
        bytes_per_s: float, latency_s: float, after: Vector, members: int, wires: int
    ) -> Links:
        one = np.ones(ranks)
        wire = np.full(ranks, wires)
        return Links(one / bytes_per_s, one * latency_s, after, members, wire)

    return (
        every(
            two.between.link_bytes_per_s,
            two.between.link_latency_s,
            (node + 1) % nodes * two.node + place,
            nodes,
            0,
        ),
        every(
            two.inside.link_bytes_per_s,
            two.inside.link_latency_s,
            node * two.node + (place + 1) % two.node,
            two.node,
            1,
        ),
    )


@dataclass
class Clock:
    """Every rank's time, and when its links are free.

    ``speed``: of each rank, 1 as planned.  ``start_s_per_byte``: to start what accumulates on its
    way, one pass over it; ``join_s_per_byte``: to join what other ranks accumulated, three.
    ``post_s``: of a rank, for every exchange that it posts.  ``home``: what is sent back in the
    pass that runs, as it is drawn: gradients, or statistics alone.
    """

    links: Links
    speed: Vector
    drawn: int = 0
    start_s_per_byte: float = 0.0
    join_s_per_byte: float = 0.0
    post_s: float = 0.0
    home: str = GRADIENT
    now: Vector = field(init=False)
    compute_s: Vector = field(init=False)
    waiting_s: Vector = field(init=False)
    events: list[Event] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        ranks = self.links.ranks
        self.now = np.zeros(ranks)
        self.compute_s, self.waiting_s = np.zeros(ranks), np.zeros(ranks)
        self._sends, self._receives = np.zeros(WIRES * ranks), np.zeros(WIRES * ranks)
        self._latest: tuple[Links | None, Vector] = (None, self.now)
        self._copies = np.zeros(ranks)
        self._collective = 0.0

    def compute(self, seconds: Vector | float) -> None:
        """Every rank's device is busy."""
        took = seconds / self.speed
        self.draw("compute", self.now, self.now + took)
        self.now = self.now + took
        self.compute_s += took

    def exchange(
        self, sent_bytes: Vector | float, what: str = SHARD, links: Links | None = None
    ) -> Vector:
        """Post to the rank after, and a receive from the one before: when it has both."""
        links = links or self.links
        start = np.maximum(self.post(links), self._free(links))
        end = start + links.seconds(sent_bytes)
        self._latest = links, end
        self.draw(what, start, end)
        done: Vector = np.maximum(end, end.take(links.places[2]))
        return done

    def post(self, links: Links) -> Vector:
        """Post an exchange on every rank: when both ends of each hop have."""
        self.now = self.now + self.post_s
        ready: Vector = np.maximum(self.now, self.now.take(links.next_ranks))
        return ready

    def _free(self, links: Links) -> Vector:
        """From when on both ends of every hop are.  Of one exchange after the other on the same
        hops, which is most of them, that is the end of the latest: others' are then noted."""
        latest, end = self._latest
        if latest is links:
            return end
        if latest is not None:
            sends, receives, _ = latest.places
            self._sends[sends] = end
            self._receives[receives] = end
        sends, receives, _ = links.places
        return np.maximum(self._sends.take(sends), self._receives.take(receives))

    def copy(self, seconds: Vector | float) -> Vector:
        """Post a copy between host memory and the device, after earlier ones: when it is done."""
        start = np.maximum(self.now, self._copies)
        self._copies = start + seconds
        self.draw("copy", start, self._copies)
        return self._copies

    def wait(self, until: Vector) -> None:
        """Until what was posted is done."""
        waited = np.maximum(until - self.now, 0.0)
        self.draw("wait", self.now, self.now + waited)
        self.now = self.now + waited
        self.waiting_s += waited

    def join(self, arriving: Vector | None, new_bytes: Vector | float) -> None:
        """Wait for what other ranks accumulated, and join it."""
        if arriving is not None:
            self.wait(arriving)
            self.compute(new_bytes * self.join_s_per_byte)

    def together(self, seconds: float, what: str = SHARD) -> Vector:
        """A collective: it begins when the last rank has posted it, one after the other."""
        self.now = self.now + self.post_s
        start = max(float(self.now.max()), self._collective)
        self._collective = start + seconds
        ends = np.full_like(self.now, self._collective)
        self.draw(what, np.full_like(self.now, start), ends)
        return ends

    def draw(self, what: str, start: Vector, end: Vector) -> None:
        """Keep an event of the first ranks."""
        if len(self.events) >= self.drawn * EVENTS:
            return
        drawn = zip(start[: self.drawn].tolist(), end[: self.drawn].tolist(), strict=True)
        for rank, (begin_s, end_s) in enumerate(drawn):
            if end_s > begin_s:
                self.events.append(Event(rank, what, begin_s, end_s))


__all__ = [
    "GRADIENT",
    "SHARD",
    "STATISTICS",
    "Clock",
    "Event",
    "Links",
    "Vector",
    "links_of",
    "links_of_levels",
]
