"""Several processes at one cache: one build, one valid entry, and nobody waits for the dead."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import cl_compiler
from cl_compiler.cache import list_entries, verify
from cl_compiler.cache.store import LOCK_PREFIX

Bench = Any  # tests/cache/conftest.py: Workbench

# Each process logs its builds with one atomic append, then prints what it was given.
FETCH = """
import json, os, sys, time
from pathlib import Path
from cl_compiler.cache import CacheKey, Variant, fetch

log, start, key, build_s, mode = sys.argv[1:]
request = {"loss": "clip", "budget": "256MiB"}
key = CacheKey(**json.loads(key))

def build():
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(float(build_s))
    if mode == "die":
        os.kill(os.getpid(), 9)
    return Variant(key.variant, "VALUE = '256MiB'\\n", request, {"tiles": [64, 128]})

if mode == "die in write":
    rename = os.rename
    os.rename = lambda *args, **kwargs: os.kill(os.getpid(), 9)
while not Path(start).exists():
    time.sleep(0.001)
entry = fetch(key, build)
print(json.dumps({"hit": entry.hit, "source": entry.source, "path": str(entry.path)}))
"""


def _start(
    bench: Bench, tmp_path: Path, *, build_s: float = 0.2, mode: str = "live"
) -> subprocess.Popen[str]:
    key = json.dumps(dataclasses.asdict(bench.key()))
    arguments = [tmp_path / "log", tmp_path / "start", key, build_s, mode]
    repository = Path(cl_compiler.__path__[0]).parent
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", FETCH, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    result: dict[str, Any] = json.loads(output)
    return result


def _builds(tmp_path: Path) -> int:
    return len((tmp_path / "log").read_text().splitlines())


def _wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.005)


def test_same_key_compiles_once_across_eight_processes(bench: Bench, tmp_path: Path) -> None:
    processes = [_start(bench, tmp_path) for _ in range(8)]
    (tmp_path / "start").touch()
    results = [_finish(process) for process in processes]
    assert _builds(tmp_path) == 1
    assert sum(result["hit"] for result in results) == 7
    assert {result["source"] for result in results} == {"VALUE = '256MiB'\n"}
    assert {result["path"] for result in results} == {str(bench.folder() / "kernels.py")}
    assert verify(bench.root) == ()
    assert len(list_entries(bench.root)) == 1


def test_processes_that_find_damage_at_once_repair_it_once(bench: Bench, tmp_path: Path) -> None:
    bench.fetch()
    (bench.folder() / "kernels.py").write_text("raise SystemExit('executed')\n")
    processes = [_start(bench, tmp_path) for _ in range(4)]
    (tmp_path / "start").touch()
    finished = [process.communicate(timeout=30) for process in processes]
    # -W error turns the one warning into that process's exit; the other three agree on the rest.
    failed = [errors for (_, errors), p in zip(finished, processes, strict=True) if p.returncode]
    assert len(failed) == 1
    assert "CacheWarning" in failed[0] and "is longer than its 17 bytes" in failed[0]
    assert _builds(tmp_path) == 1
    assert verify(bench.root) == ()


def test_a_killed_holder_of_the_lock_does_not_block_the_next(bench: Bench, tmp_path: Path) -> None:
    holder = _start(bench, tmp_path, build_s=60.0)
    (tmp_path / "start").touch()
    _wait_until((tmp_path / "log").exists, "the holder is building")
    assert (bench.folder().parent / f"{LOCK_PREFIX}{bench.key().variant}").exists()
    waiting = [_start(bench, tmp_path, build_s=0.0) for _ in range(2)]
    time.sleep(0.3)
    assert all(process.poll() is None for process in waiting), "they must wait while it lives"
    holder.send_signal(signal.SIGKILL)
    start = time.monotonic()
    results = [_finish(process) for process in waiting]
    assert time.monotonic() - start < 5.0
    assert holder.wait() == -signal.SIGKILL
    assert sorted(result["hit"] for result in results) == [False, True]
    assert _builds(tmp_path) == 2
    assert verify(bench.root) == ()
    for pipe in (holder.stdout, holder.stderr):
        assert pipe is not None
        pipe.close()


@pytest.mark.parametrize("mode", ["die", "die in write"])
def test_a_process_killed_half_way_leaves_no_half_entry(
    bench: Bench, tmp_path: Path, mode: str
) -> None:
    (tmp_path / "start").touch()
    victim = _start(bench, tmp_path, build_s=0.0, mode=mode)
    victim.communicate(timeout=30)
    assert victim.returncode == -signal.SIGKILL
    assert list_entries(bench.root) == ()
    entry = bench.fetch()
    assert not entry.hit and entry.path is not None
    assert bench.fetch().hit
    assert verify(bench.root) == ()
