"""Losses of the zoo that the package does not ship: variants that use a word of the language."""

from __future__ import annotations

from cl_compiler import lang as cl


@cl.define_loss
def weighted(sim, logit_scale):
    s, w = logit_scale * sim, cl.row_input("weight")
    row = w * (cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows))
    return cl.sum(row, over=cl.rows) / cl.sum(w, over=cl.rows)


@cl.define_loss
def row_temperature(sim):
    s = cl.row_input("row_scale") * sim
    return cl.mean(cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows), over=cl.rows)


@cl.define_loss
def col_prior(sim, logit_scale):
    s = logit_scale * sim + cl.col_input("log_prior")
    return cl.mean(cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows), over=cl.rows)


@cl.define_loss
def entropy(sim, logit_scale, weight):
    s = logit_scale * sim
    lse = cl.logsumexp(s, over=cl.cols)
    row_entropy = lse - cl.softmean(s, s, over=cl.cols)
    cross = cl.mean(lse - cl.at_positive(s, on=cl.rows), over=cl.rows)
    return cross - weight * cl.mean(row_entropy, over=cl.rows)


@cl.define_loss
def squared_hinge(sim, margin):
    gap = cl.relu(margin - cl.at_positive(sim, on=cl.rows) + sim)
    return cl.mean(cl.sum(gap**2, over=cl.cols, where=~cl.is_positive), over=cl.rows)


@cl.define_loss
def batch_hard(sim, margin):
    hardest = cl.max(sim, over=cl.cols, where=~cl.is_positive)
    return cl.mean(cl.relu(margin + hardest - cl.at_positive(sim, on=cl.rows)), over=cl.rows)


@cl.define_loss
def recall_columns(sim, tau_rank, tau_k):
    above = cl.sigmoid((sim - cl.at_positive(sim, on=cl.rows)) / tau_rank)
    rank = cl.sum(above, over=cl.rows, where=~cl.is_positive)
    return cl.mean(cl.sigmoid((rank - 2) / tau_k), over=cl.cols)


def _teacher():
    return cl.similarity(cl.operand("teacher_x", cl.rows), cl.operand("teacher_y", cl.cols))


@cl.define_loss
def distillation_two_sweeps(sim, logit_scale, teacher_scale):
    s, teacher = logit_scale * sim, teacher_scale * _teacher()
    prob = cl.exp(teacher - cl.logsumexp(teacher, over=cl.cols))
    row = cl.logsumexp(s, over=cl.cols) - cl.sum(prob * s, over=cl.cols)
    return cl.mean(row, over=cl.rows)


@cl.define_loss
def dual_softmax(sim, logit_scale, beta):
    prior = cl.exp(beta * sim - cl.logsumexp(beta * sim, over=cl.rows))
    s = logit_scale * sim * prior
    return cl.mean(cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows), over=cl.rows)


@cl.define_loss
def sinkhorn(sim, logit_scale):
    s = logit_scale * sim
    scaled = s - cl.logsumexp(s, over=cl.cols)
    return cl.mean(cl.logsumexp(scaled, over=cl.rows), over=cl.cols)
