"""Losses that compare what is elsewhere with the value at the positive, which rounding may change.

``similar`` compares nothing: it is of positives alone.
"""

from __future__ import annotations

from cl_compiler import lang as cl
from tests.zoo_case import Case


@cl.define_loss
def similar(logit_scale):
    """Minus the mean logit of the positives, whose gradient there is a number."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    return -cl.mean(cl.at_positive(s, on=cl.rows), over=cl.rows)


@cl.define_loss
def semi_hard(logit_scale):
    """Negatives that are less similar than the positive; the positive is not."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    p = cl.at_positive(s, on=cl.rows)
    return cl.mean(cl.sum(cl.relu(3.0 + s - p), over=cl.cols, where=s < p), over=cl.rows)


@cl.define_loss
def semi_hard_by_a_constant(logit_scale):
    """The same with positives that have no gradient."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    p = cl.stop_gradient(cl.at_positive(s, on=cl.rows))
    near = (cl.stop_gradient(s) > p - 5.0) & (s < p)
    return cl.mean(cl.sum(cl.relu(3.0 + s - p), over=cl.cols, where=near), over=cl.rows)


@cl.define_loss
def rank(logit_scale):
    """How many columns are as similar as the positive, which is one of them."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    p = cl.at_positive(s, on=cl.rows)
    number = cl.count(over=cl.cols, where=s >= p)
    return cl.mean(cl.log(number) - 0.1 * p, over=cl.rows)


@cl.define_loss
def rank_of_columns(logit_scale):
    """The same the other way round."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    p = cl.at_positive(s, on=cl.cols)
    some = cl.sum(cl.exp(s - p), over=cl.rows, where=p <= s)
    return cl.mean(cl.log(1.0 + some) - 0.1 * p, over=cl.cols)


@cl.define_loss
def semi_hard_views(logit_scale):
    """Of two views of one set."""
    s = logit_scale * cl.similarity(cl.z, cl.z)
    p = cl.at_positive(s, on=cl.rows)
    where = (s < p) & ~cl.is_self
    return cl.mean(cl.sum(cl.relu(3.0 + s - p), over=cl.cols, where=where), over=cl.rows)


@cl.define_loss
def wrong_rows(logit_scale):
    """Only rows whose largest similarity is not their positive's."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    p, top = cl.at_positive(s, on=cl.rows), cl.max(s, over=cl.cols)
    right = cl.where(2.0 * p >= 2.0 * top, 1.0, 0.0)
    return cl.mean(cl.relu(1.0 + top - p), over=cl.rows, where=top > p) + cl.mean(
        right, over=cl.rows
    )


@cl.define_loss
def wrong_columns(logit_scale):
    """The same of columns, by constants."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    p, top = cl.at_positive(s, on=cl.cols), cl.stop_gradient(cl.max(s, over=cl.rows))
    wrong = cl.where(cl.stop_gradient(p) < top, 1.0, 0.0)
    return cl.mean(cl.softplus(wrong - 0.1 * p), over=cl.cols)


@cl.define_loss
def wrong_views(logit_scale):
    """Of one set: the largest similarity to another row."""
    s = logit_scale * cl.similarity(cl.z, cl.z)
    p, top = cl.at_positive(s, on=cl.rows), cl.max(s, over=cl.cols, where=~cl.is_self)
    return cl.mean(cl.where(p >= top, cl.softplus(p), top), over=cl.rows)


CASES = {
    f"{loss.name}-{positives}": Case(loss.name, loss, {"logit_scale": 10.0}, positives=positives)
    for loss, positives in (
        (similar, "diagonal"),
        (semi_hard, "diagonal"),
        (semi_hard_by_a_constant, "diagonal"),
        (rank, "diagonal"),
        (rank_of_columns, "diagonal"),
        (rank_of_columns, "paired"),
        (semi_hard_views, "views"),
        (wrong_rows, "diagonal"),
        (wrong_columns, "paired"),
        (wrong_views, "views"),
    )
}
