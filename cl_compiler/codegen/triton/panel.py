"""Rows and columns of one launch: how large a gradient tile the library's products should see."""

from __future__ import annotations

from dataclasses import replace

from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.plan.types import DTYPE_BYTES, Plan, Problem, Tile

FEWEST_ROWS = 8192
"""Below it launches and the products' last waves cost more than the workspace saves."""
BLOCK_ROWS, BLOCK_COLS = 128, 256
"""The library's own tile of a product [rows, D]."""
SMALLEST_COLS = 16
"""Columns of the narrowest kernel's tile: one partial statistic of a row for each."""
STEP = 256
"""Panels are whole multiples of it: of every kernel's rows and columns."""


def gradient_bytes(problem: Problem) -> int:
    """Bytes of one element of the workspace: bf16 beside 16-bit operands, fp32 beside fp32."""
    return 4 if DTYPE_BYTES[problem.dtype] == 4 else 2


def panel(spec: HardwareSpec, problem: Problem, free_bytes: int, *, symmetric: bool) -> Tile:
    """The panel of a problem on a machine, its workspace within ``free_bytes``.

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
    room = max(1, free_bytes // gradient_bytes(problem))
    if symmetric:
        side = min(rows, cols, max(STEP, int(room**0.5) // STEP * STEP))
        return Tile(side, side)
    cols = min(cols, max(STEP, room // rows // STEP * STEP))
    rows = min(rows, max(STEP, room // cols // STEP * STEP))
    return Tile(rows, cols)


def with_panel(plan: Plan, spec: HardwareSpec, *, symmetric: bool) -> Plan:
    """The plan with a panel for its tile, and with what that takes in its memory.

    Tiles in caches are the torch templates' way: here a tile lives in registers, and the panel of
    gradients between a kernel and the library's products is all that is allocated for them.
    """
    of_tiles = ("tile buffers", "tile masks", "operand tiles in fp32")
    rest = [(what, bytes_) for what, bytes_ in plan.memory if what not in of_tiles]
    rest = [(w, 2 * b if w.startswith("statistics") else b) for w, b in rest]  # they are fp64
    free = plan.budget.device_bytes - sum(bytes_ for _, bytes_ in rest)
    partial = 1 + 2 * 4 / SMALLEST_COLS / gradient_bytes(
        plan.problem
    )  # statistics beside gradients
    tile = panel(spec, plan.problem, int(free / partial), symmetric=symmetric)
    elements = tile.rows * tile.cols
    memory = (
        *rest,
        ("a panel of gradients", elements * gradient_bytes(plan.problem)),
        ("partial statistics", 2 * 4 * elements // SMALLEST_COLS),
    )
    peak = max(plan.peak_bytes, sum(bytes_ for _, bytes_ in memory))
    levels = tuple(replace(x, tile=tile) for x in plan.levels if x.kind == "device")
    return replace(plan, tile=tile, memory=memory, peak_bytes=peak, levels=levels)


def _whole(length: int) -> int:
    return -(-length // STEP) * STEP


__all__ = ["gradient_bytes", "panel", "with_panel"]
