"""The page's code runs as it is printed, and every module that it names exists."""

import re
from importlib import import_module
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "drop_ins.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_runs():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["images"].grad.abs().max() > 0
    encoder = names["loss"].model
    assert all(p.grad.abs().max() > 0 for p in encoder.parameters())


def test_every_drop_in_is_where_the_page_says():
    rows = re.findall(r"^\| (.*) \| `(\w+)` \|$", TEXT, flags=re.MULTILINE)
    assert len(rows) == 6
    for instead, module in rows:
        found = import_module(f"cl_compiler.integrations.{module}")
        for name in re.findall(r"`([\w.]+)`", instead):
            assert hasattr(found, name.rpartition(".")[2]), name
