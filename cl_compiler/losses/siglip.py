"""The sigmoid loss of SigLIP."""

from cl_compiler import lang as cl


@cl.define_loss
def siglip(sim, logit_scale, logit_bias):
    """Sigmoid loss (Zhai et al. 2023): every pair is a binary decision; summed, per row."""
    z = 2 * cl.is_positive - 1
    pairs = cl.softplus(-z * (logit_scale * sim + logit_bias))
    return cl.sum(cl.sum(pairs, over=cl.cols), over=cl.rows) / cl.size(cl.rows)
