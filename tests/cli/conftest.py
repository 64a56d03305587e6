"""Every test has a cache of its own, so that none sees or changes the user's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cl_compiler.cli.main import app

SMALL = ["--hardware", "xeon-amx-2c", "--budget", "64MiB", "--problem", "2048x2048x64"]
"""A machine that no detection changes, and sizes that take no time."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("CL_COMPILER_CACHE_DIR", str(root))
    monkeypatch.delenv("CL_COMPILER_NO_CACHE", raising=False)
    return root


@pytest.fixture
def cli() -> Callable[..., Any]:
    """Run a command in this process: (exit_code, stdout, stderr) of the result."""

    def run(*arguments: str, **more: Any) -> Any:
        return CliRunner().invoke(app, [str(a) for a in arguments], **more)

    return run


@pytest.fixture
def cli_json(cli: Callable[..., Any]) -> Callable[..., Any]:
    """What a command that must succeed prints as JSON."""

    def run(*arguments: str) -> Any:
        result = cli(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


@pytest.fixture
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command as a process whose output is piped."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cl_compiler.cli.main", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "40"}
        )

    return run
