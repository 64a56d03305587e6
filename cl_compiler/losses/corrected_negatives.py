"""Corrections of the sampled negatives: for false ones among them, and towards hard ones.

All take one positive per row, and inputs of unit length: the floor of the estimate is what a
similarity of -1 would give.
"""

from cl_compiler import lang as cl


def _debiased(s, logit_scale, tau_plus):
    p, n = cl.at_positive(s, on=cl.rows), cl.size(cl.cols) - 1
    negatives = cl.logsumexp(s, over=cl.cols, where=~cl.is_positive) - cl.log(n)
    floor = cl.log(1 - tau_plus) - logit_scale
    z = cl.logsubexp(negatives, cl.log(tau_plus) + p, floor) - cl.log(1 - tau_plus) + cl.log(n)
    return cl.mean(cl.logaddexp(p, z) - p, over=cl.rows)


@cl.define_loss
def debiased(sim, logit_scale, tau_plus):
    """Debiased InfoNCE (Chuang et al. 2020): a negative is a false one with probability tau_plus.

    The paper takes tau_plus = 0.1 and a temperature of 0.5.
    """
    return _debiased(logit_scale * sim, logit_scale, tau_plus)


@cl.define_loss
def debiased_rows(sim, logit_scale):
    """The same with a prior of its own for each row: ``tau_plus`` [M], a vector."""
    return _debiased(logit_scale * sim, logit_scale, cl.row_input("tau_plus"))


@cl.define_loss
def hard_weighted(sim, logit_scale, beta):
    """InfoNCE whose negatives weigh e^(beta·s) (Robinson et al. 2021); the paper takes beta = 1."""
    s = logit_scale * sim
    p, n = cl.at_positive(s, on=cl.rows), cl.size(cl.cols) - 1
    tilted = cl.logsumexp((1 + beta) * s, over=cl.cols, where=~cl.is_positive)
    normaliser = cl.logsumexp(beta * s, over=cl.cols, where=~cl.is_positive)
    return cl.mean(cl.logaddexp(p, tilted - normaliser + cl.log(n)) - p, over=cl.rows)
