"""How similarities are multiplied: what a request's ``precision`` means on a machine."""

from __future__ import annotations

from cl_compiler.errors import ArgumentError, HardwareError
from cl_compiler.hardware.spec import HardwareSpec

PRECISIONS = ("auto", "ieee", "bf16")
"""auto: bf16 for bf16 inputs where the machine multiplies in bf16, ieee otherwise; ieee: fp32
products (fp64 for fp64 inputs); bf16: bf16 products of fp32 or bf16 inputs, fp32 accumulation."""


def products_of(precision: str, dtype: str, spec: HardwareSpec) -> str:
    """ "ieee" or "bf16": the products that emitted code asks for.

    Raises:
        ArgumentError: an unknown precision, or one that inputs of this dtype cannot have.
        HardwareError: the CPU has no bf16 products.
    """
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision {precision!r}: use one of {', '.join(PRECISIONS)}.")
    can = spec.kind != "cpu" or "bfloat16" in dict(spec.gemm_flops_per_s)
    if precision == "auto":
        return "bf16" if dtype == "bfloat16" and can else "ieee"
    if precision == "bf16" and dtype not in ("float32", "bfloat16"):
        raise ArgumentError(
            f"precision 'bf16' with {dtype} inputs: bf16 products are for fp32 and bf16 inputs. "
            "Use precision='auto', or cast the inputs."
        )
    if precision == "bf16" and not can:
        raise HardwareError(
            f"precision 'bf16': {spec.name} has no bf16 products (no AMX, no AVX512-BF16). "
            "Use precision='auto' or 'ieee'."
        )
    return precision


__all__ = ["PRECISIONS", "products_of"]
