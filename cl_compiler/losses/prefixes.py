"""InfoNCE on several prefixes of the same embeddings at once; a factory."""

from collections.abc import Iterable
from numbers import Integral

from cl_compiler import lang as cl
from cl_compiler.errors import ArgumentError


def matryoshka(prefixes, weights=None) -> cl.LossIR:
    """Matryoshka representation learning (Kusupati et al. 2022) with InfoNCE.

    Args:
        prefixes: how many leading columns each term sees; each prefix is normalised again.
        weights: of each term; 1 by default, as in sentence-transformers' MatryoshkaLoss.

    Raises:
        ArgumentError: prefixes that are not whole numbers from 1, or not as many weights.
    """
    prefixes = tuple(prefixes) if isinstance(prefixes, Iterable) else (prefixes,)
    whole = [isinstance(p, Integral) and not isinstance(p, bool) and p > 0 for p in prefixes]
    if not prefixes or not all(whole):
        raise ArgumentError(
            f"prefixes={prefixes}: give numbers of leading columns from 1, such as (64, 256, 768)."
        )
    prefixes = tuple(map(int, prefixes))
    weights = (1.0,) * len(prefixes) if weights is None else tuple(weights)
    if len(weights) != len(prefixes):
        raise ArgumentError(f"{len(prefixes)} prefixes and {len(weights)} weights: give as many.")

    @cl.define_loss(constants=[("prefixes", prefixes), ("weights", weights)])
    def matryoshka(logit_scale):
        total = 0
        for prefix, weight in zip(prefixes, weights, strict=True):
            x, y = cl.x[:prefix], cl.y[:prefix]
            s = logit_scale * cl.similarity(x, y) / (cl.norm(x) * cl.norm(y))
            row = cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows)
            total = total + weight * cl.mean(row, over=cl.rows)
        return total

    return matryoshka
