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
        if number == 1:
            own = names["loss_fn"](x, y, logit_scale=14.3)
            others = logits.detach().masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
            expected = (others.logsumexp(1) - logits.detach().diagonal()).mean()
            torch.testing.assert_close(own.detach(), expected)
    assert "schedule" in capsys.readouterr().out
    assert_step_is_right(names)


def assert_step_is_right(names: dict[str, object]) -> None:
    """The last block's gradients are those of one pass over the whole batch."""
    encoders = (names["image_encoder"], names["text_encoder"])
    parameters = [*(p for e in encoders for p in e.parameters()), names["log_scale"]]
    cached = [p.grad for p in parameters]
    x, y = names["image_encoder"](names["images"]), names["text_encoder"](names["texts"])
    whole = names["loss_fn"](x, y, logit_scale=names["log_scale"].exp())
    torch.testing.assert_close(names["value"], whole.detach())
    for got, want in zip(cached, torch.autograd.grad(whole, parameters), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


PRINTED = {
    "plan --loss siglip": r"siglip on .*\n  problem +M=32768 N=32768 D=512(.*\n)+.*of 1\.0 GiB\n",
    "plan --hardware h100x8": r'\{(.*\n)+  "hardware_name": "h100x8",(.*\n)+  "max_batch": \d{5,},',
    "inspect --schedule spill --diff": r" +this plan +the other\nschedule +spill +recompute\n"
    r"(.*\n)+-# schedule  spill\n",
    "inspect --loss infonce --graph": r"loss graph: infonce\.png\nhardware graph: infonce-hard",
    "inspect --hardware h100x8": r"# Generated(.*\n)+# schedule  ring_\w+; M, N of each rank",
    "simulate": r"clip on a800-4x8: 32 ranks(.*\n)+ring_owner +1024(.*\n)+fastest: \w+, bound by",
    "compile": r"compiled: .*/cache/[0-9a-f]{16}/clip-[0-9a-f]{12}/kernels\.py\nwritten: clip\.py",
    "cache list": r"0 variants, 0 B, in .*/cache\n",
    "doctor": r"what +found(.*\n)+Python +3\.(.*\n)+presets: .*h100x8",
}
"""How a line of the README begins → what it prints."""
WRITTEN = {"infonce.png": b"\x89PNG", "infonce-hardware.png": b"\x89PNG", "clip.py": b"# Generated"}


@pytest.mark.parametrize("line", SHELL)
def test_the_shell_lines_do_what_they_say(line, tmp_path):
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    (printed,) = (p for start, p in PRINTED.items() if line.startswith(f"cl-compiler {start}"))
    assert re.match(printed, result.stdout), result.stdout
    for name in re.findall(r"\S+\.(?:png|py)\b", line):
        assert (tmp_path / name).read_bytes().startswith(WRITTEN[name])


def test_every_line_that_is_checked_is_in_the_readme():
    assert len(SHELL) == len(PRINTED)


def test_every_variable_of_the_environment_is_documented():
    package = (ROOT / "cl_compiler").rglob("*.py")
    read = {name for p in package for name in re.findall(r'"(CL_COMPILER_\w+)"', p.read_text())}
    assert read == set(re.findall(r"^\| `(CL_COMPILER_\w+)", README, re.M))
    assert len(read) > 2


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
          "dtype": "bfloat16", "budget": "48MiB"}  # fmt: skip
    compiled = {"error": "", "median_s": 0.5, "live_bytes": 3 << 20, "plan": {"schedule": "spill"}}
    dense = {"error": "", "median_s": 1.0, "live_bytes": 3 << 30}
    case = {"case": of, "rows": {"compiled": compiled, "dense": dense, "gemm": dense}}
    assert list(script["rows_of"](case)) == [
        "| siglip, bfloat16 | 8,192 | 512 | 1 | 48.0 MiB | 1.0 s | 500.0 ms | 2.00 | 3.0 GiB "
        "| 3.0 MiB | `spill` |"
    ]
    case["rows"]["dense"] = {"error": "out of memory"}
    assert "| did not run | 500.0 ms |  |  | 3.0 MiB |" in next(script["rows_of"](case))
    del case["rows"]["dense"]  # nothing to compare with
    assert list(script["rows_of"](case)) == []


def test_no_two_lines_of_the_measurements_look_alike():
    section = README.split("<!-- measurements: begin -->")[1].split("<!-- measurements: end -->")[0]
    lines = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    asked = [tuple(cell.strip() for cell in (*line[1:6], line[-2])) for line in lines]
    assert len(set(asked)) == len(asked)


def test_bf16_products_are_a_line_of_their_own():
    script = runpy.run_path(str(ROOT / "docs" / "measurements.py"))
    of = {"group": "bf16", "loss": "clip", "M": 64, "N": 64, "D": 8, "threads": 1,
          "dtype": "float32", "budget": "48MiB"}  # fmt: skip
    row = {"error": "", "median_s": 0.5, "live_bytes": 3 << 20, "plan": {"schedule": "spill"}}
    (line,) = script["rows_of"](
        {"case": of, "rows": {"compiled:bf16": row, "compiled": row, "dense": row}}
    )
    assert line.startswith("| clip, bf16 products | 64 |")


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    ("schedule", "row"),
    re.findall(r"^\| `(\w+)` (\|.*\|)$", README.partition("### Schedules")[2], re.M),
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
