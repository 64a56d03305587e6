"""The cache stays within its bound by itself, also while several processes store into it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import cl_compiler
from cl_compiler.cache import CacheWarning, fetch, list_entries, max_cache_bytes, store, verify
from cl_compiler.cache.bound import DEFAULT_MAX_BYTES
from cl_compiler.cache.guard import Untrusted, discard
from cl_compiler.cache.store import LOCK_PREFIX

Bench = Any  # tests/cache/conftest.py: Workbench
VARIABLE = "CL_COMPILER_CACHE_MAX_BYTES"


def room_for(bench: Bench, monkeypatch: pytest.MonkeyPatch, count: int) -> int:
    """Bound the cache to so many variants of the workbench; bytes of one."""
    bench.fetch("1MiB")
    (entry,) = list_entries(bench.root)
    monkeypatch.setenv(VARIABLE, str(int((count + 0.5) * entry.file_bytes)))
    return entry.file_bytes


def used_ago(bench: Bench, budget: str, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(bench.folder(budget), (moment, moment))


def kept(bench: Bench) -> set[str]:
    names = {f"{n}MiB": bench.folder(f"{n}MiB") for n in range(1, 10)}
    return {budget for budget, folder in names.items() if folder.exists()}


def test_what_was_used_least_recently_makes_room(bench: Bench, monkeypatch: Any) -> None:
    room_for(bench, monkeypatch, 3)
    for budget in ("2MiB", "3MiB"):
        bench.fetch(budget)
    for age, budget in enumerate(("1MiB", "2MiB", "3MiB")):
        used_ago(bench, budget, 1000 - age)
    bench.fetch("1MiB")  # the oldest was used again
    bench.fetch("4MiB")
    assert kept(bench) == {"1MiB", "3MiB", "4MiB"}
    assert verify(bench.root) == ()
    assert not (bench.folder("2MiB").parent / f"{LOCK_PREFIX}{bench.key('2MiB').variant}").exists()


def test_a_hit_removes_nothing(bench: Bench, monkeypatch: Any) -> None:
    room_for(bench, monkeypatch, 2)
    bench.fetch("2MiB")
    monkeypatch.setenv(VARIABLE, "1")
    assert bench.fetch("1MiB").hit
    assert kept(bench) == {"1MiB", "2MiB"}


def test_what_was_just_stored_stays_whatever_the_bound(bench: Bench, monkeypatch: Any) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    for budget in ("1MiB", "2MiB"):
        assert bench.fetch(budget).path.exists()
    assert kept(bench) == {"2MiB"}


def test_variants_of_other_environments_count_too(bench: Bench, monkeypatch: Any) -> None:
    room_for(bench, monkeypatch, 1)
    used_ago(bench, "1MiB", 1000)
    other = bench.key("2MiB", hardware=json.dumps({"name": "other", "levels": []}))
    build = bench.builder("2MiB")
    assert fetch(other, build).path is not None
    assert [entry.fingerprint for entry in list_entries(bench.root)] == [other.fingerprint]


def test_other_files_in_the_folder_are_left_alone(bench: Bench, monkeypatch: Any) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    bench.fetch("1MiB")
    (bench.root / "calibration.json").write_text("{}")
    bench.fetch("2MiB")
    assert (bench.root / "calibration.json").read_text() == "{}"


def test_the_bound_is_read_from_the_environment(monkeypatch: Any) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert max_cache_bytes() == DEFAULT_MAX_BYTES
    monkeypatch.setenv(VARIABLE, "1 GiB")
    assert max_cache_bytes() == 1 << 30
    monkeypatch.setenv(VARIABLE, "0")
    assert max_cache_bytes() is None
    monkeypatch.setenv(VARIABLE, "lots")
    with pytest.warns(CacheWarning, match=f"{VARIABLE}: cannot read 'lots'"):
        assert max_cache_bytes() == DEFAULT_MAX_BYTES


STORE = """
import json, sys, warnings
from cl_compiler.cache import CacheKey, Variant, fetch
warnings.simplefilter("error")
for key, request in json.loads(sys.argv[1]):
    key = CacheKey(**key)
    source = f"VALUE = {request['budget']!r}\\n"
    for _ in range(3):
        entry = fetch(key, lambda: Variant(key.variant, source, request, {"tiles": [64, 128]}))
        assert entry.source == source and entry.path is not None
"""


def test_what_makes_room_while_it_is_read_is_built_again_without_a_word(
    bench: Bench, monkeypatch: Any, recwarn: pytest.WarningsRecorder
) -> None:
    """Its files go while its directory is open: that is no damage."""
    bench.fetch()
    looks, read = [], store.read_variant

    def late(directory: int, path: Path, request_sha256: str | None) -> dict[str, bytes]:
        looks.append(path)
        if len(looks) == 1:  # leads to the look under the lock
            raise Untrusted(path, "was seen too early")
        group = os.open(path.parent, os.O_RDONLY)
        discard(path.name, group)
        os.close(group)
        return read(directory, path, request_sha256)

    monkeypatch.setattr(store, "read_variant", late)
    assert not bench.fetch().hit and len(looks) == 2
    assert [str(w.message) for w in recwarn] == []


def test_processes_that_store_at_once_never_get_a_wrong_file(
    bench: Bench, monkeypatch: Any
) -> None:
    """Room for two, six variants, four processes in different orders: only time is lost."""
    size = room_for(bench, monkeypatch, 2)
    budgets = [f"{n}MiB" for n in range(1, 7)]
    jobs = [(asdict(bench.key(b)), {"loss": "clip", "budget": b}) for b in budgets]
    repository = Path(cl_compiler.__path__[0]).parent
    running = [
        subprocess.Popen(
            [sys.executable, "-c", STORE, json.dumps(jobs[k:] + jobs[:k])],
            env={**os.environ, "PYTHONPATH": str(repository)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(4)
    ]
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4, errors
    assert verify(bench.root) == ()
    bench.fetch("9MiB")  # alone, so the bound holds again
    assert sum(entry.file_bytes for entry in list_entries(bench.root)) < 3 * size
