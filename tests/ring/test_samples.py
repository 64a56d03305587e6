"""The committed samples of files for many ranks: current, formatted, and runnable without us.

``pytest tests/ring/test_samples.py --update-generated`` rewrites ``generated/ring/``.
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

from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.ranks import with_ranks
from cl_compiler.lang.resolve import Positives
from cl_compiler.losses import find
from cl_compiler.plan.requests import request_to_json
from cl_compiler.plan.types import MemoryBudget, Problem, Request
from cl_compiler.variants import build_variant
from tests import losses_zoo as zoo
from tests.ring import usage
from tests.ring.processes import launch
from tests.ring.shards import emit_ring, schedules_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "generated" / "ring"
RANKS = 8


@dataclass(frozen=True)
class Golden:
    """One file: a loss, a cluster schedule and a kind of positives."""

    loss: str
    schedule: str
    positives: Positives = "paired"
    hardware: str = "xeon-amx-2c"
    """A preset: many of its CPUs, or of its GPUs, which kernels are for."""

    @property
    def arch(self) -> str:
        """Of the kernels; "" where there are none."""
        spec = load_hardware(self.hardware)
        return "" if spec.kind == "cpu" else spec.arch

    @property
    def name(self) -> str:
        ids = "-ids" if self.positives == "ids" else ""
        where = "onednn" if self.hardware.startswith("epyc-zen") else self.arch
        return f"{self.loss}-{self.schedule}{ids}{f'-{where}' * bool(where)}"

    def text(self) -> str:
        """What the planner and the templates make of it."""
        ir = find(self.loss)
        per_node = RANKS // 2 if self.schedule == "two_level" else RANKS
        hardware = with_ranks(load_hardware(self.hardware), RANKS, per_node)
        request = Request(
            ir,
            hardware,
            MemoryBudget.parse("256MiB"),
            Problem(8192, 8192, 512, "bfloat16" if self.arch else "float32"),
            self.positives,
            frozenset({op.name for op in ir.operands} | set(ir.parameters)),
            "bf16" if self.arch else "ieee",
            self.schedule,
            0,
            RANKS,
        )
        return build_variant(request, request_to_json(request), self.name).source


GOLDENS = (
    Golden("clip", "ring_owner"),
    Golden("siglip", "ring_travel"),
    Golden("clip", "ring_travel", hardware="epyc-zen4-2c"),
    Golden("infonce", "all_gather"),
    Golden("supcon", "ring_owner", "ids"),
    Golden("clip", "two_level"),
    Golden("clip", "canonical"),
    Golden("clip", "ring_travel", hardware="h100x8"),
    Golden("nt_xent", "half_ring", "views"),
    Golden("clip", "both_ways"),
    Golden("clip", "host"),
    Golden("clip", "host", hardware="h100x8"),
)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
def test_sample_is_what_the_templates_emit(golden: Golden, update_generated: bool):
    path, text = FOLDER / f"{golden.name}.py", golden.text()
    if update_generated:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    committed = path.read_text() if path.exists() else ""
    difference = "\n".join(
        difflib.unified_diff(committed.splitlines(), text.splitlines(), "committed", "emitted")
    )
    assert committed == text, f"run pytest --update-generated\n{difference}"


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
def test_what_several_sweeps_read_has_one_name_that_says_what_it_is(golden: Golden):
    """Vectors are evaluated before each sweep that reads them: under one name, from one text."""
    text = (FOLDER / f"{golden.name}.py").read_text()
    assert not re.findall(r"\b[absv]\d+_\d+", text)
    assert not re.findall(r"\b[abv]\d+\b(?! ?, )", text.split('"""', 2)[2]), "vectors have names"
    before, _, after = text.partition("\ndef backward(")
    backward = after or before  # whose forward makes gradients
    names = r"(minus_\w+|\w+_weight|s\d)"
    given = dict(re.findall(rf"^ +{names} = (.+)$", backward, re.MULTILINE))
    for name, value in re.findall(rf"^ +{names} = (.+)$", backward, re.MULTILINE):
        assert given[name] == value
    assert any(name.startswith("minus_") for name in given) == bool(after)


def test_folder_has_no_other_files():
    assert {p.name for p in FOLDER.iterdir()} == {f"{g.name}.py" for g in GOLDENS}


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
def test_samples_import_torch_alone_and_kernels_triton(golden: Golden):
    names = set()
    for node in ast.walk(ast.parse((FOLDER / f"{golden.name}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    more = {"triton"} if golden.arch else set()
    more |= {"functools"} if golden.name.endswith("-onednn") else set()
    assert names == {"contextlib", "math", "threading", "torch"} | more


def test_samples_run_as_their_docstrings_say():
    names = ("ring_owner", "host", "both_ways", "canonical", "ring_travel-onednn")
    paths = [str(FOLDER / f"clip-{name}.py") for name in names]
    for outcome in launch(usage.follow, 2, paths):
        found = outcome.needed()
        assert len(found) == 2 * len(names)
        assert max(found.values()) < 2e-6, found


@pytest.mark.full
def test_text_of_the_zoo_is_formatted_and_has_no_dead_names(tmp_path: Path):
    """No unused name, unsorted import or overlong line, in any cluster schedule of any loss."""
    for case in zoo.cases():
        for schedule in schedules_of(case):
            (tmp_path / f"{case.name}-{schedule}.py").write_text(emit_ring(case, schedule))
    for command in (("check",), ("format", "--check")):
        options = ["--no-cache", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *options],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert run.returncode == 0, run.stdout + run.stderr
