"""The page lists every loss with its keywords, and its code runs."""

import re
from pathlib import Path

import pytest

from cl_compiler import losses
from cl_compiler.losses.retrieval import DIRECTIONS

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"
TEXT = PAGE.read_text(encoding="utf-8")
ROWS = [line.split(" | ") for line in TEXT.splitlines() if line.startswith("| `")]
LISTED = {name: row for row in ROWS for name in re.findall(r"`(\w+)`", row[0])}
MADE = {
    "mnrl": losses.mnrl(DIRECTIONS, "joint", "all_negatives", hard_negatives=True),
    "gist": losses.gist(hard_negatives=True),
    "qwen3": losses.qwen3(True, True, True),
    "matryoshka": losses.matryoshka((2, 3)),
    "recall_at_k": losses.recall_at_k((1, 2)),
}


def test_the_page_lists_every_loss_and_no_other():
    assert set(LISTED) == {*losses.SHIPPED, *losses.FACTORIES}
    assert set(MADE) == set(losses.FACTORIES)


@pytest.mark.parametrize("name", LISTED)
def test_a_row_names_the_keywords_of_its_loss(name):
    loss = MADE.get(name) or losses.find(name)
    keywords = {op.name for op in loss.operands} | set(loss.parameters)
    keywords |= {n for n, leaf in loss.leaves.items() if leaf.kind == "input"}
    keywords -= {"x", "y", "z", "logit_scale"}
    row = LISTED[name]
    named = set(re.findall(r"`(\w+)`", row[2]))
    assert keywords <= named
    if len(re.findall(r"`(\w+)`", row[0])) == 1:
        assert named <= keywords or name == "mnrl"  # row_code without in-batch hardness


def test_the_code_runs():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["x"].grad.abs().max() > 0
