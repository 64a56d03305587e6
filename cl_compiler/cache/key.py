"""What a cached variant is called: the environment that rendered it and the request it answers.

First half of the cache (``store.py`` is the second).  The *fingerprint* names everything that
changes generated source without the user asking for anything else: this package, its templates,
the libraries that it leans on and the cluster.  The *digest* names the request itself.  Both are
hashes of content, never of paths, line numbers or times, so two checkouts of one commit agree.

Imports neither torch, triton nor sympy: versions are read from the installed metadata.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cl_compiler.errors import CacheError

__all__ = ["CacheKey", "cache_key", "canonical_json", "environment_fingerprint", "sha256_hex"]

FINGERPRINT_HEX_DIGITS = 16
DIGEST_HEX_DIGITS = 12
_PACKAGE_ROOT = Path(__file__).resolve().parents[1]
_SOURCE_SUFFIXES = (".py", ".jinja", ".toml")
_LIBRARIES = ("torch", "triton", "sympy")

# path -> (mtime_ns, size_bytes, sha256 of the content).  A stat is ten times cheaper than a read,
# and a template edited in a running session still changes the fingerprint.
_file_digests: dict[str, tuple[int, int, str]] = {}


@dataclass(frozen=True)
class CacheKey:
    """Where one variant lives: ``<fingerprint>/<loss>-<digest>``.

    ``request_sha256`` is the whole hash of which ``digest`` is the beginning; the store compares
    it too, so that two requests whose digests collide are never taken for each other.
    """

    fingerprint: str
    loss: str
    hardware: str
    request_sha256: str

    @property
    def digest(self) -> str:
        """First twelve hexadecimal digits of the request's hash."""
        return self.request_sha256[:DIGEST_HEX_DIGITS]

    @property
    def variant(self) -> str:
        """Name of the variant, e.g. ``"clip-3f9a1c7e02b4"``: its directory, its header line."""
        return f"{self.loss}-{self.digest}"


def cache_key(
    request: Mapping[str, object], *, loss: str, hardware: str, templates: Path
) -> CacheKey:
    """Name the variant that answers ``request`` on ``hardware``.

    Args:
        request: the whole request as JSON values, the loss's IR included.
        loss: the loss's name; characters that do not belong into a file name become ``_``.
        hardware: the hardware spec's canonical JSON; its ``"name"`` is kept for listings.
        templates: the folder of ``*.jinja`` files that would render the variant.

    Raises:
        CacheError: the request holds something that JSON cannot say in one way only.
    """
    return CacheKey(
        fingerprint=environment_fingerprint(hardware, templates),
        loss=re.sub(r"\W", "_", loss, flags=re.ASCII)[:64] or "loss",
        hardware=_hardware_name(hardware),
        request_sha256=sha256_hex(canonical_json(request).encode()),
    )


def canonical_json(value: object) -> str:
    """The one JSON text of ``value``: keys sorted, no spaces, ASCII, 2.0 written as 2.

    Raises:
        CacheError: NaN, infinity, a key that is not a string or a type that JSON lacks.
    """
    plain = _plain(value, "request")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def environment_fingerprint(hardware: str, templates: Path) -> str:
    """Sixteen hexadecimal digits over package, templates, Python, libraries and cluster."""
    environment = {
        "package": _tree_digest(_PACKAGE_ROOT),
        "templates": _tree_digest(templates),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "libraries": {name: _installed_version(name) for name in ("cl-compiler", *_LIBRARIES)},
        "hardware": hardware,
    }
    return sha256_hex(canonical_json(environment).encode())[:FINGERPRINT_HEX_DIGITS]


def sha256_hex(content: bytes) -> str:
    """SHA-256 of ``content`` as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _plain(value: object, where: str) -> object:
    """``value`` with one spelling per number and nothing that JSON would quietly convert."""
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case float() if math.isfinite(value):
            # 75e9 from a TOML file and 75_000_000_000 from Python are one bandwidth.
            return int(value) if value.is_integer() else float(value)
        case float():
            obstacle = f"is {value!r}, which JSON has no number for"
        case Mapping():
            for name in value:
                if not isinstance(name, str):
                    raise CacheError(
                        f"cannot hash {where}: its key {name!r} is not a string; use string keys"
                    )
            return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
        case list() | tuple():
            return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        case _:
            obstacle = f"is a {type(value).__name__}, which JSON cannot hold"
    raise CacheError(f"cannot hash {where}: it {obstacle}; pass finite numbers, strings and lists")


def _hardware_name(hardware: str) -> str:
    try:
        name = json.loads(hardware)["name"]
    except (ValueError, KeyError, TypeError):
        return "unnamed"
    return str(name)


def _tree_digest(root: Path) -> str:
    """Hash of the names and contents of the source files below ``root``."""
    listing = hashlib.sha256()
    for relative, path in sorted(_source_files(os.fspath(root), "")):
        listing.update(f"{relative}\0{_file_digest(path)}\n".encode())
    return listing.hexdigest()


def _source_files(folder: str, prefix: str) -> Iterator[tuple[str, str]]:
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir():
            if entry.name != "__pycache__":
                yield from _source_files(entry.path, f"{prefix}{entry.name}/")
        elif entry.name.endswith(_SOURCE_SUFFIXES):
            yield prefix + entry.name, entry.path


def _file_digest(path: str) -> str:
    try:
        status = os.stat(path)
        known = _file_digests.get(path)
        if known is not None and known[:2] == (status.st_mtime_ns, status.st_size):
            return known[2]
        with open(path, "rb") as file:
            digest = sha256_hex(file.read())
    except FileNotFoundError:  # an editor's save, between the listing and now
        return "absent"
    _file_digests[path] = (status.st_mtime_ns, status.st_size, digest)
    return digest


@functools.cache
def _installed_version(distribution: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"
