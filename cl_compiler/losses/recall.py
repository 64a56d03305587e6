"""A smooth surrogate of recall@k; a factory."""

from collections.abc import Iterable
from numbers import Integral

from cl_compiler import lang as cl
from cl_compiler.errors import ArgumentError


def recall_at_k(ks) -> cl.LossIR:
    """Recall@k surrogate (Patel et al. 2022), summed over ks; one positive per row.

    The paper takes temperatures tau_rank = 0.01 and tau_k = 1, and ks = (1, 2, 4, 8, 16).  Ids that
    give a row several positives are refused: each would have a rank of its own.

    Args:
        ks: cut-offs, or one.

    Raises:
        ArgumentError: cut-offs that are not whole numbers from 1.
    """
    ks = tuple(ks) if isinstance(ks, Iterable) else (ks,)
    if not ks or not all(isinstance(k, Integral) and not isinstance(k, bool) and k > 0 for k in ks):
        raise ArgumentError(f"ks={ks}: cut-offs are whole numbers from 1, such as (1, 5, 10).")

    ks = tuple(map(int, ks))

    @cl.define_loss(constants=[("ks", ks), ("positives_per_row", 1)])
    def recall(sim, tau_rank, tau_k):
        above = cl.sigmoid((sim - cl.at_positive(sim, on=cl.rows)) / tau_rank)
        rank = 1 + cl.sum(above, over=cl.cols, where=~cl.is_positive)
        return sum(cl.mean(cl.sigmoid((rank - k) / tau_k), over=cl.rows) for k in ks)

    return recall
