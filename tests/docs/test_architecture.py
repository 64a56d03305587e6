"""The documents show what the compiler does."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_walkthrough_is_current():
    module = runpy.run_path(str(ROOT / "docs" / "walkthrough.py"))
    document = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    fresh = module["document_with"](module["walkthrough"]())
    assert document == fresh, "run `python docs/walkthrough.py --write` and look at what changed"


def test_the_architecture_names_every_folder():
    document = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "cl_compiler").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"`{path.name}/`" in document
