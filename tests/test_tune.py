"""Candidates run where the loss runs; the fastest is kept, with what was measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cl_compiler import Problem, compile_loss
from cl_compiler import tune as tuning
from cl_compiler.codegen.backend import candidates_of
from cl_compiler.errors import ArgumentError, CompilerError
from cl_compiler.hardware import load_hardware
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.types import MemoryBudget, Request
from cl_compiler.tune import Measured, Tuning, random_inputs, tune
from tests import losses_zoo as zoo

CASES = {case.name: case for case in zoo.cases()}


pytestmark = pytest.mark.usefixtures("one_thread")


def asked(rows: int = 512, *, budget: str = "8MiB", loss: str = "clip", **more) -> Request:
    ir = find(loss)
    needs = frozenset({op.name for op in ir.operands} | set(ir.parameters))
    positives = "views" if ir.is_single_set else "paired"
    hardware = more.pop("hardware", load_hardware("auto"))
    problem = Problem(rows, rows, 32)
    return Request(ir, hardware, MemoryBudget.parse(budget), problem, positives, needs, **more)


def sweeps_of(request: Request):
    return plan_sweeps(request.loss, request.positives, request.needs)


def test_candidates_fit_and_differ():
    request = asked(2048)
    found = candidates_of(request, sweeps_of(request), 8)
    assert 4 <= len(found) <= 8
    assert all(p.peak_bytes <= 8 << 20 for p in found)
    assert len({(p.schedule, p.tile, p.kept_tiles) for p in found}) == len(found)
    assert [p.seconds for p in found] == sorted(p.seconds for p in found)


def test_candidates_of_a_gpu_are_panels():
    request = asked(1 << 15, budget="1GiB", hardware=load_hardware("h100x1"), precision="bf16x3")
    found = candidates_of(request, sweeps_of(request), 6)
    assert len(found) >= 3 and {p.template for p in found} == {"triton"}


def test_the_fastest_candidate_is_kept_and_says_so():
    request = asked()
    result = tune(request, sweeps_of(request), "test", most=3, repeats=2)
    assert (result.rows, result.cols) == (512, 512)
    assert [m.seconds for m in result.measured] == sorted(m.seconds for m in result.measured)
    assert all(0 < m.seconds < 60 and not m.error for m in result.measured)
    plan = result.plan
    assert plan.schedule == result.best.plan.schedule and plan.tile == result.best.plan.tile
    assert f"fastest of {len(result.measured)} measured at 512x512" in plan.notes[0]
    assert all("times as long" in c.reason for c in plan.rejected)
    assert len(plan.rejected) == len(result.measured) - 1


def test_large_problems_are_measured_with_fewer_rows_and_as_many_tiles_kept():
    request = asked(8192, budget="16MiB")
    result = tune(request, sweeps_of(request), "test", most=2, repeats=1, longest_s=0.02)
    assert 512 <= result.rows < 8192 and result.cols == result.rows
    assert result.best.plan.problem.M == 8192
    kept = f"KEPT_TILES = {result.best.plan.kept_tiles}"
    assert (kept in result.best.source) == bool(result.best.plan.kept_tiles)


def test_compile_loss_tunes_once(monkeypatch):
    measured = []

    def quick(*given):
        measured.append(given)
        return tune(*given, most=2, repeats=1)

    monkeypatch.setattr(tuning, "tune", quick)
    x, y = torch.randn(2, 96, 24, dtype=torch.float64, requires_grad=True)
    values = []
    for _ in range(2):
        loss_fn = compile_loss("auto", "4MiB", loss="clip", tune=True)
        values.append(loss_fn(x, y, logit_scale=3.0))
        assert any("measured at 96x96" in note for note in loss_fn.plan.notes)
    assert len(measured) == 1
    plain = compile_loss("auto", "4MiB", loss="clip")(x, y, logit_scale=3.0)
    assert abs(values[0].item() - plain.item()) < 1e-12
    untuned = compile_loss("auto", "4MiB", problem="96x96x24").plan
    assert not any("measured" in note for note in untuned.notes)


@pytest.mark.parametrize("name", ["clip_ids", "gist", "hard_negatives", "supcon", "moco"])
def test_every_argument_of_a_loss_is_drawn(name: str):
    if name not in CASES:
        pytest.skip(f"the zoo has no {name}")
    case = CASES[name]
    problem = Problem(64, 64, 16, slots=3, bank=20)
    request = Request(
        case.loss, load_hardware("auto"), MemoryBudget.parse("64MiB"), problem, case.positives,
        case.needs,
    )  # fmt: skip
    result = tune(request, sweeps_of(request), "test", most=1, repeats=1)
    assert not result.best.error
    drawn = random_inputs(request, 64, 64, torch.device("cpu"))
    assert all(torch.isfinite(t).all() for t in drawn.values())


def test_a_machine_that_is_not_here_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ArgumentError, match=r"there is no GPU here\. Tune on the machine itself"):
        compile_loss("h100x1", "1GiB", problem="4096x4096x64", tune=True)


def test_a_candidate_that_fails_is_a_row_and_all_failing_is_an_error(monkeypatch):
    real, count = tuning._step, []

    def broken(module, inputs, device):
        count.append(module)
        if len(count) == 1 or broken.always:

            def fail():
                raise RuntimeError("no such tile")

            return fail
        return real(module, inputs, device)

    broken.always = False
    monkeypatch.setattr(tuning, "_step", broken)
    request = asked()
    result = tune(request, sweeps_of(request), "test", most=2, repeats=1)
    assert result.measured[-1].error == "RuntimeError: no such tile"
    assert result.plan.rejected[-1].reason == "RuntimeError: no such tile"
    broken.always = True
    with pytest.raises(CompilerError, match=r"none of 2 candidates ran on cpu; .* no such tile"):
        tune(request, sweeps_of(request), "test", most=2, repeats=1)


def test_rank_correlation_is_spearmans():
    request = asked()
    (plan,) = candidates_of(request, sweeps_of(request), 1)

    def result(predicted, measured):
        rows = [
            Measured(replace(plan, seconds=p), "", m)
            for p, m in zip(predicted, measured, strict=True)
        ]
        return Tuning(1, 1, tuple(rows)).rank_correlation

    assert result([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert result([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert result([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert math.isnan(result([1, 2], [1, 2]))
