"""What one rank's share takes as Triton kernels: the panel of a launch, its bytes and seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from cl_compiler.codegen.triton.panel import kernel_plan, panels
from cl_compiler.codegen.triton.workload import OF_TILES, Workload
from cl_compiler.lang.ring import is_local
from cl_compiler.plan.facts import ProgramFacts
from cl_compiler.plan.memory import AT_POSITIVES, WIDENED, CompiledMemory, Phase, part_of, phases_of
from cl_compiler.plan.share import Share, on_their_way
from cl_compiler.plan.space import RingProgram
from cl_compiler.plan.tape import tape_of
from cl_compiler.plan.travel import Travel, travels_of
from cl_compiler.plan.types import Plan, Tile


@dataclass(frozen=True)
class ShareWorkload(Workload):
    """A rank's share: panels are no longer than the chunks that travel, which lie beside them."""

    share: Share

    @cached_property
    def facts(self) -> ProgramFacts:
        operands = self.request.problem.operands
        program = self.program.narrowed
        return RingProgram(program, self.share.request.group_size).facts(operands)

    @cached_property
    def memory(self) -> CompiledMemory:
        """What PyTorch's tiles allocate, without the tiles, and without the products of rows and
        their positives: only gradients that are known late are made of blocks."""
        problem = self.request.problem
        casts = problem.input_bytes < problem.compute_bytes
        late = casts and bool(self.program.plan.late_positives)
        everything = phases_of(self.facts, casts=casts)
        if self.share.streams:
            everything = part_of(everything, in_host=False)
        phases = [
            Phase(
                phase.name,
                tuple(
                    (what, bytes_ / WIDENED if what == AT_POSITIVES else bytes_)
                    for what, bytes_ in phase.items
                    if what not in OF_TILES and (what != AT_POSITIVES or late)
                ),
            )
            for phase in everything
        ]
        return CompiledMemory(tuple(phases), tape_of([p.total for p in phases]).bind(self.sizes))

    @cached_property
    def _travels(self) -> tuple[Travel, ...]:
        return travels_of(self.program, self.request.problem)

    @cached_property
    def _moving(self) -> tuple[list[tuple[str, int]], ...]:
        """What is on its way in each pass: the same whatever the panel."""
        return tuple(list(on_their_way(*self.share.buffers(t))) for t in self._travels)

    @cached_property
    def _found(self) -> dict[tuple[int, Tile], list[tuple[str, int]]]:
        """What was computed of a pass and a panel, cut to what is here at once: it is asked for
        again and again."""
        return {}

    def _beside_of(self, index: int, tile: Tile) -> list[tuple[str, int]]:
        if index >= len(self._travels):
            return []
        if is_local(self.program.passes[index].grid):
            return [*self._workspace(index, tile), *self._moving[index]]
        travel, chunk = self._travels[index], self.share.chunk
        rows, cols = tile.rows, tile.cols
        most = self.share.resident or max(rows, cols)
        sides = (min(rows, most), min(cols, chunk)), (min(rows, chunk), min(cols, most))
        narrow = Tile(*sides[0 if travel.side else 1])
        if (index, narrow) not in self._found:
            self._found[index, narrow] = self._of_panel(index, narrow)
        return self._found[index, narrow]

    def _of_panel(self, index: int, narrow: Tile) -> list[tuple[str, int]]:
        """Beside what every phase holds, of a panel that is no longer than a chunk."""
        chunk = self.share.chunk
        items = [*self._workspace(index, narrow), *self._moving[index]]
        if self.program.passes[index].gradients and self.operand_bytes == 2:
            found = self._pass_sizes(index, narrow)
            block = min(found.rows, found.cols, chunk) * max(found.widths)
            items.append(("rows at positives", round(4 * block)))
        return items


def kernel_planner(arch: str) -> Callable[[Share], Plan]:
    """How a rank of a group computes on a GPU of this architecture."""

    def plan(share: Share) -> Plan:
        """The fastest panel within the budget.

        Raises:
            BudgetError: not even the smallest fits.
        """
        workload = _workload(share, arch)
        least = workload.peak_bytes(next(panels(workload)))
        found = kernel_plan(workload) if least <= workload.limit_bytes else None
        if found is None:
            raise share.too_little(least)
        return replace(found, schedule=share.program.schedule)

    return plan


def kernels_fit(arch: str) -> Callable[[Share], bool]:
    """Whether a rank of a group has room for kernels on a GPU of this architecture."""

    def fits(share: Share) -> bool:
        workload = _workload(share, arch)
        return workload.peak_bytes(next(panels(workload))) <= workload.limit_bytes

    return fits


def _workload(share: Share, arch: str) -> ShareWorkload:
    # every gradient tile leaves its kernel, whoever's gradient it goes into
    return ShareWorkload(share.alone, replace(share.program, schedule="spill"), arch, share)


__all__ = ["ShareWorkload", "kernel_planner", "kernels_fit"]
