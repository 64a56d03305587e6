"""Listing, checking and shrinking the cache."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cl_compiler.cache import CacheWarning, clear, fetch, list_entries, prune, verify
from cl_compiler.errors import CacheError

Bench = Any  # tests/cache/conftest.py: Workbench


def _age(bench: Bench, budget: str, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(bench.folder(budget), (moment, moment))


def _budgets(bench: Bench) -> set[str]:
    return {entry.path.joinpath("kernels.py").read_text() for entry in list_entries(bench.root)}


def _all_file_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def test_an_entry_says_what_it_is_how_long_and_how_old(bench: Bench) -> None:
    before = time.time() - 1
    path = bench.fetch().path.parent
    (entry,) = list_entries(bench.root)
    key = bench.key()
    assert (entry.fingerprint, entry.loss, entry.digest) == (key.fingerprint, "clip", key.digest)
    assert (entry.hardware, entry.path) == ("desk", path)
    assert entry.file_bytes == _all_file_bytes(path)
    assert before < entry.created_unix_s <= entry.last_used_unix_s + 1 < time.time() + 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.loss = "siglip"  # type: ignore[misc]


def test_a_fetch_renews_last_used_and_not_created(bench: Bench) -> None:
    bench.fetch()
    _age(bench, "256MiB", 1000)
    (old,) = list_entries(bench.root)
    bench.fetch()
    (used,) = list_entries(bench.root)
    assert used.last_used_unix_s - old.last_used_unix_s == pytest.approx(1000, abs=10)
    assert used.created_unix_s == old.created_unix_s


def test_entries_are_listed_last_used_first(bench: Bench) -> None:
    for age, budget in enumerate(("1MiB", "2MiB", "3MiB")):
        bench.fetch(budget)
        _age(bench, budget, 100 * (1 - age) ** 2 + age)
    order = [entry.digest for entry in list_entries(bench.root)]
    assert order == [bench.key(budget).digest for budget in ("2MiB", "1MiB", "3MiB")]


def test_a_damaged_entry_is_listed_with_its_bytes_and_unknown_hardware(bench: Bench) -> None:
    bench.fetch()
    (bench.folder() / "manifest.json").write_text("{}")
    (entry,) = list_entries(bench.root)
    assert entry.hardware == "unknown"
    assert entry.file_bytes == _all_file_bytes(bench.folder())


def test_verify_names_each_problem_and_changes_nothing(bench: Bench) -> None:
    for budget in ("1MiB", "2MiB", "3MiB"):
        bench.fetch(budget)
    (bench.folder("1MiB") / "plan.json").unlink()
    (bench.folder("2MiB") / "kernels.py").chmod(0o666)
    (bench.folder("3MiB").parent / "notes.txt").write_text("mine")
    before = sorted(bench.root.rglob("*"))
    problems = {(problem.path.name, problem.reason) for problem in verify(bench.root)}
    assert problems == {
        ("plan.json", "is missing"),
        ("kernels.py", "has mode 0666, which lets other users in"),
        ("notes.txt", "is nothing that the cache put there"),
    }
    assert sorted(bench.root.rglob("*")) == before


def test_pruning_by_size_keeps_what_was_used_last(bench: Bench) -> None:
    for age, budget in enumerate(("1MiB", "2MiB", "3MiB", "4MiB")):
        bench.fetch(budget)
        _age(bench, budget, 100 * (age + 1))
    one_bytes = list_entries(bench.root)[0].file_bytes
    removal = prune(max_bytes=2 * one_bytes, root=bench.root)
    assert _budgets(bench) == {"VALUE = '1MiB'\n", "VALUE = '2MiB'\n"}
    assert {entry.digest for entry in removal.removed} == {
        bench.key("3MiB").digest,
        bench.key("4MiB").digest,
    }
    assert (removal.freed_bytes, removal.kept_bytes) == (2 * one_bytes, 2 * one_bytes)
    assert removal.kept_bytes == _all_file_bytes(bench.root)


def test_pruning_by_age_removes_what_nobody_fetched(bench: Bench) -> None:
    bench.fetch("1MiB")
    bench.fetch("2MiB")
    _age(bench, "1MiB", 86400)
    assert len(prune(older_than_s=3600, root=bench.root).removed) == 1
    assert _budgets(bench) == {"VALUE = '2MiB'\n"}


def test_pruning_other_environments_keeps_this_one(bench: Bench) -> None:
    bench.fetch("1MiB")
    old = bench.key().fingerprint
    (bench.templates / "loss.py.jinja").write_text("{# edited #}\n")
    bench.fetch("2MiB")
    removal = prune(keep_fingerprints={bench.key().fingerprint}, root=bench.root)
    assert [entry.fingerprint for entry in removal.removed] == [old]
    assert _budgets(bench) == {"VALUE = '2MiB'\n"}
    assert not (bench.root / old).exists(), "locks of a group without variants go with it"


def test_pruning_without_a_limit_only_sweeps_up_after_killed_builds(bench: Bench) -> None:
    bench.fetch()
    group = bench.folder().parent
    for name, age_s in (("dead", 7200), ("live", 10)):
        (group / f".building-{name}").mkdir()
        (group / f".building-{name}" / "kernels.py").write_text("x" * 100)
        moment = time.time() - age_s
        os.utime(group / f".building-{name}", (moment, moment))
    assert [problem.path.name for problem in verify(bench.root)] == [".building-dead"]
    removal = prune(root=bench.root)
    assert (removal.removed, removal.freed_bytes) == ((), 100)
    assert not (group / ".building-dead").exists()
    assert (group / ".building-live").exists()
    assert bench.fetch().hit


def test_clear_removes_the_cache_and_nothing_else_in_its_directory(bench: Bench) -> None:
    bench.fetch("1MiB")
    bench.fetch("2MiB")
    (bench.root / "calibration.json").write_text("{}")
    (bench.root / "photos").mkdir()
    cached_bytes = _all_file_bytes(bench.root) - 2
    removal = clear(bench.root)
    assert (len(removal.removed), removal.freed_bytes, removal.kept_bytes) == (2, cached_bytes, 0)
    assert {path.name for path in bench.root.iterdir()} == {"calibration.json", "photos"}
    assert list_entries(bench.root) == ()
    assert not bench.fetch("1MiB").hit


def test_a_linked_group_is_neither_listed_nor_followed_when_cleared(
    bench: Bench, tmp_path: Path
) -> None:
    bench.fetch()
    group = bench.folder().parent
    group.rename(tmp_path / "elsewhere")
    group.symlink_to(tmp_path / "elsewhere")
    assert list_entries(bench.root) == ()
    clear(bench.root)
    assert not group.is_symlink()
    assert (tmp_path / "elsewhere" / bench.folder().name / "kernels.py").exists()


def test_bytes_that_could_not_be_deleted_do_not_count_as_freed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.fetch()

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        removal = prune(max_bytes=0, root=bench.root)
    assert removal.freed_bytes == 0
    assert removal.kept_bytes == _all_file_bytes(bench.root) > 0
    assert list_entries(bench.root) == (), "out of the way all the same"
    assert prune(root=bench.root).kept_bytes == 0


def test_someone_else_s_cache_is_left_alone(bench: Bench) -> None:
    bench.fetch()
    bench.root.chmod(0o777)
    with pytest.raises(CacheError, match=r"mode 0777.*chmod 700"):
        clear(bench.root)
    assert (bench.folder() / "kernels.py").exists()


def test_a_cache_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert list_entries(absent) == ()
    assert verify(absent) == ()
    assert clear(absent).freed_bytes == prune(root=absent).freed_bytes == 0


def test_the_configured_cache_is_the_default(bench: Bench) -> None:
    bench.fetch()
    assert len(list_entries()) == 1
    assert verify() == ()
    assert len(prune(max_bytes=0).removed) == 1
    assert list_entries() == ()
    bench.fetch()
    assert len(clear().removed) == 1
    assert not list(bench.root.iterdir())


def test_pruning_while_a_process_builds_costs_it_nothing(bench: Bench) -> None:
    key, build = bench.key(), bench.builder()

    def prune_meanwhile() -> Any:
        clear(bench.root)
        return build()

    entry = fetch(key, prune_meanwhile)
    assert entry.path is not None and entry.path.read_text() == entry.source
    assert fetch(key, build).hit


def test_a_group_that_others_may_write_goes_whole(bench: Bench) -> None:
    bench.fetch("1MiB")
    bench.fetch("2MiB")
    bench.folder().parent.chmod(0o777)
    removal = prune(root=bench.root)
    assert len(removal.removed) == 2
    assert not bench.folder().parent.exists()


def test_warnings_of_the_cache_can_be_silenced_as_a_class() -> None:
    assert issubclass(CacheWarning, UserWarning)
