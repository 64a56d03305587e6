"""A discrete-event run of a cluster plan: when each rank computes, sends and waits.

An operation takes resources for some seconds: a rank's device, the link that it sends on, the one
that it receives on.  Each resource serves in the order of issue.  All ranks do the same thing at
the same step, so one event of the simulation is a vector over ranks, and 1,024 ranks take seconds.

A transfer begins when both ends have posted it and the link is free, and takes its latency plus
bytes over bandwidth.  A rank posts the next shard, computes this one and waits, as emitted files
do (``templates/ring/travel.py.jinja``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cl_compiler.hardware.graph import hardware_graph
from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.lang.program import Program
from cl_compiler.lang.tile_ir import Gemm
from cl_compiler.plan.cluster import Travel, travels_of
from cl_compiler.plan.machine import machine_of
from cl_compiler.plan.types import Plan

Vector = np.ndarray
EVENTS = 20_000
"""Events that are kept for drawing, at most."""


@dataclass(frozen=True)
class Event:
    """One rank's use of one resource; ``what``: "compute", "send", "gradient" or "wait"."""

    rank: int
    what: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Run:
    """What came out.

    ``seconds``: until the last rank is done; ``compute_s``, ``waiting_s``: of the slowest rank;
    ``forward_s``: when the last rank begins its backward.  ``events``: of the first ranks.
    """

    seconds: float
    forward_s: float
    compute_s: float
    waiting_s: float
    events: tuple[Event, ...] = ()

    @property
    def bound_by(self) -> str:
        """What the slowest rank spends most of its time on."""
        return "products" if self.compute_s >= self.waiting_s else "the exchange"


@dataclass(frozen=True)
class Links:
    """The hop from each rank to the next: seconds per byte and of latency, both per rank."""

    s_per_byte: Vector
    latency_s: Vector

    @property
    def ranks(self) -> int:
        return len(self.latency_s)


def links_of(spec: HardwareSpec, ranks: int) -> Links:
    """Hops of the ring of ranks in order: inside a node, and to the next one."""
    s_per_byte, latency = np.zeros(ranks), np.zeros(ranks)
    machine = machine_of(hardware_graph(spec))
    for outer in machine.outer:  # from the outside in: a hop within an inner level replaces it
        if not outer.is_linked:
            continue
        group = outer.instances * outer.ranks_inside
        for rank in range(ranks):
            inside = rank // group == ((rank + 1) % ranks) // group
            if inside or group >= ranks:
                s_per_byte[rank] = 1.0 / outer.link_bytes_per_s
                latency[rank] = outer.link_latency_s
    return Links(s_per_byte, latency)


@dataclass
class Clock:
    """Every rank's time, and when its links are free.

    ``speed``: of each rank, 1 as planned.  ``join_s_per_byte``: to start a travelling gradient and
    join what came from other ranks, four passes over it.
    """

    links: Links
    speed: Vector
    drawn: int = 0
    join_s_per_byte: float = 0.0
    now: Vector = field(init=False)
    compute_s: Vector = field(init=False)
    waiting_s: Vector = field(init=False)
    events: list[Event] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        ranks = self.links.ranks
        self.now = np.zeros(ranks)
        self.compute_s, self.waiting_s = np.zeros(ranks), np.zeros(ranks)
        self._sends, self._receives = np.zeros(ranks), np.zeros(ranks)
        self._collective = 0.0

    def compute(self, seconds: Vector | float) -> None:
        """Every rank's device is busy."""
        took = seconds / self.speed
        self._draw("compute", self.now, self.now + took)
        self.now = self.now + took
        self.compute_s += took

    def exchange(self, sent_bytes: Vector | float, what: str = "send") -> Vector:
        """Post to the next rank, and a receive from the one before: when it has both."""
        size = np.broadcast_to(np.asarray(sent_bytes, dtype=float), self.now.shape)
        ready = np.maximum(self.now, np.roll(self.now, -1))  # the next rank has posted too
        start = np.maximum(ready, np.maximum(self._sends, np.roll(self._receives, -1)))
        end = start + self.links.latency_s + size * self.links.s_per_byte
        self._sends, self._receives = end, np.roll(end, 1)
        self._draw(what, start, end)
        done: Vector = np.maximum(end, np.roll(end, 1))
        return done

    def wait(self, until: Vector) -> None:
        """Until what was posted is done."""
        waited = np.maximum(until - self.now, 0.0)
        self._draw("wait", self.now, self.now + waited)
        self.now = self.now + waited
        self.waiting_s += waited

    def together(self, seconds: float) -> Vector:
        """A collective: it begins when the last rank has posted it, one after the other."""
        start = max(float(self.now.max()), self._collective)
        self._collective = start + seconds
        ends = np.full_like(self.now, self._collective)
        self._draw("send", np.full_like(self.now, start), ends)
        return ends

    def _draw(self, what: str, start: Vector, end: Vector) -> None:
        for rank in range(min(self.drawn, self.links.ranks)):
            if end[rank] > start[rank] and len(self.events) < EVENTS:
                self.events.append(Event(rank, what, float(start[rank]), float(end[rank])))


@dataclass(frozen=True)
class Work:
    """One pass on one rank: what it moves, and seconds for a whole shard against a whole shard."""

    travel: Travel
    seconds: float


def work_of(plan: Plan, program: Program) -> tuple[Work, ...]:
    """The passes of a program; the plan's seconds of one shard pair by their matrix products."""
    assert plan.cluster is not None
    weights = []
    for pass_ in program.passes:
        code = next(iter(pass_.programs.values()))
        gemms = sum(isinstance(i, Gemm) for i in code.instructions)
        weights.append(gemms + len(pass_.sides) * len(code.gradients) or 1)
    share = (plan.seconds - plan.cluster.exposed_s) / plan.cluster.group_size
    total = sum(weights)
    travels = travels_of(program, plan.problem)
    return tuple(Work(t, share * w / total) for t, w in zip(travels, weights, strict=True))


def simulate(
    plan: Plan,
    program: Program,
    spec: HardwareSpec,
    *,
    speeds: Sequence[float] = (),
    drawn_ranks: int = 0,
) -> Run:
    """Run a plan for a group of ranks, forward and backward.

    Args:
        plan: of one rank, with its ``cluster``; every rank has a shard of ``plan.problem``.
        program: what it runs.
        spec: the cluster, with as many devices as the group has ranks.
        speeds: of each rank, where they differ: 0.5 takes twice as long.
        drawn_ranks: whose events are kept.
    """
    cluster = plan.cluster
    assert cluster is not None
    ranks = cluster.group_size
    bandwidth = spec.device_level.bandwidth_bytes_per_s
    clock = Clock(
        links_of(spec, ranks),
        np.asarray(speeds or [1.0] * ranks),
        drawn_ranks,
        4.0 / bandwidth if bandwidth else 0.0,
    )
    return run(
        clock,
        cluster.schedule,
        work_of(plan, program),
        max(plan.problem.M, plan.problem.N),
        cluster.chunk,
        plan.problem.input_bytes,
        plan.problem.compute_bytes,
    )


def run(
    clock: Clock,
    schedule: str,
    work: Sequence[Work],
    rows: int,
    chunk: int,
    input_bytes: int,
    compute_bytes: int,
) -> Run:
    """Run passes on a clock; shards of ``rows`` rows travel ``chunk`` rows at a time."""
    forward_s = 0.0
    phase = "forward"
    for item in work:
        if item.travel.phase != phase:
            phase, forward_s = item.travel.phase, float(clock.now.max())
        _numbers(clock)
        if not item.travel.operand_width and not item.travel.vectors:
            clock.compute(item.seconds)
            continue
        per_row = item.travel.operand_width * input_bytes + item.travel.vectors * compute_bytes
        back = (item.travel.gradient_width + item.travel.folds) * compute_bytes
        parts = [min(chunk, rows - start) for start in range(0, rows, chunk)]
        if schedule == "all_gather":
            _gathered(clock, item.seconds / rows, per_row, back, parts)
            continue
        for count in parts:
            _around(clock, item.seconds * count / rows, per_row * count, back * count)
    _numbers(clock)
    slowest = int(clock.now.argmax())
    return Run(
        float(clock.now.max()),
        forward_s or float(clock.now.max()),
        float(clock.compute_s[slowest]),
        float(clock.waiting_s[slowest]),
        tuple(clock.events),
    )


def _around(clock: Clock, seconds: float, sent: float, back: float) -> None:
    ranks = clock.links.ranks
    arriving: Vector | None = None
    for step in range(ranks):
        posted = clock.exchange(sent) if step + 1 < ranks else None
        clock.compute(seconds)
        if back and step:
            if arriving is not None:
                clock.wait(arriving)
            clock.compute(back * clock.join_s_per_byte)
            arriving = clock.exchange(back, "gradient")
        if posted is not None:
            clock.wait(posted)
    if arriving is not None:
        clock.wait(arriving)
        clock.compute(back * clock.join_s_per_byte)


def _gathered(
    clock: Clock, s_per_row: float, sent: float, back: float, parts: Sequence[int]
) -> None:
    ranks = clock.links.ranks
    posted = clock.together(_collective_s(clock, sent * parts[0]))
    swapped: Vector | None = None
    for count, following in zip(parts, [*parts[1:], 0], strict=True):
        clock.wait(posted)
        if following:
            posted = clock.together(_collective_s(clock, sent * following))
        clock.compute(s_per_row * count * ranks)
        if back:
            if swapped is not None:
                clock.wait(swapped)
            clock.compute(back * count * ranks * clock.join_s_per_byte)
            swapped = clock.together(_collective_s(clock, back * count))
    if swapped is not None:
        clock.wait(swapped)


def _collective_s(clock: Clock, part_bytes: float) -> float:
    """A gather or an exchange of parts of all ranks: P-1 parts over the slowest hop."""
    hops = clock.links.ranks - 1
    slowest = float(clock.links.s_per_byte.max(initial=0.0))
    latency = float(clock.links.latency_s.max(initial=0.0))
    return hops * part_bytes * slowest + math.ceil(math.log2(hops + 1)) * latency


def _numbers(clock: Clock) -> None:
    """A sum over all ranks."""
    if clock.links.ranks > 1:
        clock.wait(clock.together(_collective_s(clock, 8.0)))


# ---- what other losses take ---------------------------------------------------------------------

PeerMemory = Callable[[int, int, int, int], float]
"""(global batch, D, ranks, bytes of an element) → bytes of the loss on one rank."""


def dense_bytes(batch: int, width: int, ranks: int, element: int = 4) -> float:
    """Every rank has the whole matrix: four of them, and three whole operands."""
    return (4.0 * batch * batch + 3.0 * batch * width) * element


def local_rows_bytes(batch: int, width: int, ranks: int, element: int = 4) -> float:
    """OpenCLIP with ``local_loss`` and ``gather_with_grad``: rows of one rank by all columns."""
    rows = batch / ranks
    return (4.0 * rows * batch + (2 * ranks + 2) * rows * width) * element


def inf_cl_bytes(
    batch: int, width: int, ranks: int, element: int = 4, *, offload: bool = False
) -> float:
    """Inf-CL: fifteen buffers of a shard, seventeen with its inputs."""
    return (17.0 if offload else 15.0) * batch / ranks * width * element


__all__ = [
    "Clock",
    "Event",
    "Links",
    "Run",
    "Work",
    "dense_bytes",
    "inf_cl_bytes",
    "links_of",
    "local_rows_bytes",
    "run",
    "simulate",
    "work_of",
]
