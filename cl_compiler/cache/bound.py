"""``fetch`` into a cache that stays within a bound: what was used least recently makes room.

The bound is looked at when something was stored, so a hit costs nothing.  Only variants go, one at
a time and by name; whoever is just reading one finds it whole or builds it again.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from cl_compiler.cache import store
from cl_compiler.cache.guard import CacheWarning, Untrusted, discard, open_directory, open_root
from cl_compiler.cache.key import CacheKey
from cl_compiler.cache.manage import variant_paths
from cl_compiler.cache.store import LOCK_PREFIX, Entry, Variant
from cl_compiler.errors import ArgumentError
from cl_compiler.units import parse_bytes

__all__ = ["DEFAULT_MAX_BYTES", "fetch", "max_cache_bytes"]

DEFAULT_MAX_BYTES = 256 << 20
"""Thousands of variants; more are rarely alive."""
_VARIABLE = "CL_COMPILER_CACHE_MAX_BYTES"


def fetch(
    key: CacheKey, build: Callable[[], Variant], *, lock_timeout_s: float = store.LOCK_TIMEOUT_S
) -> Entry:
    """The variant named ``key``, as ``store.fetch`` finds or builds it; the cache stays bounded.

    Raises:
        as ``store.fetch``.
    """
    entry = store.fetch(key, build, lock_timeout_s=lock_timeout_s)
    if entry.path is not None and not entry.hit:
        _make_room(entry.path.parents[2], entry.path.parent)
    return entry


def max_cache_bytes() -> int | None:
    """``$CL_COMPILER_CACHE_MAX_BYTES``, such as ``1GiB``; None (written 0) for no bound."""
    text = os.environ.get(_VARIABLE, "").strip()
    if not text:
        return DEFAULT_MAX_BYTES
    try:
        return parse_bytes(text) or None
    except ArgumentError as error:
        warnings.warn(
            f"cl_compiler cache: {_VARIABLE}: {error}; the default of {DEFAULT_MAX_BYTES} bytes "
            "is used",
            CacheWarning,
            stacklevel=2,
        )
        return DEFAULT_MAX_BYTES


def _make_room(root: Path, stored: Path) -> None:
    """Remove the variants used least recently, never ``stored``, until the rest fits the bound."""
    limit_bytes = max_cache_bytes()
    if limit_bytes is None:
        return
    from filelock import FileLock, Timeout

    found = sorted(_used_and_bytes(path) for path in variant_paths(root) if path != stored)
    excess_bytes = sum(count for _, count, _ in found) + _used_and_bytes(stored)[1] - limit_bytes
    if excess_bytes <= 0:
        return
    try:
        # Whoever else stores something meanwhile leaves this to the one who was first.
        with FileLock(root / f"{LOCK_PREFIX}bound", mode=0o600).acquire(timeout=0):
            for _, count, path in found:
                if excess_bytes <= 0:
                    return
                _drop(root, path)
                excess_bytes -= count
    except (Timeout, OSError, NotImplementedError, Untrusted):
        return  # the next one that stores something tries again


def _used_and_bytes(path: Path) -> tuple[float, int, Path]:
    """(when it was used last, bytes of its files, path); zeros for one that is gone by now."""
    try:
        with os.scandir(path) as files:
            count = sum(file.stat(follow_symlinks=False).st_size for file in files)
        return path.stat().st_mtime, count, path
    except OSError:
        return 0.0, 0, path


def _drop(root: Path, path: Path) -> None:
    """Take one variant out, and the lock that its builders waited at."""
    with (
        contextlib.suppress(FileNotFoundError),
        open_root(root) as top,
        open_directory(path.parent.name, top, path.parent) as group,
    ):
        discard(path.name, group)
        os.unlink(f"{LOCK_PREFIX}{path.name}", dir_fd=group)
