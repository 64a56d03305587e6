"""Factories of losses, every structure against a dense formula; and what ``losses`` offers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch

from cl_compiler import compile_loss, losses
from cl_compiler.errors import ArgumentError, LossDefinitionError
from cl_compiler.lang.ir import LossIR
from cl_compiler.lang.reference import evaluate
from cl_compiler.losses.retrieval import DIRECTIONS

M, EXTRA, D = 6, 2, 5
SCALE, STRENGTH, MARGIN = 7.0, 3.0, 0.1
NINF = float("-inf")


def unit(rows: int, seed: int) -> torch.Tensor:
    raw = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(raw, dim=1)


def codes(number: torch.Tensor, *, of_rows: bool) -> torch.Tensor:
    """Bits as ±1 and a column more: an inner product of 1 for equal numbers, negative otherwise."""
    bits = 2.0 * ((number[:, None] >> torch.arange(4)) & 1).double() - 1
    last = torch.ones(len(number), 1) if of_rows else torch.full((len(number), 1), -3.0)
    return torch.cat([bits, last.double()], 1)


SUBSETS = [(DIRECTIONS[0], *more) for n in range(4) for more in combinations(DIRECTIONS[1:], n)]


@pytest.mark.parametrize("extra", [0, EXTRA])
@pytest.mark.parametrize(
    "mode", [None, "in_batch_negatives", "hard_negatives", "all_negatives"], ids=str
)
@pytest.mark.parametrize("directions", SUBSETS, ids=lambda d: "+".join(d[1:]) or "one")
@pytest.mark.parametrize("partition", ["joint", "per_direction"])
def test_ranking_in_every_structure(directions, partition, mode, extra):
    loss = losses.mnrl(directions, partition, mode, hard_negatives=extra > 0)
    x = unit(M, 1).requires_grad_()
    first, rest = unit(M, 2).requires_grad_(), unit(M * extra, 3).requires_grad_()
    y = torch.cat([first, rest])
    query, document = torch.arange(M), torch.arange(M).repeat(1 + extra)
    own, positive = query[:, None] == document, torch.eye(M, len(y), dtype=torch.bool)

    sim = x @ y.T
    raised = {
        None: torch.zeros_like(own),
        "in_batch_negatives": ~own,
        "hard_negatives": own & ~positive,
        "all_negatives": ~positive,
    }[mode]
    terms = {
        "query_to_doc": SCALE * sim + STRENGTH * sim.detach() * raised,
        "query_to_query": (SCALE * x @ x.T).masked_fill(torch.eye(M, dtype=torch.bool), NINF),
        "doc_to_query": SCALE * first @ x.T,
        "doc_to_doc": (SCALE * first @ y.T).masked_fill(own, NINF),
    }
    logits = [terms[d] for d in directions]
    if partition == "joint":
        z = torch.logsumexp(torch.cat(logits, 1), 1)
    else:
        z = torch.stack([torch.logsumexp(term, 1) for term in logits]).mean(0)
    expected = (z - SCALE * (x * first).sum(1)).mean()

    given = {"x": x, "y": y, "positives": first}
    given |= {"row_code": codes(query, of_rows=True), "col_code": codes(document, of_rows=False)}
    tensors = {op.name: given[op.name] for op in loss.operands}
    everything = {"logit_scale": SCALE, "hardness_strength": STRENGTH}
    parameters = {name: everything[name] for name in loss.parameters}
    value = evaluate(loss, tensors, parameters)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, first, rest] if extra else [x, first]
    for ours, theirs in zip(
        torch.autograd.grad(value, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("anchors", [False, True])
@pytest.mark.parametrize("positives", [False, True])
@pytest.mark.parametrize("extra", [0, EXTRA])
def test_guided_negatives_in_every_structure(strategy, anchors, positives, extra):
    """Some positives have a negative similarity to the guide (pain 6)."""
    loss = losses.gist(strategy, anchors, positives, hard_negatives=extra > 0)
    given = {"x": unit(M, 1).requires_grad_(), "y": unit(M * (1 + extra), 2).requires_grad_()}
    given |= {"guide_x": unit(M, 3), "guide_y": unit(M * (1 + extra), 4)}
    given |= {"positives": given["y"][:M], "guide_positives": given["guide_y"][:M]}
    own = (given["guide_x"] * given["guide_positives"]).sum(1, keepdim=True)
    assert own.min() < 0 < own.max()
    limit = own - (own.abs() * MARGIN if strategy == "relative" else MARGIN)
    terms = []
    for wanted, a, b in (
        (True, "x", "y"),
        (anchors, "x", "x"),
        (positives, "positives", "positives"),
    ):
        if wanted:
            ga, gb = (f"guide_{name}" for name in (a, b))
            left_out = given[ga] @ given[gb].T > limit
            eye = torch.eye(M, given[b].shape[0], dtype=torch.bool)
            left_out = left_out & ~eye if a != b else left_out | eye
            terms.append((given[a] @ given[b].T).masked_fill(left_out, NINF))
    z = torch.logsumexp(SCALE * torch.cat(terms, 1), 1)
    expected = (z - SCALE * (given["x"] * given["y"][:M]).sum(1)).mean()
    tensors = {op.name: given[op.name] for op in loss.operands}
    value = evaluate(loss, tensors, {"logit_scale": SCALE, "margin": MARGIN})
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(value, [given["x"], given["y"]])
    theirs = torch.autograd.grad(expected, [given["x"], given["y"]])
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_a_prior_for_each_row_may_be_one_for_all():
    tensors = {"x": unit(M, 1).requires_grad_(), "y": unit(M + 3, 2).requires_grad_()}
    parameters = {"logit_scale": 2.0}
    vector = {"tau_plus": torch.full((M,), 0.1, dtype=torch.float64)}
    expected = evaluate(losses.debiased, tensors, {**parameters, "tau_plus": 0.1})
    value = evaluate(losses.debiased_rows, {**tensors, **vector}, parameters)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)


def test_matryoshka_weighs_prefixes_evenly_by_default():
    tensors = {"x": unit(M, 1), "y": unit(M, 2)}
    by_hand = losses.matryoshka((2, 4), (1.0, 1.0))
    value = evaluate(losses.matryoshka([2, 4]), tensors, {"logit_scale": 5.0})
    assert value == evaluate(by_hand, tensors, {"logit_scale": 5.0})


# ---- the package --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", losses.SHIPPED)
def test_a_name_is_a_documented_loss_each_time(name):
    """A module of the same name would take its place after the first import."""
    for _ in range(2):
        loss = getattr(losses, name)
        assert isinstance(loss, LossIR)
        assert loss.name == name
        assert loss.doc


@pytest.mark.parametrize("name", losses.FACTORIES)
def test_a_factory_is_a_function_and_not_a_loss(name):
    for _ in range(2):
        assert callable(getattr(losses, name))
    with pytest.raises(LossDefinitionError, match=rf"Pass what cl_compiler.losses.{name}\(…\)"):
        losses.find(name)


def test_structures_are_told_apart_by_their_constants():
    variants = [losses.gist(s, a) for s in ("absolute", "relative") for a in (False, True)]
    assert len({loss.constants for loss in variants}) == 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: losses.gist("relativ"), "did you mean 'relative'"),
        (lambda: losses.mnrl(("query_to_doc", "doc_to_qery")), "did you mean 'doc_to_query'"),
        (lambda: losses.mnrl(partition_mode="jont"), "did you mean 'joint'"),
        (lambda: losses.mnrl(hardness_mode="all"), "did you mean|use one of in_batch_negatives"),
        (lambda: losses.mnrl("query_to_doc"), "give a tuple with 'query_to_doc'"),
        (lambda: losses.mnrl(("doc_to_query",)), "give a tuple with 'query_to_doc'"),
        (lambda: losses.matryoshka((8, 16), (1.0,)), "2 prefixes and 1 weight:"),
        (lambda: losses.matryoshka((8, 16), 1.0), "2 prefixes and 1 weight:"),
        (lambda: losses.matryoshka((8,), ("a",)), "a number for each prefix"),
        (lambda: losses.matryoshka(None), "numbers of leading columns from 1"),
        (lambda: losses.matryoshka((8, 0)), "numbers of leading columns from 1"),
        (lambda: losses.matryoshka((8, 2.5)), "numbers of leading columns from 1"),
        (lambda: losses.recall_at_k(None), "cut-offs are whole numbers from 1"),
        (lambda: losses.mnrl(None), "give a tuple with 'query_to_doc'"),
        (lambda: losses.recall_at_k((0, 1.5)), "whole numbers from 1"),
        (lambda: losses.recall_at_k(()), "whole numbers from 1"),
    ],
)
def test_what_makes_another_loss_is_refused(make: Callable[[], LossIR], said: str) -> None:
    """A misspelt word must not pick the other structure."""
    with pytest.raises(ArgumentError, match=said):
        make()


def test_one_cut_off_needs_no_tuple() -> None:
    assert losses.recall_at_k(5).constants == losses.recall_at_k((5,)).constants


def rows(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize(
    ("loss", "more", "said"),
    [
        ("queue", {"queue": rows(30, 9)}, "queue has D=9|D=9; both live in one space"),
        ("hard_negatives", {"hard": rows(20, 3, 9)}, "D must be equal"),
        (losses.matryoshka((4,)), {"y": rows(20, 9)}, "D must be equal"),
        (losses.matryoshka((4, 16)), {}, "x has D=8, and the loss reads its first 16 columns"),
    ],
)
def test_widths_are_compared_where_embeddings_are(
    loss: str | LossIR, more: dict[str, torch.Tensor], said: str
) -> None:
    loss_fn = compile_loss("auto", "16MiB", loss=loss)
    with pytest.raises(ArgumentError, match=said):
        loss_fn(**{"x": rows(20, 8), "y": rows(20, 8), **more}, logit_scale=3.0)
