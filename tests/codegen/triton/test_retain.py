"""``retain``: exponentials that the forward keeps, against float64, as code and as a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cl_compiler.codegen.backend import plan_of
from cl_compiler.codegen.triton.support import obstacle
from cl_compiler.hardware import load_hardware
from cl_compiler.lang.schedules import valid_schedules
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan import MemoryBudget, Problem, Request
from cl_compiler.plan.types import Plan
from cl_compiler.runtime.loader import load_source
from tests import losses_zoo as zoo
from tests.codegen.triton.emit import REAL, emit
from tests.codegen.triton.emit import plan_of as plan_of_case

pytest.importorskip("triton")

from tests.codegen.triton import offline
from tests.codegen.triton.launches import record
from tests.codegen.triton.offline import Binary
from tests.codegen.triton.test_interpreter import KINDS, tolerance
from tests.codegen.triton.test_offline import SHARED_BYTES, assert_sound, own_cache

__all__ = ["own_cache"]

Ask = Callable[..., dict[str, Any]]
CASES = {case.name: case for case in zoo.cases()}


KEEPING = {"clip", "infonce", "dcl", "label_smoothing", "weighted", "debiased", "debiased_rows"}
KEEPING |= {"debiased_clamped"}
KEEPING |= {f"{name}_paired" for name in KEEPING} | {"moco", "moco_paired"}


@pytest.mark.full
def test_these_losses_of_the_zoo_have_kernels_that_keep():
    found = set()
    for case in zoo.cases():
        sweeps = plan_sweeps(case.loss, case.positives, case.needs)
        if not valid_schedules(sweeps)["retain"]:
            plan, program = plan_of_case(case, "bfloat16", 24, REAL, schedule="retain")
            found |= set() if obstacle(plan.problem, program) else {case.name}
    assert found == KEEPING


def assert_right(answer: dict[str, Any], bound: float) -> None:
    """Twice rounded: the exponential, and the gradient that is made of it."""
    wrong = {}
    for name, error in answer["errors"].items():
        allowed = tolerance(bound, "bfloat16", name)
        allowed += 2.0**-9 * (name != "value")
        if not error <= allowed:
            wrong[name] = error
    assert not wrong, wrong


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("clip", "bfloat16"),
        ("clip", "float16"),
        *(
            pytest.param(n, d, marks=pytest.mark.full)
            for n in sorted(KEEPING - {"clip"})
            for d in ("bfloat16", "float16")
        ),
    ],
)
def test_against_float64(interpret: Ask, name: str, dtype: str):
    """Through descriptors and through pointers; positives kept apart, and excluded."""
    answer = interpret(
        case=name, dtype=dtype, arch=KINDS[dtype], schedule="retain", m=21, n=37, d=24, seed=3
    )
    assert set(answer["gradients"]) == CASES[name].needs
    assert not answer["tripped"]
    assert_right(answer, bound=12.0)


@pytest.mark.full
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_logit_scales(interpret: Ask, scale: float):
    answer = interpret(
        case="clip",
        dtype="bfloat16",
        schedule="retain",
        parameters={"logit_scale": scale},
        d=64,
        seed=4,
    )
    assert_right(answer, bound=scale)


def test_rows_that_found_their_positives_keep_their_small_gradients(interpret: Ask):
    """There a gradient is 1 - p with p almost 1: a p that was rounded to bf16 would give any."""
    answer = interpret(
        case="clip",
        dtype="bfloat16",
        schedule="retain",
        parameters={"logit_scale": 12.0},
        aligned=True,
        m=37,
        n=37,
        d=64,
        seed=5,
    )
    assert_right(answer, bound=12.0)


@pytest.mark.full
def test_safe_kernels_read_nothing_that_was_kept(interpret: Ask):
    answer = interpret(case="clip", dtype="bfloat16", schedule="retain", d=24, force=True, seed=6)
    assert answer["tripped"]
    assert_right(answer, bound=12.0)


# -- machine code --------------------------------------------------------------------------------


def compiled(name: str, arch: str, mode: str) -> dict[str, Binary]:
    source = emit(
        CASES[name],
        dtype="bfloat16",
        width=512,
        arch=arch,
        panel=REAL,
        core=None,
        schedule="retain",
    )
    module = load_source(source, f"retain_{name}_{arch}")
    launches = record(module, CASES[name], offline.ROWS, offline.ROWS, 512, torch.bfloat16)
    first = {launch.kernel: launch for launch in reversed(launches)}
    return {k: offline.build(module, first[k], arch) for k in first if f"_{mode}_kernel" in k}


@pytest.mark.parametrize(
    ("name", "arch"),
    [("clip", "sm_90"), *(pytest.param(n, a, marks=pytest.mark.full)
      for n in sorted(KEEPING) for a in SHARED_BYTES if (n, a) != ("clip", "sm_90"))],
)  # fmt: skip
def test_a_tile_is_stored_once_and_read_once(name: str, arch: str):
    found = compiled(name, arch, "bounded")
    forward = found["_forward_sweep_bounded_kernel"]
    backward = found["_backward_sweep_bounded_kernel"]
    assert_sound(forward, arch)
    assert backward.stack_bytes == backward.matrix_instructions == 0
    assert backward.shared_bytes * 2 <= SHARED_BYTES[arch]
    if arch in ("sm_90", "sm_100"):
        assert forward.counts["UTMASTG"] == 1
        assert backward.counts["UTMALDG"] == backward.counts["UTMASTG"] == 1
        assert backward.counts.get("MUFU", 0) == 0


@pytest.mark.full
@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_safe_kernels_do_not_spill(arch: str):
    for binary in compiled("clip", arch, "running").values():
        assert_sound(binary, arch)


# -- the plan ------------------------------------------------------------------------------------


def planned(
    width: int,
    budget: str,
    hardware: str = "h100x1",
    dtype: Any = "bfloat16",
    rows: int = 32768,
) -> Plan:
    loss, needs = find("clip"), frozenset({"x", "y", "logit_scale"})
    request = Request(
        loss,
        load_hardware(hardware),
        MemoryBudget.parse(budget),
        Problem(rows, rows, width, dtype),
        "paired",
        needs,
        "bf16" if dtype == "bfloat16" else "bf16x3",
    )
    return plan_of(request, plan_sweeps(loss, "paired", needs))


def test_it_is_taken_where_it_fits_and_is_faster():
    kept = planned(512, "8GiB")
    assert (kept.schedule, kept.template, kept.units) == ("retain", "triton", 3.0)
    assert dict(kept.memory)["kept exponentials"] == 2 * 32768**2 + 4 * 32768
    other = next(c for c in kept.rejected if c.schedule == "spill")
    assert other.seconds > 1.05 * kept.seconds


def test_it_is_not_taken_where_it_does_not_fit_or_memory_is_what_takes_long():
    assert planned(512, "1GiB").schedule == "spill"
    assert planned(256, "8GiB").schedule == "spill"
    assert planned(256, "8GiB", "a100x1").schedule == "retain"


def test_only_16_bit_operands_have_it():
    plan = planned(512, "16GiB", dtype="float32")
    assert plan.schedule == "spill"
    reason = next(c.reason for c in plan.rejected if c.schedule == "retain")
    assert "16-bit operands, not for float32" in reason
