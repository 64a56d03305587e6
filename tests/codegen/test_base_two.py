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
CARRIED = ("clip", "infonce", "nt_xent", "supcon")
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
def test_products_carry_the_factor_where_only_exponentials_read_them(
    name: str, library: str
) -> None:
    source = emit(CASES[name], dtype="float32", library=library, exponential="exp2")
    bounded, running = sweep(source, "bounded"), sweep(source, "running")
    assert ".exp2_()" in bounded and "mul_(LOG2E)" not in bounded
    assert re.search(r"logit_scale\.item\(\) \* LOG2E", bounded)
    assert running.count(".mul_(LOG2E)\n") == running.count(".exp2_()") > 0
    assert not re.search(r"\.exp_\(\)|torch\.exp\(t", source)


def test_tiles_that_others_read_too_are_multiplied() -> None:
    """The similarity itself is in the gradient of its own power."""
    for seed in range(200):
        case = draw(seed)
        if {"spill", "recompute"} & set(schedules_of(case)):
            source = emit(case, schedules_of(case)[0], dtype="float32", exponential="exp2")
            if "LOG2E, out=" in source:
                break
    else:
        pytest.fail("no random loss has such a tile")
    made = re.search(r"torch\.mul\((\w+), LOG2E, out=(\w+)\)\n +(\w+)\.exp2_\(\)", source)
    assert made and made[2] == made[3] != made[1]


def test_vectors_that_cancel_tiles_share_their_base() -> None:
    """Positives are subtracted from sums of exponentials: both stay to base e."""
    case = CASES["debiased_rows"]
    for schedule in schedules_of(case):
        assert "exp2" not in emit(case, schedule, dtype="float32", exponential="exp2")


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


@pytest.mark.parametrize("name", [*CARRIED, "sinkhorn"])
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
