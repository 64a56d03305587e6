"""The sigmoid loss of SigLIP, with one positive per row or with several."""

from cl_compiler import lang as cl


@cl.define_loss
def siglip(sim, logit_scale, logit_bias):
    """Sigmoid loss (Zhai et al. 2023): every pair is a binary decision; summed, per row."""
    z = 2 * cl.is_positive - 1
    pairs = cl.softplus(-z * (logit_scale * sim + logit_bias))
    return cl.sum(cl.sum(pairs, over=cl.cols), over=cl.rows) / cl.size(cl.rows)


@cl.define_loss
def siglip_plus(sim, logit_scale, logit_bias):
    """Sigmoid loss for groups: a row's k positives weigh 1/k each (``siglip-kernel``'s SigLIP+).

    With ``row_ids`` and ``col_ids``; without them k = 1, which is ``siglip``.
    """
    k = cl.count(over=cl.cols, where=cl.is_positive)
    z = 2 * cl.is_positive - 1
    pairs = cl.softplus(-z * (logit_scale * sim + logit_bias))
    weighted = cl.where(cl.is_positive, pairs / k, pairs)
    return cl.sum(cl.sum(weighted, over=cl.cols), over=cl.rows) / cl.size(cl.rows)
