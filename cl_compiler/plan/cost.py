"""Seconds that a schedule takes, as SymPy expressions in sizes, tile sizes and rates.

Operators run one after the other, so their times add up:

* a matrix product takes the longer of its FLOP and, at every level of memory, of moving the
  operands of that level's blocks into it; a CPU, whose rates are measured with operands in its
  caches, waits for those that its caches do not hold; small tiles also pay for the copies of
  operands that a product multiplies from;
* an elementwise pass takes its rate, and what its buffers' memory is slower than the memory that
  the rate was measured with;
* every operator is launched; every shard of another rank is moved.

There are no fitted constants: rates and bandwidths are the hardware graph's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import cast

import sympy as sp

from cl_compiler.lang.ir import Let
from cl_compiler.lang.lower_pass import bounded_logits
from cl_compiler.lang.tile_ir import Accumulate
from cl_compiler.plan.facts import PassFacts, Product, ProgramFacts
from cl_compiler.plan.machine import RATED_TILE, Machine
from cl_compiler.plan.sizes import (
    COMPUTE_BYTES,
    INPUT_BYTES,
    KEPT,
    TILE_ROWS,
    M,
    count_of,
    least,
)
from cl_compiler.plan.tape import Tape, tape_of
from cl_compiler.plan.tile_work import TileWork
from cl_compiler.plan.types import Problem

gemm_rate = sp.Function("gemm_rate")
"""FLOP/s of a product, of its contracted dimension."""
seconds_per_byte = sp.Function("seconds_per_byte")
"""Of data that occupies so many bytes, in the innermost memory that holds it."""
extra_seconds_per_byte = sp.Function("extra_seconds_per_byte")
"""The same beyond what elementwise rates already include."""
waiting_per_byte = sp.Function("waiting_per_byte")
"""Seconds that products wait for a byte of operands, of which a sweep streams so many bytes."""

EXP_RATE, PASS_RATE, LAUNCH = sp.symbols("exp_per_s pass_per_s op_overhead_s", positive=True)
EXP2_RATE = sp.Symbol("exp2_per_s", positive=True)
DEVICE_RATE = sp.Symbol("B_0", positive=True)
"""Bytes/s of the device's memory; B_1, B_2, … are those of the levels inside it."""

PARTS = (
    "matrix products",
    "exponentials",
    "elementwise passes",
    "tiles beyond cache",
    "operand copies and casts",
    "operator launches",
    "vectors and gradients",
)
"""What time is spent on, in the order of ``Cost.parts``."""


def level_symbols(index: int) -> tuple[sp.Symbol, sp.Symbol, sp.Symbol]:
    """(rows, columns, bytes/s) of the blocks of the inner level ``index`` (0: outermost)."""
    names = (f"m_{index + 1}", f"n_{index + 1}", f"B_{index + 1}")
    return cast(
        tuple[sp.Symbol, sp.Symbol, sp.Symbol], tuple(sp.Symbol(n, positive=True) for n in names)
    )


@dataclass(frozen=True)
class Cost:
    """Expressions: seconds by part, FLOP of all products, bytes that each level serves.

    ``traffic[0]`` is the device's own memory, ``traffic[1:]`` the levels inside it.
    """

    parts: tuple[sp.Expr, ...]
    flops: sp.Expr
    traffic: tuple[sp.Expr, ...]


def cost_of(facts: ProgramFacts, inner_levels: int, *, casts: bool, overlaps: bool = True) -> Cost:
    """Add up the passes of a program.

    ``inner_levels``: how many levels with memory are inside the device.
    ``casts``: inputs are 16-bit, so tiles of operands are widened.
    ``overlaps``: products run while their operands come from the device's memory.
    """
    parts = [sp.Integer(0)] * len(PARTS)
    traffic = [sp.Integer(0)] * (inner_levels + 1)
    flops: sp.Expr = sp.Integer(0)
    for p in facts.passes:
        for share, work, products in _shares(p):
            seconds, moved = _products(p, products, inner_levels, overlaps)
            area, tiles = share * p.area, share * p.tiles
            parts[0] += share * seconds
            parts[1] += area * (work.exps / EXP_RATE + work.exp2s / EXP2_RATE)
            parts[2] += area * work.passes / PASS_RATE
            parts[3] += area * _beyond_cache(p, work, products)
            parts[5] += tiles * _launches(p, work) * LAUNCH
            traffic = [t + share * b for t, b in zip(traffic, moved, strict=True)]
            flops += 2 * area * sp.Add(*(q.width for q in products))
        parts[4] += _copies(p, casts)
        if casts:
            parts[5] += p.tiles * (len(p.row_operands) + len(p.col_operands)) * LAUNCH
        if p.keep:  # stored once and read once
            kept = p.kept_elements * COMPUTE_BYTES
            parts[3] += kept * seconds_per_byte(kept)
            traffic[0] += kept
    rest = beside_sweeps(facts)
    parts[5] += rest[0]
    parts[6] += rest[1]
    return Cost(tuple(parts), flops, tuple(traffic))


def _shares(p: PassFacts) -> list[tuple[sp.Expr, TileWork, tuple[Product, ...]]]:
    """(share of the tiles, work, products): all tiles, and those that are made a second time."""
    shares = [(cast(sp.Expr, sp.Integer(1)), p.work, p.products)]
    if p.keep == "read":
        again = 1 - least(sp.Integer(1), KEPT / p.tiles)
        shares.append((again, p.remade, p.remade_products))
    return shares


def _products(
    p: PassFacts, products: tuple[Product, ...], inner_levels: int, overlaps: bool
) -> tuple[sp.Expr, list[sp.Expr]]:
    """(seconds, bytes served by each level) of a pass's products."""
    seconds: sp.Expr = sp.Integer(0)
    traffic: list[sp.Expr] = [sp.Integer(0)] * (inner_levels + 1)
    for q in products:
        inner = {"similarity": q.width, "left": p.n, "right": p.m}[q.role]
        times = [2 * p.area * q.width / gemm_rate(inner)]
        moved = _moved(p, q, inner_levels)
        rates = [DEVICE_RATE, *(level_symbols(index)[2] for index in range(inner_levels))]
        alongside = slice(0 if overlaps else 1, None)
        times += [b / rate for b, rate in zip(moved[alongside], rates[alongside], strict=True)]
        seconds += sp.Max(*times, evaluate=False)
        if not overlaps:
            seconds += moved[0] * waiting_per_byte(_streamed(p))
        traffic = [t + b for t, b in zip(traffic, moved, strict=True)]
    return seconds, traffic


def _launches(p: PassFacts, work: TileWork) -> sp.Expr:
    """Operators of a tile, each strip's counted."""
    more = count_of(p.n, p.strip) - 1 if p.in_strips else 0
    return work.operators + more * work.between


def _streamed(p: PassFacts) -> sp.Expr:
    """Bytes that a row of tiles goes through: its buffers, and operands of all columns with their
    gradients.
    """
    gradients = sp.Add(*(q.width for q in p.products if q.role == "right"))
    operands = sp.Add(*p.col_operands) * INPUT_BYTES + gradients * COMPUTE_BYTES
    return p.cols * operands + p.m * p.n * p.held * COMPUTE_BYTES


def _moved(p: PassFacts, q: Product, inner_levels: int) -> list[sp.Expr]:
    """Bytes that each level serves to the blocks of the level inside it, for one product.

    Each row of a slots pass has operands of its own, so nothing is shared.
    """
    if p.is_slots:
        once = p.rows * p.cols * q.width * INPUT_BYTES
        return [once, *[sp.Integer(0)] * inner_levels]
    elements = p.area * q.width
    blocks = [(p.m, p.n)]
    for index in range(inner_levels):
        rows, cols, _ = level_symbols(index)
        blocks.append((least(rows, p.m), least(cols, p.n)))
    # The device's memory serves the blocks of the first level inside it, and so on; the innermost
    # level feeds the arithmetic itself.
    rows, cols = blocks[min(1, inner_levels)]
    moved = [elements * (_bytes(q, "left") / cols + _bytes(q, "right") / rows)]
    moved += [elements * COMPUTE_BYTES * (1 / m + 1 / n) for m, n in blocks[2:]]
    return moved + [sp.Integer(0)] * (inner_levels + 1 - len(moved))


def _bytes(q: Product, side: str) -> sp.Expr:
    """Per element of one side's operand: a gradient is read and written, an operand read."""
    return 2 * COMPUTE_BYTES if q.role == side else INPUT_BYTES


def _beyond_cache(p: PassFacts, work: TileWork, products: tuple[Product, ...]) -> sp.Expr:
    """Seconds per element that a tile costs because its buffers live too far out.

    Of a tile in strips, what products write and read; the rest where a strip is.
    """
    held = p.m * p.n * (p.held * COMPUTE_BYTES + p.mask_buffers)
    moved = work.floats_moved * COMPUTE_BYTES + work.masks_moved
    if not p.in_strips:
        return moved * extra_seconds_per_byte(held)
    made = sum(q.role == "similarity" for q in products)
    multiplied = len(products) - made
    whole = 2 * made + multiplied + bool(multiplied) + bool(p.keep)
    whole = min(whole, work.floats_moved)
    floats = p.held + p.strip_floats
    strip = p.m * p.strip * (floats * COMPUTE_BYTES + p.mask_buffers + p.strip_masks)
    far = whole * COMPUTE_BYTES
    return far * extra_seconds_per_byte(held) + (moved - far) * extra_seconds_per_byte(strip)


def _copies(p: PassFacts, casts: bool) -> sp.Expr:
    """Seconds in which operands are copied to where a product, or a cast, wants them.

    The GEMM rate includes the copies of the tile that it was measured with; tiles whose sides are
    shorter copy more per element.
    """
    if p.is_slots:
        return sp.Integer(0)
    sides = 1 / p.m + 1 / p.n
    rated = sp.Rational(1, RATED_TILE.rows) + sp.Rational(1, RATED_TILE.cols)
    more = sp.Max(0, sides - rated, evaluate=False)
    widths = sp.Add(*(q.width for q in p.products))
    result = p.area * widths * more / PASS_RATE
    if casts:
        row, col = sp.Add(*p.row_operands), sp.Add(*p.col_operands)
        result += p.area * (row / p.n + col / p.m) / PASS_RATE
    return result


def beside_sweeps(facts: ProgramFacts) -> tuple[sp.Expr, sp.Expr]:
    """(launches, other seconds) of vectors, positives and the gradients' first and last touch."""
    by_name = facts.program.plan.by_name
    operators = 0
    for stage in (*facts.program.forward, *facts.program.backward):
        for name in stage.vectors:
            node = by_name.get(name)
            operators += int(sp.count_ops(node.expr)) + 1 if isinstance(node, Let) else 3
    blocks = count_of(M, least(TILE_ROWS, M)) * 3 * len(facts.positive_widths)
    operators += _around_passes(facts)
    # Where one tile holds everything, products make the gradients, scale and all.
    made = () if facts.program.is_whole else facts.outputs
    elements = sp.Add(*(o.length * o.width for o in made))
    positives = M * sp.Add(*facts.positive_widths)
    # Gradients are cleared and scaled; products at positives are multiplied and summed.
    streamed = (3 * elements * COMPUTE_BYTES + 2 * positives * INPUT_BYTES) / DEVICE_RATE
    return (operators + blocks) * LAUNCH, streamed + (elements + 2 * positives) / PASS_RATE


def _around_passes(facts: ProgramFacts) -> int:
    """Operators that allocate what passes fill, bound the logits, and finish logsumexps."""
    program = facts.program
    if program.is_whole:
        return 0
    made = 2 * len(facts.outputs)  # cleared, and scaled
    for p in program.passes:
        code = p.programs[program.modes[0]]
        made += len(set(code.buffers.values()))
        made += len({t for i in code.instructions if isinstance(i, Accumulate) for t in i.targets})
    bounds = 2 * 3 * len(bounded_logits(program.plan)) if "bounded" in program.modes else 0
    return made + bounds + 3 * len(program.logsumexps)


@dataclass(frozen=True)
class CompiledCost:
    """A cost, ready to be evaluated."""

    cost: Cost
    seconds_by_part: Tape

    def traffic_bytes(self, values: Mapping[str, float]) -> tuple[float, ...]:
        """Bytes that the device's memory and each level inside it serve."""
        return tape_of(self.cost.traffic)(values)

    def flops(self, values: Mapping[str, float]) -> float:
        """FLOP of all matrix products."""
        return tape_of([self.cost.flops])(values)[0]


def compile_cost(
    facts: ProgramFacts,
    machine: Machine,
    problem: Problem,
    precision: str,
    *,
    by_onednn: bool = False,
) -> CompiledCost:
    """The cost of a program on a machine as functions of numbers.

    ``by_onednn``: its products are oneDNN's where others would be BLAS's.

    Raises:
        HardwareError: the machine has no rate for the way in which products are computed.
    """

    @cache
    def rate(inner: float) -> float:
        if by_onednn:
            return machine.onednn_rate(inner)
        return machine.gemm_rate(problem.dtype, precision, inner)

    cost = cost_of(
        facts,
        len(machine.inner),
        casts=problem.input_bytes < problem.compute_bytes,
        overlaps=machine.spec.kind != "cpu",
    )
    functions: dict[str, Callable[[float], float]] = {
        "gemm_rate": rate,
        "seconds_per_byte": machine.seconds_per_byte,
        "extra_seconds_per_byte": machine.extra_seconds_per_byte,
        "waiting_per_byte": machine.waiting_per_byte,
    }
    return CompiledCost(cost, tape_of(cost.parts, functions))


__all__ = [
    "PARTS",
    "CompiledCost",
    "Cost",
    "beside_sweeps",
    "compile_cost",
    "cost_of",
    "level_symbols",
]
