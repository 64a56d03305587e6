"""Rows and columns of one launch: how large a gradient tile the library's products should see."""

from __future__ import annotations

from dataclasses import replace

from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.lang.ir import COLS
from cl_compiler.lang.program import Program
from cl_compiler.plan.precision import SPLIT, rounded_operands
from cl_compiler.plan.types import DTYPE_BYTES, Plan, Problem, Tile

FEWEST_ROWS = 8192
"""Below it launches and the products' last waves cost more than the workspace saves."""
BLOCK_ROWS, BLOCK_COLS = 128, 256
"""The library's own tile of a product [rows, D]."""
SMALLEST_COLS = 16
"""Columns of the narrowest kernel's tile: one partial statistic of a row for each."""
STEP = 256
"""Panels are whole multiples of it: of every kernel's rows and columns."""


def gradient_bytes(problem: Problem, precision: str) -> int:
    """Bytes of one element of the workspace: bf16 beside 16-bit operands; fp32 beside fp32, or two
    bf16 numbers."""
    narrow = rounded_operands(problem.dtype, precision) or DTYPE_BYTES[problem.dtype] == 2
    return 2 if narrow else 4


def panel(spec: HardwareSpec, problem: Problem, room: int, *, symmetric: bool) -> Tile:
    """The panel of a problem on a machine, of at most ``room`` elements.

    As many rows as give the product [rows, D] whole waves over the multiprocessors, at least 8192;
    as many columns.  A smaller budget takes columns first: the product with the panel's transpose
    then has fewer blocks, but the statistics of a row still leave the kernel in one piece.
    ``symmetric``: square, since half of the panels are visited.
    """
    cores = next((x.count for x in reversed(spec.levels) if x.kind == "core"), 1)
    blocks = max(1, -(-problem.D // BLOCK_COLS))
    wave = max(1, BLOCK_ROWS * cores // blocks)
    most = _whole(-(-FEWEST_ROWS // wave) * wave)
    rows, cols = min(most, _whole(problem.M)), min(most, _whole(problem.N))
    if symmetric:
        side = min(rows, cols, max(STEP, int(room**0.5) // STEP * STEP))
        return Tile(side, side)
    cols = min(cols, max(STEP, room // rows // STEP * STEP))
    rows = min(rows, max(STEP, room // cols // STEP * STEP))
    return Tile(rows, cols)


def with_panel(plan: Plan, spec: HardwareSpec, program: Program) -> Plan:
    """The plan with a panel for its tile, and with what that takes in its memory.

    Tiles in caches are the torch templates' way: here a tile lives in registers, and the panel of
    gradients between a kernel and the library's products is all that is allocated for them.
    """
    of_tiles = ("tile buffers", "tile masks", "operand tiles in fp32")
    rest = [(what, bytes_) for what, bytes_ in plan.memory if what not in of_tiles]
    rest = [(w, 2 * b if w.startswith("statistics") else b) for w, b in rest]  # they are fp64
    rest += _rounded(plan, program)
    element = gradient_bytes(plan.problem, plan.precision)
    split = _split_bytes(plan, program)
    free = plan.budget.device_bytes - sum(bytes_ for _, bytes_ in rest)
    statistics = 2 * 4 / SMALLEST_COLS  # of rows and columns, for each element
    symmetric = any(p.symmetric for p in program.passes)
    room = max(1, int((free - split * STEP) / (element + statistics)))
    tile = panel(spec, plan.problem, room, symmetric=symmetric)
    if split:  # takes room of its own, by the longer side
        room = int((free - split * max(tile.rows, tile.cols)) / (element + statistics))
        tile = panel(spec, plan.problem, max(1, room), symmetric=symmetric)
        rest.append(("an operand split in bf16", split * max(tile.rows, tile.cols)))
    elements = tile.rows * tile.cols
    memory = (
        *rest,
        ("a panel of gradients", elements * element),
        ("partial statistics", int(elements * statistics)),
    )
    peak = max(plan.peak_bytes, sum(bytes_ for _, bytes_ in memory))
    levels = tuple(replace(x, tile=tile) for x in plan.levels if x.kind == "device")
    return replace(plan, tile=tile, memory=memory, peak_bytes=peak, levels=levels)


def _rounded(plan: Plan, program: Program) -> list[tuple[str, int]]:
    """The copies of fp32 operands that are rounded before they are multiplied."""
    kind = rounded_operands(plan.problem.dtype, plan.precision)
    if kind is None:
        return []
    problem, elements = plan.problem, 0
    for op in program.plan.ir.operands:
        rows = problem.N if op.axes[0] == COLS else problem.M
        elements += rows * problem.operands.get(op.name, problem.D)
    return [(f"operands in {kind}", elements * DTYPE_BYTES[kind])]


def _split_bytes(plan: Plan, program: Program) -> int:
    """Bytes for each row of an operand that a product splits: two bf16 numbers, an fp32 rest."""
    if plan.precision != SPLIT:
        return 0
    widths = [plan.problem.operands.get(op.name, plan.problem.D) for op in program.plan.ir.operands]
    return 8 * max(widths)


def _whole(length: int) -> int:
    return -(-length // STEP) * STEP


__all__ = ["gradient_bytes", "panel", "with_panel"]
