"""Operands that similarities do not compare with x, y or z have a width of their own."""

from __future__ import annotations

import pytest
import torch

from cl_compiler import compile_loss
from cl_compiler import lang as cl
from cl_compiler.plan.types import Tile
from tests import losses_zoo as zoo
from tests.random_losses import draw
from tests.ring.shards import emit_ring, run_group, split
from tests.ring.shards import schedules_of as ring_schedules_of
from tests.tiles import emit, errors, run, schedules_of
from tests.zoo_case import Case, sample


@cl.define_loss
def audio_and_text(sim, logit_scale):
    """Two matrices of logits, of operands of two widths, in one sum."""
    heard = logit_scale * cl.similarity(cl.operand("audio", cl.rows), cl.operand("text", cl.cols))
    seen = logit_scale * sim
    pairs = [cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows) for s in (seen, heard)]
    return cl.mean(pairs[0] + pairs[1], over=cl.rows)


def others(case: Case) -> set[str]:
    """Operands that have nothing to do with x, y and z."""
    near, size = {"x", "y", "z"}, 0
    views = [
        {view.operand for view in (leaf.left, leaf.right) if view is not None}
        for leaf in case.loss.leaves.values()
    ]
    while size != len(near):
        size = len(near)
        near |= {name for names in views if names & near for name in names}
    return {op.name for op in case.loss.operands} - near


TWO = Case("audio_and_text", audio_and_text, {"logit_scale": 3.0})
CASES = {c.name: c for c in (TWO, *zoo.cases(), *map(draw, range(60))) if others(c)}


def prefixes(case: Case) -> int:
    views = (v for leaf in case.loss.leaves.values() for v in (leaf.left, leaf.right) if v)
    return max((view.prefix or 1 for view in views), default=1)


@pytest.mark.parametrize("name", CASES)
def test_every_schedule(name: str) -> None:
    case = CASES[name]
    for width, other in ((6, 9), (9, 4)):
        widths = dict.fromkeys(others(case), max(other, prefixes(case)))
        whole = sample(case, 11, 15, max(width, prefixes(case)), seed=width, widths=widths)
        for schedule in schedules_of(case):
            found = errors(run(emit(case, schedule, width=width), whole), whole)
            assert max(found.values()) < 1e-10, (schedule, found)
        cut = split(case, *whole.is_positive.shape, (2, 0, 1))
        for schedule in ring_schedules_of(case):
            text = emit_ring(case, schedule, width=width, tile=Tile(3, 4))
            found = errors(run_group(text, whole, cut).result, whole)
            assert max(found.values()) < 1e-10, (schedule, found)


@pytest.mark.parametrize("schedule", ["auto", "panel", "recompute"])
def test_a_compiled_loss_of_two_widths(schedule: str) -> None:
    whole = sample(TWO, 300, 300, 64, seed=3, widths={"audio": 32, "text": 32})
    loss_fn = compile_loss("auto", "2MiB", loss=audio_and_text, schedule=schedule)
    given = {n: t.detach().float().requires_grad_() for n, t in whole.tensors.items()}
    value = loss_fn(**given, logit_scale=3.0)
    value.backward()
    wanted = whole.reference()
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    for name, gradient in whole.gradients(wanted).items():
        if name in given:
            torch.testing.assert_close(given[name].grad.double(), gradient, rtol=1e-4, atol=1e-8)
