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
from cl_compiler.hardware.cpu import cpu_facts

__all__ = ["default_path", "environment", "merge"]

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
            **{name: _version(name) for name in ("torch", "sympy", "numpy")},
        },
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def default_path() -> Path:
    """``results/cpu-<machine>-<date>.json``."""
    facts = cpu_facts()
    words = "".join(c if c.isalnum() else " " for c in facts.model.lower()).split()
    words = [w for w in words if w not in ("r", "tm", "cpu", "processor")]
    name = "-".join([*words[:4], f"{facts.cores}c"])
    return ROOT / "results" / f"cpu-{name}-{datetime.now(UTC):%Y-%m-%d}.json"


def merge(path: Path, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write cases into a results file; those measured again replace their earlier entries.

    Returns:
        What the file now holds.
    """
    earlier: list[dict[str, Any]] = []
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        earlier = content["cases"] if content.get("format") == FORMAT else []
    fresh = {case["key"] for case in cases}
    kept = [case for case in earlier if case["key"] not in fresh]
    content = {"format": FORMAT, "cases": [*kept, *cases]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return content


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
