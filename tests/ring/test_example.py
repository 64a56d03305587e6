"""The example under torchrun: four ranks take the steps that one process takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 240
STEPS = re.compile(r"step +(\d+)  loss (\d+\.\d+)")


def said(*command: str, folder: Path) -> str:
    options = ["--max-files", "2", "--batch", "96", "--steps", "21", "--dim", "16"]
    options += ["--budget", "4MiB", "--data", str(folder)]
    done = subprocess.run(
        [sys.executable, *command, str(ROOT / "examples" / "train_distributed.py"), *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(output: str) -> list[tuple[int, float]]:
    return [(int(step), float(loss)) for step, loss in STEPS.findall(output)]


@pytest.mark.full
def test_ranks_learn_what_one_process_learns(tmp_path):
    first = said(folder=tmp_path)
    alone = losses(first)
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    output = said(*run, folder=tmp_path)
    together = losses(output)
    # Reading takes a while, of which one rank speaks.
    assert output.count("rank 0 of 4 reads") == 1 and output.count("pairs to train on") == 1
    assert [step for step, _ in alone] == [0, 10, 20]
    assert first.count("on 1 rank\n") == 1 and output.count("on 4 ranks\n") == 1
    assert alone[-1][1] < 0.9 * alone[0][1]
    for (step, one), (same, four) in zip(alone, together, strict=True):
        assert step == same and abs(one - four) < 1e-4 * one, (step, one, four)
