"""Building, finding, and doing without: the store when nobody harms it."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cl_compiler.cache.store as store_module
from cl_compiler.cache import CacheWarning, Variant, cache_root, fetch
from cl_compiler.errors import CacheError

Bench = Any  # tests/cache/conftest.py: Workbench


def test_the_first_fetch_builds_and_the_second_reads_the_same(bench: Bench) -> None:
    built, found = bench.fetch(), bench.fetch()
    assert (built.hit, found.hit, bench.builds) == (False, True, 1)
    assert built.source == found.source == "VALUE = '256MiB'\n"
    assert built.plan == found.plan == {"tiles": [64, 128]}
    assert built.path == found.path == bench.folder() / "kernels.py"
    assert found.path.read_text() == found.source


def test_an_entry_is_four_private_files_and_nothing_else(bench: Bench) -> None:
    bench.fetch()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in bench.folder().iterdir()}
    names = ("kernels.py", "manifest.json", "plan.json", "request.json")
    assert modes == dict.fromkeys(names, 0o600)
    for folder in (bench.folder(), bench.folder().parent, bench.root):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert json.loads((bench.folder() / "request.json").read_text())["budget"] == "256MiB"
    assert not list(bench.folder().parent.glob(".building-*"))


def test_two_builds_of_one_variant_write_the_same_bytes(bench: Bench) -> None:
    bench.fetch()
    first = {path.name: path.read_bytes() for path in bench.folder().iterdir()}
    for path in bench.folder().iterdir():
        path.unlink()
    bench.folder().rmdir()
    bench.fetch()
    assert {path.name: path.read_bytes() for path in bench.folder().iterdir()} == first


def test_two_budgets_and_two_machines_are_distinct_entries(bench: Bench) -> None:
    small, large = bench.fetch("1MiB"), bench.fetch("2MiB")
    key = bench.key("1MiB", hardware='{"name": "h100x8"}')
    elsewhere = fetch(key, bench.builder("1MiB"))
    assert len({small.path, large.path, elsewhere.path}) == 3
    assert elsewhere.path is not None
    assert small.path.parent.parent == large.path.parent.parent != elsewhere.path.parent.parent
    assert (small.source, large.source) == ("VALUE = '1MiB'\n", "VALUE = '2MiB'\n")
    assert bench.builds == 3


def test_no_cache_builds_every_time_and_writes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CL_COMPILER_NO_CACHE", "1")
    first, second = bench.fetch(), bench.fetch()
    assert (first.path, first.hit, second.hit, bench.builds) == (None, False, False, 2)
    assert first.plan == {"tiles": [64, 128]}
    assert not bench.root.exists()
    monkeypatch.setenv("CL_COMPILER_NO_CACHE", "0")
    assert bench.fetch().path is not None


def test_print_source_prints_what_is_built_and_only_then(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.fetch("1MiB")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("CL_COMPILER_PRINT_SOURCE", "1")
    bench.fetch()
    assert "VALUE = '256MiB'" in capsys.readouterr().err
    bench.fetch()
    assert capsys.readouterr().err == ""


def test_without_a_chosen_directory_the_platform_s_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CL_COMPILER_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root().name == "cl_compiler"
    assert tmp_path in cache_root().parents
    monkeypatch.setenv("CL_COMPILER_CACHE_DIR", "~/mine")
    assert cache_root() == tmp_path / "mine"


def test_a_cache_root_that_is_a_link_to_one_s_own_directory_is_used(
    bench: Bench, tmp_path: Path
) -> None:
    (tmp_path / "scratch").mkdir(mode=0o755)
    bench.root.symlink_to(tmp_path / "scratch")
    bench.fetch()
    assert bench.fetch().hit
    assert list((tmp_path / "scratch").glob("*/clip-*/kernels.py"))


def test_a_cache_below_a_regular_file_compiles_in_memory_with_a_warning(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("CL_COMPILER_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(CacheWarning, match=r"file/cache cannot be used \(Not a directory\).*memory"):
        entry = bench.fetch()
    assert (entry.path, entry.hit, entry.source) == (None, False, "VALUE = '256MiB'\n")


def _fail(code: int, only: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if only(*args):
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    return failing


@pytest.mark.parametrize(
    ("function", "code"),
    [
        ("write", errno.ENOSPC),
        ("write", errno.EDQUOT),
        ("fsync", errno.EIO),
        ("rename", errno.ENOSPC),
        ("mkdir", errno.ENOSPC),
        ("mkdir", errno.EROFS),
        ("mkdir", errno.EACCES),
    ],
)
def test_a_full_or_read_only_disk_compiles_in_memory_and_leaves_no_rest(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    failing = _fail(code)(getattr(os, function))
    with (
        monkeypatch.context() as patched,
        pytest.warns(CacheWarning, match=rf"{os.strerror(code)}.* compiled in memory") as caught,
    ):
        patched.setattr(os, function, failing)
        entry = bench.fetch()
    assert str(bench.root) in str(caught[0].message)
    assert (entry.path, entry.hit, entry.source) == (None, False, "VALUE = '256MiB'\n")
    assert bench.builds == 1
    left = [path for path in bench.root.rglob("*") if not path.name.startswith(".lock-")]
    assert [path for path in left if path != bench.folder().parent] == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names descriptors through /proc")
def test_everything_is_on_the_disk_before_it_gets_its_name(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def spy_fsync(descriptor: int) -> None:
        steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split("-")[0])
        fsync(descriptor)

    def spy_rename(*args: Any, **kwargs: Any) -> None:
        steps.append("rename")
        rename(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    bench.fetch()
    group = bench.key().fingerprint
    assert sorted(steps[:4]) == ["kernels.py", "manifest.json", "plan.json", "request.json"]
    assert steps[4:] == [".building", "rename", group]


def test_a_short_write_is_continued(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
        bench.fetch()
    assert bench.fetch().hit


def test_a_read_only_cache_still_serves_its_entries(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.fetch()
    for function in ("mkdir", "rename", "utime", "write", "fsync"):
        monkeypatch.setattr(os, function, _fail(errno.EROFS)(getattr(os, function)))
    assert bench.fetch().hit


def test_a_locking_failure_costs_nothing_but_the_lock(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr(fcntl, "flock", _fail(errno.ENOLCK)(fcntl.flock))
    assert bench.fetch().path is not None
    assert bench.fetch().hit


def test_a_builder_that_comes_second_uses_what_it_finds(bench: Bench) -> None:
    key, build = bench.key(), bench.builder()

    def slow() -> Variant:
        with pytest.warns(CacheWarning, match="was held"):
            first = fetch(key, build, lock_timeout_s=0.05)  # another process, out of patience
        assert not first.hit
        variant: Variant = build()
        return variant

    entry = fetch(key, slow)
    assert (entry.hit, bench.builds) == (True, 2)
    assert entry.path == bench.folder() / "kernels.py"


def test_threads_that_ask_at_once_build_once(bench: Bench) -> None:
    entries: list[Any] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        entries.append(bench.fetch())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bench.builds == 1
    assert sum(entry.hit for entry in entries) == 7


def test_an_error_in_the_build_is_the_user_s_and_leaves_nothing(bench: Bench) -> None:
    def build() -> Variant:
        raise OSError(errno.ENOSPC, "the planner's own trouble")

    with pytest.raises(OSError, match="planner's own"):
        fetch(bench.key(), build)
    assert not bench.folder().exists()
    assert bench.fetch().path is not None


def test_a_variant_built_for_another_request_is_refused(bench: Bench) -> None:
    with pytest.raises(CacheError, match=r"named clip-.*CacheKey\.variant"):
        fetch(bench.key("1MiB"), bench.builder("2MiB"))
    wrong = Variant(bench.key().variant, "", {"budget": "2MiB"}, {})
    with pytest.raises(CacheError, match="another request"):
        fetch(bench.key(), lambda: wrong)
    nan = Variant(bench.key().variant, "", {"loss": "clip", "budget": "256MiB"}, {"s": 1e999})
    with pytest.raises(CacheError, match=r"plan\.json"):
        fetch(bench.key(), lambda: nan)


def test_a_platform_without_posix_owners_compiles_in_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        store_module, "os", SimpleNamespace(name="nt", environ=os.environ, path=os.path)
    )
    assert bench.fetch().path is None


def test_finding_an_entry_takes_less_than_three_milliseconds(bench: Bench) -> None:
    key = bench.key()
    source = "".join(f"x{i} = {i}  # {'-' * 60}\n" for i in range(1000))  # 70 KB
    build = bench.builder()
    big = Variant(key.variant, source, build().request, {"levels": list(range(1000))})
    fetch(key, lambda: big)
    durations = []
    for _ in range(20):
        start = time.perf_counter()
        assert fetch(key, build).hit
        durations.append(time.perf_counter() - start)
    assert min(durations) < 3e-3, f"fastest of 20: {min(durations) * 1e3:.2f} ms"


def test_a_found_entry_needs_no_lock_library(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.fetch()
    monkeypatch.setitem(sys.modules, "filelock", None)
    assert bench.fetch().hit
