"""The guide's code runs as it is printed, top to bottom."""

import re
from pathlib import Path

import torch

GUIDE = Path(__file__).parents[2] / "docs" / "add_a_loss.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_COMPILER_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    names: dict = {}
    for block in blocks():
        exec(compile(block, str(GUIDE), "exec"), names)
    torch.testing.assert_close(names["value"].double(), names["expected"], rtol=1e-5, atol=1e-6)
    x, y = names["x"], names["y"]
    expected = torch.autograd.grad(names["expected"], [x, y])
    torch.testing.assert_close([x.grad, y.grad], list(expected), rtol=1e-4, atol=1e-6)
    assert (names["plan"].forward_levels, names["plan"].backward_levels) == (1, 1)
    assert names["plan"].saved == ("r0",)
    assert names["loss_graph"](names["plan"]).graph["units"] == "4"
    assert names["recall_at_k"]((1, 2)).constants == (("ks", (1, 2)),)


def test_the_messages_that_the_guide_explains_are_those_of_the_code():
    """Every message in the last table occurs in the language's source."""
    package = Path(__file__).parents[2] / "cl_compiler" / "lang"
    source = "".join(p.read_text() for p in sorted(package.glob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # joined literals
    table = GUIDE.read_text().split("What the errors mean")[1]
    messages = re.findall(r"^\| `([^`]*)`", table, flags=re.MULTILINE)
    assert len(messages) > 8
    for message in messages:
        fixed = re.split(r"…|rows, cols, rows2|sum over rows|over cols|'x'|mean over rows", message)
        for part in (p.strip(" ,;") for p in fixed):
            assert part in source, message
