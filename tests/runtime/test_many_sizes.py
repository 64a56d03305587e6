"""Batches of many sizes in one process: libraries keep code for a few of them, and no more.

``python test_many_sizes.py`` prints the resident memory after every size.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_compiler import compile_loss
from cl_compiler.runtime.loader import PACKAGE
from cl_compiler.runtime.measure import planted_pairs

SIZES = range(900, 2900, 50)
WIDTH = 96
AT_FIRST = 10
"""Sizes, of which emitted files leave eight to oneDNN."""


def main() -> dict[str, Any]:
    torch.set_num_threads(1)
    loss_fn = compile_loss("epyc-zen5-2c", "32MiB")
    found = []
    for rows in (min(SIZES), max(SIZES), *SIZES):  # what is held at once is there from the start
        x, y = (t.requires_grad_() for t in planted_pairs(rows, rows, WIDTH))
        for factor in (14.3, 2000.0):  # a shared exponential; running maxima
            loss_fn(x, y, logit_scale=factor).backward()
        del x, y
        ctypes.CDLL(None).malloc_trim(0)
        lines = Path("/proc/self/status").read_text().splitlines()
        resident = next(line.split()[1] for line in lines if line.startswith("VmRSS"))
        found.append(int(resident) / 1024)
    assert loss_fn.plan.library == "onednn"
    loaded = [m for name, m in sys.modules.items() if name.startswith(f"{PACKAGE}.")]
    return {"resident_mib": found, "setting": loaded[-1]._exact_setting()}


def test_resident_memory_stops_growing() -> None:
    """Of 40 sizes, in plans of their own: before this was bounded, each took 11 MiB for good."""
    run = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=300, check=True
    )
    answer = json.loads(run.stdout)
    if answer["setting"] == "ieee":
        pytest.skip("oneDNN multiplies fp32 matrices exactly on no setting of this machine")
    found = answer["resident_mib"]
    assert len(found) == len(SIZES) + 2
    assert found[-1] - found[AT_FIRST] < 16, found


if __name__ == "__main__":
    print(json.dumps(main()))
