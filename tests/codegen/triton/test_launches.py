"""What runs on the host: no statement waits for the device, and every argument lies on it."""

from __future__ import annotations

import pytest
import torch

from cl_compiler.runtime.loader import load_source
from tests import losses_zoo as zoo
from tests.codegen.triton.emit import REAL, emit, served

pytest.importorskip("triton")

from tests.codegen.triton.launches import Launch, record

CASES = {case.name: case for case in zoo.cases() if case.name in served()}
ROWS, WIDTH = 16384, 512


def launches_of(name: str, arch: str, rows: int = ROWS, cols: int = ROWS) -> list[Launch]:
    case = CASES[name]
    source = emit(case, dtype="bfloat16", width=WIDTH, arch=arch, panel=REAL, core=None)
    module = load_source(source, f"launched_{name}_{arch}")
    return record(module, case, rows, cols, WIDTH, torch.bfloat16)


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", CASES)
def test_the_host_never_waits_for_the_device(name: str, arch: str):
    """Otherwise ``meta`` tensors, which have no data, raise."""
    panels = (ROWS // REAL.rows) ** 2
    assert len(launches_of(name, arch)) > panels


def test_more_rows_take_the_same_kernels_in_more_panels():
    few, many = (launches_of("infonce", "sm_90", rows, rows) for rows in (1 << 14, 1 << 16))
    assert {x.kernel for x in few} == {x.kernel for x in many}
    assert len(many) > 8 * len(few)
    signatures = {x.kernel: dict(x.signature) for x in few if "sweep" in x.kernel}
    for launch in many:
        if "sweep" in launch.kernel:
            assert dict(launch.signature) == signatures[launch.kernel]


def test_whole_panels_are_not_masked_and_ragged_ones_are():
    ragged = [x.constants["RAGGED"] for x in launches_of("clip", "sm_90") if "sweep" in x.kernel]
    assert ragged
    assert not any(ragged)
    edges = launches_of("clip", "sm_90", rows=ROWS + 1, cols=ROWS + 64)
    masked = [x.constants["RAGGED"] for x in edges if "sweep" in x.kernel]
    assert any(masked)
    assert not all(masked)
