"""Rows and columns of one launch: how large a gradient tile the library's products should see."""

from __future__ import annotations

from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.plan.types import DTYPE_BYTES, Problem, Tile

FEWEST_ROWS = 8192
"""Below it launches and the products' last waves cost more than the workspace saves."""
BLOCK_ROWS, BLOCK_COLS = 128, 256
"""The library's own tile of a product [rows, D]."""
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


def _whole(length: int) -> int:
    return -(-length // STEP) * STEP


__all__ = ["gradient_bytes", "panel"]
