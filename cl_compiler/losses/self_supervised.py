"""Losses over one set of embeddings ``z``: NT-Xent (SimCLR) and SupCon."""

from cl_compiler import lang as cl


@cl.define_loss
def nt_xent(logit_scale):
    """NT-Xent (Chen et al. 2020): a row's positive is its other view, itself excluded."""
    s = logit_scale * cl.similarity(cl.z, cl.z)
    lse = cl.logsumexp(s, over=cl.cols, where=~cl.is_self)
    return cl.mean(lse - cl.at_positive(s, on=cl.rows), over=cl.rows)


@cl.define_loss
def supcon(logit_scale):
    """SupCon (Khosla et al. 2020): mean log-probability over a row's positives."""
    s = logit_scale * cl.similarity(cl.z, cl.z)
    lse = cl.logsumexp(s, over=cl.cols, where=~cl.is_self)
    return cl.mean(lse - cl.at_positive(s, on=cl.rows), over=cl.rows)
