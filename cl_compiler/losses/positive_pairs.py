"""Losses with one term per positive pair: each against the negatives of its row only.

The NT-Xent of pytorch-metric-learning (logit scale 1 / 0.07 there); with one positive per row it is
``nt_xent`` or ``infonce``.  It takes ids; a row's other positives are not in its denominator.
"""

from cl_compiler import lang as cl


@cl.define_loss
def nt_xent_pairs(logit_scale):
    """The mean over all positive pairs of ``z``, itself excluded."""
    s = logit_scale * cl.similarity(cl.z, cl.z)
    lse = cl.logsumexp(s, over=cl.cols, where=~cl.is_positive & ~cl.is_self)
    total = cl.sum(cl.sum(cl.softplus(lse - s), over=cl.cols, where=cl.is_positive), over=cl.rows)
    return total / cl.sum(cl.count(over=cl.cols, where=cl.is_positive), over=cl.rows)


@cl.define_loss
def infonce_pairs(sim, logit_scale):
    """The mean over all positive pairs of ``x`` with ``y``."""
    s = logit_scale * sim
    lse = cl.logsumexp(s, over=cl.cols, where=~cl.is_positive)
    total = cl.sum(cl.sum(cl.softplus(lse - s), over=cl.cols, where=cl.is_positive), over=cl.rows)
    return total / cl.sum(cl.count(over=cl.cols, where=cl.is_positive), over=cl.rows)
