"""Batches that fit in one tile: safe for any logits, as exact as dense, and few operators."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cl_compiler import compile_loss
from cl_compiler.api import find_loss
from cl_compiler.cli.dense import dense_clip
from cl_compiler.lang.reference import evaluate

LOSSES = {"clip": {}, "infonce": {}, "siglip": {"logit_bias": -10.0}, "nt_xent": {}}


def operands_of(name: str, rows: int, seed: int) -> dict[str, Tensor]:
    """Random rows of unit length, in fp64."""
    draw = torch.Generator().manual_seed(seed)
    names = ("z",) if name == "nt_xent" else ("x", "y")
    found = {n: torch.randn(rows, 48, generator=draw, dtype=torch.float64) for n in names}
    return {n: torch.nn.functional.normalize(t, dim=1).requires_grad_() for n, t in found.items()}


@pytest.mark.parametrize("scale", [0.0, 1e-3, 14.3, 1e4], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_one_tile_is_exact_at_any_scale(name: str, scale: float) -> None:
    given = operands_of(name, 66, seed=1)
    numbers = {"logit_scale": scale, **LOSSES[name]}
    results = []
    for compiled in (False, True):
        scalars = {n: torch.tensor(v, dtype=torch.float64) for n, v in numbers.items()}
        leaves = [*given.values(), *(s.requires_grad_() for s in scalars.values())]
        if compiled:
            loss = compile_loss("auto", "64MiB", loss=name, schedule="dense")
            value = loss(*given.values(), **scalars)
        else:
            value = evaluate(find_loss(name), given, scalars)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert "for i in" not in loss.source
    for want, got in zip(*results, strict=True):
        floor = 1e-9 * float(max(t.norm() for t in results[0][1:]))
        assert float((got - want).norm()) <= 1e-9 * float(want.norm()) + 1e-3 * floor


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(op)] += 1
        return op(*args, **(kwargs or {}))


def test_clip_in_one_tile_launches_no_more_operators_than_dense() -> None:
    """Their number is what a small batch takes; three of them are products."""
    given = operands_of("clip", 64, seed=2)
    scale = torch.tensor(14.3, requires_grad=True)
    loss = compile_loss("auto", "64MiB", loss="clip")
    counts = []
    for formula in (dense_clip, loss):
        formula(**given, logit_scale=scale).backward()
        with _Operators() as seen:
            formula(**given, logit_scale=scale).backward()
        counts.append(seen.found)
    dense, compiled = counts
    assert loss.plan.schedule == "dense"
    products = sum(n for op, n in compiled.items() if "mm" in op)
    assert products == 3
    assert compiled.total() <= dense.total()
    assert "logsumexp over cols of logits, less the logit of the positive" in loss.source
    assert "_lse" not in loss.source


def test_a_call_like_an_earlier_one_sees_its_own_arguments() -> None:
    """It is recognised by shapes and dtypes; tensors in another order are another kind."""
    loss = compile_loss("auto", "64MiB", loss="clip")
    first, second = operands_of("clip", 20, seed=3), operands_of("clip", 20, seed=4)
    scale = torch.tensor(5.0, dtype=torch.float64)
    values = []
    for given in (first, second, first):
        kept = loss(given["x"], given["y"], logit_scale=scale)
        swapped = loss(logit_scale=scale, y=given["y"], x=given["x"])
        want = evaluate(find_loss("clip"), given, {"logit_scale": scale})
        torch.testing.assert_close(kept, want)
        torch.testing.assert_close(swapped, kept, rtol=0, atol=0)
        values.append(kept.item())
    assert values[0] == values[2] != values[1]
    assert loss(first["x"], first["y"], logit_scale=5.0).item() == pytest.approx(values[0])
