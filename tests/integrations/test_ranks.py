"""Two real processes: drop-ins over shards give the whole batch's gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 120


def test_gradients_averaged_over_ranks_are_those_of_the_whole_batch(tmp_path):
    """Pains 1 and 3: no factor of the world size, and shards of unequal length.  See ``ranks.py``.

    Pain 4: cached steps under DistributedDataParallel reduce once.
    Pain 6: the positives of rank 1 are its own columns, not the first ones.
    """
    command = [sys.executable, "-m", "tests.integrations.ranks"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
        assert output.endswith("done\n"), output
