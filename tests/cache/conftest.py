"""A cache of one's own, and a way to make variants that need no planner."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import cl_compiler.cache.key as key_module
from cl_compiler.cache import CacheKey, Entry, Variant, cache_key, fetch

HARDWARE = json.dumps({"name": "desk", "levels": []})


@dataclass
class Workbench:
    """A cache directory and counted builds into it."""

    root: Path
    templates: Path
    builds: int = 0

    def key(self, budget: object = "256MiB", hardware: str = HARDWARE, **rest: Any) -> CacheKey:
        request = {"loss": "clip", "budget": budget, **rest}
        return cache_key(request, loss="clip", hardware=hardware, templates=self.templates)

    def builder(self, budget: object = "256MiB", **rest: Any) -> Callable[[], Variant]:
        request = {"loss": "clip", "budget": budget, **rest}

        def build() -> Variant:
            self.builds += 1
            name = self.key(budget, **rest).variant
            return Variant(name, f"VALUE = {budget!r}\n", request, {"tiles": (64, 128)})

        return build

    def fetch(self, budget: object = "256MiB", **rest: Any) -> Entry:
        return fetch(self.key(budget, **rest), self.builder(budget, **rest))

    def folder(self, budget: object = "256MiB") -> Path:
        key = self.key(budget)
        return self.root / key.fingerprint / key.variant


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
    templates = tmp_path / "templates"
    templates.mkdir()
    (templates / "loss.py.jinja").write_text("{{ source }}\n")
    # The package as it is being edited must not rename entries in the middle of a test.
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(key_module, "_PACKAGE_ROOT", tmp_path / "package")
    root = tmp_path / "cache"
    monkeypatch.setenv("CL_COMPILER_CACHE_DIR", str(root))
    for variable in (
        "CL_COMPILER_NO_CACHE",
        "CL_COMPILER_PRINT_SOURCE",
        "CL_COMPILER_CACHE_MAX_BYTES",
    ):
        monkeypatch.delenv(variable, raising=False)
    yield Workbench(root, templates)
