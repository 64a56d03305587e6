"""Whatever was tampered with is never executed: it is replaced, and the user is told."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_compiler.cache import CacheWarning, clear, fetch, verify
from cl_compiler.cache.key import canonical_json, sha256_hex
from cl_compiler.cache.manifest import parse_manifest

Bench = Any  # tests/cache/conftest.py: Workbench
NAMES = ("kernels.py", "request.json", "plan.json", "manifest.json")
EVIL = "raise SystemExit('executed')\n"


def _refuses_and_rebuilds(bench: Bench, reason: str) -> None:
    """The damage is reported by verify, replaced by fetch, with one warning that says why."""
    assert verify(bench.root), "verify() must see the damage too"
    with pytest.warns(CacheWarning, match=reason) as caught:
        entry = bench.fetch()
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    assert str(bench.root) in str(caught[0].message)
    assert "is rebuilt" in str(caught[0].message)
    assert (entry.hit, bench.builds) == (False, 2)
    assert entry.source == "VALUE = '256MiB'\n"
    assert bench.fetch().hit, "the rebuilt entry must be valid"
    assert verify(bench.root) == ()
    assert not list(bench.root.rglob(".rejected-*"))


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_byte_is_never_executed(bench: Bench, name: str) -> None:
    bench.fetch()
    file = bench.folder() / name
    pristine = file.read_bytes()
    for position in (0, len(pristine) // 2, len(pristine) - 2):
        content = bytearray(pristine)
        content[position] ^= 0x01
        file.write_bytes(content)
        with pytest.warns(CacheWarning, match=name):
            assert not bench.fetch().hit, f"byte {position} of {name}"
        assert file.read_bytes() == pristine


def test_every_single_flipped_bit_of_a_manifest_is_noticed(bench: Bench) -> None:
    bench.fetch()
    pristine = (bench.folder() / "manifest.json").read_bytes()
    parse_manifest(pristine)
    unnoticed = []
    for position in range(len(pristine)):
        for bit in range(8):
            content = bytearray(pristine)
            content[position] ^= 1 << bit
            with contextlib.suppress(ValueError):
                parse_manifest(bytes(content))
                unnoticed.append((position, bit))
    assert unnoticed == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_truncated_file_is_never_executed(bench: Bench, name: str, keep: int) -> None:
    bench.fetch()
    file = bench.folder() / name
    file.write_bytes(file.read_bytes()[:keep] if name != "manifest.json" or keep != -1 else b"{")
    _refuses_and_rebuilds(bench, f"{name} (ends after|is not a manifest|is missing)")


def test_a_file_with_lines_appended_is_never_executed(bench: Bench) -> None:
    bench.fetch()
    with (bench.folder() / "kernels.py").open("a") as file:
        file.write(EVIL)
    _refuses_and_rebuilds(bench, r"kernels\.py is longer than its")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_rebuilt(bench: Bench, name: str) -> None:
    bench.fetch()
    (bench.folder() / name).unlink()
    _refuses_and_rebuilds(bench, f"{name} is missing")


@pytest.mark.parametrize("name", NAMES)
def test_a_link_in_a_file_s_place_is_never_followed(
    bench: Bench, tmp_path: Path, name: str
) -> None:
    bench.fetch()
    file = bench.folder() / name
    target = tmp_path / "elsewhere"
    shutil.copy(file, target)
    os.chmod(target, 0o600)
    file.unlink()
    file.symlink_to(target)  # same content: only the link is wrong
    _refuses_and_rebuilds(bench, f"{name} is a symbolic link")
    assert target.exists(), "what a link points to is not the cache's to delete"


def test_a_link_in_the_entry_s_place_is_never_followed(bench: Bench, tmp_path: Path) -> None:
    bench.fetch()
    bench.folder().rename(tmp_path / bench.folder().name)
    bench.folder().symlink_to(tmp_path / bench.folder().name)
    _refuses_and_rebuilds(bench, "is a symbolic link")
    assert (tmp_path / bench.folder().name / "kernels.py").exists()


def test_a_link_in_the_group_s_place_is_never_followed(bench: Bench, tmp_path: Path) -> None:
    bench.fetch()
    group = bench.folder().parent
    group.rename(tmp_path / group.name)
    group.symlink_to(tmp_path / group.name)
    _refuses_and_rebuilds(bench, "is a symbolic link")
    assert (tmp_path / group.name / bench.folder().name / "kernels.py").exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o701])
@pytest.mark.parametrize("which", ["file", "entry", "group"])
def test_what_others_may_touch_is_never_executed(bench: Bench, which: str, mode: int) -> None:
    bench.fetch()
    folder = bench.folder()
    path = {"file": folder / "kernels.py", "entry": folder, "group": folder.parent}[which]
    path.chmod(mode)
    _refuses_and_rebuilds(bench, f"has mode {mode:04o}, which lets other users in")


def test_a_cache_root_that_others_may_write_is_not_used_at_all(bench: Bench) -> None:
    bench.fetch()
    bench.root.chmod(0o777)
    with pytest.warns(CacheWarning, match="cache has mode 0777.*compiled in memory"):
        entry = bench.fetch()
    assert (entry.path, entry.hit) == (None, False)
    assert [problem.path for problem in verify(bench.root)] == [bench.root]


@pytest.mark.parametrize("which", ["file", "entry", "group"])
def test_what_somebody_else_owns_is_never_executed(
    bench: Bench, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.fetch()
    folder = bench.folder()
    path = {"file": folder / "kernels.py", "entry": folder, "group": folder.parent}[which]
    os.utime(path, (1, 1))  # a mark that whatever replaces it will not bear
    status, descriptor_status = os.stat, os.fstat

    def foreign(real: os.stat_result) -> os.stat_result:
        fields = list(real)
        if real.st_mtime == 1:
            fields[4] = real.st_uid + 1  # st_uid
        return os.stat_result(fields)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda *a, **k: foreign(status(*a, **k)))
        patched.setattr(os, "fstat", lambda *a, **k: foreign(descriptor_status(*a, **k)))
        with pytest.warns(CacheWarning, match="belongs to uid"):
            entry = bench.fetch()
    assert (entry.hit, bench.builds) == (False, 2)
    assert bench.fetch().hit


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_file_really_owned_by_another_user_is_never_executed(bench: Bench) -> None:
    bench.fetch()
    os.chown(bench.folder() / "kernels.py", 12345, -1)
    _refuses_and_rebuilds(bench, "belongs to uid 12345, not to this user")


def test_a_fifo_in_a_file_s_place_does_not_hang(bench: Bench) -> None:
    bench.fetch()
    (bench.folder() / "kernels.py").unlink()
    os.mkfifo(bench.folder() / "kernels.py", 0o600)
    _refuses_and_rebuilds(bench, r"kernels\.py is not a regular file")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_something_else_in_the_entry_s_place_is_replaced(
    bench: Bench, make: Callable[[Path], None]
) -> None:
    bench.fetch()
    shutil.rmtree(bench.folder())
    make(bench.folder())
    os.chmod(bench.folder(), 0o700)
    _refuses_and_rebuilds(bench, r"is missing|is not a directory")


def test_an_entry_renamed_to_another_key_is_never_executed(bench: Bench) -> None:
    bench.fetch("1MiB")
    bench.folder("1MiB").rename(bench.folder())
    bench.builds = 1
    _refuses_and_rebuilds(bench, "made for another request")


def test_an_entry_moved_to_another_fingerprint_is_never_executed(bench: Bench) -> None:
    bench.fetch()
    old = bench.folder()
    (bench.templates / "loss.py.jinja").write_text("{# edited #}\n")
    bench.folder().parent.mkdir(mode=0o700)
    old.rename(bench.folder())
    _refuses_and_rebuilds(bench, "was rendered for the fingerprint")


def test_a_manifest_with_honest_checksums_of_other_files_is_refused(bench: Bench) -> None:
    bench.fetch()
    file = bench.folder() / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"]
    manifest["files"][0]["name"] = "../../../outside.py"
    manifest["sha256"] = sha256_hex(canonical_json(manifest).encode())
    file.write_text(json.dumps(manifest))
    _refuses_and_rebuilds(bench, "lists other files than a variant has")


def test_a_colliding_digest_is_not_taken_for_the_request(bench: Bench) -> None:
    bench.fetch()
    key = bench.key()
    twin = type(key)(key.fingerprint, key.loss, key.hardware, key.digest + "0" * 52)
    assert twin.variant == key.variant

    class Built(Exception):
        pass

    def build() -> Any:
        raise Built

    with pytest.warns(CacheWarning, match="another request"), pytest.raises(Built):
        fetch(twin, build)


def test_damage_that_cannot_be_removed_is_still_never_executed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.fetch()
    (bench.folder() / "kernels.py").write_text(EVIL)

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(os, "rename", read_only)
    with pytest.warns(CacheWarning) as caught:
        entry = bench.fetch()
    refused, in_memory = (str(warning.message) for warning in caught)
    assert "not executed" in refused and "stays there" in refused
    assert "compiled in memory" in in_memory
    assert (entry.path, entry.source) == (None, "VALUE = '256MiB'\n")


def test_the_text_that_was_verified_is_the_text_that_is_returned(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.fetch()
    source = bench.folder() / "kernels.py"
    inode, reads, close = source.stat().st_ino, [], os.close

    def swap_after_reading(descriptor: int) -> None:
        # The entry's directory is closed last; by then an attacker has rewritten the file.
        source.write_text(EVIL)
        reads.append(descriptor)
        close(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", swap_after_reading)
        entry = bench.fetch()
    assert reads and source.read_text() == EVIL and source.stat().st_ino == inode
    assert (entry.hit, entry.source) == (True, "VALUE = '256MiB'\n")


def test_nothing_in_the_cache_is_a_pickle_or_compiled_code(bench: Bench) -> None:
    bench.fetch()
    files = [path for path in bench.root.rglob("*") if path.is_file()]
    assert {path.suffix for path in files if not path.name.startswith(".lock-")} == {
        ".py",
        ".json",
    }
    clear(bench.root)
    assert [path for path in bench.root.rglob("*") if path.is_file()] == []
