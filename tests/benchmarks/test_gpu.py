"""``python -m benchmarks.gpu`` end to end on a CPU: crashes, hangs, kills and budgets included."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu.cases import SECTIONS, Contest, items_of
from benchmarks.gpu.journal import Journal, read_note
from benchmarks.gpu.options import parse
from benchmarks.gpu.peers import PEERS
from benchmarks.gpu.supervisor import unpacked

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG"


def command(out: Path, *options: str) -> list[str]:
    where = [] if "--resume" in options else ["--out", str(out)]
    return [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", *where, *options]


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(out, *options), cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def rows_of(content: dict, section: str) -> dict[tuple[str, str], dict]:
    cases = [case for case in content["cases"] if case["section"] == section]
    return {(case["key"], name): row for case in cases for name, row in case["rows"].items()}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, Path, float]:
    path = tmp_path_factory.mktemp("results") / "dry.json"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(path, "--quick", "--providers", "ours", "chunked", "open_clip", "dense", "memeff",
               "broken:raise", "broken:memory")  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(path.read_text()), done.stdout, path, spent


def test_a_dry_run_takes_less_than_a_minute_of_a_processor(quick):
    _, _, _, seconds = quick
    assert seconds < 60


def test_every_item_is_measured_once(quick):
    content, _, _, _ = quick
    names = ("ours", "chunked", "open_clip", "dense", "memeff", "broken:raise", "broken:memory")
    wanted = items_of(quick=True, providers=names)
    assert [case["key"] for case in content["cases"]] == [item.key for item in wanted]
    assert all(case["done"] for case in content["cases"])


def test_every_repetition_is_kept(quick):
    content, _, _, _ = quick
    for (_, name), row in rows_of(content, "speed").items():
        if name in ("memeff", "broken:raise", "broken:memory"):
            continue
        assert row["error"] == ""
        forward, backward = row["forward_seconds"], row["backward_seconds"]
        assert len(row["seconds"]) == len(forward) == len(backward) >= 2
        assert row["seconds"] == [f + b for f, b in zip(forward, backward, strict=True)]
        assert min(forward) <= row["forward_s"] <= max(forward)
        assert row["live_bytes"] > 0


def test_what_fails_is_a_row_and_the_rest_goes_on(quick):
    content, _, _, _ = quick
    for section in ("correctness", "speed"):
        rows = rows_of(content, section)
        errors = {name: row["error"] for (_, name), row in rows.items()}
        assert errors["broken:raise"] == "ValueError: failed on purpose"
        assert errors["broken:memory"] == "OutOfMemoryError: out of memory on purpose"
        assert errors["memeff"] == "skipped: memeff needs a GPU"
        assert errors["ours"] == errors["chunked"] == errors["open_clip"] == ""


def test_everybody_agrees_with_float64(quick):
    """bf16 gradients are rounded to 2^-9; bf16 logits, which the formulas have, cost more."""
    content, _, _, _ = quick
    for (_, name), row in rows_of(content, "correctness").items():
        if row["error"]:
            continue
        bound = 5e-3 if name in ("ours", "chunked") else 5e-2
        assert {"value", "d_logit_scale"} < row["errors"].keys()
        assert max(row["errors"].values()) < bound
        assert row["repeats"] is True


def test_a_run_says_where_it_ran(quick):
    content, _, _, _ = quick
    (described,) = content["runs"].values()
    assert described["device"]["kind"] == "cpu" and described["device"]["name"]
    assert described["versions"]["torch"] and "triton" in described["versions"]
    assert described["is_complete"] and described["is_quick"] and described["ended_early"] == ""
    assert described["seconds"] > 0
    assert len(described["commit"]) in (0, 40)


def test_tables_and_figures_come_last(quick):
    _, text, path, _ = quick
    for words in ("Limits", "Correctness", "Speed and memory", "Verdict", "failed on purpose",
                  "GFLOP/s", "ahead"):  # fmt: skip
        assert words in text
    for kind in ("time", "memory", "ceiling"):
        assert (path.parent / f"dry-{kind}.png").read_bytes().startswith(PNG)
    assert text.rstrip().endswith(str(path))


def test_a_crash_and_a_hang_cost_their_own_rows_only(tmp_path):
    path = tmp_path / "r.json"
    done = run(path, "--only", "speed", "--losses", "nt_xent", "--provider-seconds", "20",
               "--providers", "dense", "broken:exit", "broken:hang")  # fmt: skip
    content = json.loads(path.read_text())
    ((_, dense), (_, crashed), (_, hung)) = rows_of(content, "speed").items()
    assert crashed["error"] == "crashed: the process ended with 7"
    assert hung["error"] == "TimeoutError: no result within 20 s"
    assert dense["error"] == "" and dense["median_s"] > 0
    assert "DID NOT RUN" in done.stdout
    assert not path.with_suffix(".now").exists()


def test_a_killed_run_is_resumed(tmp_path):
    path = tmp_path / "r.json"
    options = ("--only", "ceilings", "correctness", "--losses", "infonce", "siglip",
               "--providers", "dense", "open_clip", "chunked")  # fmt: skip
    wanted = len(items_of(quick=True, only=("ceilings", "correctness"),
                          losses=("infonce", "siglip")))  # fmt: skip
    process = subprocess.Popen(command(path, *options), cwd=ROOT, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    while sum(case["done"] for case in Journal(path, "").content["cases"]) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    worker = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if worker:  # Linux: a killed run leaves nothing behind
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in worker))
    before = {c["key"]: c for c in json.loads(path.read_text())["cases"] if c["done"]}
    assert 5 <= len(before) < wanted
    run(path, *options, "--resume", str(path))
    content = json.loads(path.read_text())
    after = {case["key"]: case for case in content["cases"]}
    assert len(after) == wanted and all(case["done"] for case in after.values())
    assert {key: after[key] for key in before} == before
    assert len(content["runs"]) == 2


def test_an_interrupted_run_shows_what_it_has(tmp_path):
    """Ctrl-C reaches every process of the terminal's foreground group."""
    path = tmp_path / "r.json"
    process = subprocess.Popen(
        command(path, "--providers", "broken:hang"), cwd=ROOT, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: (read_note(path.with_suffix(".now")) or {}).get("provider") == "broken:hang")
    os.killpg(process.pid, signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and errors.rstrip().endswith("ended early: interrupted")
    assert "Limits" in text and "ended early: interrupted; go on with --resume" in text
    (described,) = json.loads(path.read_text())["runs"].values()
    assert described["ended_early"] == "interrupted"
    assert not path.with_suffix(".now").exists()


def children_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def wait_for(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_spent_budget_ends_a_run_cleanly(tmp_path):
    path = tmp_path / "r.json"
    done = run(path, "--budget-seconds", "0.01")
    content = json.loads(path.read_text())
    (described,) = content["runs"].values()
    assert described["ended_early"] == "the time budget is spent"
    assert described["is_complete"] is False and content["cases"] == []
    assert "--resume" in done.stdout


def test_results_of_two_devices_do_not_mix(tmp_path):
    path = tmp_path / "r.json"
    Journal(path, "first").begin_run({"device": {"name": "H100"}})
    with pytest.raises(ValueError, match="holds results of H100, this is A100"):
        Journal(path, "second", resume=True).begin_run({"device": {"name": "A100"}})


def test_a_note_names_what_took_the_process_down(tmp_path):
    journal = Journal(tmp_path / "r.json", "run")
    journal.write({"key": "k", "rows": {}, "done": False})
    with pytest.raises(KeyboardInterrupt), journal.doing("k", "guilty"):
        raise KeyboardInterrupt
    note = json.loads(journal.note_path.read_text())
    assert (note["key"], note["provider"], note["run"]) == ("k", "guilty", "run")
    journal.blame(note, "crashed")
    again = Journal(tmp_path / "r.json", "run")
    assert again.failed_for_good("k") == {"guilty": {"error": "crashed", "fatal": True}}
    assert again.strikes("guilty") == 1 and again.strikes("other") == 0
    assert Journal(tmp_path / "r.json", "later").failed_for_good("k") == {}


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
    [["--resume", "nowhere.json"], ["--budget-seconds", "0"], ["--wheels", "."], ["--only", "x"]],
)
def test_a_wrong_command_line_is_refused(options, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ending:
        parse(options)
    assert ending.value.code == 2 and options[0] in capsys.readouterr().err


def test_the_dry_run_is_quick_and_resuming_keeps_its_file(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("{}")
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
