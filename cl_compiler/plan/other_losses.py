"""What other losses take on one rank, by formulas that reproduce published tables."""

from __future__ import annotations


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


__all__ = ["dense_bytes", "inf_cl_bytes", "local_rows_bytes"]
