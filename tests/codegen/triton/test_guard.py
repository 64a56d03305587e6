"""The range of shifted exponentials in fp32 that flushes to zero, at the edge of the guard.

The hardware's exponential returns 0 below 2**-126; the interpreter's does not, so this emulates it
with the emitted functions that choose the shift and judge the sums.
"""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from cl_compiler.runtime.loader import load_source
from tests import losses_zoo as zoo
from tests.codegen.triton.emit import emit

pytest.importorskip("triton")

LOG2E = 1 / math.log(2)
TERMS = 4096
CLIP = next(case for case in zoo.cases() if case.name == "clip")


@pytest.fixture(scope="module")
def emitted() -> ModuleType:
    return load_source(emit(CLIP), "guard")


def flushed(values: Tensor) -> Tensor:
    """fp32 without subnormal numbers."""
    values = values.float()
    return torch.where(values.abs() < 2.0**-126, 0.0, values)


def row(bound: float, largest: float, seed: int) -> Tensor:
    """Logits of one row: anything in range, the largest as given; [TERMS] fp64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(TERMS, generator=generator, dtype=torch.float64)
    logits = -bound + (largest + bound) * logits
    logits[0] = largest
    return logits


def statistics(emitted: ModuleType, bound: float, logits: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(shift, sum of exponentials as the kernel has it, whether the guard trips)."""
    shift = emitted._shift(torch.tensor(bound, dtype=torch.float64), TERMS)
    total = flushed(torch.exp2((logits - shift) * LOG2E)).sum(dtype=torch.float64)
    return shift, total, bool(emitted._out_of_range(shift, total[None], TERMS))


@pytest.mark.parametrize("bound", [1.0, 14.3, 50.0, 63.0, 75.0, 100.0, 150.0, 400.0])
def test_whatever_passes_the_guard_is_accurate(emitted: ModuleType, bound: float):
    """From one end of the range to the other: the sum, and the gradient made from it."""
    passed = []
    for step in range(81):
        largest = bound * (1 - step / 40)
        logits = row(bound, largest, step)
        shift, total, tripped = statistics(emitted, bound, logits)
        if tripped:
            continue
        passed.append(largest)
        exact = torch.logsumexp(logits, 0)
        assert abs(float(torch.log(total) + shift - exact)) < 2e-6
        weight = 1 / TERMS
        inverse = flushed(emitted._inverse(exact, shift) * weight)
        gradient = flushed(flushed(torch.exp2((logits - shift) * LOG2E)) * inverse)
        wanted = weight * torch.exp(logits - exact)
        assert float((gradient - wanted).norm() / wanted.norm()) < 2e-6
    assert bound in passed, "the guard trips where nothing is lost"
    if bound <= 60:
        assert min(passed) == -bound, "rows in range that the guard gives up"


def test_the_guard_trips_where_a_sum_loses_bits(emitted: ModuleType):
    """Rows far below the bound: without the guard their logsumexp would be wrong."""
    bound = 150.0
    wrong = []
    for step in range(81):
        logits = row(bound, bound * (1 - step / 40), step)
        shift, total, tripped = statistics(emitted, bound, logits)
        error = abs(float(torch.log(total) + shift - torch.logsumexp(logits, 0)))
        if not error < 1e-4:
            wrong.append(step)
            assert tripped
    assert wrong


def test_sums_never_overflow(emitted: ModuleType):
    """All logits at the bound, and as many as a launch can have."""
    for terms in (2, 3, 1024, 1 << 16, 1 << 22):
        shift = emitted._shift(torch.tensor(90.0, dtype=torch.float64), terms)
        total = terms * torch.exp2((90.0 - shift) * LOG2E)
        assert torch.isfinite(total.float())
        assert flushed(1 / total / terms) > 0, "its inverse times a weight of 1 / terms is normal"
    assert float(shift * LOG2E) == pytest.approx(round(float(shift * LOG2E)), abs=1e-9)
