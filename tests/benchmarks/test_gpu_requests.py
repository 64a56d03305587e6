"""What may be asked of ``python -m benchmarks.gpu``; what cannot be is said before it measures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import supervisor, worker
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.cases import LOSSES, PROVIDERS, SECTIONS, Contest, is_provider, items_of
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.options import parse
from benchmarks.gpu.peers import PEERS
from benchmarks.gpu.supervisor import unpacked
from benchmarks.record import merge
from cl_compiler.errors import ArgumentError
from cl_compiler.lang.program import SCHEDULES

ROOT = Path(__file__).parents[2]


def test_items_come_most_valuable_first_and_once():
    items = items_of()
    keys = [item.key for item in items]
    assert len(keys) == len(set(keys))
    sections = [item.section for item in items]
    assert list(dict.fromkeys(sections)) == list(SECTIONS)
    speed = [item for item in items if item.section == "speed"]
    assert (speed[0].loss, speed[0].M, speed[0].D) == ("clip", 32768, 512)
    sizes = {(i.M, i.D) for i in speed if i.loss == "clip"}
    assert {(n, d) for n in (16384, 32768, 65536) for d in (256, 512, 768, 1024)} < sizes
    assert {(262144, 512), (1 << 20, 256)} < sizes
    assert {(32768, 768), (65536, 768)} < {(i.M, i.D) for i in speed if i.loss == "siglip"}


def test_promises_are_for_clip_at_64k_pairs_only():
    targets = {(i.M, i.D): i.target for i in items_of(losses=["clip"], only=["speed"])
               if isinstance(i, Contest)}  # fmt: skip
    assert targets[65536, 512] == 0.74 and targets[65536, 1024] == 0.86
    assert targets[32768, 512] is None and targets[65536, 256] is None


@pytest.mark.parametrize(
    "options",
    [
        ["--resume", "nowhere.json"],
        ["--budget-seconds", "0"],
        ["--wheels", "."],
        ["--only", "x"],
        ["--providers", "ours", "nonsense"],
        ["--providers", "ours:none"],
        ["--providers", "triton:8448"],
        ["--providers", "broken"],
        ["--providers", "memeff", "--only", "speed", "--losses", "siglip"],
    ],
)
def test_a_wrong_command_line_is_refused(options, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ending:
        parse(options)
    assert ending.value.code == 2 and options[0] in capsys.readouterr().err


def test_the_dry_run_is_quick_and_resuming_keeps_its_file(tmp_path):
    path = tmp_path / "r.json"
    path.touch()
    options = parse(["--device", "cpu", "--resume", str(path)])
    assert options.quick and options.out == path


def test_wheels_are_unpacked_for_the_worker_and_removed(tmp_path):
    with zipfile.ZipFile(tmp_path / "peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer_of_ours/__init__.py", "ANSWER = 42\n")
        wheel.writestr("peer_of_ours-1.0.dist-info/METADATA", "Name: peer-of-ours\nVersion: 1.0\n")
    code = "import peer_of_ours as p; from importlib.metadata import version\n"
    code += "print(p.ANSWER, version('peer-of-ours'))"
    with unpacked(tmp_path) as folder:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": folder},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert done.stdout == "42 1.0\n"
    assert not Path(folder).exists()
    with unpacked(None) as nothing:
        assert nothing == ""


def test_a_damaged_wheel_is_said_before_anything_is_measured(tmp_path):
    (tmp_path / "peer-1.0-py3-none-any.whl").write_bytes(b"half of it")
    with pytest.raises(ArgumentError, match=r"peer-1.0.* cannot be unpacked"), unpacked(tmp_path):
        pass


def test_providers_that_are_named_take_part_wherever_they_apply():
    def found(*names: str, **more: object) -> set[tuple[str, str, str]]:
        items = items_of(providers=names, **more)
        return {
            (i.section, i.loss, n) for i in items if isinstance(i, Contest) for n in i.providers
        }

    compared = {(s, loss) for s in ("correctness", "speed") for loss in LOSSES}
    for name in ("ours:recompute", "triton:4096x8192", "dense:compiled"):
        cases = {(s, loss) for s, loss, _ in found(name)}
        assert compared < cases and ("step", "clip") not in cases
    assert {(s, loss) for s, loss, _ in found("ours:uncached")} == {("step", "clip")}
    assert {loss for _, loss, _ in found("open_clip")} == {"clip", "siglip"}
    assert {loss for _, loss, _ in found("cce:filtered")} == {"infonce"}
    assert {loss for _, loss, _ in found("broken:raise")} == set(LOSSES)
    assert all(is_provider(n) for i in items_of() if isinstance(i, Contest) for n in i.providers)
    schedules = set(PROVIDERS["ours"].split("|")) - {"uncached", "fp8"}
    assert schedules == set(SCHEDULES)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A repository of its own for default paths, and a worker that never ends."""
    monkeypatch.setattr(supervisor, "ROOT", tmp_path)
    monkeypatch.setattr(supervisor, "_gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(supervisor, "_command", lambda options, run: sleep)
    (tmp_path / "results").mkdir()
    return tmp_path


def test_no_run_goes_on_with_a_file_that_it_was_not_told_to(here):
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    for options, stem in (
        (["--device", "cpu"], "dry-run"),
        (["--quick"], "dry-run-nvidia-h100-80gb-hbm3"),
        ([], "nvidia-h100-80gb-hbm3"),
    ):
        for tail in ("", "-2", "-3"):
            path = supervisor._default_path(parse(options))
            assert path == here / "results" / f"{stem}-{today}{tail}.json"
            path.touch()
    path = here / "mine.json"
    Journal(path, "run").save()
    with pytest.raises(ArgumentError, match=r"exists: --resume .*mine.json"):
        supervisor.supervise(parse(["--out", str(path)]))


def test_a_run_ends_within_its_budget(here, monkeypatch):
    assert supervisor._deadline(100.0, 480.0) == 580.0 - supervisor.GRACE_S - supervisor.TABLES_S
    monkeypatch.setattr(supervisor, "GRACE_S", 0.2)
    monkeypatch.setattr(supervisor, "LOADING_S", 0.0)
    start = time.monotonic()
    found = supervisor.supervise(parse(["--budget-seconds", "1"]))
    assert found == (None, "the time budget is spent") and time.monotonic() - start < 5
    assert not list(here.glob("results/*"))


def test_a_worker_that_comes_too_late_says_so(here):
    path, threads = here / "r.json", torch.get_num_threads()
    options = ["--device", "cpu", "--out", str(path), "--worker", "run", "--deadline", "1"]
    try:
        assert worker.work(parse(options)) == worker.STOPPED
    finally:
        torch.set_num_threads(threads)
    content = Journal(path, "run").content
    assert content["cases"] == [] and content["runs"]["run"]["is_complete"] is False


FOREIGN = {
    "list": "[1]",
    "other": '{"format": 9, "cases": []}',
    "truncated": '{"format": 1, "cases": [',
    "cpu": '{"format": 1, "cases": []}',
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused_and_stays(text, here):
    path = here / "r.json"
    path.write_text(text)
    for name in ("--out", "--resume"):
        with pytest.raises(ArgumentError, match="it stays as it is"):
            supervisor.supervise(parse([name, str(path)]))
    if text != FOREIGN["cpu"]:
        with pytest.raises(ArgumentError, match="it stays as it is"):
            merge(path, [])
    assert path.read_text() == text


def test_what_cannot_be_read_or_written_is_said_before_anything_is_measured(here):
    (here / "file").touch()
    for where in (here, here / "file" / "r.json"):
        with pytest.raises(ArgumentError, match=f"cannot (read|write) {where}"):
            supervisor.supervise(parse(["--out", str(where)]))
    code = "import sys, benchmarks.gpu.supervisor, benchmarks.gpu.__main__; "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0


def test_without_a_gpu_there_is_a_message_and_nothing_else(here, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = here / "r.json"
    options = ["--out", str(out), "--worker", "run", "--deadline", str(time.time() + 600)]
    assert worker.work(parse(options)) == worker.REFUSED and not out.exists()
    said = capsys.readouterr().err
    assert said == "error: --device cuda: PyTorch sees no GPU; --device cpu is a dry run\n"
    refused = [sys.executable, "-c", f"raise SystemExit({worker.REFUSED})"]
    monkeypatch.setattr(supervisor, "_command", lambda options, run: refused)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["--out", str(out)]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().out == "" and not out.exists()


def test_the_pins_of_the_peers_are_those_of_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = extras["optional-dependencies"]["peers"]
    assert sorted(pin.partition("==")[0] for pin in pins) == sorted(
        peer.package for peer in PEERS.values()
    )
    assert all("==" in pin for pin in pins)
    script = (ROOT / "benchmarks" / "fetch_peer_wheels.sh").read_text()
    assert 'extras["peers"]' in script and os.access(
        ROOT / "benchmarks" / "fetch_peer_wheels.sh", os.X_OK
    )
