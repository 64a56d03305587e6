"""``recompute``: gradients in registers, against float64, and the machine code that holds them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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
from tests.codegen.triton.test_interpreter import KINDS, assert_right
from tests.codegen.triton.test_offline import SHARED_BYTES, assert_sound, own_cache

__all__ = ["own_cache"]

Ask = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[3]
CASES = {case.name: case for case in zoo.cases() if case.name in served("recompute")}
QUICK = {"clip", "nt_xent", "siglip", "gist_relative", "matryoshka"}
"""Each way to own gradients: both sides, one set twice, statistics, several operands, prefixes."""


def quick_or_full(names: list[str], quick: set[str] = QUICK) -> list[Any]:
    return [n if n in quick else pytest.param(n, marks=pytest.mark.full) for n in names]


def launches(name: str, arch: str, width: int, rows: int = 16384, **options: Any) -> list[Launch]:
    source = emit(
        CASES[name],
        width=width,
        arch=arch,
        panel=REAL,
        core=None,
        schedule="recompute",
        **{"dtype": "bfloat16", **options},
    )
    module = load_source(source, f"recomputed_{name}_{arch}_{width}")
    dtype = getattr(torch, options.get("dtype", "bfloat16"))
    return record(module, CASES[name], rows, rows, width, dtype)


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick_or_full(list(CASES)))
def test_zoo_in_fp32(interpret: Ask, name: str):
    """Width 20 in parts of 16: the second part is ragged."""
    answer = interpret(case=name, dtype="float32", schedule="recompute")
    assert set(answer["gradients"]) == CASES[name].needs
    assert_right(answer, bound=12.0, dtype="float32")


@pytest.mark.parametrize("name", quick_or_full(list(CASES), {"clip", "nt_xent", "siglip"}))
def test_zoo_in_16_bits(interpret: Ask, name: str):
    dtype = ("float16", "bfloat16")[list(CASES).index(name) % 2]
    answer = interpret(
        case=name, dtype=dtype, arch=KINDS[dtype], schedule="recompute", m=16, n=33, d=24, seed=2
    )
    assert_right(answer, bound=12.0, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["clip", "nt_xent", "siglip"])
def test_operands_that_stay_on_the_chip(interpret: Ask, name: str, dtype: str):
    """One block as deep as the operands are wide, through descriptors and through pointers."""
    arch = KINDS[dtype]
    answer = interpret(
        case=name, dtype=dtype, arch=arch, schedule="recompute", resident=True, seed=3
    )
    assert_right(answer, bound=12.0, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_logit_scales(interpret: Ask, scale: float, dtype: str):
    answer = interpret(
        case="clip",
        dtype=dtype,
        arch=KINDS[dtype],
        schedule="recompute",
        parameters={"logit_scale": scale},
        d=64,
        seed=4,
    )
    assert_right(answer, bound=scale, dtype=dtype)


@pytest.mark.parametrize("name", ["clip", "nt_xent", "entropy"])
def test_the_safe_kernels_alone(interpret: Ask, name: str):
    answer = interpret(
        case=name, dtype="float32", arch="gfx942", schedule="recompute", force=True, seed=5
    )
    assert answer["tripped"]
    assert_right(answer, bound=12.0, dtype="float32")


def test_operands_of_any_length(interpret: Ask):
    answer = interpret(case="clip", dtype="float32", schedule="recompute", stretch=4.0, seed=6)
    assert_right(answer, bound=16 * 7.0, dtype="float32")


def test_small_gradients_of_fp16_inputs_are_not_lost(interpret: Ask):
    """At scale 100 most are far below what fp16 holds; in bf16 each keeps its eight bits."""
    answer = interpret(
        case="clip_ids",
        dtype="float16",
        arch="sm_80",
        schedule="recompute",
        parameters={"logit_scale": 100.0},
        d=64,
        seed=7,
    )
    assert_right(answer, bound=100.0, dtype="float16")


# -- launches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick_or_full(list(CASES), {"clip", "matryoshka"}))
def test_the_host_never_waits_and_makes_no_panel_of_gradients(name: str):
    """Otherwise ``meta`` tensors, which have no data, raise."""
    owners = [x for x in launches(name, "sm_90", 512) if "PART_D" in x.constants]
    assert owners
    assert not any(n.startswith("g_") for x in owners for n in x.signature)


def test_programs_own_all_rows_and_all_columns_of_gradients():
    owners = [x for x in launches("clip", "sm_90", 768, rows=16640) if "PART_D" in x.constants]
    for launch in owners:
        block = launch.constants["BLOCK_M" if "_a_" in launch.kernel else "BLOCK_N"]
        parts = -(-768 // launch.constants["PART_D"])
        assert launch.grid == (-(-16640 // block), parts)
    assert {x.kernel for x in owners} == {
        f"_backward_sweep_{side}_{mode}_kernel" for side in "ab" for mode in ("bounded", "running")
    }


def test_emitted_text_of_the_zoo_has_no_dead_names_and_no_long_lines(tmp_path: Path):
    for name, case in CASES.items():
        if name not in ("clip", "nt_xent", "matryoshka"):
            continue
        for arch in ("sm_90", "sm_80"):
            text = emit(
                case,
                dtype="bfloat16",
                width=256,
                arch=arch,
                panel=REAL,
                core=None,
                schedule="recompute",
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


def test_a_plan_on_request_takes_no_workspace():
    problem = Problem(1 << 16, 1 << 16, 512, "bfloat16")
    plans = {
        s: compile_loss("h100x1", "2GiB", loss="clip", problem=problem, schedule=s).plan
        for s in ("auto", "recompute")
    }
    plan = plans["recompute"]
    assert (plan.template, plan.schedule) == ("triton", "recompute")
    assert "a panel of gradients" not in dict(plan.memory)
    assert plan.peak_bytes < plans["auto"].peak_bytes
    assert plan.units == 7  # the forward's one; for each side two parts that make S, one product
    assert plans["auto"].schedule == "spill"


# -- machine code --------------------------------------------------------------------------------


def binaries(
    name: str,
    arch: str,
    width: int,
    dtype: str = "bfloat16",
    precision: str = "ieee",
    mode: str = "",
) -> list[offline.Binary]:
    """Every kernel that owns gradients (of one mode, if that is given), each once."""
    source = emit(
        CASES[name],
        dtype=dtype,
        width=width,
        arch=arch,
        panel=REAL,
        core=None,
        precision=precision,
        schedule="recompute",
    )
    module = load_source(source, f"recomputed_{name}_{arch}_{width}_{dtype}")
    found = record(module, CASES[name], 16384, 16384, width, getattr(torch, dtype))
    first = {x.kernel: x for x in reversed(found) if "PART_D" in x.constants}
    return [
        offline.build(module, first[kernel], arch) for kernel in sorted(first) if mode in kernel
    ]


needs_disassembler = pytest.mark.skipif(
    not offline.has_disassembler(), reason="this build of Triton has no disassembler"
)


@needs_disassembler
@pytest.mark.parametrize(
    ("name", "arch", "width"),
    [
        pytest.param(
            n, a, w, marks=[] if (n, a, w) == ("infonce", "sm_90", 256) else pytest.mark.full
        )
        for n in ("clip", "infonce", "nt_xent", "siglip")
        for a in SHARED_BYTES
        for w in (128, 256, 768)
    ]
    + [pytest.param(n, "sm_80", 128, marks=pytest.mark.full) for n in ("dcl_views", "qwen3")]
    + [  # rows that descriptors cannot copy
        pytest.param(n, a, w, marks=pytest.mark.full)
        for n, w in (("clip", 250), ("nt_xent", 100))
        for a in ("sm_90", "sm_100")
    ],
)
def test_nothing_spills(name: str, arch: str, width: int):
    for binary in binaries(name, arch, width):
        assert_sound(binary, arch)


@needs_disassembler
@pytest.mark.full
@pytest.mark.xfail(reason="Triton 3.7.1: 16 to 48 bytes in the backward's kernels", strict=False)
def test_nothing_spills_of_rows_of_odd_length():
    for binary in binaries("clip", "sm_80", 99):
        assert_sound(binary, "sm_80")


@needs_disassembler
def test_owned_operands_in_registers_leave_room_for_the_rest():
    """On Ampere, where they are loaded once, and rows keep what rounding takes off positives."""
    for binary in binaries("clip", "sm_80", 128, mode="bounded"):
        assert_sound(binary, "sm_80")


@needs_disassembler
@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
@pytest.mark.parametrize("name", ["matryoshka", "mnrl_hard", "gist_relative"])
def test_several_matrices_fit_beside_each_other(name: str, arch: str):
    """Three similarities, several gradients, prefixes: registers, and shared memory for all."""
    for binary in binaries(name, arch, 256):
        assert_sound(binary, arch)


@needs_disassembler
@pytest.mark.full
@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("float16", "fp16"), ("float32", "bf16x3"), ("float32", "tf32"), ("float32", "ieee")],
)
def test_nothing_spills_in_other_precisions(dtype: str, precision: str, arch: str):
    if arch == "gfx942" and precision == "tf32":
        pytest.skip("the plan refuses it there")
    for binary in binaries("clip", arch, 256, dtype, precision):
        assert binary.stack_bytes == 0, binary.kernel
        assert binary.matrix_instructions > 0 or precision == "ieee"


@needs_disassembler
@pytest.mark.full
def test_hopper_multiplies_gradients_from_registers():
    """A gradient tile goes into its product as it lies: one exponential, no store of it."""
    for binary in binaries("infonce", "sm_90", 128):
        assert binary.counts.get("HMMA", 0) == 0
        assert any(name.startswith("HGMMA.64x") for name in binary.variants)
        if "bounded" in binary.kernel:
            assert binary.per_logit("MUFU") <= 1.05
            assert binary.counts.get("STS", 0) * 32 * 8 <= 2 * 128 * 128  # the gradient, once
