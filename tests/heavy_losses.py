"""Losses that multiply exponentials by large numbers before their sum divides these.

Where rows are all but their own positives, logits attain the bound that their norms give.
"""

from __future__ import annotations

from cl_compiler import lang as cl
from tests.zoo_case import Case


@cl.define_loss
def expected_logit(logit_scale):
    """The mean of the logits, each weighted with its probability: as large as the logits are."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    rows = cl.mean(cl.softmean(s, s, over=cl.cols), over=cl.rows)
    return rows + cl.mean(cl.softmean(s, s, over=cl.rows), over=cl.cols)


@cl.define_loss
def row_weights(logit_scale):
    """Logits times a number of the row, whose gradient sums what exponentials weigh."""
    s = logit_scale * cl.similarity(cl.x, cl.y) * cl.row_input("weight")
    return cl.mean(cl.logsumexp(s, over=cl.cols), over=cl.rows)


@cl.define_loss
def col_weights(logit_scale):
    """Logits times a large number of the column, which comes after the exponential."""
    s = logit_scale * cl.similarity(cl.x, cl.y) * cl.col_input("weight")
    return cl.mean(cl.logsumexp(s, over=cl.cols), over=cl.rows)


@cl.define_loss
def large_values(logit_scale):
    """Values so large that an exponential of logits that need no shift takes them out of range."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    values = cl.softmean(cl.exp(s), s, over=cl.cols)
    return cl.mean(cl.log(values), over=cl.rows)


def case_of(loss, *inputs: str) -> Case:
    return Case(
        loss.name,
        loss,
        {"logit_scale": 1.0},
        ranges=dict.fromkeys(inputs, (0.9, 1.0)),
    )


CASES = {
    "expected_logit": case_of(expected_logit),
    "row_weights": case_of(row_weights, "weight"),
    "col_weights": case_of(col_weights, "weight"),
    "large_values": case_of(large_values),
}
