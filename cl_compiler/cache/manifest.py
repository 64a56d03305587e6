"""The manifest beside every cached variant: which files, how long, with which checksums.

It carries a checksum of itself, so a flipped bit anywhere in an entry is noticed, and no time and
no path, so that two builds of one variant write the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cl_compiler.cache.key import CacheKey, canonical_json, sha256_hex
from cl_compiler.errors import CacheError

__all__ = ["FileRecord", "Manifest", "describe_files", "parse_manifest"]

_FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """One file of a variant: its name, its length in bytes and its SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a variant's directory must hold to be the variant that it says it is."""

    name: str
    loss: str
    hardware: str
    fingerprint: str
    request_sha256: str
    files: tuple[FileRecord, ...]

    def to_json(self) -> str:
        """The manifest as text, its own checksum included."""
        content = {"format": _FORMAT, **asdict(self)}
        content["sha256"] = sha256_hex(canonical_json(content).encode())
        return json.dumps(content, sort_keys=True, indent=2) + "\n"


def describe_files(key: CacheKey, files: Mapping[str, bytes]) -> Manifest:
    """The manifest of the variant ``key`` whose files are ``files`` (name to content)."""
    return Manifest(
        name=key.variant,
        loss=key.loss,
        hardware=key.hardware,
        fingerprint=key.fingerprint,
        request_sha256=key.request_sha256,
        files=tuple(
            FileRecord(name, len(content), sha256_hex(content)) for name, content in files.items()
        ),
    )


def parse_manifest(text: bytes) -> Manifest:
    """The manifest in ``text``.

    Raises:
        ValueError: not a manifest of this format, or changed since it was written; the message
            completes the sentence "the file …".
    """
    try:
        content: dict[str, Any] = json.loads(text)
        claimed = content.pop("sha256")
        actual = sha256_hex(canonical_json(content).encode())
        if content.pop("format") != _FORMAT:
            raise ValueError("has another format")
        files = tuple(FileRecord(**record) for record in content.pop("files"))
        manifest = Manifest(files=files, **content)
    except (ValueError, KeyError, TypeError, AttributeError, CacheError) as obstacle:
        raise ValueError("is not a manifest of this version") from obstacle
    if claimed != actual:
        raise ValueError("does not match its own checksum")
    return manifest
