"""The committed samples of emitted code: current, formatted, self-contained and right.

``pytest tests/codegen/test_generated.py --update-generated`` rewrites ``generated/``.
"""

from __future__ import annotations

import ast
import difflib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cl_compiler import lang as cl
from cl_compiler.hardware import load_hardware
from cl_compiler.lang.ir import LossIR
from cl_compiler.lang.resolve import Positives
from cl_compiler.losses import find
from cl_compiler.plan.requests import request_to_json
from cl_compiler.plan.types import MemoryBudget, Problem, Request
from cl_compiler.runtime.loader import load_source
from cl_compiler.variants import build_variant
from tests import losses_zoo as zoo
from tests.tiles import emit, schedules_of
from tests.zoo_case import Case, sample

FOLDER = Path(__file__).parents[2] / "generated" / "torch"
D = 512
BUDGET = "256MiB"
ZEN4 = "epyc-zen4-2c"
"""oneDNN multiplies faster there than BLAS."""


@cl.define_loss
def weighted_margin(sim, logit_scale, margin):
    """A user's loss: InfoNCE with a margin on the positives and a weight for each row."""
    s = logit_scale * (sim - margin * cl.is_positive)
    weight = cl.row_input("weight")
    row = weight * (cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows))
    return cl.sum(row, over=cl.rows) / cl.sum(weight, over=cl.rows)


@dataclass(frozen=True)
class Golden:
    """One file of ``generated/``: a loss, a schedule, a kind of positives, rows and columns."""

    loss: LossIR
    schedule: str
    positives: Positives = "paired"
    rows: int = 16384
    machine: str = "xeon-amx-2c"

    @property
    def name(self) -> str:
        suffix = "-ids" if self.positives == "ids" else ""
        suffix += "-onednn" if self.machine == ZEN4 else ""
        return f"{self.loss.name}-{self.schedule}{suffix}"

    @property
    def case(self) -> Case:
        values = {"logit_scale": 14.3, "logit_bias": -10.0, "margin": 0.1}
        return Case(
            self.name,
            self.loss,
            {name: values[name] for name in self.loss.parameters},
            positives=self.positives,
            square=self.positives == "paired",
        )

    def text(self) -> str:
        """What the planner and the templates make of it."""
        hardware, budget = load_hardware(self.machine), MemoryBudget.parse(BUDGET)
        request = Request(
            self.loss,
            hardware,
            budget,
            Problem(self.rows, self.rows, D),
            self.positives,
            self.case.needs,
            "ieee",
            self.schedule,
        )
        return build_variant(request, request_to_json(request), self.name).source


GOLDENS = (
    Golden(find("clip"), "spill"),
    Golden(find("clip"), "retain"),
    Golden(find("clip"), "spill", "ids"),
    Golden(find("clip"), "dense", rows=256),
    Golden(find("clip"), "spill", machine=ZEN4),
    Golden(find("infonce"), "panel"),
    Golden(find("siglip"), "spill"),
    Golden(find("nt_xent"), "spill", "views"),
    Golden(find("supcon"), "spill", "ids"),
    Golden(weighted_margin, "recompute"),
)
by_name = pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)


def path_of(golden: Golden) -> Path:
    return FOLDER / f"{golden.name}.py"


@by_name
def test_generated_file_is_what_the_templates_emit(golden: Golden, update_generated: bool):
    path, text = path_of(golden), golden.text()
    if update_generated:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    committed = path.read_text() if path.exists() else ""
    difference = "\n".join(
        difflib.unified_diff(committed.splitlines(), text.splitlines(), "committed", "emitted")
    )
    assert committed == text, f"run pytest --update-generated\n{difference}"


def test_generated_folder_has_no_other_files():
    assert {p.name for p in FOLDER.iterdir()} == {path_of(g).name for g in GOLDENS}


def ruff(*arguments: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_generated_files_are_formatted_and_have_no_dead_names():
    ruff("check", "--no-cache", str(FOLDER))
    ruff("format", "--no-cache", "--check", str(FOLDER))


def test_generated_text_of_the_zoo_is_formatted_and_has_no_dead_names(tmp_path: Path):
    """No unused name, unsorted import or overlong line, in any schedule of any loss."""
    for case in zoo.cases():
        for schedule in schedules_of(case):
            text = emit(case, schedule)
            (tmp_path / f"{case.name}-{schedule}.py").write_text(text)
    config = str(Path(__file__).parents[2] / "pyproject.toml")
    ruff("check", "--no-cache", "--config", config, str(tmp_path))
    ruff("format", "--no-cache", "--config", config, "--check", str(tmp_path))


@by_name
def test_generated_file_stands_alone(golden: Golden):
    """It imports torch and the standard library only, and uses autograd as a base class only."""
    tree = ast.parse(path_of(golden).read_text())
    imported = {
        a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names
    }
    assert imported <= {"functools", "math", "threading", "torch"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "autograd"]
    bases = [base for n in ast.walk(tree) if isinstance(n, ast.ClassDef) for base in n.bases]
    names = [ast.unparse(base) for base in bases]
    assert set(names) <= {"torch.autograd.Function", "ValueError"}
    assert len(uses) == names.count("torch.autograd.Function")


@by_name
def test_generated_file_names_no_path_and_no_time(golden: Golden):
    text = path_of(golden).read_text()
    assert not re.search(r"\s/\w|\d\d:\d\d|\d{4}-\d\d-\d\d", text)


@by_name
def test_generated_file_is_right(golden: Golden):
    """Loaded from the committed file, in fp32, on sizes that leave its tiles ragged."""
    import torch

    module = load_source(path_of(golden).read_text(), golden.name)
    rows = 1030 if golden.case.square else 530
    exact = sample(golden.case, m=rows, n=1030, d=D, seed=5)
    named = {**exact.tensors, **exact.parameters}
    values = {n: t.detach().float().requires_grad_() for n, t in exact.tensors.items()}
    values |= {n: t.detach().clone().requires_grad_() for n, t in exact.parameters.items()}
    arguments = {**values, **exact.ids}
    value = module.Loss.apply(*(arguments[name] for name in module.ARGUMENTS))[0]
    value.backward()
    expected = exact.reference()
    expected.backward()
    assert abs(value.item() - expected.item()) < 2e-6 * max(1.0, abs(expected.item()))
    for name in golden.case.needs:
        want, got = named[name].grad, values[name].grad
        assert float((got - want).norm()) < 2e-5 * float(torch.linalg.norm(want)), name
