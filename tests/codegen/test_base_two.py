"""Tiles whose exponentials are to base 2: formulas, what carries the factor, and who gets it."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

import pytest
import torch

from cl_compiler.hardware import load_hardware
from cl_compiler.losses import find
from cl_compiler.plan.search import choose_plan
from cl_compiler.plan.types import Plan, Tile
from tests import losses_zoo as zoo
from tests.plan.requests import request
from tests.random_losses import draw
from tests.tiles import emit, errors, run, schedules_of
from tests.zoo_case import Case, sample

ZEN4 = load_hardware("epyc-zen4-2c")
CASES = {case.name: case for case in zoo.cases()}
TILES = (Tile(3, 4), Tile(5, 2), Tile(4, 64))
CARRIED = ("clip", "infonce", "nt_xent", "dcl")
"""Losses whose products only one shared exponential reads."""


def assert_right(case: Case, seed: int) -> None:
    rng = Random(seed)
    for schedule in schedules_of(case):
        source = emit(case, schedule, tile=rng.choice(TILES), exponential="exp2")
        found = errors(run(source, sample(case, seed=seed)), sample(case, seed=seed))
        assert max(found.values()) < 1e-9, (schedule, found, source)


@pytest.mark.full  # beside oneDNN's products, which such machines have: test_onednn
@pytest.mark.parametrize("name", CASES)
def test_zoo(name: str) -> None:
    assert_right(CASES[name], seed=4)


@pytest.mark.full
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_losses(first: int) -> None:
    for seed in range(first, first + 20):
        assert_right(draw(seed), seed)


def sweep(source: str, mode: str) -> str:
    """The text of the backward's pass in one mode."""
    found = re.search(rf"\ndef _backward_sweep_{mode}\(.*?\n\n\n", source, re.DOTALL)
    assert found
    return found.group()


@pytest.mark.parametrize("library", ["blas", "onednn"])
@pytest.mark.parametrize("name", CARRIED)
def test_products_carry_the_factor(name: str, library: str) -> None:
    source = emit(CASES[name], dtype="float32", library=library, exponential="exp2")
    bounded, running = sweep(source, "bounded"), sweep(source, "running")
    assert re.search(r"logit_scale\.item\(\) \* LOG2E", bounded)
    assert ".exp2_()" in bounded and ".exp_()" not in bounded
    assert ".exp_()" in running and "exp2" not in running and "LOG2E" not in running


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("supcon", "its forward adds logits up, too"),
        ("sinkhorn", "logsumexps are subtracted from logits"),
        ("gist", "three shifts, of which one may be unsafe"),
        ("debiased_rows", "positives, to base e, are subtracted from sums"),
        ("siglip", "no shared exponential"),
    ],
)
def test_all_of_a_program_or_none_of_it(name: str, why: str) -> None:
    """Sums of exponentials and weights that are divided by them are rounded alike."""
    for schedule in schedules_of(CASES[name]):
        text = emit(CASES[name], schedule, dtype="float32", exponential="exp2")
        assert "exp2" not in text, why


def planned(**options: object) -> Plan:
    return choose_plan(request(find("clip"), **{"hardware": ZEN4, **options}))  # type: ignore[arg-type]


def test_a_plan_takes_the_faster_function() -> None:
    plan = planned()
    assert plan.exponential == "exp2"
    slow = planned(hardware=replace(ZEN4, exp2_per_s=ZEN4.exp_per_s))
    assert slow.exponential == "exp"
    seconds = [dict(p.seconds_by_part)["exponentials"] for p in (plan, slow)]
    assert seconds[1] / seconds[0] == pytest.approx(ZEN4.exp2_per_s / ZEN4.exp_per_s)
    assert planned(hardware="xeon-amx-2c").exponential == "exp"
    assert planned(dtype="float64", budget="512MiB").exponential == "exp"
    assert planned(rows=128, width=64).exponential == "exp"


def test_a_gpu_keeps_its_own() -> None:
    """Kernels have exponentials of their own, and PyTorch's tiles there were not measured."""
    gpu = load_hardware("a100x1")
    assert choose_plan(request(find("clip"), gpu)).exponential == "exp"


@pytest.mark.parametrize("name", CARRIED)
def test_what_is_not_finite_goes_where_it_goes_to_base_e(name: str) -> None:
    case = CASES[name]
    for schedule in schedules_of(case):
        texts = [emit(case, schedule, exponential=e) for e in ("exp", "exp2")]
        for bad in (torch.nan, torch.inf, -torch.inf):
            found = []
            for text in texts:
                inputs = sample(case, seed=6)
                first = next(iter(inputs.tensors))
                with torch.no_grad():
                    inputs.tensors[first][1, -1] = bad
                found.append(run(text, inputs))
            e, two = found
            assert torch.equal(e.value.isnan(), two.value.isnan())
            for n, gradient in e.gradients.items():
                assert torch.equal(gradient.isfinite(), two.gradients[n].isfinite()), n
