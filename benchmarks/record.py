"""Results as JSON: one file per machine and day, one entry per case, the latest run of each."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cl_compiler import __version__
from cl_compiler.errors import ArgumentError
from cl_compiler.hardware.cpu import cpu_facts

__all__ = ["FORMAT", "default_path", "environment", "load", "merge", "require_writable", "save",
           "slug_of"]  # fmt: skip

ROOT = Path(__file__).resolve().parent
FORMAT = 1


def environment() -> dict[str, Any]:
    """Machine, versions and commit: what a figure needs to be compared with another."""
    facts = cpu_facts()
    return {
        "machine": {
            "cpu": facts.model,
            "arch": facts.arch,
            "features": sorted(facts.features),
            "cores": facts.cores,
            "memory_bytes": facts.memory_bytes,
            "system": f"{platform.system()} {platform.release()}",
            "load_average": list(os.getloadavg()),
        },
        "versions": {
            "cl_compiler": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "sympy", "numpy")},
        },
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def default_path() -> Path:
    """``results/cpu-<machine>-<date>.json``."""
    facts = cpu_facts()
    name = f"{slug_of(facts.model)}-{facts.cores}c"
    return ROOT / "results" / f"cpu-{name}-{datetime.now(UTC):%Y-%m-%d}.json"


def slug_of(model: str) -> str:
    """A device's name as part of a file's: its first four words that say something."""
    words = "".join(c if c.isalnum() else " " for c in model.lower()).split()
    return "-".join([w for w in words if w not in ("r", "tm", "cpu", "processor")][:4])


def merge(path: Path, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write cases into a results file; those measured again replace their earlier entries.

    Returns:
        What the file now holds.
    """
    content = load(path)
    fresh = {case["key"] for case in cases}
    kept = [case for case in content["cases"] if case["key"] not in fresh]
    content = {**content, "cases": [*kept, *cases]}
    save(path, content)
    return content


def load(path: Path, *, of_gpu: bool = False) -> dict[str, Any]:
    """What a results file holds; an empty one if there is none.

    Args:
        path: of the file.
        of_gpu: a file of ``benchmarks.gpu``, which has runs.

    Raises:
        ArgumentError: it cannot be read, or is something else.
    """
    empty = {"format": FORMAT, "cases": []} | ({"runs": {}} if of_gpu else {})
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return empty
    except OSError as error:
        raise ArgumentError(f"cannot read {path}: {error.strerror}; name another file") from error
    except ValueError:
        content = None
    if not (
        isinstance(content, dict)
        and content.get("format") == FORMAT
        and isinstance(content.get("cases"), list)
        and isinstance(content.get("runs"), dict if of_gpu else type(None))
    ):
        raise ArgumentError(
            f"{path} holds no results of python -m benchmarks.{'gpu' if of_gpu else 'cpu'}, or not "
            "all of them; it stays as it is: name another file"
        )
    return content


def require_writable(path: Path) -> None:
    """Find out before anything is measured whether results can be written.

    Raises:
        ArgumentError: they cannot.
    """
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        text = f"cannot write {path}: {error.strerror}; name another file with --out"
        raise ArgumentError(text) from error


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a results file so that whoever reads it, or kills this, finds the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
