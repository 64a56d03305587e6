"""The harvested pairs as a file beside the cache: parsed once, then read.

Compressed JSON, written whole or not at all.  A file that cannot be read as what it should be is
harvested anew; a directory that cannot be written only costs the next run its time.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_compiler.cli.demo.harvest import HARVEST_VERSION, Pair, harvest
from cl_compiler.cli.demo.sources import SourceFile, SourceRoot, list_files, roots_key

__all__ = ["Collection", "collect"]

# Files parsed, files in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Collection:
    """Deduplicated ``pairs`` of ``roots``; ``path`` keeps them, None where nothing does.

    ``was_kept`` tells that they were read from ``path`` rather than harvested now.
    """

    pairs: tuple[Pair, ...]
    roots: tuple[SourceRoot, ...]
    path: Path | None
    was_kept: bool


def collect(
    roots: Sequence[SourceRoot],
    directory: Path,
    *,
    max_files: int | None = None,
    workers: int = 2,
    progress: Progress = lambda done, total: None,
) -> Collection:
    """The pairs of ``roots``: from ``directory`` where an earlier run left them, else harvested.

    Args:
        roots: what to read; their names and versions name the file that is kept.
        directory: where it is kept; made, private to this user, when it does not exist.
        max_files: parse only the first so many files of each root, and keep nothing.
        workers: processes that parse.
        progress: called with (files parsed, files in all) as the harvest goes on.
    """
    path = directory / f"pairs-{roots_key(roots, HARVEST_VERSION)}.json.gz"
    if max_files is None:
        kept = _read(path)
        if kept is not None:
            return Collection(kept, tuple(roots), path, was_kept=True)
    files: list[SourceFile] = []
    for root in roots:
        files.extend(list_files(root)[:max_files])
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, len(files))

    progress(0, len(files))
    pairs = harvest(files, workers=workers, advance=advance)
    written = max_files is None and _write(path, pairs, roots)
    return Collection(pairs, tuple(roots), path if written else None, was_kept=False)


def _read(path: Path) -> tuple[Pair, ...] | None:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            content = json.load(file)
        if content["harvest_version"] != HARVEST_VERSION:
            return None
        return tuple(_pair(row) for row in content["pairs"])
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        return None


def _pair(row: Any) -> Pair:
    module, text, code = row
    if not (isinstance(module, str) and isinstance(text, str) and isinstance(code, str)):
        raise TypeError("a pair is three strings")
    return Pair(module, text, code)


def _write(path: Path, pairs: Sequence[Pair], roots: Sequence[SourceRoot]) -> bool:
    content = {
        "harvest_version": HARVEST_VERSION,
        "roots": [[root.package, root.version] for root in roots],
        "pairs": [[pair.module, pair.text, pair.code] for pair in pairs],
    }
    # mtime=0: the same pairs are the same bytes.
    packed = gzip.compress(json.dumps(content).encode(), compresslevel=6, mtime=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".pairs-")
    except OSError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(packed)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            return False
        raise
    return True
