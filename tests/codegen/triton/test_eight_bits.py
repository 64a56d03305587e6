"""``precision="fp8"``: similarities of e4m3 copies, as numbers, as machine code, as a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cl_compiler import Problem, compile_loss
from cl_compiler.codegen.backend import plan_of
from cl_compiler.codegen.triton.support import obstacle
from cl_compiler.errors import ArgumentError, HardwareError, ScheduleError
from cl_compiler.hardware import load_hardware
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan import MemoryBudget, Request
from cl_compiler.plan.types import Plan
from tests import losses_zoo as zoo
from tests.codegen.triton.emit import served

pytest.importorskip("triton")

from tests.codegen.triton import offline
from tests.codegen.triton.test_interpreter import KINDS, assert_right, quick_or_full
from tests.codegen.triton.test_offline import assert_sound, own_cache
from tests.codegen.triton.test_retain import KEEPING
from tests.codegen.triton.test_retain import assert_right as assert_right_twice_rounded

__all__ = ["own_cache"]

Ask = Callable[..., dict[str, Any]]
CASES = {case.name: case for case in zoo.cases()}
SERVED = [
    name
    for name, program in served().items()
    if not obstacle(Problem(64, 64, 20, "bfloat16"), program, "fp8")
]


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick_or_full(SERVED))
def test_operands_that_e4m3_has_lose_nothing(interpret: Ask, name: str):
    """Then every similarity is exact, and all the rest is as it is with 16-bit products."""
    dtype = ("float16", "bfloat16")[SERVED.index(name) % 2]
    answer = interpret(
        case=name, dtype=dtype, arch=KINDS[dtype], precision="fp8", e4m3=True,
        m=21, n=37, d=32, seed=2,
    )  # fmt: skip
    assert set(answer["gradients"]) == CASES[name].needs
    assert_right(answer, bound=12.0, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "schedule", "force"),
    [
        ("clip", "spill", True),
        ("nt_xent", "spill", True),
        ("infonce", "panel", False),
        ("clip", "retain", False),
        *(pytest.param(n, "retain", f, marks=pytest.mark.full)
          for n in sorted(KEEPING) for f in (False, True)),
    ],
)  # fmt: skip
def test_other_schedules_and_safe_kernels_read_the_copies(
    interpret: Ask, name: str, schedule: str, force: bool
):
    answer = interpret(
        case=name, dtype="bfloat16", precision="fp8", schedule=schedule, e4m3=True,
        force=force, m=37, n=37, d=32, seed=3,
    )  # fmt: skip
    assert not force or answer["tripped"]
    assert_right_twice_rounded(answer, bound=12.0)


@pytest.mark.parametrize(("scale", "aligned"), [(1.0, True), (14.3, True), (100.0, False)])
def test_other_operands_lose_what_four_bits_lose(interpret: Ask, scale: float, aligned: bool):
    """Also rows that found their positives, most of whose gradient is a difference: statistics and
    tiles lose the same, so that the difference is off by a part of itself.

    An element of e4m3 is off by at most 2**-4 of itself, by 2**-5.6 as a root mean square; so is
    an inner product of D = 64 such elements by 2**-5.1 / sqrt(64) of the product of its norms.
    """
    answer = interpret(
        case="clip", dtype="bfloat16", precision="fp8", parameters={"logit_scale": scale},
        aligned=aligned, m=64, n=64, d=64, seed=4,
    )  # fmt: skip
    logit = scale * 2.0**-5.1 / 8
    assert answer["errors"]["value"] <= 4 * logit
    assert max(answer["errors"].values()) <= 4 * logit + 2.5e-3


def test_statistics_and_tiles_of_one_rounding_keep_small_gradients():
    """The reason for copies in the backward, too: exact tiles beside statistics of rounded ones
    leave a confident row a gradient that is the difference of both."""
    generator = torch.Generator().manual_seed(6)
    noise = torch.randn(2, 1024, 512, dtype=torch.float64, generator=generator)
    x, other = torch.nn.functional.normalize(noise, dim=2)
    y = torch.nn.functional.normalize(0.2 * x + 0.8 * other, dim=1)

    def rounded(t: torch.Tensor) -> torch.Tensor:
        unit = t.abs().max() / 448
        return (t / unit).to(torch.float8_e4m3fn).double() * unit

    def gradient(tiles: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
        p = torch.exp(tiles - statistics.logsumexp(1, keepdim=True))
        q = torch.exp(tiles - statistics.logsumexp(0, keepdim=True))
        return ((p + q) / 2 - torch.eye(1024)) @ y

    logits, narrow = 100 * x @ y.T, 100 * rounded(x) @ rounded(y).T
    exact = gradient(logits, logits)
    errors = [
        float((gradient(tiles, narrow) - exact).norm() / exact.norm()) for tiles in (narrow, logits)
    ]
    assert errors[0] < 0.1 and errors[1] > 1


# -- machine code --------------------------------------------------------------------------------


@pytest.mark.skipif(not offline.has_disassembler(), reason="Triton without a disassembler")
@pytest.mark.parametrize(
    ("name", "arch"),
    [("clip", "sm_90"), *(pytest.param(n, a, marks=pytest.mark.full)
      for n in SERVED for a in ("sm_90", "sm_100") if (n, a) != ("clip", "sm_90"))],
)  # fmt: skip
def test_matrix_instructions_take_eight_bits(name: str, arch: str):
    found = offline.binaries(CASES[name], arch, 512, "bfloat16", "fp8")
    for binary in found:
        if not binary.matrix_instructions:  # a count of ids has none
            continue
        assert_sound(binary, arch)
        eight = sum(n for kind, n in binary.counts.items() if "Q" in kind and "MMA" in kind)
        assert eight == binary.matrix_instructions, binary.counts


# -- plans ---------------------------------------------------------------------------------------


def planned(precision: str, loss: str = "clip", schedule: str = "auto", **more: Any) -> Plan:
    ir, needs = find(loss), frozenset({"x", "y", "logit_scale"})
    request = Request(
        ir,
        load_hardware(more.get("hardware", "h100x1")),
        MemoryBudget.parse("2GiB"),
        Problem(65536, 65536, 512, "bfloat16"),
        "paired",
        needs,
        precision,
        schedule,
    )
    return plan_of(request, plan_sweeps(ir, "paired", needs))


def test_the_plan_counts_copies_and_faster_products():
    narrow, wide = planned("fp8"), planned("bf16")
    assert narrow.template == wide.template == "triton"
    assert dict(narrow.memory)["operands in fp8"] == 2 * 65536 * 512
    assert dict(narrow.seconds_by_part)["products of the library"] == pytest.approx(
        dict(wide.seconds_by_part)["products of the library"]
    )
    assert dict(narrow.seconds_by_part)["kernels"] < 0.7 * dict(wide.seconds_by_part)["kernels"]


def test_what_has_no_such_kernels_is_refused():
    with pytest.raises(ScheduleError, match=r"'recompute' multiplies what it loaded.*'auto'"):
        planned("fp8", schedule="recompute")
    with pytest.raises(ArgumentError, match=r"h100x8 has 8 devices.*group_size=8"):
        planned("fp8", hardware="h100x8")
    with pytest.raises(ArgumentError, match="only 16-bit inputs are multiplied in fp8"):
        compile_loss("h100x1", "1GiB", problem=Problem(64, 64, 16, "float32"), precision="fp8")
    for hardware in ("a100x1", "rtx4090x1", "mi300x1"):
        with pytest.raises(
            HardwareError, match=r"no such products \(kernels with them are for sm_90 and sm_100\)"
        ):
            compile_loss(hardware, "1GiB", problem=Problem(64, 64, 16, "bfloat16"), precision="fp8")


def test_losses_with_slots_are_refused():
    slotted = [n for n, p in served().items() if any(q.is_slots for q in p.passes)]
    assert slotted and not set(slotted) & set(SERVED)
