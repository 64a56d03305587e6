"""fp32 tiles are as exact as dense fp32 PyTorch, at any scale, in every schedule.

The bound is 2e-6 or three times the error of the dense formula on the same inputs, whichever is
larger; both errors are measured against float64.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_compiler.losses import find
from cl_compiler.plan.types import Tile
from tests.tiles import emit, load, schedules_of
from tests.zoo_case import Case

FLOOR, FACTOR = 2e-6, 3.0
ROWS, COLS, WIDTH = 130, 177, 48


def clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits, label = scale * x @ y.T, torch.arange(len(x))
    return (F.cross_entropy(logits, label) + F.cross_entropy(logits.T[: len(x)], label)) / 2


def infonce(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * x @ y.T, torch.arange(len(x)))


def siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    sign = 2 * torch.eye(len(x), len(y), dtype=x.dtype) - 1
    return -F.logsigmoid(sign * (scale * x @ y.T + bias)).sum() / len(x)


def two_views(z: Tensor, scale: Tensor) -> Tensor:
    logits = (scale * z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


DENSE = {"clip": clip, "infonce": infonce, "siglip": siglip, "nt_xent": two_views}
DENSE["supcon"] = two_views


def features(name: str, scale: float, norms: bool, seed: int) -> dict[str, Tensor]:
    """Unit (or unnormalised) embeddings whose positives are near but not at their rows."""
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return F.normalize(
            torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64), dim=1
        )

    x, y = unit(ROWS), unit(COLS)
    near = 0.2 if scale > 50 else 0.5  # so that the gradient has not vanished at a high scale
    y[:ROWS] = F.normalize(y[:ROWS] + near * x, dim=1)
    if norms:
        x *= 0.1 + 2.0 * torch.rand(ROWS, 1, generator=generator, dtype=torch.float64)
        y *= 0.1 + 2.0 * torch.rand(COLS, 1, generator=generator, dtype=torch.float64)
    values = {"z": torch.cat([x, y[:ROWS]])} if name in ("nt_xent", "supcon") else {"x": x, "y": y}
    values["logit_scale"] = torch.tensor(scale, dtype=torch.float64)
    if name == "siglip":
        values["logit_bias"] = torch.tensor(-4.0, dtype=torch.float64)
    return {n: t.float().double() for n, t in values.items()}


def gradients(function: object, values: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Value and gradients of ``function`` of ``values`` in a dtype, as float64."""
    leaves = [
        t.to(dtype if t.dim() else torch.float64).detach().requires_grad_() for t in values.values()
    ]
    value = function(*leaves)  # type: ignore[operator]
    found = torch.autograd.grad(value, leaves)
    return [value.detach().double(), *(g.double() for g in found)]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    first = abs(float(got[0]) - float(want[0])) / max(1.0, abs(float(want[0])))
    rest = zip(got[1:], want[1:], strict=True)
    return [first, *(float((g - w).norm() / w.norm()) for g, w in rest)]


def case_of(name: str) -> Case:
    loss = find(name)
    positives = "views" if loss.is_single_set else "diagonal"
    return Case(name, loss, {}, positives=positives)  # type: ignore[arg-type]


@pytest.mark.parametrize("norms", [False, True], ids=["unit", "unnormalised"])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("name", sorted(DENSE))
def test_every_schedule_is_as_exact_as_dense_fp32(name: str, scale: float, norms: bool) -> None:
    case, dense = case_of(name), DENSE[name]
    values = features(name, scale, norms, seed=int(scale) + norms)
    if name == "clip":  # the columns beyond the rows are negatives of the row direction only

        def dense(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
            logits = s * x @ y.T
            label = torch.arange(len(x))
            columns = torch.logsumexp(logits, 0)[: len(x)] - logits.diagonal()
            return (F.cross_entropy(logits, label) + columns.mean()) / 2

    want = gradients(dense, values, torch.float64)
    plain = errors(
        gradients(lambda *a: dense(*(t.float() for t in a)), values, torch.float32), want
    )
    for schedule in schedules_of(case):
        source = emit(case, schedule, dtype="float32", tile=Tile(48, 64), width=WIDTH)
        module = load(source)
        ours = errors(
            gradients(lambda *a, m=module: m.Loss.apply(*a)[0], values, torch.float32), want
        )
        for mine, theirs in zip(ours, plain, strict=True):
            assert mine <= max(FLOOR, FACTOR * theirs), (schedule, ours, plain)


@pytest.mark.parametrize("cosine", [0.2, -0.1, -0.3, -0.5, -0.9])
def test_rows_far_below_the_bound_are_right_on_both_sides_of_the_guard(cosine: float) -> None:
    """One row's best cosine falls until its shifted sum leaves the range: maxima take over."""
    generator = torch.Generator().manual_seed(7)
    axis = F.normalize(torch.randn(WIDTH, generator=generator, dtype=torch.float64), dim=0)
    x = F.normalize(torch.randn(64, WIDTH, generator=generator, dtype=torch.float64), dim=1)
    noise = torch.randn(64, WIDTH, generator=generator, dtype=torch.float64)
    noise = F.normalize(noise - (noise @ axis)[:, None] * axis, dim=1)
    y = cosine * axis + (1 - cosine**2) ** 0.5 * noise
    x[0] = axis  # its cosine with every column is ``cosine``
    values = {"x": x, "y": y, "logit_scale": torch.tensor(100.0, dtype=torch.float64)}
    values = {n: t.float().double() for n, t in values.items()}
    module = load(emit(case_of("clip"), "spill", dtype="float32", tile=Tile(24, 32), width=WIDTH))
    ran = []
    for mode in ("bounded", "running"):
        name = f"_backward_sweep_{mode}"
        whole = getattr(module, name)

        def spy(*args: object, mode: str = mode, whole: object = whole) -> object:
            ran.append(mode)
            return whole(*args)  # type: ignore[operator]

        setattr(module, name, spy)
    try:
        got = gradients(lambda *a: module.Loss.apply(*a)[0], values, torch.float32)
    finally:
        sys.modules.pop(module.__name__, None)
    want = gradients(clip, values, torch.float64)
    single = gradients(lambda *a: clip(*(t.float() for t in a)), values, torch.float32)
    plain = errors(single, want)
    for mine, theirs in zip(errors(got, want), plain, strict=True):
        assert mine <= max(FLOOR, FACTOR * theirs)
    first_row = (got[1][0] - want[1][0]).norm() / want[1][0].norm()
    assert float(first_row) < 1e-4
    assert ran == ["bounded" if cosine >= -0.5 else "running"]
