"""What the README says runs, and what it counts is true."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cl_compiler.cli.main import COMMANDS, app
from cl_compiler.cli.requests import Question, request_of
from cl_compiler.plan.search import choose_plan

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
SHELL = [line for line in README.splitlines() if line.startswith("cl-compiler ")]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_COMPILER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_the_python_is_right(tmp_path, capsys):
    # From a file: a loss's definition is read from its source.
    names: dict[str, object] = {}
    for number, text in enumerate(PYTHON):
        path = tmp_path / f"readme_{number}.py"
        path.write_text(text)
        exec(compile(text, str(path), "exec"), names)
        if number == 0:
            x, y = (names[n].detach().requires_grad_() for n in "xy")
            logits, target = 14.3 * x @ y.T, torch.arange(len(x))
            cross_entropy = torch.nn.functional.cross_entropy
            dense = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
            dense.backward()
            torch.testing.assert_close(names["value"], dense)
            torch.testing.assert_close(names["x"].grad, x.grad, rtol=1e-3, atol=1e-7)
    assert "schedule" in capsys.readouterr().out
    own = names["loss_fn"](x, y, logit_scale=14.3)
    others = logits.detach().masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
    expected = (others.logsumexp(1) - logits.detach().diagonal()).mean()
    torch.testing.assert_close(own.detach(), expected)


@pytest.mark.parametrize("line", SHELL)
def test_the_shell_lines_run(line):
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output


def test_the_commands_that_are_named_exist():
    named = set(re.findall(r"`?cl-compiler ([a-z]+)", README))
    assert named <= set(COMMANDS) and {"plan", "inspect", "doctor", "calibrate"} <= named


def test_the_measurements_are_those_of_the_file_that_is_named():
    section = README.split("<!-- measurements: begin -->")[1].split("<!-- measurements: end -->")[0]
    named = re.search(r"\]\((benchmarks/results/.*?\.json)\)", section)
    if named is None:
        assert not re.search(r"\d", section)  # no file, no figures
        return
    script = runpy.run_path(str(ROOT / "docs" / "measurements.py"))
    assert section.strip() == script["measurements"](ROOT / named[1])


def test_a_results_file_becomes_a_table(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "measurements.py"))
    of = {"group": "losses", "loss": "siglip", "M": 8192, "N": 8192, "D": 512, "threads": 1,
          "dtype": "bfloat16"}  # fmt: skip
    compiled = {"error": "", "median_s": 0.5, "live_bytes": 3 << 20, "plan": {"schedule": "spill"}}
    dense = {"error": "", "median_s": 1.0, "live_bytes": 3 << 30}
    case = {"case": of, "rows": {"compiled": compiled, "dense": dense, "gemm": dense}}
    assert list(script["rows_of"](case)) == [
        "| siglip, bfloat16 | 8,192 | 512 | 1 | 1.0 s | 500.0 ms | 2.00 | 3.0 GiB | 3.0 MiB "
        "| `spill` |"
    ]
    case["rows"]["dense"] = {"error": "out of memory"}
    assert "| did not run | 500.0 ms |  |  | 3.0 MiB |" in next(script["rows_of"](case))


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    ("schedule", "row"),
    re.findall(r"^\| `(\w+)` (\|.*\|)$", README, re.M),
)
def test_the_units_of_the_schedules(schedule, row):
    cells = [cell.strip() for cell in row.split("|")[1:4]]
    for loss, cell in zip(("clip", "infonce", "siglip"), cells, strict=True):
        question = Question("xeon-amx-2c", "6GiB", loss, "16384x512", schedule=schedule)
        if cell == "–":  # noqa: RUF001
            with pytest.raises(ValueError, match=f"{loss} cannot use schedule '{schedule}'"):
                choose_plan(request_of(question))
            continue
        least, *_ = map(int, cell.split(" to "))
        assert choose_plan(request_of(question)).units == pytest.approx(least, abs=0.05)
