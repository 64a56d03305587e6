"""``python -m benchmarks.gpu`` end to end on a CPU: crashes, hangs, kills and budgets included."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.cases import items_of
from benchmarks.gpu.journal import Journal, read_note
from benchmarks.gpu.peers import PEERS

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
    """The dry run as it is: every provider of every case."""
    path = tmp_path_factory.mktemp("results") / "dry.json"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(path, "--quick")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(path.read_text()), done.stdout, path, spent


def test_a_dry_run_takes_less_than_a_minute_of_a_processor(quick):
    _, _, _, seconds = quick
    assert seconds < 60


def test_every_item_is_measured_once(quick):
    content, _, _, _ = quick
    wanted = items_of(quick=True)
    assert [case["key"] for case in content["cases"]] == [item.key for item in wanted]
    assert all(case["done"] for case in content["cases"])
    for case, item in zip(content["cases"], wanted, strict=True):
        assert tuple(case["rows"]) == getattr(item, "providers", ("library",))


def test_every_repetition_is_kept_and_only_what_needs_a_gpu_is_skipped(quick):
    content, _, _, _ = quick
    for (_, name), row in rows_of(content, "speed").items():
        if name.partition(":")[0] in {"triton", *PEERS}:
            assert row["error"].startswith("skipped: ") and row["error"].endswith(" needs a GPU")
            continue
        assert row["error"] == ""
        forward, backward = row["forward_seconds"], row["backward_seconds"]
        assert len(row["seconds"]) == len(forward) == len(backward) >= 2
        assert row["seconds"] == [f + b for f, b in zip(forward, backward, strict=True)]
        assert min(forward) <= row["forward_s"] <= max(forward)
        assert row["live_bytes"] > 0


def test_everybody_agrees_with_float64(quick):
    """bf16 gradients are rounded to 2^-9; bf16 logits, which the formulas have, cost more."""
    content, _, _, _ = quick
    for (_, name), row in rows_of(content, "correctness").items():
        if row["error"]:
            continue
        bound = 5e-3 if name.startswith(("ours", "chunked")) else 5e-2
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
    for words in ("Limits", "Correctness", "Speed and memory", "Verdict", "whole step",
                  "GFLOP/s"):  # fmt: skip
        assert words in text
    for kind in ("time", "memory", "ceiling"):
        assert (path.parent / f"dry-{kind}.png").read_bytes().startswith(PNG)
    assert text.rstrip().endswith(str(path))


def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path):
    """A crash and a hang too cost their own rows only."""
    path = tmp_path / "r.json"
    broken = ("broken:raise", "broken:memory", "broken:exit", "broken:hang")
    done = run(path, "--only", "speed", "--losses", "nt_xent", "--provider-seconds", "10",
               "--providers", "dense", *broken)  # fmt: skip
    rows = rows_of(json.loads(path.read_text()), "speed")
    ((_, dense), *failed) = rows.items()
    assert [row["error"] for _, row in failed] == [
        "ValueError: failed on purpose",
        "OutOfMemoryError: out of memory on purpose",
        "crashed: the process ended with 7",
        "TimeoutError: no result within 10 s",
    ]
    assert dense["error"] == "" and dense["median_s"] > 0
    assert "DID NOT RUN" in done.stdout and "failed on purpose" in done.stdout
    assert not path.with_suffix(".now").exists()


def test_a_run_that_is_killed_at_once_leaves_nothing(tmp_path):
    """Its worker has not even imported PyTorch."""
    process = subprocess.Popen(command(tmp_path / "r.json"), cwd=ROOT, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    if not children_of(os.getpid()):
        pytest.skip("needs Linux")
    wait_for(lambda: children_of(process.pid))
    worker = children_of(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in worker), seconds=15)


def test_a_killed_run_is_resumed(tmp_path):
    path = tmp_path / "r.json"
    options = ("--only", "ceilings", "correctness", "--losses", "nt_xent", "--providers", "dense")
    wanted = len(items_of(quick=True, only=("ceilings", "correctness"), losses=("nt_xent",)))
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
        command(path, "--providers", "broken:hang", "--only", "ceilings", "kernels"), cwd=ROOT,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
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


WORKER = """
import sys, time
from pathlib import Path
from benchmarks.gpu.journal import Journal
journal = Journal(Path(sys.argv[1]), sys.argv[2])
journal.begin_run({"device": {"name": "here"}})
with journal.doing("k", "slow"):
    time.sleep(60)
"""
SUPERVISOR = """
import sys
from benchmarks.gpu import __main__, supervisor
supervisor._command = lambda o, run: [sys.executable, "-c", sys.argv[1], str(o.out), run]
sys.exit(__main__.main(["--out", sys.argv[2]]))
"""


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path):
    path = tmp_path / "r.json"
    process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, WORKER, str(path)], cwd=ROOT,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    wait_for(lambda: read_note(path.with_suffix(".now")))
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    (described,) = json.loads(path.read_text())["runs"].values()
    assert described["ended_early"] == "interrupted"
    assert not path.with_suffix(".now").exists()


def children_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


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
    assert again.kept("k", finished=False) == {"guilty": {"error": "crashed", "fatal": True}}
    assert again.strikes("guilty") == 1 and again.strikes("other") == 0
    assert Journal(tmp_path / "r.json", "later").kept("k", finished=False) == {}
