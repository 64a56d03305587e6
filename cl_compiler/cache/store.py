"""The content-addressed store of generated source: verified before it is executed.

``fetch(key, build)`` is the cache.  A variant is one directory,

    <root>/<fingerprint>/<loss>-<digest>/{request.json, plan.json, kernels.py, manifest.json}

rendered into a sibling temporary directory, synced and renamed, so that it exists whole or not at
all; of two builders the second uses what it finds.  What fails any check is never executed: it is
moved out of the way, rebuilt, and a ``CacheWarning`` says so.  A cache that cannot be used never
stops a compilation: the variant is then compiled in memory.

The source is read once; the text that was verified is the text that ``runtime/loader.py`` runs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_compiler.cache.guard import (
    CacheWarning,
    Untrusted,
    discard,
    is_same,
    open_directory,
    open_root,
    read_file,
    remove,
    sync_directory,
    write_file,
)
from cl_compiler.cache.key import CacheKey, canonical_json, sha256_hex
from cl_compiler.cache.manifest import Manifest, describe_files, parse_manifest
from cl_compiler.errors import CacheError

__all__ = [
    "Entry",
    "Variant",
    "cache_root",
    "fetch",
    "is_switched_off",
    "read_manifest",
    "read_variant",
]

SOURCE, REQUEST, PLAN, MANIFEST = "kernels.py", "request.json", "plan.json", "manifest.json"
LOCK_PREFIX, BUILDING_PREFIX = ".lock-", ".building-"
_MAX_MANIFEST_BYTES = 64 * 1024
LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Variant:
    """What a build makes: one self-contained source file and where it came from.

    ``name`` is ``CacheKey.variant``; ``request`` and ``plan`` are JSON values.
    """

    name: str
    source: str
    request: Mapping[str, Any]
    plan: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A variant that may be executed.

    ``path`` is the ``kernels.py`` that holds ``source``, None for one compiled in memory;
    ``plan`` is what ``plan.json`` says; ``hit`` tells that nothing had to be built here.
    """

    name: str
    path: Path | None
    source: str
    plan: Mapping[str, Any]
    hit: bool


def cache_root() -> Path:
    """``$CL_COMPILER_CACHE_DIR``, else the platform's cache directory for this user."""
    chosen = os.environ.get("CL_COMPILER_CACHE_DIR")
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("cl_compiler", appauthor=False))


def is_switched_off() -> bool:
    """Whether everything is compiled in memory: ``CL_COMPILER_NO_CACHE``, or no POSIX system."""
    # Elsewhere there are no owners and modes to check.
    return _is_on("CL_COMPILER_NO_CACHE") or os.name != "posix"


def fetch(
    key: CacheKey, build: Callable[[], Variant], *, lock_timeout_s: float = LOCK_TIMEOUT_S
) -> Entry:
    """The variant named ``key``: from the cache where it is valid, else from ``build``, kept.

    Any number of processes may ask at once; one builds, the others wait for it, at most
    ``lock_timeout_s`` seconds.  ``CL_COMPILER_NO_CACHE=1`` builds in memory;
    ``CL_COMPILER_PRINT_SOURCE=1`` prints what is built to stderr.

    Raises:
        CacheError: ``build`` made a variant for another key or one that JSON cannot hold.
        Whatever ``build`` raises.
    """
    if is_switched_off():
        return _in_memory(_build(key, build))
    root = cache_root()
    try:
        with contextlib.suppress(Untrusted, FileNotFoundError):
            return _find(root, key)
        _make_group(root, key.fingerprint)
    except (OSError, Untrusted) as obstacle:
        _warn(f"{_describe(obstacle, root)}; {key.variant} is compiled in memory")
        return _in_memory(_build(key, build))
    lock = root / key.fingerprint / f"{LOCK_PREFIX}{key.variant}"
    with _locked(lock, lock_timeout_s):
        found = _find_or_reject(root, key)
        if found is not None:
            return found
        built = _build(key, build)
        try:
            return _publish(root, key, built)
        except (OSError, Untrusted) as obstacle:
            _warn(f"{_describe(obstacle, root)}; {key.variant} was compiled in memory")
            return _in_memory(built)


@dataclass(frozen=True)
class _Built:
    """A variant as the files that it becomes, checked against its key."""

    name: str
    source: str
    files: Mapping[str, bytes]


def _build(key: CacheKey, build: Callable[[], Variant]) -> _Built:
    variant = build()
    if variant.name != key.variant:
        raise CacheError(
            f"the build for {key.variant} made a variant named {variant.name}; "
            "name it after CacheKey.variant"
        )
    if sha256_hex(canonical_json(variant.request).encode()) != key.request_sha256:
        raise CacheError(
            f"the build for {key.variant} answers another request than the key was made of; "
            "pass the same request to cache_key and to the variant"
        )
    if _is_on("CL_COMPILER_PRINT_SOURCE"):
        print(variant.source, file=sys.stderr)
    files = {
        SOURCE: variant.source.encode(),
        REQUEST: _json_file(key.variant, REQUEST, variant.request),
        PLAN: _json_file(key.variant, PLAN, variant.plan),
    }
    return _Built(variant.name, variant.source, files)


def _in_memory(built: _Built) -> Entry:
    return Entry(built.name, None, built.source, _plan_of(built), hit=False)


def _plan_of(built: _Built) -> Mapping[str, Any]:
    # Through the file's text, so that a plan looks the same built and found (lists, not tuples).
    plan: Mapping[str, Any] = json.loads(built.files[PLAN])
    return plan


def _json_file(variant: str, name: str, value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, indent=2, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as obstacle:
        raise CacheError(
            f"cannot write {name} of {variant}: {obstacle}; use JSON values with finite numbers"
        ) from obstacle


# --- reading -------------------------------------------------------------------------------------


def _find(root: Path, key: CacheKey) -> Entry:
    """The verified entry; FileNotFoundError or Untrusted otherwise."""
    group_path = root / key.fingerprint
    path = group_path / key.variant
    with (
        open_root(root) as top,
        open_directory(key.fingerprint, top, group_path) as group,
        open_directory(key.variant, group, path) as directory,
    ):
        try:
            contents = read_variant(directory, path, key.request_sha256)
        except Untrusted:
            if is_same(key.variant, group, directory):
                raise
            # Another process made room while this one read: what it emptied lies elsewhere by now.
            raise FileNotFoundError(path) from None
        with contextlib.suppress(OSError):  # a read-only cache is still a cache
            os.utime(directory)  # "last used", for prune()
    source = contents[SOURCE].decode()
    return Entry(key.variant, path / SOURCE, source, json.loads(contents[PLAN]), hit=True)


def read_manifest(directory: int, path: Path) -> Manifest:
    """The manifest of the variant behind the descriptor ``directory``; ``path`` names it.

    Raises:
        Untrusted: missing, unreadable, of another format or changed since it was written.
    """
    where = path / MANIFEST
    text = read_file(MANIFEST, directory, where, max_bytes=_MAX_MANIFEST_BYTES)
    try:
        return parse_manifest(text)
    except ValueError as obstacle:
        raise Untrusted(where, str(obstacle)) from obstacle


def read_variant(directory: int, path: Path, request_sha256: str | None) -> dict[str, bytes]:
    """Every file of the variant behind the descriptor, each checked against the manifest.

    Args:
        directory: descriptor of the variant's directory.
        path: ``<root>/<fingerprint>/<variant>``: for messages, and what the manifest must say.
        request_sha256: the request that it must answer; None for any that fits its name.

    Raises:
        Untrusted: any check failed.
    """
    manifest = read_manifest(directory, path)
    if manifest.fingerprint != path.parent.name:
        raise Untrusted(path, f"was rendered for the fingerprint {manifest.fingerprint}")
    if manifest.name != path.name or request_sha256 not in (None, manifest.request_sha256):
        raise Untrusted(path, f"holds {manifest.name}, made for another request")
    if {record.name for record in manifest.files} != {SOURCE, REQUEST, PLAN}:
        raise Untrusted(path / MANIFEST, "lists other files than a variant has")
    contents = {}
    for record in manifest.files:
        where = path / record.name
        content = read_file(record.name, directory, where, max_bytes=record.bytes)
        if len(content) < record.bytes:
            raise Untrusted(where, f"ends after {len(content)} of its {record.bytes} bytes")
        if sha256_hex(content) != record.sha256:
            raise Untrusted(where, "does not match its checksum")
        contents[record.name] = content
    return contents


def _find_or_reject(root: Path, key: CacheKey) -> Entry | None:
    """Under the lock: the entry, or None after whatever lies in its place was moved away."""
    try:
        return _find(root, key)
    except OSError:  # not there; any other obstacle is met again, and named, when writing
        return None
    except Untrusted as verdict:
        outcome = "it was removed and is rebuilt"
        group_path = root / key.fingerprint
        try:
            with open_root(root) as top, open_directory(key.fingerprint, top, group_path) as group:
                discard(key.variant, group)
        except (OSError, Untrusted) as obstacle:
            outcome = f"{_describe(obstacle, group_path)}, so it stays there"
        _warn(f"{verdict}: not executed; {outcome}")
        return None


# --- writing -------------------------------------------------------------------------------------


def _make_group(root: Path, fingerprint: str) -> None:
    """Make sure that a trustworthy ``<root>/<fingerprint>`` exists; replace one that is not."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open_root(root) as top:
        if _try_group(root, top, fingerprint) is None:
            return
        # The second look is under a lock, lest one process throw away what another just made.
        with _locked(root / f"{LOCK_PREFIX}groups", LOCK_TIMEOUT_S):
            verdict = _try_group(root, top, fingerprint)
            if verdict is None:
                return
            discard(fingerprint, top)
            _warn(f"{verdict}: nothing in it is executed; it was removed and is rebuilt")
            verdict = _try_group(root, top, fingerprint)
            if verdict is not None:
                raise verdict


def _try_group(root: Path, top: int, fingerprint: str) -> Untrusted | None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(fingerprint, 0o700, dir_fd=top)
    try:
        with open_directory(fingerprint, top, root / fingerprint):
            return None
    except Untrusted as verdict:
        return verdict


def _publish(root: Path, key: CacheKey, built: _Built) -> Entry:
    """Write the variant beside its place and rename it there; yield to one already there."""
    _make_group(root, key.fingerprint)  # pruned while this process was building
    group_path = root / key.fingerprint
    manifest = describe_files(key, built.files)
    temporary = f"{BUILDING_PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
    with open_root(root) as top, open_directory(key.fingerprint, top, group_path) as group:
        os.mkdir(temporary, 0o700, dir_fd=group)
        try:
            with open_directory(temporary, group, group_path / temporary) as directory:
                for name, content in built.files.items():
                    write_file(name, directory, content)
                write_file(MANIFEST, directory, manifest.to_json().encode())
                sync_directory(directory)
            os.rename(temporary, key.variant, src_dir_fd=group, dst_dir_fd=group)
            sync_directory(group)
        except BaseException as obstacle:
            with contextlib.suppress(OSError):
                remove(temporary, group)
            taken = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
            if isinstance(obstacle, OSError) and obstacle.errno in taken:
                return _find(root, key)  # a builder without the lock came first
            raise
    path = group_path / key.variant / SOURCE
    return Entry(built.name, path, built.source, _plan_of(built), hit=False)


@contextlib.contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the file lock if that is possible.

    The lock only saves work: renames keep the cache right without it.  The kernel releases a
    killed holder's lock; a file system without locks, or a holder that hangs, costs a second build.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, mode=0o600)
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:
        _warn(f"{path} was held for {timeout_s:.0f} s by another process; not waiting any longer")
    except (OSError, NotImplementedError):
        pass  # the write that follows meets the same obstacle and names it
    try:
        yield
    finally:
        lock.release()


def _describe(obstacle: BaseException, path: Path) -> str:
    if isinstance(obstacle, Untrusted):
        return str(obstacle)
    reason = obstacle.strerror if isinstance(obstacle, OSError) else None
    return f"{path} cannot be used ({reason or obstacle})"


def _warn(message: str) -> None:
    warnings.warn(f"cl_compiler cache: {message}", CacheWarning, stacklevel=3)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")
