"""What one schedule's program asks of a machine: tiles, operators, products, vectors.

The planner's bytes and seconds are both made of these facts, so neither can count something that
the other overlooks.  Sizes are SymPy symbols; numbers of buffers, operators and passes are counted
on the very tile programs that the code generator prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import sympy as sp

from cl_compiler.lang.ir import SLOTS, Leaf, View
from cl_compiler.lang.lower import inverse_of
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.tile_ir import (
    Accumulate,
    Gemm,
    Instruction,
    Mode,
    TileProgram,
)
from cl_compiler.lang.whole import scale_gradients, taken_at_positives
from cl_compiler.plan.sizes import (
    KEPT,
    ONE,
    TILE_COLS,
    TILE_ROWS,
    Sizes,
    count_of,
    largest,
    least,
    strip_columns,
)
from cl_compiler.plan.tile_work import TileWork, tile_work


@dataclass(frozen=True)
class Product:
    """One matrix product per tile; ``width`` is the operands' number of columns."""

    role: Literal["similarity", "left", "right"]
    width: sp.Expr


@dataclass(frozen=True)
class PassFacts:
    """One loop nest: sizes as expressions, work as counts.

    ``rows`` x ``cols`` is the grid, ``m`` x ``n`` its tile, ``tiles`` their number and ``area`` the
    elements that are made (half of the grid and of its diagonal tiles where it is symmetric).
    ``float_buffers``, ``mask_buffers``: the most that any mode allocates; ``held``: float buffers
    in use in the expected mode, the kept one included.
    ``remade``: what a tile that was not kept costs again.
    """

    phase: Literal["forward", "backward"]
    grid: tuple[str, str]
    rows: sp.Expr
    cols: sp.Expr
    m: sp.Expr
    n: sp.Expr
    tiles: sp.Expr
    area: sp.Expr
    float_buffers: int
    mask_buffers: int
    held: int
    work: TileWork
    products: tuple[Product, ...]
    remade: TileWork
    remade_products: tuple[Product, ...]
    row_operands: tuple[sp.Expr, ...]
    col_operands: tuple[sp.Expr, ...]
    symmetric: bool
    whole_rows: bool
    keep: str
    block_width: sp.Expr
    """Width of the rows that a row scale is applied to, 0 without one."""
    in_strips: bool
    """Work between its products is done in strips of tiles."""
    strip: sp.Expr
    """Columns of such a strip; ``n`` without them."""
    strip_floats: int
    strip_masks: int
    """Buffers of strips, as ``float_buffers`` and ``mask_buffers`` are of tiles."""

    @property
    def is_slots(self) -> bool:
        return SLOTS in self.grid

    @property
    def kept_elements(self) -> sp.Expr:
        """Of all tiles that are kept: those at the edges may be smaller."""
        return least(KEPT * self.m * self.n, self.area)

    @property
    def has_gradients(self) -> bool:
        return any(p.role != "similarity" for p in self.products)


@dataclass(frozen=True)
class Output:
    """An operand's gradient: ``length`` rows."""

    operand: str
    length: sp.Expr
    width: sp.Expr


@dataclass(frozen=True)
class ProgramFacts:
    """A program as the planner sees it.

    ``forward_vectors`` and ``backward_vectors``: (name, length) of what lives in either phase,
    saved vectors in both.  ``operand_elements``: of each operand.
    """

    program: Program
    passes: tuple[PassFacts, ...]
    outputs: tuple[Output, ...]
    forward_vectors: tuple[tuple[str, sp.Expr], ...]
    backward_vectors: tuple[tuple[str, sp.Expr], ...]
    positive_widths: tuple[sp.Expr, ...]
    norm_casts: tuple[sp.Expr, ...]
    operand_elements: tuple[sp.Expr, ...]

    @property
    def mode(self) -> Mode:
        """The variant that is expected to run."""
        return self.program.modes[0]

    @property
    def kept_tile(self) -> PassFacts | None:
        """The pass that writes the kept tiles, if the schedule keeps any."""
        return next((p for p in self.passes if p.keep == "write"), None)

    @property
    def kept_in_loops(self) -> bool:
        """Whether tiles are kept, of more than the one that holds everything."""
        return self.kept_tile is not None and not self.program.is_whole

    @property
    def needs_square_tiles(self) -> bool:
        return any(p.symmetric for p in self.passes)

    @property
    def in_strips(self) -> bool:
        """Whether any tiles are worked on in strips."""
        return any(p.in_strips for p in self.passes)

    @property
    def spans_rows(self) -> bool:
        return any(p.whole_rows for p in self.passes)


def facts_of(
    program: Program,
    extra_operands: Iterable[str] = (),
    *,
    diagonals: sp.Expr = ONE,
) -> ProgramFacts:
    """Count a program.

    ``extra_operands``: operands whose width is not D; theirs is the symbol ``D_<name>``.
    ``diagonals``: of the grids that half is made of, the share in which tiles of the diagonal are
    made whole.
    """
    sizes = Sizes(frozenset(extra_operands))
    backward = {id(p) for s in program.backward for p in s.passes}
    passes = tuple(
        _pass(program, p, "backward" if id(p) in backward else "forward", sizes, diagonals)
        for p in program.passes
    )
    forward, late = _vectors(program, sizes)
    return ProgramFacts(
        program,
        passes,
        _outputs(program, sizes),
        forward,
        late,
        _positive_widths(program, sizes),
        _norm_casts(program, sizes),
        tuple(sizes.rows_of(op) * sizes.operand_width(op.name) for op in program.plan.ir.operands),
    )


# ---- passes -------------------------------------------------------------------------------------


def _pass(
    program: Program,
    p: Pass,
    phase: Literal["forward", "backward"],
    sizes: Sizes,
    diagonals: sp.Expr,
) -> PassFacts:
    leaves, tile = program.plan.leaves, p.programs[program.modes[0]]
    rows, cols = sizes.length(p.grid[0]), sizes.length(p.grid[1])
    m = least(TILE_ROWS, rows)
    n = cols if p.whole_rows or p.is_slots else least(TILE_COLS, cols)
    down, across = count_of(rows, m), count_of(cols, n)
    tiles, area = down * across, rows * cols
    if p.symmetric:
        tiles, area = down * (across + diagonals) / 2, rows * (cols + diagonals * n) / 2
    gradients = tuple(
        Product(side, sizes.width(view))
        for name in p.gradients
        for side, view in (("left", leaves[name].left), ("right", leaves[name].right))
        if side in p.sides and _is_wanted(program, view)
    )
    remade = p.remake[program.modes[0]].instructions if p.keep == "read" else ()
    views = [v for s in p.similarities for v in (leaves[s].left,)]
    others = [v for s in p.similarities for v in (leaves[s].right,)]
    work = tile_work(tile.instructions, p.whole)
    work += TileWork(
        floats_moved=len(gradients),
        operators=len(gradients) + sum(bool(g.row_scale) for g in tile.gradients),
    )
    scaled = [
        sizes.width(leaves[g.similarity].left)
        for t in p.programs.values()
        for g in t.gradients
        if g.row_scale
    ]
    return PassFacts(
        phase,
        p.grid,
        rows,
        cols,
        m,
        n,
        tiles,
        area,
        max(_buffers(p, mode, "t") for mode in p.programs),
        max(_buffers(p, mode, "m") for mode in p.programs),
        tile.float_buffers + bool(p.keep),
        work,
        (*_similarities(tile.instructions, leaves, sizes), *gradients),
        tile_work(remade, p.whole),
        _similarities(remade, leaves, sizes),
        _operand_widths(views, sizes),
        _operand_widths(others, sizes),
        p.symmetric,
        p.whole_rows,
        p.keep,
        largest(scaled) if scaled else sp.Integer(0),
        p.in_strips,
        least(strip_columns(TILE_ROWS), n) if p.in_strips else n,
        max(_strips(p, mode, "t") for mode in p.programs),
        max(_strips(p, mode, "m") for mode in p.programs),
    )


def _buffers(p: Pass, mode: Mode, kind: str) -> int:
    """Tile buffers of one kind ("t" floats, "m" masks), those that remake a kept tile included."""
    found = {b for t in _programs(p, mode) for b in {*t.buffers.values()} - t.strip_buffers}
    return sum(b.startswith(kind) for b in found)


def _strips(p: Pass, mode: Mode, kind: str) -> int:
    """The same of strips."""
    found = {b for t in _programs(p, mode) for b in t.strip_buffers}
    return sum(b.startswith(kind) for b in found)


def _programs(p: Pass, mode: Mode) -> list[TileProgram]:
    return [p.programs[mode], *([p.remake[mode]] if p.keep == "read" else [])]


def _is_wanted(program: Program, view: View | None) -> bool:
    return view is not None and view.operand in program.plan.needs and not view.stop


def _operand_widths(views: Iterable[View | None], sizes: Sizes) -> tuple[sp.Expr, ...]:
    names = sorted({v.operand for v in views if v is not None})
    return tuple(sizes.operand_width(name) for name in names)


def _similarities(
    code: Iterable[Instruction], leaves: Mapping[str, Leaf], sizes: Sizes
) -> tuple[Product, ...]:
    return tuple(
        Product("similarity", sizes.width(leaves[i.similarity].left))
        for i in code
        if isinstance(i, Gemm)
    )


# ---- vectors and outputs ------------------------------------------------------------------------


def _vectors(
    program: Program, sizes: Sizes
) -> tuple[tuple[tuple[str, sp.Expr], ...], tuple[tuple[str, sp.Expr], ...]]:
    leaves = program.plan.leaves
    saved = {n: sizes.vector(leaves[n].axes) for n in program.plan.saved}
    if "bounded" in program.modes:  # inverse sums of exponentials, one for each logsumexp
        for red in program.logsumexps:
            saved[inverse_of(red.name).name] = sizes.vector(leaves[red.name].axes)
    found = []
    for stages in (program.forward, program.backward):
        here: dict[str, sp.Expr | None] = dict(saved) if stages else {}
        for stage in stages:
            here.update({n: sizes.vector(leaves[n].axes) for n in stage.vectors})
            for p in stage.passes:
                for tile in p.programs.values():
                    here.update({n: sizes.vector(axes) for n, (_, axes) in tile.hoisted.items()})
                    for i in tile.instructions:
                        if isinstance(i, Accumulate) and not i.mirrored and i.kind != "total":
                            length = sizes.length(p.grid[1 - i.dim])
                            here.update(dict.fromkeys(i.targets, length))
        found.append(tuple((n, v) for n, v in sorted(here.items()) if v is not None))
    return found[0], found[1]


def _outputs(program: Program, sizes: Sizes) -> tuple[Output, ...]:
    return tuple(
        Output(op.name, sizes.rows_of(op), sizes.operand_width(op.name))
        for op in program.plan.ir.operands
        if op.name in program.plan.needs and not op.stop
    )


def _norm_casts(program: Program, sizes: Sizes) -> tuple[sp.Expr, ...]:
    """Elements of operands whose gradient runs through the norms of their rows."""
    gradient, result = program.plan.gradient, []
    operands = {op.name: op for op in program.plan.ir.operands}
    for name in gradient.vectors if gradient is not None else ():
        leaf = program.plan.leaves[name]
        if leaf.kind == "norm" and leaf.left is not None:
            rows = sizes.rows_of(operands[leaf.left.operand])
            result.append(rows * sizes.width(leaf.left))
    return tuple(result)


def _positive_widths(program: Program, sizes: Sizes) -> tuple[sp.Expr, ...]:
    """Widths of what is computed at the positives alone, or row by row beside the sweeps."""
    plan = program.plan
    taken = taken_at_positives(plan) if program.is_whole else ()
    leaves = [
        leaf
        for name, leaf in plan.leaves.items()
        if leaf.kind == "similarity_at_positive" and name not in taken
    ]
    if plan.gradient is not None:
        leaves += [plan.leaves[name] for name in plan.late_positives]
    widths = [sizes.width(leaf.left) for leaf in leaves]
    if plan.gradient is not None:  # <operand, its gradient>, for the gradient of a scale
        done = scale_gradients(plan).values() if program.is_whole else ()
        dots = [pairs for name, pairs in plan.gradient.dots.items() if name not in done]
        widths += [sizes.operand_width(operand) for pairs in dots for operand, _ in pairs]
    return tuple(widths)
