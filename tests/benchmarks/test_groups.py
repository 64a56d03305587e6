"""The benchmark of groups runs, and what it compares are the same gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.groups import BY_ONEDNN, QUICK, main
from cl_compiler.hardware.cpu import cpu_facts


def test_it_measures_the_same_gradients(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "groups.json"
    main(["--quick", "--out", str(path)])
    (found,) = json.loads(path.read_text())["cases"]
    theirs = {"gathered", "decomposed"}
    assert theirs < set(found["rows"])
    if "amx_bf16" not in cpu_facts().features:
        assert {f"{name}{BY_ONEDNN}" for name in theirs} < set(found["rows"])
    for row in found["rows"].values():
        assert len(row["seconds"]) == QUICK[0].repeats
        assert row["live_bytes"] > 0
        assert row["difference"] < 1e-5
    assert "of compiled" in capsys.readouterr().out
