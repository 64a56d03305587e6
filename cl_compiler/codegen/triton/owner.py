"""Kernels of ``recompute``: a program owns a block of a gradient, and makes tiles for it.

It owns rows of the left operand's gradient, or columns (rows of the right operand's), which stay in
its registers while it visits all tiles along the other axis: no workspace, no atomics, and every
sum has one order.  A gradient that is too wide for registers is owned in parts, whose programs make
the same tiles again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy as sp

from cl_compiler.codegen.symbols import operand_scale
from cl_compiler.codegen.triton.kernels import KernelPrinter
from cl_compiler.codegen.triton.orientation import Orientation
from cl_compiler.codegen.triton.text import KernelText, Partial
from cl_compiler.lang.ir import View
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import Accumulate, Gemm


@dataclass(frozen=True)
class Axis:
    """What a kernel calls things along rows or columns."""

    tile: str
    index: str
    offs: str
    block: str
    start: str
    stop: str
    slot: str


AXES = (
    Axis("tile", "i", "offs_m", "BLOCK_M", "row_start", "row_stop", "row_slot"),
    Axis("column", "j", "offs_n", "BLOCK_N", "col_start", "col_stop", "col_slot"),
)


@dataclass(frozen=True)
class Owned:
    """A block of a gradient: the tensor, the block's variable, the tensor's width in the kernel."""

    total: str
    block: str
    width: str


@dataclass
class OwnerText(KernelText):
    """What the template needs of a kernel whose programs own blocks of gradients."""

    own_dim: int = 0
    owned: list[Owned] = field(default_factory=list)
    part_descriptors: list[tuple[str, str, str]] = field(default_factory=list)
    """(parameter, matrix, rows of a block) of operands that are read PART_D columns wide."""
    masked: bool = False
    """The parts are not whole."""
    adds: bool = False
    """The gradients hold something already."""

    @property
    def own(self) -> Axis:
        return AXES[self.own_dim]

    @property
    def other(self) -> Axis:
        return AXES[1 - self.own_dim]

    @property
    def own_pointers(self) -> list[tuple[str, str]]:
        return (self.row_pointers, self.col_pointers)[self.own_dim]

    @property
    def other_pointers(self) -> list[tuple[str, str]]:
        return (self.col_pointers, self.row_pointers)[self.own_dim]

    @property
    def own_vectors(self) -> list[tuple[str, str]]:
        return (self.row_vectors, self.col_vectors)[self.own_dim]

    @property
    def other_vectors(self) -> list[tuple[str, str]]:
        return (self.col_vectors, self.row_vectors)[self.own_dim]

    @property
    def in_strips(self) -> bool:
        return False

    @property
    def in_panels(self) -> bool:
        """Whether it leaves statistics of the axis that programs share, a block for each owner."""
        return any(p.dim == self.own_dim for p in self.partials)

    @property
    def owns(self) -> bool:
        return True


def own_dim(program: Program, pass_: Pass) -> int | None:
    """0 where programs own rows, 1 where they own columns; None: they write gradient tiles."""
    if program.schedule != "recompute" or not pass_.gradients or len(pass_.sides) != 1:
        return None
    return ("left", "right").index(pass_.sides[0])


def obstacle_of_owners(program: Program) -> str:
    """Why a program's gradients cannot be made where they are owned; "" where they can."""
    maxima = program.plan.full_maxima
    if not maxima:
        return ""
    return (
        f"{maxima[0]} is a maximum, whose elements must be found again bit for bit, and kernels "
        "that own columns multiply the other way round: 'spill' does not"
    )


def owned_view(plan: SweepPlan, similarity: str, own: int) -> View | None:
    """The operand whose gradient a similarity's tile goes into, if that is needed."""
    leaf = plan.leaves[similarity]
    view = (leaf.left, leaf.right)[own]
    assert view is not None
    return view if view.operand in plan.needs and not view.stop else None


def owned_operands(plan: SweepPlan, pass_: Pass, own: int) -> list[str]:
    """The operands whose gradients a pass makes."""
    views = [owned_view(plan, g, own) for g in pass_.gradients]
    return list(dict.fromkeys(v.operand for v in views if v is not None))


def shares_statistics(pass_: Pass, own: int) -> bool:
    """Whether a pass reduces along the axis of its owners, so that their parts must be folded."""
    return any(pass_.grid.index(r.over) == own for r in pass_.reductions)


def adding_passes(program: Program) -> set[int]:
    """The ids of passes that add to what earlier ones, or earlier panels, left in a gradient."""
    made: set[str] = set()
    result = set()
    for pass_ in program.passes:
        own = own_dim(program, pass_)
        sides = [("left", "right").index(side) for side in pass_.sides]
        operands = {o for side in sides for o in owned_operands(program.plan, pass_, side)}
        if own is not None and (shares_statistics(pass_, own) or made & operands):
            result.add(id(pass_))
        made |= operands  # by slots and by what makes both sides, too
    return result


class OwnerPrinter(KernelPrinter):
    """Prints a pass whose programs own rows (``own`` 0) or columns (1).

    ``dtype``: of the operands; ``adds``: the gradients hold something already.
    """

    kind = OwnerText

    def __init__(self, *args: Any, own: int, dtype: str, adds: bool) -> None:
        super().__init__(*args)
        self.own, self.dtype, self.adds = own, dtype, adds
        self.orientation = Orientation(flipped=own == 1)

    @property
    def parts(self) -> int:
        """Programs that share a block of rows or columns."""
        widths = [self.widths[o] for o in owned_operands(self.plan, self.pass_, self.own)]
        return -(-max(widths) // self.tile.part)

    def _doc_of_gradients(self) -> list[str]:
        operands = owned_operands(self.plan, self.pass_, self.own)
        gradients = " and ".join(f"dL/d{g}" for g in self.pass_.gradients)
        return [f"d_{o}: {gradients} times what it stands beside, in blocks" for o in operands]

    # -- products --------------------------------------------------------------------------------

    def _products(self, k: KernelText, g: Gemm) -> list[str]:
        if not self.tile.resident:
            return super()._products(k, g)
        views = self.views(g.similarity)
        tiles = self._tiles(*views)
        loads = [self._load(k, view, dim, step="") for dim, view in enumerate(views)]
        k.start.append(f"{tiles[self.own]} = {loads[self.own]}")
        return [
            f"{tiles[1 - self.own]} = {loads[1 - self.own]}",
            f"{self.dots[g.value]} = {self._dot(tiles, '')}",
        ]

    def _gradient(self, k: KernelText, value: int, similarity: str, scale: sp.Expr) -> None:
        assert isinstance(k, OwnerText)
        k.own_dim, k.adds = self.own, self.adds
        view = owned_view(self.plan, similarity, self.own)
        if view is None:
            return
        leaf, other = self.plan.leaves[similarity], self.views(similarity)[1 - self.own]
        variable = self.expressions.variables[value]
        factors = [scale] if scale != 1 else []
        if leaf.scale and operand_scale(self.plan, view.operand) == "mixed":
            factors.append(sp.Symbol(leaf.scale, real=True))
        if factors or self.expressions.uses[value] > 1 or variable == "products":
            scaled = f" * {self.scalar(factors)}" if factors else ""
            k.body.append(f"g_{similarity} = {variable}{scaled}")
            variable = f"g_{similarity}"
        whole = not (leaf.scale and operand_scale(self.plan, view.operand) == "mixed")
        if self.own == 0 and whole and not self.precision and self._has_positives():
            variable = self._residual(k, variable, similarity)
        if (variable, "0.0") not in self.masked:
            k.body.append("if RAGGED and at_edge:")
            k.body.append(f"    {variable} = tl.where(inside, {variable}, 0.0)")
        block = f"d_{view.operand}_{AXES[self.own].index}"
        owned = Owned(f"d_{view.operand}", block, self._width(view.operand))
        if owned not in k.owned:
            k.owned.append(owned)
            k.start.append(f"{block} = tl.zeros([{AXES[self.own].block}, PART_D], tl.float32)")
        k.masked |= self.parts * self.tile.part != self.widths[view.operand]
        part = self._part(k, similarity, other)
        if not self.precision:  # bf16 has the range of fp32, which fp16 has not
            variable = f"{variable}.to(tl.bfloat16)"
            part = part if self.dtype == "bfloat16" else f"{part}.to(tl.bfloat16)"
        k.body.append(f"{block} = tl.dot({variable}, {part}, {block}{self._precision()})")

    def _part(self, k: OwnerText, similarity: str, other: View) -> str:
        """The variable with what a gradient tile is multiplied with, PART_D columns wide."""
        if self.tile.resident:
            return self._tiles(*self.views(similarity))[1 - self.own]
        if other.operand not in k.operands:
            k.operands.append(other.operand)
        axis, width = AXES[1 - self.own], other.prefix or self.widths[other.operand]
        variable = f"{other.operand}_part{other.prefix or ''}"
        if self.descriptors:
            prefix = "" if other.prefix is None else f"[:, :{other.prefix}]"
            name = f"{other.operand}_{('cols', 'rows')[self.own]}{other.prefix or ''}_part"
            entry = (name, f"{other.operand}{prefix}", axis.block.lower())
            k.part_descriptors += [entry] if entry not in k.part_descriptors else []
            load = f"{name}.load([{axis.index}, first_d])"
        else:
            address = f"{other.operand}_{axis.index}_part"
            rows = f"_clamped({axis.offs}, {axis.stop}, RAGGED).to(tl.int64)[:, None]"
            text = f"{other.operand} + {rows} * {self._width(other.operand)} + offs_part[None, :]"
            entries = (k.col_pointers, k.row_pointers)[self.own]
            entries += [(address, text)] if (address, text) not in entries else []
            mask = f", mask=(offs_part < {width})[None, :], other=0.0"
            load = f"tl.load({address}{mask * (self.parts * self.tile.part != width)})"
        line = f"{variable} = {load}"
        k.body += [line] if line not in k.body else []
        return variable

    def _declare(self, k: KernelText) -> None:
        super()._declare(k)
        assert isinstance(k, OwnerText)
        for owned in k.owned:
            width = (owned.width, self.widths[owned.total.removeprefix("d_")])
            k.widths += [width] if width not in k.widths else []

    # -- statistics ------------------------------------------------------------------------------

    def _accumulate(self, k: KernelText, a: Accumulate) -> None:
        tiles = [self.expressions.variables[v] for v in a.args]
        tiles[0] = self._inside(k, a)
        side = "tiles" if a.dim == 1 else "strips"
        targets = tuple(self.names(t) for t in a.targets)
        pointers = tuple(f"{t}_{side}" for t in targets)
        k.partials.append(Partial(a.kind, pointers, targets, a.dim, a.mirrored))
        kept = 1 - a.dim
        fold = {"sum": "tl.sum", "max": "_largest"}.get(a.kind, f"_{a.kind}")
        fold = f"{fold}({', '.join(tiles)}, {self.orientation.dim(a.dim)})"
        running = [f"{t}_{AXES[kept].index}" for t in targets]
        axis = AXES[kept]
        stores = [
            f"tl.store({p} + {axis.slot}, {r}, mask={axis.offs} < {axis.stop})"
            for p, r in zip(pointers, running, strict=True)
        ]
        if self.parts > 1:
            stores = ["if first_d == 0:", *(f"    {line}" for line in stores)]
        if kept != self.own:
            k.body += [f"{', '.join(running)} = {fold}", *stores]
            return
        k.finish += stores
        lowest = f'tl.full([{axis.block}], float("-inf"), tl.float32)'
        zeros = f"tl.zeros([{axis.block}], tl.float32)"
        starts = [zeros] if a.kind == "sum" else [lowest, *[zeros] * (len(running) - 1)]
        k.start += [f"{r} = {s}" for r, s in zip(running, starts, strict=True)]
        match a.kind:
            case "sum":
                k.body.append(f"{running[0]} += {fold}")
            case "max":
                k.body.append(f"{running[0]} = _maximum({running[0]}, {fold})")
            case _:
                parts = [f"{t}_part" for t in targets]
                merged = f"_merge_{a.kind}({', '.join([*running, *parts])})"
                k.body += [f"{', '.join(parts)} = {fold}", f"{', '.join(running)} = {merged}"]
