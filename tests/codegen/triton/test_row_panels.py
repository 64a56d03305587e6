"""``panel`` in Triton: whole rows of exponentials, multiplied out at once, against float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cl_compiler import compile_loss
from cl_compiler.plan.types import Problem
from cl_compiler.runtime.loader import load_source
from tests import losses_zoo as zoo
from tests.codegen.triton.emit import REAL, emit, served

pytest.importorskip("triton")

from tests.codegen.triton import offline
from tests.codegen.triton.launches import Launch, record
from tests.codegen.triton.test_interpreter import (
    KINDS,
    ROUNDED_GRADIENT,
    SPLIT,
    assert_right,
    tolerance,
)
from tests.codegen.triton.test_offline import SHARED_BYTES, assert_sound, own_cache

__all__ = ["own_cache"]

Ask = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[3]
CASES = {case.name: case for case in zoo.cases() if case.name in served("panel")}


def test_losses_whose_gradient_waits_for_row_sums_only_are_served():
    assert set(CASES) == {"infonce", "infonce_paired", "dcl", "dcl_paired"}


# -- numbers -------------------------------------------------------------------------------------


def quick_or_full(names: list[str]) -> list[Any]:
    quick = ("infonce", "dcl")
    return [n if n in quick else pytest.param(n, marks=pytest.mark.full) for n in names]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", quick_or_full(list(CASES)))
def test_against_float64(interpret: Ask, name: str, dtype: str):
    """Positives in the sums and outside of them; two panels, both ragged."""
    answer = interpret(case=name, dtype=dtype, arch=KINDS[dtype], schedule="panel")
    assert set(answer["gradients"]) == CASES[name].needs
    assert not answer["tripped"]
    assert_right(answer, bound=12.0, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["infonce", "dcl"])
def test_panels_that_are_made_again(interpret: Ask, name: str, dtype: str):
    """The guard trips for every panel: maxima first, then exponentials relative to them."""
    answer = interpret(
        case=name, dtype=dtype, arch=KINDS[dtype], schedule="panel", force=True, seed=3
    )
    assert answer["tripped"]
    assert_right(answer, bound=12.0, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_logit_scales(interpret: Ask, scale: float, dtype: str):
    parameters = {"logit_scale": scale}
    answer = interpret(
        case="infonce",
        dtype=dtype,
        arch=KINDS[dtype],
        schedule="panel",
        parameters=parameters,
        d=64,
        seed=4,
    )
    assert_right(answer, bound=scale, dtype=dtype)


def test_one_panel_trips_and_the_other_does_not(interpret: Ask):
    """A row that is far from every column, at scale 100: the first panel of 16 rows has it."""
    answer = interpret(
        case="infonce",
        dtype="float32",
        schedule="panel",
        parameters={"logit_scale": 100.0},
        opposed=True,
        m=20,
        n=20,
        d=8,
        stretch=1.6,
    )
    assert answer["tripped"]
    assert_right(answer, bound=256.0, dtype="float32")


def test_operands_of_any_length(interpret: Ask):
    answer = interpret(case="infonce", dtype="float32", schedule="panel", stretch=4.0, seed=6)
    assert_right(answer, bound=16 * 7.0, dtype="float32")


def test_products_in_bf16x3(interpret: Ask):
    answer = interpret(case="infonce", dtype="float32", precision="bf16x3", schedule="panel")
    found = tolerance(12.0, "float32", "") + SPLIT * 12
    assert max(answer["errors"].values()) <= found + 4 * SPLIT


@pytest.fixture(scope="module")
def trained(interpret: Ask) -> dict[str, float]:
    """Rows that all but equal their positives: each gradient is what rounding would hide."""
    answer = interpret(
        case="infonce_paired",
        dtype="bfloat16",
        schedule="panel",
        parameters={"logit_scale": 20.0},
        aligned=True,
        m=32,
        n=32,
        d=32,
        seed=7,
    )
    errors: dict[str, float] = answer["errors"]
    return errors


def test_gradients_at_positives_are_not_rounded(trained: dict[str, float]):
    """p - 1 where p is almost 1: in bf16, p would be off by 2**-9, which is more than p - 1."""
    assert trained["x"] <= tolerance(20.0, "bfloat16", "x") + ROUNDED_GRADIENT


# -- launches ------------------------------------------------------------------------------------


def launches(name: str, arch: str, width: int) -> tuple[ModuleType, list[Launch]]:
    source = emit(
        CASES[name],
        dtype="bfloat16",
        width=width,
        arch=arch,
        panel=REAL,
        core=None,
        schedule="panel",
    )
    module = load_source(source, f"row_panels_{name}_{arch}_{width}")
    return module, record(module, CASES[name], 16384, 16384, width, torch.bfloat16)


@pytest.mark.parametrize("name", quick_or_full(list(CASES)))
def test_the_host_never_waits_for_the_device(name: str):
    """Otherwise ``meta`` tensors, which have no data, raise.  Three kernels a panel."""
    sweeps = [x.kernel for x in launches(name, "sm_90", 512)[1] if "sweep" in x.kernel]
    kinds = ("bounded", "maxima", "safe")
    assert sweeps == [f"_forward_sweep_{kind}_kernel" for _ in range(2) for kind in kinds]


def test_emitted_text_has_no_dead_names_and_no_long_lines(tmp_path: Path):
    for name in ("infonce", "dcl"):
        for arch in ("sm_90", "sm_80"):
            case = CASES[name]
            text = emit(
                case,
                dtype="bfloat16",
                width=512,
                arch=arch,
                panel=REAL,
                core=None,
                schedule="panel",
            )
            (tmp_path / f"{name}_{arch}.py").write_text(text)
    config = str(ROOT / "pyproject.toml")
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", config, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 0, run.stdout + run.stderr


# -- plans ---------------------------------------------------------------------------------------


def test_the_plan_for_a_loss_that_can_use_it_has_three_units():
    problem = Problem(1 << 16, 1 << 16, 512, "bfloat16")
    loss_fn = compile_loss("h100x1", "2GiB", loss="infonce", problem=problem)
    plan = loss_fn.plan
    assert (plan.template, plan.schedule, plan.units) == ("triton", "panel", 3)
    assert plan.tile.cols == 1 << 16
    assert dict(plan.memory)["a panel of gradients"] == 2 * plan.tile.rows * plan.tile.cols
    assert plan.peak_bytes <= 2 << 30
    assert f"TILE_M, TILE_N = {plan.tile.rows}, {plan.tile.cols}" in loss_fn.source


@pytest.mark.parametrize("loss", ["siglip", "entropy", "weighted", "nt_xent"])
def test_what_has_no_panels_says_why_and_runs_as_pytorch_tiles(loss: str):
    case = next(c for c in zoo.cases() if c.name == loss)
    problem = Problem(4096, 4096, 64, "bfloat16")
    plan = compile_loss("h100x1", "1GiB", loss=case.loss, problem=problem, schedule="panel").plan
    assert plan.template == "torch"
    assert any("'panel' has " in note for note in plan.notes)


# -- machine code --------------------------------------------------------------------------------


@pytest.mark.skipif(
    not offline.has_disassembler(), reason="this build of Triton has no disassembler"
)
@pytest.mark.parametrize(
    ("name", "arch", "width"),
    [
        pytest.param(
            n, a, w, marks=[] if (n, a, w) == ("infonce", "sm_90", 256) else pytest.mark.full
        )
        for n in ("infonce", "dcl")
        for a in SHARED_BYTES
        for w in (128, 256, 512)
    ],
)
def test_nothing_spills(name: str, arch: str, width: int):
    module, found = launches(name, arch, width)
    first = {x.kernel: x for x in reversed(found) if "sweep" in x.kernel}
    for kernel in first:
        binary = offline.build(module, first[kernel], arch)
        assert_sound(binary, arch)
        if arch == "sm_90" and "bounded" in kernel:
            assert binary.per_logit("MUFU") <= 1.05
            assert binary.counts.get("UTMASTG", 0) >= 1
