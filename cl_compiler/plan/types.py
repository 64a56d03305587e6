"""The values that planning takes and makes: problem, budget, request, tiles, plan (all frozen)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from types import MappingProxyType
from typing import Literal

from cl_compiler.errors import ArgumentError, BudgetError, instead_of
from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.lang.ir import LossIR
from cl_compiler.lang.program import Schedule
from cl_compiler.lang.resolve import Positives
from cl_compiler.lang.ring import CANONICAL, TWO_GROUPS
from cl_compiler.units import parse_bytes

DType = Literal["float64", "float32", "bfloat16", "float16"]
DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
)

BUDGET_SHARE = 0.25
"""Of the free memory, where no budget is given."""


@dataclass(frozen=True)
class Problem:
    """Global sizes: x [M, D], y [N, D].  For losses over one set, M = N = rows of z.

    ``operands`` gives further operands' widths (columns); ``slots`` K; ``bank`` the queue's length.

    Raises:
        ArgumentError: a size is no positive integer, or the dtype is none of the four.
    """

    M: int
    N: int
    D: int
    dtype: DType = "float32"
    operands: Mapping[str, int] = field(default_factory=dict)
    slots: int = 0
    bank: int = 0

    def __post_init__(self) -> None:
        for name, least in (("M", 1), ("N", 1), ("D", 1), ("slots", 0), ("bank", 0)):
            object.__setattr__(self, name, _size(name, getattr(self, name), least))
        for name, width in self.operands.items():
            _size(f"operands[{name!r}]", width, 1)
        if self.dtype not in DTYPE_BYTES:
            raise ArgumentError(
                f"Problem(dtype={self.dtype!r}): {instead_of(self.dtype, DTYPE_BYTES)}."
            )

    @classmethod
    def parse(cls, problem: Problem | str) -> Problem:
        """From a Problem, or from its sizes as text: "MxNxD", or "MxD" where N = M.

        Raises:
            ArgumentError: it is neither.
        """
        if isinstance(problem, Problem):
            return problem
        if isinstance(problem, str):
            rows, *cols, features = parse_sizes(problem)
            return cls(rows, cols[0] if cols else rows, features)
        hint = "Problem(M, N, D)"
        if isinstance(problem, (tuple, list)) and len(problem) == 3:
            hint = f"Problem({', '.join(map(repr, problem))})"
        raise ArgumentError(
            f'problem={problem!r}: give {hint}, or the sizes as text such as "1024x1024x512".'
        )

    def __hash__(self) -> int:
        return hash((self.M, self.N, self.D, self.dtype, self.slots, self.bank))

    @property
    def input_bytes(self) -> int:
        """Bytes of one input element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element of tiles, statistics and accumulators."""
        return 8 if self.dtype == "float64" else 4


def _size(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ArgumentError(f"Problem({name}={value!r}): sizes are integers of at least {least}.")
    return int(value)


def parse_sizes(text: str) -> tuple[int, ...]:
    """The two or three numbers of "MxNxD" or "MxD".

    Raises:
        ArgumentError: the text has other numbers, or none.
    """
    numbers = re.split(r"\s*[xX*,]\s*", text.strip())
    if len(numbers) not in (2, 3) or not all(re.fullmatch(r"\d[\d_]*", n) for n in numbers):
        raise ArgumentError(
            f"problem={text!r}: write MxNxD, such as 16384x16384x512, or MxD where N = M."
        )
    return tuple(int(n) for n in numbers)


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that the loss may allocate or keep on one device, and on its host (None: no limit).

    Each may be given as whatever ``parse_bytes`` reads, ``MemoryBudget("512MiB")``; what is kept is
    an integer.

    Raises:
        ArgumentError: an amount cannot be read.
        BudgetError: less than a byte.
    """

    device_bytes: int
    host_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("device_bytes", "host_bytes"):
            amount = getattr(self, name)
            if amount is not None or name == "device_bytes":
                object.__setattr__(self, name, parse_bytes(amount))
        if self.device_bytes < 1:
            raise BudgetError(
                f"a memory budget of {self.device_bytes} bytes: give at least 1 byte."
            )

    @classmethod
    def parse(cls, budget: int | str | Mapping[str, int | str] | MemoryBudget) -> MemoryBudget:
        """From bytes, "512MiB", {"device": …, "host": …} or a MemoryBudget."""
        if isinstance(budget, MemoryBudget):
            return budget
        if isinstance(budget, Mapping):
            unknown = set(budget) - {"device", "host"}
            if unknown or "device" not in budget:
                raise BudgetError(
                    f"memory budget {dict(budget)!r}: give 'device' and, if wanted, 'host', such "
                    'as {"device": "512MiB", "host": "4GiB"}.'
                )
            host = budget.get("host")
            return cls(parse_bytes(budget["device"]), None if host is None else parse_bytes(host))
        return cls(parse_bytes(budget))

    @classmethod
    def share_of(cls, free_bytes: int) -> MemoryBudget:
        """A quarter of the memory that is free, rounded down to its four leading bits.

        Free memory changes from one second to the next; a budget that did would make every process
        plan, and cache, something new.
        """
        count = int(free_bytes * BUDGET_SHARE)
        shift = max(0, count.bit_length() - 4)
        return cls(max(1, count >> shift << shift))


@dataclass(frozen=True)
class Request:
    """Everything that a plan depends on.  Its canonical form is the cache key."""

    loss: LossIR
    hardware: HardwareSpec
    budget: MemoryBudget
    problem: Problem
    positives: Positives = "diagonal"
    needs: frozenset[str] = frozenset()
    """Operands, inputs and parameters whose gradients are wanted; empty for the value alone."""
    precision: str = "ieee"
    schedule: str = "auto"
    contiguous_copies: int = 0
    """Bytes of contiguous copies that the caller's strided inputs force (counted in the budget)."""
    group_size: int = 0
    """Ranks of the process group that runs the loss, 0 without one.  With a group ``problem`` is
    the largest shard of any rank, and ``schedule`` a cluster schedule."""
    deterministic: bool = False
    """Bits must not depend on what the process computed before."""

    @property
    def reproducible(self) -> bool:
        """Whether they must not, be it because every number of ranks is to have the same."""
        return self.deterministic or self.schedule == CANONICAL

    @property
    def row_step(self) -> int:
        """A rank's rows are a multiple of it: rows i and i + b of 2b are two views."""
        return 2 if self.positives == "views" else 1


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a block of the similarity matrix."""

    rows: int
    cols: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"


@dataclass(frozen=True)
class LevelPlan:
    """What one level of the hardware does: the block that it holds, and what bounds it."""

    level: str
    kind: str
    tile: Tile
    resident_bytes: int
    traffic_bytes: int
    seconds: float
    bound_by: str


@dataclass(frozen=True)
class Candidate:
    """A plan that was considered and not taken."""

    schedule: Schedule
    tile: Tile
    kept_tiles: int
    peak_bytes: int
    seconds: float
    reason: str


@dataclass(frozen=True)
class LinkBytes:
    """What passes over the busiest link of one kind, in one direction.

    ``level``: whose instances it joins; ``kind``: such as "nvlink".  Statistics are not counted.
    """

    level: str
    kind: str
    bytes_per_s: float
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class HostPlan:
    """Between a rank's host memory, where its shards are, and its device.

    ``memory_bytes``: in host memory, inputs not counted; 0 where the device's memory is the host's.
    ``copy_s``: of copies while products are made; ``wait_s``: of copies that products wait for.
    """

    memory_bytes: int
    copy_s: float
    wait_s: float


@dataclass(frozen=True)
class ClusterPlan:
    """How a loss runs on a group of ranks.

    ``schedule``: see ``cl_compiler.lang.ring``; ``chunk``: rows of a shard that travel together.
    ``forward_bytes``, ``backward_bytes``: what a rank sends, statistics not counted.
    ``exchange_s``: seconds of sending them, and ``exposed_s`` those that products do not hide.
    ``hiding_rows_by_phase``: (phase, rows per rank from which on all of it is hidden) where
    something is sent.  ``links``: of every kind that is used.
    """

    schedule: str
    group_size: int
    chunk: int
    forward_bytes: int
    backward_bytes: int
    exchange_s: float
    exposed_s: float
    hiding_rows_by_phase: tuple[tuple[str, int], ...] = ()
    links: tuple[LinkBytes, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    """(cluster schedule, why it was not taken)."""
    node: int = 0
    """Of a ring of rings, the ranks of a node; 0: one ring of all ranks."""
    resident: int = 0
    """Of shards in host memory, rows of a block that stays on the device; 0: none are there."""
    host: HostPlan | None = None
    """Of shards in host memory, what passes between it and the device."""

    @property
    def inputs_in_host(self) -> bool:
        """Whether a rank is called with tensors in host memory, and returns gradients there."""
        return self.resident > 0

    @property
    def two_groups(self) -> bool:
        """Whether two shards are on their way at the same time, each in a group of its own."""
        return self.schedule in TWO_GROUPS and self.group_size > 2

    @property
    def hiding_rows(self) -> int:
        """Rows per rank from which on the exchange of every phase is hidden; 0: there is none."""
        return max((rows for _, rows in self.hiding_rows_by_phase), default=0)


@dataclass(frozen=True)
class Plan:
    """A mapping of the loss graph onto the hardware graph.

    ``tile`` is the block that the emitted loops step by; ``kept_tiles`` how many of its tiles the
    ``retain`` and ``dense`` schedules keep from forward to backward.
    ``memory`` lists (what, bytes); its sum over what lives at the peak is ``peak_bytes``.
    """

    loss_name: str
    hardware_name: str
    problem: Problem
    positives: Positives
    needs: frozenset[str]
    precision: str
    budget: MemoryBudget
    schedule: Schedule
    tile: Tile
    kept_tiles: int
    levels: tuple[LevelPlan, ...]
    memory: tuple[tuple[str, int], ...]
    peak_bytes: int
    seconds: float
    units: float
    """Work in units of 2·M·N·D FLOP, forward and backward together."""
    template: str = "torch"
    library: Literal["blas", "onednn"] = "blas"
    """Which multiplies tiles, of PyTorch's tiles on a CPU."""
    exponential: Literal["exp", "exp2"] = "exp"
    """Which function of PyTorch's tiles evaluates them."""
    strip: int = 0
    """Columns of a tile that elementwise work goes through at a time; 0: all of them."""
    notes: tuple[str, ...] = ()
    rejected: tuple[Candidate, ...] = ()
    seconds_by_part: tuple[tuple[str, float], ...] = ()
    """(what, seconds); they add up to ``seconds``."""
    peak_phase: str = ""
    """When the peak is reached."""
    rates: str = "nominal"
    """Which of the rates that seconds rest on were measured, and which are nominal."""
    cluster: ClusterPlan | None = None
    """Of a loss on a process group; ``problem`` is then the largest shard of any rank."""
