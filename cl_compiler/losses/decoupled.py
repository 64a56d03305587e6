"""Decoupled contrastive learning (Yeh et al. 2022): the positive is not in the denominator.

Common is a temperature of 0.1, a logit scale of 10.
"""

from cl_compiler import lang as cl


@cl.define_loss
def dcl(sim, logit_scale):
    """Each row against all columns but its positive."""
    s = logit_scale * sim
    lse = cl.logsumexp(s, over=cl.cols, where=~cl.is_positive)
    return cl.mean(lse - cl.at_positive(s, on=cl.rows), over=cl.rows)


@cl.define_loss
def dcl_views(logit_scale):
    """The same over one set ``z`` of two views."""
    s = logit_scale * cl.similarity(cl.z, cl.z)
    lse = cl.logsumexp(s, over=cl.cols, where=~cl.is_self & ~cl.is_positive)
    return cl.mean(lse - cl.at_positive(s, on=cl.rows), over=cl.rows)


@cl.define_loss
def dcl_views_weighted(logit_scale):
    """The same with ``weight`` [M] on each row's positive (DCLW, equation 6)."""
    s = logit_scale * cl.similarity(cl.z, cl.z)
    lse = cl.logsumexp(s, over=cl.cols, where=~cl.is_self & ~cl.is_positive)
    positive = cl.row_input("weight") * cl.at_positive(s, on=cl.rows)
    return cl.mean(lse - positive, over=cl.rows)
