"""``cl-compiler bench`` measures what it says, also for losses without a dense formula."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cl_compiler.cli.main import app

SMALL = ["bench", "--problem", "192x192x16", "--budget", "1MiB", "--threads", "1", "--repeats", "2"]


def run(*options: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, [*SMALL, *options])
    return found.exit_code, found.output


@pytest.mark.parametrize("loss", ["clip", "nt_xent", "siglip"])
def test_json_holds_both_sides_and_they_agree(loss):
    code, text = run("--loss", loss, "--json")
    assert code == 0, text
    found = json.loads(text)
    dense, compiled = found["rows"]
    assert (dense["name"], compiled["name"]) == ("dense", "compiled")
    assert len(dense["seconds_all"]) == len(compiled["seconds_all"]) == 2
    assert 0 < compiled["live_bytes"] < dense["live_bytes"]
    scalars = 4096  # a few dozen numbers of 8 bytes are not planned
    assert compiled["live_bytes"] <= found["predicted_bytes"] + scalars
    assert found["predicted_bytes"] <= found["budget_bytes"]
    assert found["largest_error"] < 1e-4
    assert found["clock"] == "cpu"


def test_a_table_says_what_was_faster_and_smaller():
    code, text = run()
    assert code == 0, text
    assert "clip, M=192 N=192 D=16 float32, forward and backward, 1 thread, CPU time" in text
    for words in ("dense", "compiled", "predicted", "live tensors", "schedule", "agreement"):
        assert words in text


def test_a_loss_without_a_dense_formula_is_measured_alone(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from cl_compiler import lang as cl\n"
        "@cl.define_loss\n"
        "def mine(sim, logit_scale):\n"
        '    """The mean over rows of their logsumexp."""\n'
        "    return cl.mean(cl.logsumexp(logit_scale * sim, over=cl.cols), over=cl.rows)\n"
    )
    code, text = run("--loss", f"{path}:mine", "--json")
    assert code == 0, text
    dense, compiled = json.loads(text)["rows"]
    assert "no dense formula" in dense["error"] and dense["seconds"] is None
    assert compiled["seconds"] > 0


def test_a_budget_that_is_too_small_is_the_compilers_error():
    code, text = run("--budget", "4KiB")
    assert code == 1 and "needs at least" in text
