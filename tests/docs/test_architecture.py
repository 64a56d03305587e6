"""The documents show what the compiler does."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.test_structure import ALLOWED, BASE

ROOT = Path(__file__).parents[2]


def test_the_walkthrough_is_current(request: pytest.FixtureRequest):
    module = runpy.run_path(str(ROOT / "docs" / "walkthrough.py"))
    path = ROOT / "docs" / "architecture.md"
    fresh = module["document_with"](module["walkthrough"]())
    if request.config.getoption("--update-generated", default=False):
        path.write_text(fresh, encoding="utf-8")
    document = path.read_text(encoding="utf-8")
    assert document == fresh, "run `python docs/walkthrough.py --write` and look at what changed"


def test_the_table_of_imports_is_the_one_that_is_enforced():
    """What the last column says is what ``test_structure.py`` allows, neither more nor less."""
    document = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = document.partition("| folder | what it holds | imports |")[2].partition("\n\n")[0]
    said = {}
    for row in table.splitlines()[2:]:
        names, _, imported = (cell.strip() for cell in row.strip("|").split("|"))
        for name in re.findall(r"`(\w+)(?:/|\.py)`", names):
            every = {"everything above": set(said), "anything": None}
            said[name] = every.get(imported, set(re.findall(r"`(\w+)`", imported)))
    places = {path.stem for path in (ROOT / "cl_compiler").iterdir() if path.stem[0] not in "_."}
    for name in places - {"py"}:
        allowed = ALLOWED.get(name)
        everything = None if allowed is None else allowed - BASE
        found = said[name]
        assert (found if found is None else found - BASE - {"templates", "generated"}) == everything


def test_the_architecture_names_every_folder():
    document = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "cl_compiler").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"`{path.name}/`" in document
