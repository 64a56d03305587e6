"""Runs emitted kernels in Triton's interpreter: a process of its own, one JSON request per line.

Triton reads TRITON_INTERPRET while it is imported, so a process can interpret or compile, not both.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter

from cl_compiler.lang.ring import HOST
from cl_compiler.runtime.loader import load_source
from tests import comparing_losses, heavy_losses, random_losses
from tests.codegen.triton.emit import PANEL, RESIDENT, SMALL, emit
from tests.dense_fp32 import limits
from tests.losses_zoo import cases
from tests.ring.shards import emit_ring, run_group, split
from tests.ring.streams import pretend
from tests.zoo_case import Sample, held_in_e4m3, sample

CASES = {case.name: case for case in cases()} | heavy_losses.CASES | comparing_losses.CASES


def mend_bfloat16() -> None:
    """The interpreter truncates where it should round to bf16, multiplies bit patterns, and does
    not know of products in bf16x3."""
    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    cast: Callable[..., Any] = builder.cast_impl
    dot: Callable[..., Any] = builder.create_dot

    def widened(data: np.ndarray) -> np.ndarray:
        return (data.astype(np.uint32) << 16).view(np.float32)

    def rounded(data: np.ndarray) -> np.ndarray:
        bits = data.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16):
            return handle(rounded(source.data), tl.bfloat16)
        if (source.dtype.scalar, target.scalar) == (tl.bfloat16, tl.float32):
            return handle(widened(source.data), tl.float32)
        if (source.dtype.scalar, target.scalar) == (tl.float16, tl.bfloat16):
            return handle(rounded(source.data), tl.bfloat16)
        return cast(self, source, target)

    def widening_dot(self: Any, a: Any, b: Any, total: Any, precision: Any, most: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(widened(t.data), tl.float32) for t in (a, b))
        if precision == ir.INPUT_PRECISION.BF16x3:
            (a, a_low), (b, b_low) = split(a), split(b)
            total = dot(self, a_low, b, total, precision, most)
            total = dot(self, a, b_low, total, precision, most)
        return dot(self, a, b, total, precision, most)

    def split(value: Any) -> tuple[Any, Any]:
        """An fp32 number as two of bf16."""
        high = widened(rounded(value.data))
        low = widened(rounded(value.data - high))
        return handle(high, tl.float32), handle(low, tl.float32)

    allowed = ("ieee", "tf32", "bf16x3")
    object.__setattr__(
        interpreter.interpreter_builder.options, "allowed_dot_input_precisions", allowed
    )
    builder.cast_impl = rounding_cast
    builder.create_dot = widening_dot


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda t: t,
    "apart": lambda t: torch.cat([t, torch.full_like(t, 7.0)], -1)[..., : t.shape[-1]],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "shifted": lambda t: torch.cat([t.new_full((1,), 7.0), t.flatten()])[1:].view(t.shape),
}
"""How the rows of an operand lie in memory."""


def laid_out(function: Any, layout: str) -> Any:
    """An autograd Function whose operands lie so."""

    class Laid:
        @staticmethod
        def apply(ring: Any, *arguments: Any) -> Any:
            lay = LAYOUTS[layout]
            return function.apply(ring, *(lay(t) if t.dim() > 1 else t for t in arguments))

    return Laid


def draw(request: dict[str, Any]) -> Sample:
    """A sample whose operands are representable in the request's dtype."""
    name, _, seed = request["case"].partition(" ")
    case = random_losses.draw(int(seed)) if name == "random" else CASES[name]
    given = request.get("parameters", {})
    case = dataclasses.replace(case, parameters={**case.parameters, **given})
    drawn = sample(case, request["m"], request["n"], request["d"], request["seed"])
    dtype = getattr(torch, request["dtype"])
    stretch = request.get("stretch", 1.0)
    tensors: dict[str, Tensor] = {}
    for name, tensor in drawn.tensors.items():
        value = tensor.detach()
        if value.dim() > 1:
            spread = 1 + (stretch - 1) * torch.linspace(0, 1, len(value), dtype=value.dtype)
            spread = spread.view(-1, *(1 for _ in value.shape[1:]))
            value = (value * spread).to(dtype).double()
            value = held_in_e4m3(value) if request.get("e4m3") else value
        tensors[name] = value.requires_grad_(tensor.requires_grad)
    if request.get("aligned"):  # each row all but equals its positive
        with torch.no_grad():
            tensors["x"].copy_((tensors["y"] + 0.05 * tensors["x"]).to(dtype))
    if request.get("found"):  # rows are their positives, but for the last
        with torch.no_grad():
            tensors["y"].copy_(tensors["x"])
            tensors["y"][-1] = tensors["x"][0]
    for name, value in request.get("poison", {}).items():
        with torch.no_grad():
            tensors[name].view(-1)[47] = float(value)
    if request.get("opposed"):  # a row that is far from every column
        with torch.no_grad():
            tensors["x"][0] = -tensors["y"].mean(0) / tensors["y"].mean(0).norm()
            tensors["x"].copy_(tensors["x"].to(dtype))
    return dataclasses.replace(drawn, tensors=tensors)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Errors of the value and of every gradient against float64, whether a guard tripped, and the
    value beside the one that it should be.

    With ``limits``: how large they may be, too.
    """
    inputs = draw(request)
    run = run_on_ranks if "ring" in request else run_alone
    value, gradients, tripped = run(request, inputs)
    wanted_value = inputs.reference()
    wanted = inputs.gradients(wanted_value)
    largest = max(1e-30, *(float(g.norm()) for g in wanted.values()))
    expected = float(wanted_value.detach())
    errors = {"value": abs(value - expected) / max(1.0, abs(expected))}
    for name, gradient in gradients.items():
        # a scalar is an inner product of an operand with its gradient, whose rounding it has
        share = 1.0 if wanted[name].dim() == 0 and request["dtype"] != "float32" else 1e-2
        size = max(float(wanted[name].norm()), share * largest)
        errors[name] = float((gradient.double() - wanted[name]).norm()) / size
    found = {
        "errors": errors,
        "tripped": tripped,
        "gradients": list(gradients),
        "values": [value, expected],
    }
    return {**found, "limits": dict(limits(inputs))} if request.get("limits") else found


Found = tuple[float, dict[str, Tensor], bool]
"""The value, gradients by name, whether a guard tripped."""


def run_alone(request: dict[str, Any], inputs: Sample) -> Found:
    """On one device."""
    dtype = getattr(torch, request["dtype"])
    source = emit(
        inputs.case,
        dtype=request["dtype"],
        width=request["d"],
        arch=request["arch"],
        precision=request.get("precision", "ieee"),
        schedule=request.get("schedule", "spill"),
        core=RESIDENT if request.get("resident") else SMALL,
        needs=frozenset(request["needs"]) if "needs" in request else None,
    )
    module = load_source(source, "interpreted")
    tripped = [False]
    if hasattr(module, "_out_of_range"):
        judge = module._out_of_range

        def watched(*arguments: Any) -> Tensor:
            verdict = judge(*arguments) | bool(request.get("force"))
            tripped[0] |= bool(verdict)
            return verdict

        module._out_of_range = watched
    values: dict[str, Tensor] = {}
    for name, tensor in inputs.tensors.items():
        kind = dtype if tensor.dim() > 1 else torch.float32
        value = tensor.detach().to(kind)
        if tensor.dim() > 1:
            value = LAYOUTS[request.get("layout", "whole")](value)
        values[name] = value.requires_grad_(tensor.requires_grad)
    for name, tensor in inputs.parameters.items():
        values[name] = tensor.detach().clone().requires_grad_()
    arguments = {**values, **inputs.ids}
    value = module.Loss.apply(*(arguments[name] for name in module.ARGUMENTS))[0]
    gradients = torch.autograd.grad(value, [values[name] for name in module.GRADIENTS])
    by_name = dict(zip(module.GRADIENTS, gradients, strict=True))
    return float(value.detach()), by_name, tripped[0]


def run_on_ranks(request: dict[str, Any], inputs: Sample) -> Found:
    """On threads, a rank each: ``ring`` says by which schedule, ``shares`` how rows are cut."""
    rows, cols = inputs.is_positive.shape
    cut = split(inputs.case, rows, cols, request["shares"])
    source = emit_ring(
        inputs.case,
        request["ring"],
        dtype=request["dtype"],
        chunk=request.get("chunk", 8),
        tile=PANEL,
        width=request["d"],
        precision=request.get("precision", "ieee"),
        node=request.get("node", 1),
        arch=request["arch"],
        core=SMALL,
    )
    tripped = [False]

    def watch(module: ModuleType) -> None:
        if request["ring"] == HOST:
            pretend(setattr, late=bool(request.get("late", True)))(module)
        if "layout" in request:
            module.Loss = laid_out(module.Loss, request["layout"])  # type: ignore[attr-defined]
        if hasattr(module, "_in_range"):
            judge = module._in_range

            def watched(*arguments: Any) -> bool:
                verdict = judge(*arguments) and not request.get("force")
                tripped[0] |= not verdict
                return verdict

            module._in_range = watched

    dtype = getattr(torch, request["dtype"])
    if request.get("force"):
        source = source.replace("return max(0.0, math.ceil(", "return max(1e-9, math.ceil(")
    found = run_group(source, inputs, cut, dtype=dtype, timeout_s=120.0, prepare=watch)
    assert len(set(found.values)) == 1, found.values
    return found.values[0], dict(found.result.gradients), tripped[0]


def take_turns() -> None:
    """The interpreter runs one program at a time; ranks are threads."""
    run, turn = interpreter.GridExecutor.__call__, threading.RLock()

    def alone(self: Any, *arguments: Any, **options: Any) -> Any:
        with turn:
            return run(self, *arguments, **options)

    interpreter.GridExecutor.__call__ = alone


def main() -> None:
    torch.set_num_threads(1)
    mend_bfloat16()
    take_turns()
    for line in sys.stdin:
        try:
            result = answer(json.loads(line))
        except Exception as error:
            import traceback

            result = {"failure": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
