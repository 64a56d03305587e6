"""Run an emitted file on tensors without data: which kernels it launches, with which arguments.

No kernel runs and no memory is taken; the ``meta`` device stands for a GPU.  A statement that waits
for the device (``.item()``, a condition on a tensor, a copy to the host) or mixes devices raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zoo_case import Case

SHORT = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """One launch: kernel, grid, types of its arguments, constants and options."""

    kernel: str
    grid: tuple[int, ...]
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    multiples_of_16: Mapping[str, bool]
    """Which whole numbers the compiler may take for multiples of 16."""


@dataclass(frozen=True)
class FakeDescriptor:
    """Stands for a ``TensorDescriptor``, which would ask for an address."""

    base: Tensor
    block: tuple[int, ...]

    @classmethod
    def from_tensor(cls, base: Tensor, block: list[int]) -> FakeDescriptor:
        assert base.stride(-1) == 1 and base.stride(0) * base.element_size() % 16 == 0
        assert block[-1] * base.element_size() >= 16
        return cls(base, tuple(block))


class Recorder:
    """Takes a kernel's place and notes its launches, of tensors on a device."""

    def __init__(
        self, name: str, kernel: Any, launches: list[Launch], device: str = "meta"
    ) -> None:
        self.name, self.kernel, self.launches, self.device = name, kernel, launches, device

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*positional: Any, **named: Any) -> None:
            options = {
                k: named.pop(k)
                for k in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
                if k in named
            }
            values = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
            assert sorted(values) == sorted(self.kernel.arg_names), self.name
            constants = {p.name for p in self.kernel.params if p.is_constexpr}
            self.launches.append(
                Launch(
                    self.name,
                    grid,
                    {
                        n: kind_of(values[n], self.device)
                        for n in self.kernel.arg_names
                        if n not in constants
                    },
                    {n: values[n] for n in self.kernel.arg_names if n in constants},
                    options,
                    {
                        n: v % 16 == 0
                        for n, v in values.items()
                        if type(v) is int and n not in constants
                    },
                )
            )

        return launch


def kind_of(value: Any, device: str) -> str:
    """Triton's name of an argument's type."""
    match value:
        case Tensor():
            assert value.device.type == device, f"an argument on {value.device}"
            return f"*{SHORT[value.dtype]}"
        case FakeDescriptor():
            return f"tensordesc<{SHORT[value.base.dtype]}{list(value.block)}>"
        case int():
            return "i64" if value >= 2**31 else "i32"
        case float():
            return "fp32"
        case _:
            raise AssertionError(f"{value!r} as a kernel's argument")


def watch(module: ModuleType, device: str = "meta") -> list[Launch]:
    """Let a file run no kernel from now on, and note here what it launches."""
    launches: list[Launch] = []
    for name, kernel in list(vars(module).items()):
        if name.endswith("_kernel"):
            kernel = kernel.kernel if isinstance(kernel, Recorder) else kernel
            setattr(module, name, Recorder(name, kernel, launches, device))
    if hasattr(module, "TensorDescriptor"):
        module.TensorDescriptor = FakeDescriptor  # type: ignore[attr-defined]
    return launches


def record(
    module: ModuleType, case: Case, m: int, n: int, d: int, dtype: torch.dtype
) -> list[Launch]:
    """The launches of forward and backward on [m, d] and [n, d] operands."""
    launches = watch(module)
    length = {"rows": m, "cols": n, "bank": n}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "is_cuda", property(lambda t: t.device.type == "meta"))
        values: dict[str, Tensor] = {}
        for op in case.loss.operands:
            slots = [case.slots] * ("slots" in op.axes)
            shape = (length[op.axes[0]], *slots, d)
            values[op.name] = torch.empty(shape, dtype=dtype, device="meta")
        for name in case.inputs:
            values[name] = torch.empty(length[case.loss.leaves[name].axes[0]], device="meta")
        for name in case.loss.parameters:
            values[name] = torch.empty((), dtype=torch.float64, device="meta")
        for name, rows in (("ids", m), ("row_ids", m), ("col_ids", n)):
            values[name] = torch.empty(rows, dtype=torch.int64, device="meta")
        arguments = [values[name] for name in module.ARGUMENTS]
        value, _, saved = module.forward.__wrapped__(*arguments)  # without the device guard
        assert value.device.type == "meta"
        if hasattr(module, "backward"):
            grad_output = torch.empty((), dtype=torch.float64, device="meta")
            gradients = module.backward.__wrapped__(grad_output, saved, *arguments)
            assert {g.device.type for g in gradients} <= {"meta"}
    return launches
