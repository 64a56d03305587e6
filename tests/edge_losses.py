"""Losses whose masks leave nothing for some rows, and whose untaken branches are not finite.

Each has an excluded infinity somewhere: 1/0, log(0), an empty logsumexp or maximum.  The value is
finite and so must every gradient be; ``0 * inf`` anywhere on the way shows as NaN.  ``samples()``
returns inputs for which the hole is really there.
"""

from __future__ import annotations

import torch

from cl_compiler import lang as cl
from cl_compiler.lang import reference
from tests.zoo_case import Case, Sample


def _positives_only(pair):
    """The sum of ``pair(sim, k, offset)`` over positives; rows without one have k = 0."""

    @cl.define_loss
    def positives_only(sim, offset):
        k = cl.count(over=cl.cols, where=cl.is_positive)
        return cl.sum(
            cl.sum(pair(sim, k, offset), over=cl.cols, where=cl.is_positive), over=cl.rows
        )

    return positives_only


inverse_count = _positives_only(lambda sim, k, offset: cl.softplus(offset - sim) / k)
inverse_count_scaled = _positives_only(lambda sim, k, offset: cl.softplus(-offset * sim) / k)
log_count = _positives_only(lambda sim, k, offset: cl.softplus(offset - sim) * cl.log(k))
selected_weight = _positives_only(
    lambda sim, k, offset: cl.where(cl.is_positive, 1 / k, 0) * cl.softplus(offset - sim)
)


@cl.define_loss
def empty_logsumexp_as_factor(sim, offset):
    lse = cl.logsumexp(offset * sim, over=cl.cols, where=cl.is_positive)
    pairs = cl.sigmoid(offset * sim) * lse
    return cl.sum(cl.sum(pairs, over=cl.cols, where=cl.is_positive), over=cl.rows)


@cl.define_loss
def empty_logsumexp_inside(sim, offset):
    lse = cl.logsumexp(offset * sim, over=cl.cols, where=cl.is_positive)
    pairs = cl.sigmoid(offset * sim - lse)
    return cl.sum(cl.sum(pairs, over=cl.cols, where=cl.is_positive), over=cl.rows)


@cl.define_loss
def empty_logsumexp_of_log(sim, offset):
    lse = cl.logsumexp(cl.log(0.3 + cl.softplus(offset * sim)), over=cl.rows, where=sim > 0.5)
    return cl.mean(cl.exp(cl.sigmoid(cl.logaddexp(lse, 0.66))), over=cl.cols)


@cl.define_loss
def empty_softmean(sim, offset):
    value = cl.softmean(sim, cl.log(0.3 + cl.softplus(offset * sim)), over=cl.rows, where=sim > 0.5)
    return cl.mean(cl.exp(value), over=cl.cols)


@cl.define_loss
def empty_maximum(sim, offset):
    largest = cl.max(offset * sim, over=cl.cols, where=cl.is_positive)
    pairs = cl.sigmoid(offset * sim) * largest
    return cl.sum(cl.sum(pairs, over=cl.cols, where=cl.is_positive), over=cl.rows)


@cl.define_loss
def untaken_root(sim, offset):
    root = cl.where(sim > 0.1, cl.sqrt(offset * sim) + cl.log(sim), 0)
    return cl.sum(cl.sum(root, over=cl.cols), over=cl.rows)


@cl.define_loss
def floor_reached(sim, offset):
    s = offset * sim
    gap = cl.logsubexp(
        cl.logsumexp(s, over=cl.cols), cl.at_positive(s, on=cl.rows) + offset, -0.55617
    )
    return cl.mean(gap, over=cl.rows)


@cl.define_loss
def two_kinks(sim, offset):
    pairs = cl.relu(offset * sim) + cl.relu(offset * sim + 0.2317)
    other = cl.where(sim > 0.1, cl.relu(offset * sim - 0.2), cl.relu(offset * sim + 0.3)) ** 2
    return cl.mean(cl.sum(pairs + 0.89017 * other, over=cl.cols), over=cl.rows)


def samples() -> tuple[Sample, ...]:
    """One sample per loss, by ids where positives matter: rows 2 and 4 have none."""
    by_ids = {
        "inverse_count": inverse_count,
        "inverse_count_scaled": inverse_count_scaled,
        "log_count": log_count,
        "selected_weight": selected_weight,
        "empty_logsumexp_as_factor": empty_logsumexp_as_factor,
        "empty_logsumexp_inside": empty_logsumexp_inside,
        "empty_maximum": empty_maximum,
    }
    diagonal = {
        "empty_logsumexp_of_log": empty_logsumexp_of_log,
        "empty_softmean": empty_softmean,
        "untaken_root": untaken_root,
        "floor_reached": floor_reached,
        "two_kinks": two_kinks,
    }
    ids = {"row_ids": torch.tensor([0, 1, 9, 1, 3]), "col_ids": torch.tensor([0, 1, 1, 2, 5, 6])}
    drawn = [_sample(Case(n, f, {"offset": 2.0}, positives="ids"), ids) for n, f in by_ids.items()]
    return (*drawn, *(_sample(Case(n, f, {"offset": 2.0}), {}) for n, f in diagonal.items()))


def _sample(case: Case, ids: dict[str, torch.Tensor]) -> Sample:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, length in (("x", 5), ("y", 6)):
        raw = torch.randn(length, 4, generator=generator, dtype=torch.float64)
        tensors[name] = torch.nn.functional.normalize(raw, dim=1).requires_grad_()
    offset = torch.tensor(case.parameters["offset"], dtype=torch.float64, requires_grad=True)
    mask = reference.positive_mask(case.loss, 5, 6, **ids)
    return Sample(case, tensors, {"offset": offset}, ids, mask)
