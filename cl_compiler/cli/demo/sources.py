"""Which files the demonstration may read: the standard library and named installed packages.

First stage of the harvest.  A package is taken only from an installation directory (site-packages
and the like), never from the working directory or from an editable checkout, so the demonstration
cannot pick up anybody's own code.  Nothing is imported: the files are only located.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import site
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PACKAGES", "SourceFile", "SourceRoot", "installed_roots", "list_files", "roots_key"]

# This project's dependencies and what they bring along.  PyTorch is left out: it would double the
# time of the harvest.
PACKAGES: tuple[str, ...] = (
    "sympy",
    "networkx",
    "numpy",
    "mpmath",
    "matplotlib",
    "jinja2",
    "rich",
    "pygments",
    "typer",
    "filelock",
    "platformdirs",
)

_SKIPPED_PARTS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "testing", "idle_test"}
)


@dataclass(frozen=True)
class SourceRoot:
    """One installed package: ``path`` holds its ``.py`` files, ``version`` names the release."""

    package: str
    path: Path
    version: str


@dataclass(frozen=True)
class SourceFile:
    """One file to parse; ``module`` is its dotted name below the package."""

    module: str
    path: Path


def installed_roots(packages: Iterable[str] = PACKAGES) -> tuple[SourceRoot, ...]:
    """The standard library and those of ``packages`` that are installed, in a fixed order."""
    roots = [SourceRoot("stdlib", Path(sysconfig.get_path("stdlib")), platform.python_version())]
    directories = _site_directories()
    for package in packages:
        for directory in directories:
            path = directory / package
            if (path / "__init__.py").is_file():
                roots.append(SourceRoot(package, path, _version(package)))
                break
    return tuple(roots)


def list_files(root: SourceRoot) -> tuple[SourceFile, ...]:
    """Every Python file of ``root`` but tests, sorted by module; not what links lead out to."""
    base = root.path.resolve()
    files = []
    for path in root.path.rglob("*.py"):
        relative = path.relative_to(root.path)
        if _SKIPPED_PARTS.intersection(relative.parts):
            continue
        if not path.resolve().is_relative_to(base):
            continue
        module = ".".join((root.package, *relative.with_suffix("").parts))
        files.append(SourceFile(module.removesuffix(".__init__"), path))
    return tuple(sorted(files, key=lambda file: file.module))


def roots_key(roots: Sequence[SourceRoot], harvest_version: int) -> str:
    """A short name for what a harvest of ``roots`` would give; paths play no part in it."""
    text = "\n".join(
        [f"harvest {harvest_version}", *(f"{root.package} {root.version}" for root in roots)]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _site_directories() -> tuple[Path, ...]:
    names = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    names += site.getsitepackages()
    names.append(site.getusersitepackages())
    return tuple(dict.fromkeys(Path(name) for name in names))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
