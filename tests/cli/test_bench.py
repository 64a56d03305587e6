"""``cl-compiler bench`` measures what it says, also for losses without a dense formula."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cl_compiler.cli.dense import DENSE, dense_baseline
from cl_compiler.cli.main import app
from cl_compiler.cli.user_loss import find_loss

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
    assert 0 < compiled["live_bytes"] <= found["budget_bytes"]
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


OWN = (
    "from cl_compiler import lang as cl\n"
    "@cl.define_loss\n"
    "def {name}(sim, logit_scale):\n"
    '    """The mean over rows of their logsumexp."""\n'
    "    s = logit_scale * sim\n"
    "    return cl.mean(cl.logsumexp(s, over=cl.cols){positive}, over=cl.rows)\n"
)


@pytest.mark.parametrize("name", ["mine", "clip"])
def test_a_loss_without_a_dense_formula_is_compared_with_the_reference(tmp_path, name):
    """Also where it is called like a shipped loss that says something else."""
    path = tmp_path / "mine.py"
    path.write_text(OWN.format(name=name, positive=""))
    code, text = run("--loss", f"{path}:{name}", "--json")
    assert code == 0, text
    found = json.loads(text)
    dense, compiled = found["rows"]
    assert dense["name"] == "reference, fp64" and not dense["error"] and dense["seconds"] > 0
    assert compiled["seconds"] > 0 and compiled["live_bytes"] < dense["live_bytes"]
    assert found["largest_error"] < 1e-4


def test_a_shipped_loss_by_another_name_has_its_formula(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN.format(name="mine", positive=" - cl.at_positive(s, on=cl.rows)"))
    _, formula, _ = dense_baseline(find_loss(f"{path}:mine"), 4)
    assert formula is DENSE["infonce"]


def test_a_machine_that_is_not_here_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("cl_compiler.cli.bench.compare", None)
    code, text = run("--hardware", "h100x1")
    assert code == 1
    assert text.startswith("error: --hardware h100x1: h100x1 has GPUs, and this command measures")
    code, text = run("--hardware", "h100x8")
    assert code == 1 and text.startswith("error: --hardware h100x8: ")


def test_two_views_need_an_even_number_of_rows():
    code, text = run("--loss", "nt_xent", "--problem", "193x16")
    assert code == 1 and "their number is even; got M=193" in text


def test_a_budget_that_is_too_small_is_the_compilers_error():
    code, text = run("--budget", "4KiB")
    assert code == 1 and "needs at least" in text
