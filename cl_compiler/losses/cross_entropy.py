"""Cross-entropies over all columns: CLIP, its one-directional half InfoNCE, smoothed targets."""

from cl_compiler import lang as cl


@cl.define_loss
def clip(sim, logit_scale):
    """Symmetric InfoNCE (Radford et al. 2021): the mean of both directions' cross-entropies."""
    s = logit_scale * sim
    rows = cl.mean(cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows), over=cl.rows)
    cols = cl.mean(cl.logsumexp(s, over=cl.rows) - cl.at_positive(s, on=cl.cols), over=cl.cols)
    return (rows + cols) / 2


@cl.define_loss
def infonce(sim, logit_scale):
    """InfoNCE (van den Oord et al. 2018): each row against all columns."""
    s = logit_scale * sim
    return cl.mean(cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows), over=cl.rows)


@cl.define_loss
def label_smoothing(sim, logit_scale, eps):
    """InfoNCE whose target gives ``eps`` to all columns evenly (Szegedy et al. 2016).

    As ``torch.nn.functional.cross_entropy(label_smoothing=eps)``; common is eps = 0.1.
    """
    s = logit_scale * sim
    even = cl.sum(s, over=cl.cols) / cl.size(cl.cols)
    row = cl.logsumexp(s, over=cl.cols) - (1 - eps) * cl.at_positive(s, on=cl.rows) - eps * even
    return cl.mean(row, over=cl.rows)
