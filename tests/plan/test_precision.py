"""What a request for products means on a machine, and what it is told where it means nothing."""

from __future__ import annotations

import pytest

from cl_compiler.errors import ArgumentError, HardwareError
from cl_compiler.hardware import load_hardware
from cl_compiler.plan.precision import PRECISIONS, products_of, rounded_operands

H100, XEON = load_hardware("h100x1"), load_hardware("xeon-amx-2c")


@pytest.mark.parametrize(
    ("dtype", "on_gpu", "on_cpu"),
    [
        ("float64", "ieee", "ieee"),
        ("float32", "bf16x3", "ieee"),
        ("bfloat16", "bf16", "bf16"),
        ("float16", "fp16", "ieee"),
    ],
)
def test_automatic_precision(dtype, on_gpu, on_cpu):
    assert products_of("auto", dtype, H100) == on_gpu
    assert products_of("auto", dtype, XEON) == on_cpu


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p not in ("auto", "fp8")])
def test_a_gpu_multiplies_fp32_in_every_way(precision):
    assert products_of(precision, "float32", H100) == precision


@pytest.mark.parametrize("precision", ["tf32", "bf16x3", "fp16"])
def test_a_cpu_says_which_ways_it_has(precision):
    with pytest.raises(HardwareError, match=r"they are for GPUs\)\. Use .*'ieee' or 'bf16'"):
        products_of(precision, "float32", XEON)


@pytest.mark.parametrize(
    ("precision", "dtype", "said"),
    [
        ("tf32", "bfloat16", "16-bit inputs are multiplied in their own type"),
        ("fp16", "bfloat16", "16-bit inputs are multiplied in their own type"),
        ("bf16", "float64", "fp64 inputs are multiplied in ieee"),
        ("fp8", "float32", "only 16-bit inputs are multiplied in fp8"),
        ("int4", "float32", "use one of auto, ieee"),
    ],
)
def test_what_inputs_cannot_have_is_refused_with_the_reason(precision, dtype, said):
    with pytest.raises(ArgumentError, match=said):
        products_of(precision, dtype, H100)


def test_only_fp32_operands_are_rounded():
    assert rounded_operands("float32", "bf16") == "bfloat16"
    assert rounded_operands("float32", "fp16") == "float16"
    assert rounded_operands("float32", "bf16x3") is None
    assert rounded_operands("float16", "fp16") is None
