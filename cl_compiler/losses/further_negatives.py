"""InfoNCE with negatives beside the batch: each row's own, or a queue of old embeddings."""

from cl_compiler import lang as cl


@cl.define_loss
def hard_negatives(sim, logit_scale):
    """All columns, and K hard negatives of each row: ``hard`` [M, K, D] (Karpukhin et al. 2020)."""
    own = logit_scale * cl.similarity(cl.x, cl.operand("hard", (cl.rows, cl.slots)))
    s = logit_scale * sim
    z = cl.logaddexp(cl.logsumexp(s, over=cl.cols), cl.logsumexp(own, over=cl.slots))
    return cl.mean(z - cl.at_positive(s, on=cl.rows), over=cl.rows)


@cl.define_loss
def queue(sim, logit_scale):
    """All columns, and a ``queue`` [B, D] of old embeddings (Wang et al. 2020), no gradient."""
    old = logit_scale * cl.similarity(cl.x, cl.operand("queue", cl.bank, stop=True))
    s = logit_scale * sim
    z = cl.logaddexp(cl.logsumexp(s, over=cl.cols), cl.logsumexp(old, over=cl.bank))
    return cl.mean(z - cl.at_positive(s, on=cl.rows), over=cl.rows)


@cl.define_loss
def moco(sim, logit_scale):
    """The positive against a ``queue`` [B, D] alone (He et al. 2020; temperature 0.07 there)."""
    old = logit_scale * cl.similarity(cl.x, cl.operand("queue", cl.bank, stop=True))
    positive = cl.at_positive(logit_scale * sim, on=cl.rows)
    z = cl.logaddexp(positive, cl.logsumexp(old, over=cl.bank))
    return cl.mean(z - positive, over=cl.rows)
