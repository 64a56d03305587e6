"""One interpreting process for all tests of a session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def interpret() -> Iterator[Callable[..., dict[str, Any]]]:
    """``interpret(case=…, dtype=…, …)``: see ``worker.answer``."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.codegen.triton.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None

        def ask(**request: Any) -> dict[str, Any]:
            request = {"m": 21, "n": 37, "d": 20, "seed": 1, "arch": "sm_90", **request}
            print(json.dumps(request), file=stdin, flush=True)
            answer: dict[str, Any] = json.loads(stdout.readline())
            assert "failure" not in answer, answer["failure"]
            return answer

        yield ask
        stdin.close()
