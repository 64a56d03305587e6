"""What a reader of an emitted kernel meets: exact lines, and text that passes the linter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cl_compiler.plan.types import Tile
from tests import losses_zoo as zoo
from tests.codegen.triton.emit import REAL, emit, served

CASES = {case.name: case for case in zoo.cases() if case.name in served()}
ROOT = Path(__file__).parents[3]


def body(name: str, kernel: str, arch: str = "sm_90") -> list[str]:
    """Lines of one kernel, without indentation."""
    text = emit(CASES[name], dtype="bfloat16", width=512, arch=arch, panel=REAL, core=None)
    start = text.index(f"def {kernel}(")
    return [line.strip() for line in text[start : text.index("\n\n\n", start)].split("\n")]


@pytest.mark.parametrize(
    ("name", "kernel", "lines"),
    [
        (
            "clip",
            "_forward_sweep_bounded_kernel",
            [
                "t1 = _exp2(_fma(products, logit_scale_log2, s0_log2))",
                "if RAGGED and at_edge:",
                "t1 = tl.where(inside, t1, 0.0)",
                "row_lse_sum_part = tl.sum(t1, 1)",
                "tl.store(row_lse_sum_tiles + row_slot, row_lse_sum_part, mask=offs_m < row_stop)",
                "col_lse_sum_j += _fold(t1, ROW_WARPS)",
            ],
        ),
        (
            "clip",
            "_backward_sweep_bounded_kernel",
            [
                "g = (b0_j[None, :] + a1_i[:, None]) * "
                "_exp2(_fma(products, logit_scale_log2, s2_log2))",
                "if _crosses(i, j, 0, BLOCK_M, BLOCK_N):",
                "on_positive = offs_n[None, :] == offs_m[:, None]",
                "g = tl.where(on_positive, g + a3_i[:, None], g)",
                "g_logits.store([i - row_start, j - col_start], g.to(g_logits.dtype))",
            ],
        ),
        (
            "siglip",
            "_forward_sweep_kernel",
            [
                "logits = _fma(products, logit_scale, logit_bias)",
                "logits = tl.where(on_positive, -logits, logits)",
                "t2 = _softplus(logits)",
                "g = _sigmoid(logits)",
                "g = tl.where(on_positive, -g, g)",
            ],
        ),
    ],
)
def test_kernel_lines(name: str, kernel: str, lines: list[str]):
    text = body(name, kernel)
    found = [line for line in text if line in lines]
    assert found == lines, "\n".join(text)


def test_positives_of_two_views_lie_on_two_diagonals():
    text = "\n".join(body("nt_xent", "_backward_sweep_bounded_kernel"))
    assert (
        "_crosses(i, j, half, BLOCK_M, BLOCK_N) | _crosses(i, j, -half, BLOCK_M, BLOCK_N)" in text
    )


def test_slots_multiply_scalars_where_they_lie():
    text = emit(CASES["hard_negatives"], dtype="bfloat16")
    assert ".item()" not in text
    assert "        t0.mul_(logit_scale)\n" in text


def test_changes_on_one_diagonal_share_a_branch():
    """Else everything that the second tile is made of would live through the first branch."""
    lines = body("mnrl_joint", "_backward_sweep_a_running_kernel", "sm_100")
    start = lines.index("t2 = tl.where(on_self, 0.0, t2)")
    assert lines[start + 1] == "t6 = tl.where(on_self, 0.0, t6)"
    assert sum(line.startswith("if _crosses(") for line in lines) == 1


def test_no_program_before_hopper_has_descriptors():
    assert "TensorDescriptor" not in emit(CASES["clip"], arch="sm_80")
    assert "TensorDescriptor" in emit(CASES["clip"], arch="sm_90")
    assert "inline_asm" not in emit(CASES["clip"], arch="gfx942")


def test_panels_are_whole_tiles():
    text = emit(CASES["clip"], dtype="bfloat16", width=512, panel=Tile(1000, 3000), core=None)
    assert "TILE_M, TILE_N = 1024, 3072" in text


def test_emitted_text_of_the_zoo_has_no_dead_names_and_no_long_lines(tmp_path: Path):
    for name, case in CASES.items():
        text = emit(case, dtype="bfloat16", width=512, panel=REAL, core=None)
        (tmp_path / f"{name}.py").write_text(text)
    config = str(ROOT / "pyproject.toml")
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", config, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
