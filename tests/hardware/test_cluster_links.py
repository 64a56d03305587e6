"""Links between ranks: fitted, stored, found again by a group; measured under ``torchrun``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cl_compiler.errors import HardwareError
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.cluster_links import (
    MeasuredLink,
    fitted,
    links_path,
    load_links,
    store_links,
    with_links,
    with_measured_links,
)
from cl_compiler.hardware.detect import detect_nominal, torch_version
from cl_compiler.hardware.ranks import with_ranks

SIZES = (1 << 18, 1 << 20, 3 << 20, 1 << 23)
INSIDE = MeasuredLink("device", 3.5e9, 21e-6, False, 0.995)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_COMPILER_CACHE_DIR", str(tmp_path))


def test_a_line_is_found_again_and_noise_is_refused():
    seconds = [80e-6 + n / 2.5e9 for n in SIZES]
    bytes_per_s, latency_s, r2 = fitted(SIZES, seconds)
    assert bytes_per_s == pytest.approx(2.5e9, rel=1e-6)
    assert latency_s == pytest.approx(80e-6, rel=1e-6) and r2 > 0.9999
    for bad in ([5e-3, 1e-3, 4e-3, 2e-3], [4e-3, 3e-3, 2e-3, 1e-3]):
        with pytest.raises(HardwareError, match=r"R² = .*calibrate again"):
            fitted(SIZES, bad)


def test_a_group_finds_what_was_measured_for_its_nodes():
    spec = with_ranks(detect_nominal(), 8, 4)
    path = links_path(detect_nominal(), torch_version(), 2, 4)
    assert with_measured_links(spec) == spec  # nothing is stored
    store_links(path, [INSIDE])
    found = with_measured_links(spec)
    assert found.link("device").bandwidth_bytes_per_s == 3.5e9
    assert found.link("device").latency_s == 21e-6 and not found.link("device").full_duplex
    assert "measured" in found.link("device").source
    assert found.link("node") == spec.link("node")
    other = with_ranks(detect_nominal(), 8, 8)
    assert with_measured_links(other) == other


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "links": [{}]}'])
def test_a_file_that_cannot_be_understood_is_none(text):
    path = links_path(detect_nominal(), torch_version(), 1, 2)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert load_links(path) == ()
    store_links(path, [MeasuredLink("device", float("nan"), 1e-6, True, 1.0)])
    assert load_links(path) == ()


def test_links_that_are_slow_change_plans():
    spec = with_ranks(load_hardware("xeon-amx-2c"), 4, 4)
    slow = with_links(spec, [MeasuredLink("device", 1e6, 1e-3, True, 1.0)])
    assert slow.link("device").bandwidth_bytes_per_s == 1e6


@pytest.mark.full
def test_ranks_measure_their_links(tmp_path):
    """Two processes: the rates of the machine, and of the hop between them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher.append("--no-python")
    code = "from cl_compiler.cli.main import app; app()"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for _ in range(4):  # a busy machine is asked for another try
        run = subprocess.run(
            [*launcher, sys.executable, "-c", code, "calibrate", "--json"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, **environment},
        )
        if "calibrate again while nothing else uses the network" not in run.stderr:
            break
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    (link,) = found["links"]
    assert link["level"] == "device" and link["r2"] >= 0.98
    assert 1e7 < link["bytes_per_s"] < 1e11 and 0 <= link["latency_s"] < 1.0
    assert load_links(Path(found["path"])) == (MeasuredLink(**link),)
    assert len(list((tmp_path / "calibration").glob("*.json"))) == 2
