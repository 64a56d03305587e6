"""``generated/triton``: committed samples of emitted kernels, as the compiler prints them today.

``pytest tests/codegen/triton/test_samples.py --update-generated`` rewrites them.
"""

from __future__ import annotations

import ast
import difflib
from pathlib import Path

import pytest

from cl_compiler.hardware import load_hardware
from cl_compiler.lang.ir import LossIR
from cl_compiler.losses import find
from cl_compiler.plan import MemoryBudget, Problem, Request
from cl_compiler.plan.requests import request_to_json
from cl_compiler.variants import build_variant
from tests.codegen.test_generated import weighted_margin

FOLDER = Path(__file__).parents[3] / "generated" / "triton"
SAMPLES: dict[str, tuple[LossIR, str, str]] = {
    "clip-sm_90": (find("clip"), "h100x1", "auto"),
    "clip-sm_80": (find("clip"), "a100x1", "auto"),
    "siglip-sm_90": (find("siglip"), "h100x1", "auto"),
    "siglip-sm_80": (find("siglip"), "a100x1", "auto"),
    "nt_xent-sm_90": (find("nt_xent"), "h100x1", "auto"),
    "weighted_margin-sm_90": (weighted_margin, "h100x1", "auto"),
    "clip-recompute-sm_90": (find("clip"), "h100x1", "recompute"),
    "infonce-panel-sm_90": (find("infonce"), "h100x1", "panel"),
}


def printed(name: str) -> str:
    """What ``compile_loss`` makes of 32,768 pairs of width 768 in bf16, within 2 GiB."""
    loss, hardware, schedule = SAMPLES[name]
    needs = {op.name for op in loss.operands} | set(loss.parameters)
    request = Request(
        loss,
        load_hardware(hardware),
        MemoryBudget.parse("2GiB"),
        Problem(32768, 32768, 768, "bfloat16"),
        "views" if loss.is_single_set else "paired",
        frozenset(needs),
        "bf16",
        schedule,
    )
    return build_variant(request, request_to_json(request), name).source


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_is_what_the_templates_emit(name: str, update_generated: bool):
    path, text = FOLDER / f"{name}.py", printed(name)
    if update_generated:
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text)
    committed = path.read_text()
    difference = "\n".join(difflib.unified_diff(committed.split("\n"), text.split("\n"), n=1))
    assert committed == text, f"run pytest --update-generated\n{difference}"


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_stands_alone(name: str):
    """It imports torch, triton and the standard library only."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {m.split(".")[0] for m in modules} <= {
        "functools",
        "math",
        "threading",
        "torch",
        "triton",
    }


def test_folder_holds_nothing_else():
    assert {path.stem for path in FOLDER.glob("*")} == set(SAMPLES)
