"""Look after the cache: list what is in it, check it, make it smaller.

Only names that the store gives are touched: whatever else lies in the chosen directory, such as
a calibration or a user's own files, is neither counted nor deleted.  Sizes are measured on the
files that are there, and bytes count as freed only once they are gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from cl_compiler.cache.guard import (
    REJECTED_PREFIX,
    Untrusted,
    discard,
    open_directory,
    open_root,
)
from cl_compiler.cache.store import (
    BUILDING_PREFIX,
    LOCK_PREFIX,
    MANIFEST,
    cache_root,
    read_manifest,
    read_variant,
)
from cl_compiler.errors import CacheError

__all__ = [
    "CacheProblem",
    "CachedVariant",
    "Removal",
    "clear",
    "list_entries",
    "prune",
    "variant_paths",
    "verify",
]

_GROUP = re.compile(r"[0-9a-f]{16}", re.ASCII)
_VARIANT = re.compile(r"(?P<loss>\w{1,64})-(?P<digest>[0-9a-f]{12})", re.ASCII)
# No build takes this long, so what is older was left behind by a process that was killed.
_ABANDONED_AFTER_S = 3600.0
_NOT_DELETED = "was rejected and could not be deleted"


@dataclass(frozen=True)
class CachedVariant:
    """One entry: its names, the length of its files and when it was made and last fetched.

    ``hardware`` is the spec's name, "unknown" where the manifest cannot be trusted; times are
    seconds since the epoch.
    """

    fingerprint: str
    loss: str
    digest: str
    hardware: str
    file_bytes: int
    created_unix_s: float
    last_used_unix_s: float
    path: Path


@dataclass(frozen=True)
class CacheProblem:
    """Something in the cache that would not be executed, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Removal:
    """What ``prune`` or ``clear`` did: the variants that are gone, and bytes gone and left."""

    removed: tuple[CachedVariant, ...]
    freed_bytes: int
    kept_bytes: int


def list_entries(root: Path | None = None) -> tuple[CachedVariant, ...]:
    """Every variant below ``root`` (the configured cache by default), last used first."""
    root = root or cache_root()
    entries = [entry for group_path in _groups(root) for entry in _variants(group_path)]
    return tuple(sorted(entries, key=lambda entry: (-entry.last_used_unix_s, entry.path)))


def verify(root: Path | None = None) -> tuple[CacheProblem, ...]:
    """Check every file of every variant; nothing is changed or executed."""
    root = root or cache_root()
    problems: list[CacheProblem] = []
    try:
        with open_root(root) as top:
            for path in _groups(root):
                problems += _verify_group(path, top)
            problems += [CacheProblem(path, _NOT_DELETED) for path in _rejected(root)]
    except FileNotFoundError:
        return ()
    except (Untrusted, OSError) as verdict:
        return (CacheProblem(root, _reason(verdict)),)
    return tuple(problems)


def prune(
    *,
    max_bytes: int | None = None,
    older_than_s: float | None = None,
    keep_fingerprints: Collection[str] | None = None,
    root: Path | None = None,
) -> Removal:
    """Remove what is not needed any more, and what killed processes left behind.

    Args:
        max_bytes: keep the most recently used variants that fit into so many bytes.
        older_than_s: remove variants that nobody fetched for so many seconds.
        keep_fingerprints: remove variants of every other environment.
        root: the cache; the configured one by default.

    Raises:
        CacheError: the cache directory is not this user's own.
    """
    root = root or cache_root()
    now_unix_s = time.time()
    doomed: list[CachedVariant] = []
    kept_bytes = 0
    for entry in list_entries(root):
        stale = older_than_s is not None and now_unix_s - entry.last_used_unix_s > older_than_s
        foreign = keep_fingerprints is not None and entry.fingerprint not in keep_fingerprints
        crowded = max_bytes is not None and kept_bytes + entry.file_bytes > max_bytes
        if stale or foreign or crowded:
            doomed.append(entry)
        else:
            kept_bytes += entry.file_bytes
    return _remove(root, doomed, abandoned_before_unix_s=now_unix_s - _ABANDONED_AFTER_S)


def clear(root: Path | None = None) -> Removal:
    """Remove every variant with its lock, and every leftover.

    Raises:
        CacheError: the cache directory is not this user's own.
    """
    root = root or cache_root()
    return _remove(root, list(list_entries(root)), abandoned_before_unix_s=float("inf"))


def variant_paths(root: Path) -> list[Path]:
    """The folders of all variants, without a look into them."""
    return [path for group_path in _groups(root) for path in _paths(group_path)]


def _paths(group_path: Path) -> list[Path]:
    if group_path.is_symlink():
        return []
    return [
        path
        for path in _children(group_path)
        if _VARIANT.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]


def _variants(group_path: Path) -> list[CachedVariant]:
    return [_describe(path) for path in _paths(group_path)]


def _describe(path: Path) -> CachedVariant:
    match = _VARIANT.fullmatch(path.name)
    assert match is not None  # _variants asked
    hardware = "unknown"
    with contextlib.suppress(Untrusted, OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            hardware = read_manifest(descriptor, path).hardware
        finally:
            os.close(descriptor)
    last_used_unix_s = _modified_unix_s(path)
    return CachedVariant(
        fingerprint=path.parent.name,
        loss=match["loss"],
        digest=match["digest"],
        hardware=hardware,
        file_bytes=_file_bytes(path),
        created_unix_s=_modified_unix_s(path / MANIFEST) or last_used_unix_s,
        last_used_unix_s=last_used_unix_s,
        path=path,
    )


def _verify_group(group_path: Path, top: int) -> Iterator[CacheProblem]:
    try:
        with open_directory(group_path.name, top, group_path) as group:
            for path in _children(group_path):
                if path.name.startswith(LOCK_PREFIX):
                    continue
                try:
                    _verify_child(path, group)
                except (Untrusted, OSError) as verdict:
                    where = verdict.path if isinstance(verdict, Untrusted) else path
                    yield CacheProblem(where, _reason(verdict))
    except (Untrusted, OSError) as verdict:
        yield CacheProblem(group_path, _reason(verdict))


def _verify_child(path: Path, group: int) -> None:
    if path.name.startswith(BUILDING_PREFIX):
        if time.time() - _modified_unix_s(path) > _ABANDONED_AFTER_S:
            raise Untrusted(path, "was left behind by a build that was killed")
        return
    if path.name.startswith(REJECTED_PREFIX):
        raise Untrusted(path, _NOT_DELETED)
    match = _VARIANT.fullmatch(path.name)
    if match is None:
        raise Untrusted(path, "is nothing that the cache put there")
    with open_directory(path.name, group, path) as directory:
        read_variant(directory, path, request_sha256=None)


def _remove(root: Path, doomed: list[CachedVariant], *, abandoned_before_unix_s: float) -> Removal:
    removed: list[CachedVariant] = []
    freed_bytes = 0
    try:
        with open_root(root) as top:
            for group_path in _groups(root):
                chosen = [entry for entry in doomed if entry.path.parent == group_path]
                gone, gone_bytes = _shrink_group(group_path, top, chosen, abandoned_before_unix_s)
                removed += gone
                freed_bytes += gone_bytes
            for path in _rejected(root):
                freed_bytes += _discard_measured(path, top)
    except FileNotFoundError:
        pass
    except (Untrusted, OSError) as obstacle:
        raise CacheError(
            f"cannot remove anything from {root}: it {_reason(obstacle)}; "
            "make it yours alone (chmod 700) or point CL_COMPILER_CACHE_DIR elsewhere"
        ) from obstacle
    kept_bytes = sum(_file_bytes(path) for path in (*_groups(root), *_rejected(root)))
    return Removal(tuple(removed), freed_bytes, kept_bytes)


def _shrink_group(
    group_path: Path, top: int, chosen: list[CachedVariant], abandoned_before_unix_s: float
) -> tuple[list[CachedVariant], int]:
    removed: list[CachedVariant] = []
    freed_bytes = 0
    try:
        with open_directory(group_path.name, top, group_path) as group:
            for entry in chosen:
                with contextlib.suppress(OSError):
                    freed_bytes += _discard_measured(entry.path, group)
                    removed.append(entry)
            for path in _children(group_path):
                abandoned = (
                    path.name.startswith(BUILDING_PREFIX)
                    and _modified_unix_s(path) < abandoned_before_unix_s
                )
                if abandoned or path.name.startswith(REJECTED_PREFIX):
                    with contextlib.suppress(OSError):
                        freed_bytes += _discard_measured(path, group)
    except Untrusted:  # nothing in it may be executed: all of it goes
        everything = _variants(group_path)
        return everything, freed_bytes + _discard_measured(group_path, top)
    rest = list(_children(group_path))
    if all(path.name.startswith(LOCK_PREFIX) for path in rest):
        # A lock that somebody holds may go too: it saves a second build, it does not guard.
        freed_bytes += _discard_measured(group_path, top)
    return removed, freed_bytes


def _discard_measured(path: Path, parent: int) -> int:
    """Discard ``path``; how many bytes of files are gone for it."""
    file_bytes = _file_bytes(path)
    return file_bytes if discard(path.name, parent) else 0


def _groups(root: Path) -> list[Path]:
    return [path for path in _children(root) if _GROUP.fullmatch(path.name)]


def _rejected(root: Path) -> list[Path]:
    return [path for path in _children(root) if path.name.startswith(REJECTED_PREFIX)]


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _file_bytes(path: Path) -> int:
    """Length of the file, or of all files below the folder; a link counts as nothing."""
    if path.is_symlink():
        return 0
    if path.is_dir():
        return sum(_file_bytes(child) for child in _children(path))
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _modified_unix_s(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _reason(verdict: Exception) -> str:
    if isinstance(verdict, Untrusted):
        return verdict.reason
    return f"cannot be read ({verdict})"
