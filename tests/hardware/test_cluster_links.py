"""Links between ranks: fitted, stored, found again by a group; measured under ``torchrun``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import typer

from cl_compiler.cli.calibrate_ranks import _on_all as on_all
from cl_compiler.cli.calibrate_ranks import rough
from cl_compiler.errors import CompilerError, HardwareError
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
from cl_compiler.runtime.busy import CpuTimes, cores_here, foreign_cores, in_the_way, is_busy

SIZES = (1 << 18, 1 << 20, 3 << 20, 1 << 23)
INSIDE = MeasuredLink("device", 3.5e9, 21e-6, False, 0.012, 0.03, 1 << 20)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_COMPILER_CACHE_DIR", str(tmp_path))


def repeated(seconds, noise, source):
    """Repetitions of messages that are at times disturbed: nothing is ever quicker."""
    return [[s * (1 + source.exponential(noise)) for _ in range(25)] for s in seconds]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("disturbed", [None, 0, 1, 2, 3])
def test_a_line_is_found_again_whatever_disturbs_one_size(disturbed, seed):
    """A whole size whose messages take five times as long, and a tenth of all others, move a line
    by no more than what the other repetitions scatter."""
    source = np.random.default_rng(seed)
    bytes_per_s, latency_s = source.uniform(0.5e9, 20e9), source.uniform(20e-6, 300e-6)
    samples = repeated([latency_s + n / bytes_per_s for n in SIZES], 0.01, source)
    for index, of in enumerate(samples):
        bursts = range(25) if index == disturbed else source.choice(25, 3, replace=False)
        for at in bursts:
            of[at] *= 5.0
    fit = fitted(SIZES, samples)
    assert fit.bytes_per_s == pytest.approx(bytes_per_s, rel=0.05)
    for size in SIZES if disturbed != 0 else SIZES[1:]:  # which alone shows the latency
        seconds = latency_s + size / bytes_per_s
        assert fit.latency_s + size / fit.bytes_per_s == pytest.approx(seconds, rel=0.05)
    assert fit.error < 0.04
    if disturbed is None:
        assert fit.worst < 0.04
    else:
        assert fit.worst > 0.5 and fit.worst_bytes == SIZES[disturbed]


def test_an_exact_line_is_found_exactly():
    fit = fitted(SIZES, [[80e-6 + n / 2.5e9] for n in SIZES])
    assert fit.bytes_per_s == pytest.approx(2.5e9, rel=1e-9)
    assert fit.latency_s == pytest.approx(80e-6, rel=1e-9) and fit.worst < 1e-9


@pytest.mark.parametrize("seconds", [[5e-3, 1e-3, 9e-3, 1e-3], [4e-3, 3e-3, 2e-3, 1e-3]])
def test_what_is_no_line_is_refused(seconds):
    with pytest.raises(HardwareError, match=r"256\.0 KiB in .* ms.*calibrate again while nothing"):
        fitted(SIZES, [[s] * 5 for s in seconds])


def test_a_rough_line_is_kept_and_warned_of():
    seconds = [80e-6 + n / 2.5e9 for n in SIZES]
    fit = fitted(SIZES, [[s * f] for s, f in zip(seconds, (1, 1.35, 0.8, 1.2), strict=True)])
    text = rough(MeasuredLink("node", full_duplex=True, **asdict(fit)))
    assert fit.error > 0.1 and re.match(
        r"between nodes, messages take times that are \d\d% off", text
    )
    assert rough(INSIDE) == ""


class Ranks:
    """Of ``torch.distributed`` what one of several ranks sees, with what the others say."""

    def __init__(self, rank, others):
        self.rank, self.others = rank, others

    def get_rank(self):
        return self.rank

    def get_world_size(self):
        return len(self.others)

    def all_gather_object(self, into, own):
        into[:] = [own if i == self.rank else said for i, said in enumerate(self.others)]


def warned(*texts):
    for text in texts:
        warnings.warn(text, stacklevel=1)
    return 7


def refused():
    raise HardwareError("no rate")


def test_what_ranks_say_is_said_once(monkeypatch):
    import torch.distributed as dist

    def see(rank, others):
        for name in ("get_rank", "get_world_size", "all_gather_object"):
            monkeypatch.setattr(dist, name, getattr(Ranks(rank, others), name))

    see(0, [None, ("", ["busy"]), ("", ["busy", "slow"])])
    assert on_all(lambda: warned("busy", "busy")) == (7, ("busy", "rank 2: slow"))
    see(0, [None, ("no rate", []), ("full disk", [])])
    with pytest.raises(CompilerError, match=r"\Aranks 0, 1: no rate\nrank 2: full disk\Z"):
        on_all(refused)
    see(1, [("no rate", []), None])
    with pytest.raises(typer.Exit) as silent:
        on_all(refused)
    assert silent.value.exit_code == 1


def test_cores_that_others_keep_busy():
    """A process beside this one is seen, and its own threads are not."""
    cores = cores_here()
    before, began = CpuTimes.now(), time.perf_counter()
    code = "import time; end = time.time() + 1.0\nwhile time.time() < end: pass"
    beside = subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
    assert beside.returncode == 0
    wall = time.perf_counter() - began
    foreign = foreign_cores(before, CpuTimes.now(), wall)
    if foreign is None:
        pytest.skip("nobody counts")
    assert foreign > 0.3  # of a core; a machine that others use as well gives it less than one
    assert in_the_way(foreign, cores) or foreign < 0.1 * cores
    assert in_the_way(0.0, cores) == "" and in_the_way(None, cores) == ""
    assert in_the_way(0.5 * cores, 0) == ""
    assert "so try again" in in_the_way(1.0 * cores, 1, "try again")
    assert is_busy(1.0 * cores) and not is_busy(0.0) and not is_busy(None)
    text = in_the_way(1.0 * cores, 1)
    assert text.startswith(f"other processes kept {cores:.1f} of {cores} cores busy")
    assert "calibrate again" in text


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


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 2, "links": [{}]}'])
def test_a_file_that_cannot_be_understood_is_none(text):
    path = links_path(detect_nominal(), torch_version(), 1, 2)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert load_links(path) == ()
    store_links(path, [MeasuredLink("device", float("nan"), 1e-6, True, 0.0, 0.0, 1)])
    assert load_links(path) == ()


def test_links_that_are_slow_change_plans():
    spec = with_ranks(load_hardware("xeon-amx-2c"), 4, 4)
    slow = with_links(spec, [MeasuredLink("device", 1e6, 1e-3, True, 0.0, 0.0, 1)])
    assert slow.link("device").bandwidth_bytes_per_s == 1e6


@pytest.mark.full
def test_ranks_measure_their_links(tmp_path):
    """Two processes: the rates of the machine, and of the hop between them; a busy machine is
    reported once, and is no error."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher.append("--no-python")
    code = "from cl_compiler.cli.main import app; app()"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*launcher, sys.executable, "-c", code, "calibrate", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    said = [line for line in run.stderr.splitlines() if line.startswith("warning: ")]
    assert len(said) == len(set(said)) and bool(said) == found["disturbed"]
    (link,) = found["links"]
    assert link["level"] == "device" and link["error"] <= 0.25 and link["error"] <= link["worst"]
    assert 1e7 < link["bytes_per_s"] < 1e11 and 0 <= link["latency_s"] < 1.0
    assert load_links(Path(found["path"])) == (MeasuredLink(**link),)
    assert len(list((tmp_path / "calibration").glob("*.json"))) == 2
