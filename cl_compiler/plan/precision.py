"""How similarities are multiplied: what a request's ``precision`` means on a machine."""

from __future__ import annotations

from cl_compiler.errors import ArgumentError, HardwareError, instead_of
from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.plan.types import DType

SPLIT = "bf16x3"
"""Products of fp32 operands as three of bf16: what bf16 rounds off is a second bf16 number."""

FP8 = "fp8"
"""Products of e4m3 copies of 16-bit operands."""

PRECISIONS = ("auto", "ieee", "bf16", "fp16", "tf32", "bf16x3", FP8)
"""auto: 16-bit inputs in their own type where the machine multiplies in it; fp32 inputs in bf16x3
on a GPU, in ieee on a CPU.

ieee: fp32 products (fp64 for fp64 inputs).  bf16, fp16: fp32 inputs are rounded to that type.
tf32: fp32 inputs are rounded to 11 bits of mantissa by the tensor cores.  bf16x3: fp32 inputs as
two bf16 numbers each, three products, 16 bits.  fp8: 16-bit inputs are rounded to 4 bits (e4m3)
where similarities are made of them, on request only.  Sums are fp32 in all of them."""


def products_of(precision: str, dtype: str, spec: HardwareSpec) -> str:
    """One of ``PRECISIONS`` without "auto": the products that emitted code asks for.

    Raises:
        ArgumentError: an unknown precision, or one that inputs of this dtype cannot have.
        HardwareError: the machine has no such products.
    """
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision {precision!r}: {instead_of(precision, PRECISIONS)}.")
    of_inputs, of_machine = _of_inputs(dtype, spec), _of_machine(spec)
    possible = [p for p in of_inputs if p in of_machine]
    if precision == "auto":
        return possible[0]
    if precision not in of_inputs:
        takes = "16-bit inputs are multiplied in their own type, in ieee or in fp8"
        takes = "only 16-bit inputs are multiplied in fp8" if precision == FP8 else takes
        wide = "fp64 inputs are multiplied in ieee"
        raise ArgumentError(
            f"precision {precision!r} with {dtype} inputs: "
            f"{wide if dtype == 'float64' else takes}. Use precision='auto', or cast the inputs."
        )
    if precision not in of_machine:
        raise HardwareError(
            f"precision {precision!r}: {spec.name} has no such products{_why(precision, spec)}. "
            f"Use precision='auto' or {' or '.join(repr(p) for p in possible)}."
        )
    return precision


def rounded_operands(dtype: str, precision: str) -> DType | None:
    """The type that fp32 operands are rounded to before anything else, if they are."""
    rounded: dict[str, DType] = {"bf16": "bfloat16", "fp16": "float16"}
    return rounded.get(precision) if dtype == "float32" else None


def _of_inputs(dtype: str, spec: HardwareSpec) -> tuple[str, ...]:
    """What inputs of a dtype can be multiplied in, the preferred one first."""
    match dtype:
        case "float64":
            return ("ieee",)
        case "bfloat16":
            return ("bf16", "ieee", FP8)
        case "float16":
            return ("fp16", "ieee", FP8)
        case _ if spec.kind == "cpu":
            return ("ieee", "bf16x3", "bf16", "fp16", "tf32")
        case _:
            return ("bf16x3", "ieee", "bf16", "fp16", "tf32")


def _of_machine(spec: HardwareSpec) -> tuple[str, ...]:
    rates = dict(spec.gemm_flops_per_s)
    if spec.kind == "cpu":
        return ("ieee", "bf16") if "bfloat16" in rates else ("ieee",)
    # AMD's e4m3 is another one, and on sm_89 kernels of three similarities spill
    narrow = FP8 in rates and spec.arch in ("sm_90", "sm_100")
    more = (("tf32", "tf32" in rates), (FP8, narrow))
    return ("ieee", "bf16", "fp16", "bf16x3", *(p for p, has in more if has))


def _why(precision: str, spec: HardwareSpec) -> str:
    if spec.kind == "cpu" and precision == "bf16":
        return " (no AMX, no AVX512-BF16)"
    if precision == FP8 and spec.kind != "cpu":
        return " (kernels with them are for sm_90 and sm_100)"
    return " (they are for GPUs)" if spec.kind == "cpu" else ""


__all__ = ["FP8", "PRECISIONS", "SPLIT", "products_of", "rounded_operands"]
