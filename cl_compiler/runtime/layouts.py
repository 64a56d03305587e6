"""Whether emitted code reads an operand as it lies in memory, or a copy of it."""

from __future__ import annotations

import torch
from torch import Tensor

STRIDED = torch.strided
ALIGNMENT = 16
"""Bytes at a multiple of which descriptors, and kernels that load 16 bytes at once, begin."""


def read_in_place(operand: Tensor) -> bool:
    """Whether PyTorch's products do: rows may lie apart, but not overlap."""
    rows = operand.stride()[:-1]
    return operand.stride(-1) == 1 and all(s >= operand.shape[-1] for s in rows)


def whole_rows(operand: Tensor) -> bool:
    """Whether kernels do, which are told an operand's width, not its strides: row behind row."""
    in_rows = operand.is_contiguous() and operand.stride(0) == operand.shape[1:].numel()
    return in_rows and begins_well(operand)


def begins_well(tensor: Tensor) -> bool:
    """Whether its first element lies where kernels may begin."""
    return tensor.layout is STRIDED and tensor.data_ptr() % ALIGNMENT == 0


__all__ = ["STRIDED", "begins_well", "read_in_place", "whole_rows"]
