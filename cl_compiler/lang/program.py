"""A schedule applied to a sweep plan: the passes over tiles, and the vectors between them.

This is what the planner counts and what the code generator prints; both walk the same value, so
predicted bytes are those of the code that runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from cl_compiler.lang.differences import is_nested, reads_positives, wide_vectors
from cl_compiler.lang.ir import SLOTS, Reduction
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import Barrier, Mode, TileProgram

Schedule = Literal["recompute", "spill", "panel", "retain", "dense"]
SCHEDULES: tuple[Schedule, ...] = ("recompute", "spill", "panel", "retain", "dense")
Side = Literal["left", "right"]


@dataclass(frozen=True)
class Pass:
    """One loop nest over the tiles of a grid.

    ``programs`` has one tile program per mode.  ``sides``: which operands' gradients its gradient
    tiles are multiplied into.  ``whole_rows``: a tile spans all columns (a row panel).  ``whole``:
    one tile spans the grid, so that there is no loop, and the grid's passes share their buffers.
    """

    level: int
    grid: tuple[str, str]
    similarities: tuple[str, ...]
    reductions: tuple[Reduction, ...]
    gradients: tuple[str, ...]
    sides: tuple[Side, ...]
    symmetric: bool
    whole_rows: bool
    whole: bool
    keep: Literal["", "write", "read"]
    programs: Mapping[Mode, TileProgram]
    remake: Mapping[Mode, TileProgram] = field(default_factory=dict)
    """Of a pass that reads kept tiles: how to make one that was not kept."""
    rounded: Mapping[Mode, TileProgram] = field(default_factory=dict)
    """The programs of tiles that read vectors as they are rounded, where those differ."""
    rounded_remake: Mapping[Mode, TileProgram] = field(default_factory=dict)
    in_strips: bool = False
    """Between products, its tile programs run on one strip of columns after the other."""

    @property
    def has_barrier(self) -> bool:
        """Row statistics are completed, and read, inside the pass."""
        code = next(iter(self.programs.values()))
        return any(isinstance(i, Barrier) for i in code.instructions)

    @property
    def narrowed(self) -> Pass:
        """The same with tiles that read vectors as they are rounded."""
        programs, remake = self.rounded or self.programs, self.rounded_remake or self.remake
        return replace(self, programs=programs, remake=remake, rounded={}, rounded_remake={})

    @property
    def softmeans(self) -> tuple[Reduction, ...]:
        """Weighted means among what it reduces."""
        return tuple(r for r in self.reductions if r.monoid == "softmean")

    @property
    def is_slots(self) -> bool:
        """Tiles are [m, K]: each row with its own K slots."""
        return SLOTS in self.grid


@dataclass(frozen=True)
class Stage:
    """Passes of one level, and the names of vectors to evaluate after them, in order."""

    level: int
    passes: tuple[Pass, ...]
    vectors: tuple[str, ...]

    @property
    def narrowed(self) -> Stage:
        """The same with tiles that read vectors as they are rounded."""
        return replace(self, passes=tuple(p.narrowed for p in self.passes))


@dataclass(frozen=True)
class Program:
    """Everything that the emitted file does, for one schedule.

    ``forward`` starts with a stage of level 0: vectors known before any sweep, and without passes
    but where one tile holds everything: values at the positives are read off it.
    ``backward`` likewise; it is empty when ``fused`` (value and gradients in one go).
    ``narrow``: vectors are as wide as tiles, as they are in kernels.
    """

    plan: SweepPlan
    schedule: Schedule
    modes: tuple[Mode, ...]
    forward: tuple[Stage, ...]
    backward: tuple[Stage, ...]
    fused: bool
    narrow: bool = False

    @property
    def passes(self) -> tuple[Pass, ...]:
        return tuple(p for s in (*self.forward, *self.backward) for p in s.passes)

    @cached_property
    def logsumexps(self) -> tuple[Reduction, ...]:
        """Logsumexps that are reduced from tiles."""
        return tuple(
            n
            for n in self.plan.nodes
            if isinstance(n, Reduction) and n.monoid == "logsumexp" and self.plan.is_full(n.name)
        )

    @cached_property
    def wide(self) -> frozenset[str]:
        """Vectors in fp64 whatever the tiles are in (``differences``)."""
        if self.narrow:
            return frozenset()
        return wide_vectors(self.plan, [t for p in self.passes for t in p.programs.values()])

    @cached_property
    def subtracts_positives(self) -> bool:
        """Whether gradients subtract similarities at the positives from sums of what tiles hold."""
        return not self.narrow and reads_positives(self.plan)

    @property
    def narrowed(self) -> Program:
        """The same with vectors as wide as tiles, of which nothing is added in two parts."""
        return replace(
            self,
            forward=tuple(s.narrowed for s in self.forward),
            backward=tuple(s.narrowed for s in self.backward),
            narrow=True,
        )

    @property
    def is_unshifted(self) -> bool:
        """Exponentials are shifted by no bound: a logsumexp in their logits would lose digits."""
        return not self.narrow and is_nested(self.plan)

    @property
    def is_whole(self) -> bool:
        """One tile holds everything, and every statement stands in one function."""
        return self.modes == ("whole",)

    @property
    def keeps_tiles(self) -> bool:
        return any(p.keep for p in self.passes)
