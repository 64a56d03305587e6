"""Which library multiplies fp32 tiles on a CPU: BLAS, or oneDNN where that is faster."""

from __future__ import annotations

from cl_compiler.lang.program import Program
from cl_compiler.plan.machine import ONEDNN, Machine, gemm_type
from cl_compiler.plan.types import Request

ONEDNN_FROM = 2**22
"""Multiplications of all pairs from which oneDNN's products pay: each looks up its code first.

Of 64 x 64 x 512 on two threads of a Zen 5 dense took 0.93 of the time with oneDNN's products, 1.17
with BLAS's: ``python -m benchmarks.cpu --only small``, in two runs."""


def by_onednn(request: Request, machine: Machine, program: Program) -> bool:
    """Whether oneDNN makes a program's products.

    Not where bits must not depend on what was computed before: a process leaves it to BLAS to
    multiply batches of more than a few sizes, or of any while another thread wants BLAS.  So not
    where a backward must find a maximum's elements again, bit for bit.  Nor where positives, which
    are BLAS's, are subtracted from tiles.
    """
    problem, spec = request.problem, machine.spec
    if request.reproducible or program.plan.full_maxima or program.subtracts_positives:
        return False
    if problem.M * problem.N * problem.D < ONEDNN_FROM or spec.kind != "cpu":
        return False
    if gemm_type(problem.dtype, request.precision, spec) != ("float32", 1):
        return False
    rates = dict(spec.gemm_flops_per_s)
    return rates.get(ONEDNN, 0.0) > rates["float32"]


__all__ = ["ONEDNN_FROM", "by_onednn"]
