"""Products of 16-bit operands: in fp32 as far as a device has them, and as autocast makes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["add_product", "product", "under_autocast"]


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type == "cpu":  # no mixed-type product there
        return left.float() @ right.float()
    mixed: Any = torch.mm
    found: Tensor = mixed(left, right, out_dtype=torch.float32)
    return found


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``sums`` plus left @ right, accumulated in fp32 and in place where that is possible.

    A 16-bit accumulator would lose most of what many panels add.
    """
    if left.dtype == torch.float32:
        return sums.addmm_(left, right)
    if left.device.type == "cpu":
        return sums.addmm_(left.float(), right.float())
    return _mixed(sums, left, right, in_place=_writes_in_place(left.device, left.dtype))


def _mixed(sums: Tensor, left: Tensor, right: Tensor, *, in_place: bool) -> Tensor:
    add: Any = torch.addmm
    more = {"out": sums} if in_place else {}
    found: Tensor = add(sums, left, right, out_dtype=torch.float32, **more)
    return found


@cache
def _writes_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``addmm(sums, …, out_dtype=, out=sums)`` gives the right sums here."""
    left = torch.eye(16, device=device, dtype=dtype)
    sums = torch.ones(16, 16, device=device)
    try:
        _mixed(sums, left, left, in_place=True)
        return bool(torch.equal(sums, torch.ones(16, 16, device=device) + left.float()))
    except (TypeError, NotImplementedError, RuntimeError):
        return False


def under_autocast(formula: Callable[..., Tensor], dtype: str) -> Callable[..., Tensor]:
    """A formula as training code runs it: products in a 16-bit ``dtype``; in fp32 as it stands."""

    def call(**leaves: Tensor) -> Tensor:
        device = leaves["logit_scale"].device.type
        half = torch.float16 if dtype == "float16" else torch.bfloat16
        with torch.autocast(device, dtype=half, enabled=dtype != "float32"):
            return formula(**leaves)

    return call
