"""Every loss of the zoo in fp32 tiles is as exact as dense fp32 PyTorch, in every schedule."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from cl_compiler.lang.differences import cancelling
from cl_compiler.lang.rewrite import remainder
from cl_compiler.lang.schedules import build_program
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.plan.types import Tile
from tests import losses_zoo as zoo
from tests.dense_fp32 import WIDTH, features, in_fp32, limits, misses
from tests.tiles import emit, load, run, schedules_of
from tests.zoo_case import Case, Sample

CASES = {case.name: case for case in zoo.cases()}
SUBTRACTING = ("debiased", "debiased_rows", "hard_negatives", "mnrl_joint")
"""Gradients are functions of differences of statistics."""
WEIGHING = ("mnrl_hard", "sinkhorn", "dual_softmax", "dual_softmax_paired")
"""Weights are exponentials less a logsumexp, at large scales or at any."""
SHARING = ("clip", "infonce", "siglip", "nt_xent", "supcon")
"""One shared exponential makes their weights, unless logits are too large for it."""


def check(case: Case, samples: list[Sample], library: str = "blas") -> None:
    allowed = [limits(whole) for whole in samples]
    for schedule in schedules_of(case):
        source = emit(
            case,
            schedule,
            dtype="float32",
            tile=Tile(12, 17),
            width=WIDTH,
            library=library,
            exponential="exp2" if library == "onednn" else "exp",
        )
        for number, whole in enumerate(samples):
            beyond = misses(whole, run(source, in_fp32(whole)), allowed[number])
            assert not beyond, (schedule, number, beyond)


def near_floor(case: Case, above: float, seed: int) -> Sample:
    """Priors for which corrected negatives are ``above`` times the floor above it, where one is.

    Where a row's negatives outweigh its positive no prior below 1 does it; it keeps its own.
    """
    whole = features(case, None, False, seed)
    with torch.no_grad():
        scale = whole.parameters["logit_scale"]
        e = torch.exp(scale * whole.tensors["x"] @ whole.tensors["y"].T)
        positive = (e * whole.is_positive).sum(1)
        negative = (e * ~whole.is_positive).sum(1) / (e.shape[1] - 1)
        estimate = (1 + above) * torch.exp(-scale)
        prior = ((negative - estimate) / (positive - estimate)).float()
        possible = (prior > 0) & (prior < 0.95)
        whole.tensors["tau_plus"][possible] = prior[possible].double()
    assert int(possible.sum()) > len(possible) // 2
    return whole


@pytest.mark.parametrize("name", SUBTRACTING)
def test_what_differences_are_made_of_is_as_exact_as_dense_fp32(name: str) -> None:
    check(CASES[name], [features(CASES[name], None, False, seed) for seed in range(2)])


@pytest.mark.parametrize("name", WEIGHING)
def test_weights_of_large_logits_are_as_exact_as_dense_fp32(name: str) -> None:
    """At a logit of 400 a logsumexp in fp32 is off by 1.5e-5, the same for a row's every weight."""
    check(CASES[name], [features(CASES[name], 100.0, True, seed) for seed in range(2)])


@pytest.mark.parametrize("name", [*WEIGHING, *SHARING])
def test_a_logsumexp_is_subtracted_in_two_parts_where_it_is_in_weights(name: str) -> None:
    """Where one shared exponential serves, and in fp64, it is not."""
    case = CASES[name]
    passes = build_program(plan_sweeps(case.loss, case.positives, case.needs), "spill").passes
    modes = {
        mode
        for pass_ in passes
        for mode, code in pass_.programs.items()
        if any(expr.has(remainder) for expr, _ in code.hoisted.values())
    }
    nested = name == "sinkhorn"  # logits less a logsumexp
    assert modes == (
        {"bounded", "running"} if nested else set() if name == "siglip" else {"running"}
    )
    assert ("_remainder(" in emit(case, "spill", dtype="float32", width=WIDTH)) == bool(modes)
    assert "_remainder(" not in emit(case, "spill", dtype="float64", width=WIDTH)


@pytest.mark.parametrize("above", [1.0, 0.1])
def test_a_row_near_the_floor_is_as_exact_as_dense_fp32(above: float) -> None:
    """Its sum of negatives and its positive's term agree in all but a few per cent."""
    case = CASES["debiased_rows"]
    check(case, [near_floor(case, above, seed) for seed in range(2)])


@pytest.mark.parametrize("name", ["supcon", "gist_relative", "row_temperature"])
def test_running_maxima_are_as_exact_as_dense_fp32(name: str) -> None:
    """Logits too large for one shared exponential; a set's own tiles stand for their transposes."""
    check(CASES[name], [features(CASES[name], 100.0, True, seed) for seed in (10, 12)])


@pytest.mark.parametrize("name", ["dual_softmax", "debiased_clamped_paired"])
def test_what_positives_are_subtracted_from_is_as_exact_as_dense_fp32(name: str) -> None:
    """A similarity of a row with its positive cancels what a tile holds there."""
    regimes = [(None, 7), (14.3, 3)]
    check(CASES[name], [features(CASES[name], scale, True, seed) for scale, seed in regimes])


@pytest.mark.parametrize("library", ["blas", "onednn"])
def test_entropies_of_shifted_logits_are_as_exact_as_dense_fp32(library: str) -> None:
    """Little is left of a logsumexp less a mean: what shifts them must round neither."""
    case = CASES["entropy"]
    check(case, [features(case, 100.0, False, seed) for seed in (4, 9, 18, 31)], library)


def test_totals_that_cancel_are_as_exact_as_dense_fp32() -> None:
    """The gradient of beta is of three totals, each of them much larger."""
    case = CASES["dual_softmax"]
    check(case, [features(case, None, True, seed) for seed in (3, 6)])


def test_the_only_tile_is_added_up_in_fp64_a_few_rows_at_a_time() -> None:
    module: Any = load(emit(CASES["dual_softmax"], "dense", dtype="float32", width=WIDTH))
    tile = torch.randn(37, 53, generator=torch.Generator().manual_seed(0))
    for module.SUMMED_AT_ONCE in (1, 53 * 5, 53 * 37):
        for dim in (0, 1):
            torch.testing.assert_close(module._sum(tile, dim), tile.double().sum(dim))


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_every_loss_is_as_exact_as_dense_fp32(name: str) -> None:
    """Its own parameters and logit scales of 1, 14.3 and 100, with rows of length 1 and of any.

    All of it takes four minutes on one core.
    """
    case = CASES[name]
    regimes = itertools.product((None, 1.0, 14.3, 100.0), (False, True), range(4))
    check(case, [features(case, *regime) for regime in regimes])


BY_ONEDNN = [
    name
    for name, case in CASES.items()
    if not build_program(
        plan_sweeps(case.loss, case.positives, case.needs), "spill"
    ).subtracts_positives
]
"""What plans may have oneDNN multiply."""


@pytest.mark.parametrize("name", SHARING)
def test_products_by_onednn_are_as_exact_as_dense_fp32(name: str) -> None:
    regimes = itertools.product((None, 100.0), (False, True))
    check(CASES[name], [features(CASES[name], *regime, 20) for regime in regimes], "onednn")


@pytest.mark.full
@pytest.mark.parametrize("name", BY_ONEDNN)
def test_every_loss_by_onednn_is_as_exact_as_dense_fp32(name: str) -> None:
    regimes = itertools.product((None, 1.0, 14.3, 100.0), (False, True), range(4))
    check(CASES[name], [features(CASES[name], *regime) for regime in regimes], "onednn")


def wide(case: Case) -> frozenset[str]:
    return build_program(plan_sweeps(case.loss, case.positives, case.needs), "spill").wide


def test_only_what_is_subtracted_is_wider_than_tiles() -> None:
    """Logsumexps are in any loss: running maxima subtract them in two parts."""
    found = {name: set(wide(CASES[name])) for name in SHARING}
    one, two = {"r0"}, {"r0", "r5"}
    assert found == {"clip": two, "infonce": one, "siglip": set(), "nt_xent": one, "supcon": one}
    plan = plan_sweeps(CASES["debiased"].loss, "diagonal", CASES["debiased"].needs)
    found = {plan.leaves[n].kind for n in wide(CASES["debiased"])}
    assert found == {"reduction", "similarity_at_positive"}
    read = {"a_r1"}  # the tile's factor for each row
    assert not read & wide(CASES["debiased"])


@pytest.mark.parametrize(
    ("name", "sums"),
    {
        "dual_softmax": {"t2", "t4", "t6", "t7"},
        "hard_weighted": {"t0", "t2"},
        "siglip": set(),  # d bias is one total
        "row_temperature": set(),  # a vector's gradient
        "recall_at_k": set(),  # totals of vectors that the loss makes anyway
    }.items(),
)
def test_sums_are_wider_than_tiles_where_a_scalars_gradient_is_several(
    name: str, sums: set[str]
) -> None:
    case = CASES[name]
    assert cancelling(plan_sweeps(case.loss, case.positives, case.needs)) == sums
    assert sums <= wide(case)
    for schedule in schedules_of(case):
        source = emit(case, schedule, dtype="float32", width=WIDTH)
        modes = build_program(plan_sweeps(case.loss, case.positives, case.needs), schedule).modes
        found = source.count("0.0, dtype=torch.float64)") + source.count(" = _sum(")
        assert found == len(sums) * len(modes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_in_fp64_are_what_a_files_vectors_are(dtype: str) -> None:
    """The statistics that are saved for the backward, as the planner counts them."""
    case = CASES["debiased_rows"]
    source = emit(case, "spill", dtype=dtype, width=WIDTH)
    names = {"row_lse", "logits_pos"}
    for name in names:
        assert f'"{name}": {name}' in source
    assert source.count(".double()") >= len(names)
    assert ".double()" not in emit(case, "spill", dtype="float64", width=WIDTH)
