"""What judges and what competes: the float64 oracle, the chunked baseline, inputs, ceilings."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import chunked, mixed, oracle
from benchmarks.gpu.cases import LOSSES, PANEL, UNITS, Ceiling, Contest, items_of
from benchmarks.gpu.ceilings import _operands, _product, measure_ceiling
from benchmarks.gpu.providers import inputs_of, prepare
from cl_compiler.lang.reference import evaluate
from cl_compiler.losses import find

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SIZES = ((96, 24), (70, 16))


def leaves_of(loss: str, n: int, width: int, scale: float, dtype: str = "float32"):
    contest = Contest("correctness", loss, n, n, width, (), scale, dtype)
    return inputs_of(contest, CPU, seed=n + int(scale))


@pytest.fixture
def small_panels(monkeypatch):
    """Several panels, the last one ragged."""
    monkeypatch.setattr(oracle, "PANEL_ELEMENTS", 27 * 96)
    monkeypatch.setattr(chunked, "PANEL_BYTES", 4 * 23 * 96)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("n", "width"), SIZES)
@pytest.mark.usefixtures("small_panels")
def test_the_oracle_is_the_dense_reference(loss, scale, n, width):
    leaves = {k: t.detach().double().requires_grad_() for k, t in
              leaves_of(loss, n, width, scale).items()}  # fmt: skip
    truth = oracle.truth_of(loss, leaves)
    operands = {k: t for k, t in leaves.items() if t.dim() == 2}
    parameters = {k: t for k, t in leaves.items() if t.dim() == 0}
    value = evaluate(find(loss), operands, parameters)
    value.backward()
    errors = oracle.errors_of(truth, value, leaves)
    assert errors.keys() == {"value", *(f"d_{name}" for name in leaves)}
    # Both are float64 sums of at most n² terms; what cancels in them is at most a thousandfold.
    assert max(errors.values()) < 1e3 * n * torch.finfo(torch.float64).eps


def test_an_error_is_found():
    leaves = leaves_of("clip", 64, 16, 14.3)
    truth = oracle.truth_of("clip", leaves)
    step = prepare("chunked", Contest("speed", "clip", 64, 64, 16, ()), leaves).step
    value = step()
    wrong = leaves["x"].grad[int(truth.rows["x"][3])]
    expected = 0.5 * float(wrong.norm() / leaves["x"].grad.norm())
    wrong.mul_(1.5)
    leaves["y"].grad = None
    errors = oracle.errors_of(truth, value * 1.01, leaves)
    assert errors["value"] == pytest.approx(0.01, rel=1e-3)
    assert errors["d_x"] == pytest.approx(expected, rel=1e-3)
    assert errors["d_y"] is None and errors["d_logit_scale"] < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("n", "width"), SIZES)
@pytest.mark.usefixtures("small_panels")
def test_the_chunked_baseline_is_exact_in_fp32(loss, scale, n, width):
    errors = _errors_of_chunked(loss, n, width, scale, "float32")
    # A logit of size `scale` is known to scale·eps, which its exponential turns into its own
    # relative error; a handful of such terms add up.
    assert max(errors.values()) < 20 * max(scale, 5.0) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("small_panels")
def test_the_chunked_baseline_loses_bf16_roundings_only(loss):
    errors = _errors_of_chunked(loss, 96, 24, 14.3, "bfloat16")
    # G is rounded once and the gradient once more, each by at most 2^-9, positives and negatives of
    # one row cancelling in between.
    assert max(errors.values()) < 4 * 2**-8
    assert errors["value"] < 1e-5


def _errors_of_chunked(loss, n, width, scale, dtype):
    leaves = leaves_of(loss, n, width, scale, dtype)
    truth = oracle.truth_of(loss, leaves)
    step = prepare("chunked", Contest("speed", loss, n, n, width, ()), leaves).step
    return oracle.errors_of(truth, step(), leaves)


def test_the_chunked_baseline_scales_its_gradient():
    leaves = leaves_of("siglip", 32, 8, 10.0)
    step = prepare("chunked", Contest("speed", "siglip", 32, 32, 8, ()), leaves).step
    step()
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    step.clear()
    (3 * step.forward()).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 3 * once[name])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("small_panels")
def test_the_mixed_products_of_a_gpu_are_called_as_pytorch_takes_them(loss, in_place, monkeypatch):
    """The CPU has no 16-bit products in fp32; PyTorch's own checks run on the meta device too."""
    monkeypatch.setattr(mixed, "_writes_in_place", lambda *_: in_place)
    seen = []
    add = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: (seen.append(k), add(*a, **k))[1])
    x, y = (torch.empty(96, 24, device="meta", dtype=torch.bfloat16, requires_grad=True)
            for _ in "xy")  # fmt: skip
    scale, bias = (torch.empty((), device="meta", requires_grad=True) for _ in range(2))
    both = (x, x) if loss == "nt_xent" else (x, y)
    value = chunked.chunked_loss(loss, *both, scale, bias if loss == "siglip" else None)
    value.backward()
    assert value.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16 and scale.grad.dtype == torch.float32
    assert len(seen) == 5  # panels of 23 rows
    assert all(k["out_dtype"] == torch.float32 and ("out" in k) == in_place for k in seen)


@pytest.mark.parametrize(("scale", "n", "width"), [(14.3, 1024, 64), (100.0, 2048, 64),
                                                   (100.0, 512, 256)])  # fmt: skip
def test_inputs_are_in_the_regime_of_training(scale, n, width):
    """The positive gets about half of a row's probability: gradients are neither nil nor noise."""
    leaves = leaves_of("clip", n, width, scale)
    value = float(oracle.truth_of("clip", leaves).value)
    assert 0.2 < value < 2.5
    norms = leaves["x"].detach().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(n))


@pytest.mark.parametrize("item", [i for i in items_of(quick=True, only=["ceilings"])
                                  if i.kind == "gemm"], ids=lambda i: i.key)  # fmt: skip
def test_a_ceilings_product_is_what_its_name_says(item: Ceiling):
    left, right = _operands(item, CPU)
    assert (left.shape, right.shape) == ((item.M, item.K), (item.K, item.N))
    product = _product(left, right)
    torch.testing.assert_close(product().double(), left.double() @ right.double(),
                               rtol=2**-7, atol=2**-7 * math.sqrt(item.K))  # fmt: skip
    row = measure_ceiling(item, CPU, turns=3)
    flops = 2 * item.M * item.N * item.K
    assert row["rate"] == pytest.approx(flops / sorted(row["seconds"])[1])


def test_ceilings_have_the_strides_of_a_loss():
    """S = X·Yᵀ reads rows of both; dY = Gᵀ·X reads G by columns."""
    similarity, by_rows = (_operands(Ceiling("gemm", "float32", s, 8, 12, 4), CPU)
                           for s in ("S", "dX"))  # fmt: skip
    assert similarity[1].T.is_contiguous() and by_rows[1].is_contiguous()
    gradient, _ = _operands(Ceiling("accumulate", "float32", "dY", 8, 12, 4), CPU)
    assert gradient.T.is_contiguous()


def test_ceilings_cover_the_contests():
    items = items_of()
    widths = {i.D for i in items if isinstance(i, Contest)}
    gemms = [i for i in items if isinstance(i, Ceiling) and i.dtype == "bfloat16"]
    assert widths <= {i.K for i in gemms if i.shape == "square"}
    assert {i.K for i in gemms if i.shape == "dX"} == {65536}
    assert {i.K for i in gemms if i.shape == "dY"} == {PANEL}
    assert {i.dtype for i in items if isinstance(i, Ceiling)} == {
        "bfloat16", "float16", "tf32", "float32"
    }  # fmt: skip


def test_least_work():
    contest = Contest("speed", "nt_xent", 64, 64, 16, ())
    assert contest.flops == 2 * 2 * 64 * 64 * 16
    assert UNITS == {"clip": 4, "infonce": 3, "siglip": 3, "nt_xent": 2}


KERNELS = """
import json, sys, torch
from benchmarks.gpu import oracle
from benchmarks.gpu.cases import Contest
from benchmarks.gpu.providers import inputs_of, prepare
torch.set_num_threads(1)
found = {}
for loss in sys.argv[1:]:
    contest = Contest("correctness", loss, 96, 96, 32, (), 14.3, "float32")
    leaves = inputs_of(contest, torch.device("cpu"), 1)
    truth = oracle.truth_of(loss, leaves)
    found[loss] = oracle.errors_of(truth, prepare("triton:64x64", contest, leaves).step(), leaves)
print(json.dumps(found))
"""


def test_the_kernels_are_right_without_the_planner():
    """In Triton's interpreter, with panels that do not divide the batch."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KERNELS, "clip", "siglip"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for errors in json.loads(done.stdout).values():
        assert max(errors.values()) < 2**-10  # tf32 products and better
