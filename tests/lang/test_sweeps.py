"""How often tiles are made, what is kept between sweeps, and that text is the same everywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cl_compiler.lang.sweeps import SweepPlan, plan_sweeps
from tests import losses_zoo as zoo

ROOT = Path(__file__).parents[2]
CASES = {case.name: case for case in zoo.cases()}


def plan_of(name: str, *needs: str) -> SweepPlan:
    case = CASES[name]
    return plan_sweeps(case.loss, case.positives, frozenset(needs) if needs else case.needs)


def matrix_levels(plan: SweepPlan) -> list[int]:
    """Levels at which similarity tiles are made; counting ids makes none."""
    return sorted({s.level for s in plan.sweeps if s.similarities})


@pytest.mark.parametrize("name", CASES)
def test_sweeps_before_and_after_the_value(name):
    case, plan = CASES[name], plan_of(name)
    levels = matrix_levels(plan)
    forward = [level for level in levels if level <= plan.forward_levels]
    assert (len(forward), len(levels) - len(forward)) == (case.forward, case.backward)
    assert plan.is_fused == (case.backward == 0)


@pytest.mark.parametrize("name", CASES)
def test_the_value_alone_makes_no_more_than_the_forward_sweeps(name):
    case = CASES[name]
    plan = plan_sweeps(case.loss, case.positives, frozenset())
    assert len(matrix_levels(plan)) == case.forward
    assert plan.saved == () and not any(s.gradients for s in plan.sweeps)


def test_a_gradient_that_nobody_needs_is_not_formed():
    """A locked tower of the guide: no tile of its gradient."""
    both = plan_of("distillation")
    student = plan_of("distillation", "x", "y")
    gradients = {g for s in both.sweeps for g in s.gradients}
    assert gradients == {"logits", "logits_teacher_x_teacher_y"}
    assert {g for s in student.sweeps for g in s.gradients} == {"logits"}


@pytest.mark.parametrize(
    ("name", "monoids"),
    [
        ("clip", ["logsumexp", "logsumexp"]),
        ("infonce", ["logsumexp"]),
        ("dcl", ["logsumexp"]),
        ("nt_xent", ["logsumexp"]),
        ("supcon", ["logsumexp", "sum"]),  # lse and the count of positives
        ("siglip", []),
        ("squared_hinge", []),
        ("recall_at_k", ["sum", "sum", "sum"]),  # rank, and its derivative in sim and in tau
        ("mnrl_joint", ["logsumexp"] * 4),
        ("gist", ["logsumexp"] * 3),
        ("batch_hard", ["max"]),
    ],
)
def test_what_a_sweep_leaves_for_the_backward(name, monoids):
    plan = plan_of(name)
    kept = [plan.by_name[n].monoid for n in plan.saved if n in plan.by_name]
    assert sorted(kept) == sorted(monoids)


def test_single_positives_need_no_sweep():
    """The positive's similarity is a row vector computed in O(M·D), not a reduction of tiles."""
    plan = plan_of("infonce")
    assert plan.leaves["logits_pos"].axes == ("rows",)
    assert [r.monoid for s in plan.sweeps for r in s.reductions] == ["logsumexp"]


def test_many_positives_share_the_forward_sweep():
    plan = plan_of("supcon")
    assert [sorted(r.monoid for r in s.reductions) for s in plan.sweeps] == [
        ["logsumexp", "sum", "sum"],
        [],
    ]


def test_a_set_with_itself_needs_half_of_its_tiles():
    symmetric = {s.grid: s.symmetric for s in plan_of("mnrl_joint").sweeps}
    assert symmetric == {
        ("rows", "cols"): False,
        ("rows", "rows2"): True,
        ("cols", "cols2"): True,
    }


def test_a_logit_scale_is_read_off_the_gradients():
    """dL/dscale is <x, dx>: no sum over pairs, and none at all when the scale is fixed."""
    plan = plan_of("clip")
    assert plan.gradient is not None
    assert plan.gradient.dots["logit_scale"] == (("x", 1),)
    assert not any(r.monoid == "sum" for s in plan.sweeps for r in s.reductions)


def test_the_same_statistic_twice_is_one_reduction():
    """Entropy's logsumexp is that of its softmean."""
    plan = plan_of("entropy")
    (first, *_) = plan.sweeps
    assert sorted(r.monoid for r in first.reductions) == ["logsumexp", "softmean"]


@pytest.mark.parametrize(
    ("name", "possible"),
    [("infonce", True), ("recall_at_k", True), ("clip", False), ("siglip", False)],
)
def test_row_panels_are_for_losses_without_a_column_statistic(name, possible):
    assert (plan_of(name).panel_sweeps is not None) == possible


SCRIPT = """
from cl_compiler.lang.graph import graph_to_json, loss_graph
from cl_compiler.lang.sweeps import plan_sweeps
from tests.losses_zoo import cases
from tests.random_losses import draw
for case in (*cases()[::3], *(draw(seed) for seed in range(5))):
    plan = plan_sweeps(case.loss, case.positives, case.needs)
    print(repr((case.loss, plan.ir, plan.gradient, plan.nodes, plan.levels, plan.sweeps)))
    print(plan.saved, plan.late_positives, graph_to_json(loss_graph(plan)))
"""


def test_text_does_not_depend_on_hashing():
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (0, 4)
    ]
    texts = {process.communicate()[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(texts) == 1 and len(texts.pop()) > 10_000
