"""InfoNCE on several prefixes of the same embeddings at once; a factory."""

from collections.abc import Iterable
from numbers import Integral, Real

from cl_compiler import lang as cl
from cl_compiler.errors import ArgumentError
from cl_compiler.units import counted


def matryoshka(prefixes, weights=None) -> cl.LossIR:
    """Matryoshka representation learning (Kusupati et al. 2022) with InfoNCE.

    Args:
        prefixes: how many leading columns each term sees; each prefix is normalised again.
        weights: of each term; 1 by default, as in sentence-transformers' MatryoshkaLoss.

    Raises:
        ArgumentError: prefixes that are not whole numbers from 1, or not as many weights, numbers.
    """
    prefixes = _several(prefixes)
    whole = [isinstance(p, Integral) and not isinstance(p, bool) and p > 0 for p in prefixes]
    if not prefixes or not all(whole):
        raise ArgumentError(
            f"prefixes={prefixes}: give numbers of leading columns from 1, such as (64, 256, 768)."
        )
    prefixes = tuple(map(int, prefixes))
    weights = (1.0,) * len(prefixes) if weights is None else _several(weights)
    if not all(isinstance(w, Real) and not isinstance(w, bool) for w in weights):
        raise ArgumentError(f"weights={weights}: give a number for each prefix.")
    if len(weights) != len(prefixes):
        told = (
            f"{counted(len(prefixes), 'prefix', 'prefixes')} and {counted(len(weights), 'weight')}"
        )
        raise ArgumentError(f"{told}: give as many.")

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


def _several(given):
    """A tuple of what is given, be it one."""
    several = isinstance(given, Iterable) and getattr(given, "ndim", 1)  # an array of one is none
    return tuple(given) if several else (given,)
