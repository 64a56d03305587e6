"""The documents show what the compiler does."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_walkthrough_is_current(request: pytest.FixtureRequest):
    module = runpy.run_path(str(ROOT / "docs" / "walkthrough.py"))
    path = ROOT / "docs" / "architecture.md"
    fresh = module["document_with"](module["walkthrough"]())
    if request.config.getoption("--update-generated", default=False):
        path.write_text(fresh, encoding="utf-8")
    document = path.read_text(encoding="utf-8")
    assert document == fresh, "run `python docs/walkthrough.py --write` and look at what changed"


def test_the_architecture_names_every_folder():
    document = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "cl_compiler").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"`{path.name}/`" in document
