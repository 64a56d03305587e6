"""Gradients of rows that leave a sweep block by block: which do, and what that takes."""

from collections.abc import Callable
from typing import Any

import pytest

from cl_compiler import Problem, compile_loss
from cl_compiler.codegen.triton.row_gradients import leaving_operands
from cl_compiler.lang.program import Program
from cl_compiler.lang.schedules import build_program
from cl_compiler.lang.sweeps import plan_sweeps
from tests import losses_zoo as zoo

CASES = {case.name: case for case in zoo.cases()}
OPERANDS = frozenset({"x", "y", "logit_scale"})


def spilled(name: str, needs: frozenset[str] | None = None) -> Program:
    case = CASES[name]
    sweeps = plan_sweeps(case.loss, case.positives, case.needs if needs is None else needs)
    return build_program(sweeps, "spill")


@pytest.mark.parametrize(
    ("name", "leaving"),
    [
        ("clip", ("x",)),
        ("nt_xent", ()),  # a tile stands for its transpose: rows get something later
        ("siglip", ()),  # value and gradients in one sweep: what they are scaled by comes later
        ("matryoshka", ()),  # every prefix adds its part
        ("distillation", ("x", "teacher_x")),
    ],
)
def test_rows_that_one_pass_completes_leave(name: str, leaving: tuple[str, ...]):
    assert leaving_operands(spilled(name), "bfloat16") == leaving
    assert leaving_operands(spilled(name), "float32") == ()


def test_a_locked_tower_has_no_gradient_that_could_leave():
    assert leaving_operands(spilled("clip", OPERANDS - {"x"}), "float16") == ()
    assert leaving_operands(spilled("clip", OPERANDS - {"y"}), "float16") == ("x",)


@pytest.mark.parametrize("needs", [OPERANDS, OPERANDS - {"y"}, OPERANDS - {"logit_scale"}])
def test_blocks_of_rows_add_up(interpret: Callable[..., dict[str, Any]], needs: frozenset[str]):
    """Three blocks of 16 rows, the last one ragged, and columns without a positive."""
    answer = interpret(
        case="clip", dtype="bfloat16", arch="sm_90", m=41, n=57, seed=5, needs=sorted(needs)
    )
    assert set(answer["gradients"]) == needs
    assert all(error < 2.5e-3 for error in answer["errors"].values()), answer["errors"]


def test_a_million_rows_fit_in_little_more_than_their_gradients():
    """dY in fp32 and in bf16, and dX in bf16: 2 GiB at D = 256."""
    problem = Problem(1 << 20, 1 << 20, 256, "bfloat16")
    loss_fn = compile_loss("h100x1", "2.2GiB", loss="clip", problem=problem)
    assert loss_fn.plan.template == "triton"
    assert 2 << 30 < loss_fn.plan.peak_bytes <= 2.2 * (1 << 30)
