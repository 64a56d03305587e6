"""Emitted kernels in Triton's interpreter against the dense float64 reference.

Samples of 21 by 37 in tiles of 16 and panels of 16 by 32 have whole, ragged and several panels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from cl_compiler.errors import ScheduleError
from tests import losses_zoo as zoo
from tests.codegen.triton.emit import emit, served

Ask = Callable[..., dict[str, Any]]

CASES = {case.name: case for case in zoo.cases()}
SERVED = list(served())
QUICK = {"clip", "clip_ids", "nt_xent", "siglip", "gist", "entropy", "sinkhorn", "batch_hard"}


def quick_or_full(names: list[str]) -> list[Any]:
    """Each construct of the language always, all losses in the long run."""
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in names]


KINDS = {"float32": "sm_90", "float16": "sm_80", "bfloat16": "sm_90"}
"""dtype → architecture: descriptors and pointers both occur."""

HALF_ULP = 2.0**-24
ROUNDED_GRADIENT = 2.0**-8
"""A gradient tile in bf16: half an ulp is 2**-9, twice that for sums in which terms cancel."""


def tolerance(bound: float, dtype: str, name: str) -> float:
    """Of fp32 statistics of logits up to ``bound``: each product, sum and exponential rounds.

    An error of half an ulp in a logit is a relative one of bound * 2**-24 in its exponential; eight
    roundings of that size (product, scale, shift, exponential, sums) cover every loss of the zoo.
    """
    rounding = 8 * HALF_ULP * (4 + bound)
    return rounding if dtype == "float32" or name == "value" else rounding + ROUNDED_GRADIENT


def assert_right(answer: dict[str, Any], bound: float, dtype: str) -> None:
    errors = answer["errors"]
    wrong = {n: e for n, e in errors.items() if not e <= tolerance(bound, dtype, n)}
    assert not wrong, wrong


@pytest.mark.parametrize("name", SERVED)
def test_zoo_in_fp32(interpret: Ask, name: str):
    answer = interpret(case=name, dtype="float32")
    assert set(answer["gradients"]) == CASES[name].needs
    assert_right(answer, bound=12.0, dtype="float32")


@pytest.mark.parametrize("name", quick_or_full(SERVED))
def test_zoo_in_16_bits(interpret: Ask, name: str):
    """fp16 through pointers and bf16 through descriptors, in turn, on other sizes and ids."""
    dtype = ("float16", "bfloat16")[SERVED.index(name) % 2]
    answer = interpret(case=name, dtype=dtype, arch=KINDS[dtype], m=16, n=33, d=24, seed=2)
    assert_right(answer, bound=12.0, dtype=dtype)


GUARDED = [n for n, p in served().items() if "bounded" in p.modes and not p.fused]


@pytest.mark.parametrize("name", quick_or_full(GUARDED))
def test_zoo_where_the_guard_trips(interpret: Ask, name: str):
    """The safe kernels alone, on an architecture without assembly."""
    answer = interpret(case=name, dtype="float32", arch="gfx942", force=True, seed=3)
    assert answer["tripped"]
    assert_right(answer, bound=12.0, dtype="float32")


@pytest.mark.parametrize("schedule", ["spill", "recompute"])
@pytest.mark.parametrize("layout", ["apart", "transposed", "shifted"])
@pytest.mark.parametrize("name", ["clip", "siglip", "hard_negatives"])
def test_operands_that_do_not_lie_row_behind_row(
    interpret: Ask, name: str, layout: str, schedule: str
):
    """Halves of a wider matrix above all, as ``chunk(2, dim=1)`` makes them."""
    arch = {"apart": "sm_80", "transposed": "gfx942", "shifted": "sm_90"}[layout]
    answer = interpret(
        case=name, dtype="float32", arch=arch, schedule=schedule, layout=layout, seed=12
    )
    assert_right(answer, bound=12.0, dtype="float32")


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("name", ["clip", "nt_xent"])
def test_logit_scales(interpret: Ask, name: str, scale: float, dtype: str):
    answer = interpret(
        case=name, dtype=dtype, arch=KINDS[dtype], parameters={"logit_scale": scale}, d=64, seed=4
    )
    assert_right(answer, bound=scale, dtype=dtype)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("name", ["clip", "nt_xent", "siglip", "infonce"])
def test_gradients_of_bf16_operands_are_little_worse_than_their_rounding(
    interpret: Ask, name: str, scale: float
):
    """Returned in bf16, the exact gradient is off by 1.7e-3; the positives' share, most of it, is
    multiplied before anything is rounded."""
    parameters = {"logit_scale": scale} | ({"logit_bias": -10.0} if name == "siglip" else {})
    answer = interpret(
        case=name, dtype="bfloat16", parameters=parameters, m=64, n=64, d=128, seed=10
    )
    assert answer["errors"].pop("value") <= 3e-5
    assert max(answer["errors"].values()) <= 2.5e-3


def test_positives_lose_nothing_to_rounding(interpret: Ask):
    """At a scale where the positives are all that is left of a gradient tile, inner products with
    it are as exact as in fp32, though it is stored in bf16."""
    found = interpret(
        case="clip", dtype="bfloat16", parameters={"logit_scale": 0.1}, m=48, n=48, d=64, seed=11
    )
    assert found["errors"]["logit_scale"] < 2.0**-12


SPLIT = 2.0**-16
"""What three products of bf16 numbers leave out of one of fp32, relative to the factors' sizes."""


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("name", "arch"), [("clip", "sm_90"), ("nt_xent", "sm_80")])
def test_products_in_bf16x3(interpret: Ask, name: str, arch: str, scale: float):
    """Logits are off by scale * 2**-16, exponentials relatively by as much, as are gradients: of a
    gradient tile and of an operand two bf16 numbers are multiplied, too."""
    answer = interpret(
        case=name,
        dtype="float32",
        precision="bf16x3",
        arch=arch,
        parameters={"logit_scale": scale},
        d=64,
        seed=7,
    )
    found = tolerance(scale, "float32", "") + SPLIT * scale
    assert answer["errors"].pop("value") <= found
    assert max(answer["errors"].values()) <= found + 4 * SPLIT


def test_bf16x3_is_not_bf16(interpret: Ask):
    errors = {
        p: max(interpret(case="clip", dtype="float32", precision=p, seed=8)["errors"].values())
        for p in ("bf16x3", "bf16")
    }
    assert errors["bf16x3"] < errors["bf16"] / 50


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fp32_operands_rounded_to_16_bits(interpret: Ask, precision: str):
    """Unit rows: a logit is off by two roundings of its operands, its exponential by as much."""
    half_ulp = {"bf16": 2.0**-9, "fp16": 2.0**-12}[precision]
    answer = interpret(
        case="clip", dtype="float32", precision=precision, parameters={"logit_scale": 4.0}, seed=9
    )
    assert answer["errors"].pop("value") <= 2 * 4 * half_ulp
    assert max(answer["errors"].values()) <= (2 * 4 + 1) * half_ulp + ROUNDED_GRADIENT


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_sigmoid_loss_at_its_usual_bias(interpret: Ask, scale: float):
    """Softplus of -10 and less: a logarithm of 1 + u would lose it."""
    parameters = {"logit_scale": scale, "logit_bias": -10.0}
    answer = interpret(case="siglip", dtype="float32", parameters=parameters, d=32, seed=5)
    assert_right(answer, bound=scale + 10, dtype="float32")


@pytest.mark.parametrize("name", ["clip", "infonce_ids", "siglip", "recall_at_k"])
def test_operands_of_any_length(interpret: Ask, name: str):
    """Rows of norm 1 to 4: the bound follows the longest."""
    answer = interpret(case=name, dtype="float32", stretch=4.0, seed=6)
    assert_right(answer, bound=16 * 7.0, dtype="float32")


def test_a_row_far_from_every_column_trips_the_guard(interpret: Ask):
    """At scale 100 its exponentials are below what fp32 holds; the safe kernels give the answer."""
    answer = interpret(
        case="clip",
        dtype="float32",
        parameters={"logit_scale": 100.0},
        opposed=True,
        m=6,
        n=6,
        d=8,
        stretch=1.6,
    )
    assert answer["tripped"]
    assert_right(answer, bound=256.0, dtype="float32")


def test_no_guard_trips_on_embeddings_as_training_makes_them(interpret: Ask):
    answer = interpret(case="clip", dtype="float32", parameters={"logit_scale": 100.0}, d=64)
    assert not answer["tripped"]


def test_what_is_not_served_says_why():
    with pytest.raises(ScheduleError, match="float64"):
        emit(CASES["clip"], dtype="float64")


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("name", quick_or_full(SERVED))
def test_nan_and_infinity_propagate(interpret: Ask, name: str, bad: str) -> None:
    for operand in CASES[name].operands:
        found, wanted = interpret(case=name, dtype="float32", poison={operand: bad})["values"]
        assert math.isnan(found) == math.isnan(wanted), operand
        assert math.isinf(found) == math.isinf(wanted), operand
