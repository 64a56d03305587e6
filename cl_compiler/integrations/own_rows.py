"""Losses that also say what each row adds: across ranks some peers return their own rows' mean."""

from typing import Any

from cl_compiler import lang as cl

__all__ = ["clip_rows", "infonce_rows", "siglip_rows"]


@cl.define_loss
def clip_rows(sim: Any, logit_scale: Any) -> Any:
    """``clip``; ``rows`` [M] and ``cols`` [N] are the cross-entropies of both directions."""
    s = logit_scale * sim
    rows = cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows)
    cols = cl.logsumexp(s, over=cl.rows) - cl.at_positive(s, on=cl.cols)
    cl.output("rows", rows)
    cl.output("cols", cols)
    return (cl.mean(rows, over=cl.rows) + cl.mean(cols, over=cl.cols)) / 2


@cl.define_loss
def infonce_rows(sim: Any, logit_scale: Any) -> Any:
    """``infonce``; ``rows`` [M] are the cross-entropies."""
    s = logit_scale * sim
    rows = cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows)
    cl.output("rows", rows)
    return cl.mean(rows, over=cl.rows)


@cl.define_loss
def siglip_rows(sim: Any, logit_scale: Any, logit_bias: Any) -> Any:
    """``siglip``; ``rows`` [M] are the sums over columns."""
    z = 2 * cl.is_positive - 1
    rows = cl.sum(cl.softplus(-z * (logit_scale * sim + logit_bias)), over=cl.cols)
    cl.output("rows", rows)
    return cl.sum(rows, over=cl.rows) / cl.size(cl.rows)
