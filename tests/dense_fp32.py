"""What dense fp32 PyTorch makes of a zoo entry: the measure of how exact fp32 tiles have to be.

The line is 2e-6, or three times the error of the dense formula on the same inputs, whichever is
larger.  Where a gradient is badly conditioned (a row whose corrected negatives nearly vanish), one
evaluation of the dense formula may be right by luck, so it is made with its sums in several orders:
features are permuted, which changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.overrides import TorchFunctionMode

from cl_compiler.lang import reference
from tests.tiles import Result, errors
from tests.zoo_case import Case, Sample, sample

FLOOR, FACTOR, ORDERS = 2e-6, 3.0, 6
ROWS, COLS, WIDTH = 37, 53, 16


class _InSingle(TorchFunctionMode):
    """What asks for fp64 gets fp32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float64:
            kwargs["dtype"] = torch.float32
        return (torch.Tensor.float if func is torch.Tensor.double else func)(*args, **kwargs)


def dense(whole: Sample, dtype: torch.dtype, *, by_hand: bool = True) -> Result:
    """The hand-written formula in a dtype; or, in fp32, the traced loss, safe for any logits."""
    case = whole.case
    tensors = {n: t.detach().to(dtype).requires_grad_() for n, t in whole.tensors.items()}
    scalars = {n: t.detach().to(dtype).requires_grad_() for n, t in whole.parameters.items()}
    if by_hand:
        assert case.formula is not None
        value = case.formula(tensors, whole.is_positive, scalars)
    else:
        with _InSingle():
            value = reference.evaluate(case.loss, tensors, scalars, **whole.ids)
        assert value.dtype == dtype
    names = sorted(case.needs)
    leaves = {**tensors, **scalars}
    grads = torch.autograd.grad(
        value, [leaves[n] for n in names], allow_unused=True, materialize_grads=True
    )
    return Result(value.detach(), dict(zip(names, grads, strict=True)), {})


def limits(whole: Sample) -> Mapping[str, float]:
    """By name: how large an error may be."""
    worst: dict[str, float] = {}
    for order in range(ORDERS):
        shuffled = _shuffled(whole, order)
        by_hand = whole.case.formula is not None
        found = errors(dense(shuffled, torch.float32, by_hand=by_hand), shuffled)
        if not all(map(math.isfinite, found.values())):  # its exponentials overflow
            found = errors(dense(shuffled, torch.float32, by_hand=False), shuffled)
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in found.items()}
    return {name: max(FLOOR, FACTOR * error) for name, error in worst.items()}


def misses(whole: Sample, result: Result, allowed: Mapping[str, float]) -> dict[str, str]:
    """What is beyond the limits, by name; {} where all holds."""
    found = errors(result, whole)
    return {n: f"{e:.2e} > {allowed[n]:.2e}" for n, e in found.items() if not e <= allowed[n]}


def _shuffled(whole: Sample, order: int) -> Sample:
    """The same problem with its features in another order, unless the loss takes the first few."""
    views = [v for leaf in whole.case.loss.leaves.values() for v in (leaf.left, leaf.right) if v]
    if not order or any(view.prefix is not None for view in views):
        return whole
    tensors = {}
    for name, tensor in whole.tensors.items():
        generator = torch.Generator().manual_seed(order)  # one order for all operands of a width
        if tensor.dim() > 1:
            tensor = tensor.detach()[..., torch.randperm(tensor.shape[-1], generator=generator)]
        tensors[name] = tensor.detach().clone().requires_grad_(whole.tensors[name].requires_grad)
    return replace(whole, tensors=tensors)


def features(
    case: Case, scale: float | None, norms: bool, seed: int, shape: tuple[int, int] = (ROWS, COLS)
) -> Sample:
    """Unit (or unnormalised) embeddings whose positives are near but not at their rows.

    ``scale``: of the logits; None leaves the entry's own parameters.  All numbers are fp32's.
    """
    if scale is not None and "logit_scale" in case.parameters:
        case = replace(case, parameters={**case.parameters, "logit_scale": scale})
    if scale is not None and "row_scale" in case.ranges:
        case = replace(case, ranges={"row_scale": (0.7 * scale, 1.3 * scale)})
    whole = sample(case, *shape, WIDTH, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    near = 0.2 if (scale or 0) > 50 else 0.5  # so that the gradient has not vanished
    with torch.no_grad():
        if case.positives in ("diagonal", "paired") and "y" in whole.tensors:
            x, y = whole.tensors["x"], whole.tensors["y"]
            y[: len(x)] += near * x
            y.copy_(torch.nn.functional.normalize(y, dim=-1))
        for name in case.operands if norms else ():
            rows = whole.tensors[name].shape[:-1]
            lengths = 0.1 + 2 * torch.rand(*rows, 1, generator=generator, dtype=torch.float64)
            whole.tensors[name].mul_(lengths)
        for tensor in (*whole.tensors.values(), *whole.parameters.values()):
            tensor.copy_(tensor.float())
    return whole


def in_fp32(whole: Sample) -> Sample:
    """The same with tensors, not scalars, in fp32."""
    tensors = {
        n: t.detach().float().requires_grad_(t.requires_grad) for n, t in whole.tensors.items()
    }
    return replace(whole, tensors=tensors)
