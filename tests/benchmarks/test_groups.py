"""The benchmark of groups runs, and what it compares are the same gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.groups import QUICK, main


def test_it_measures_the_same_gradients(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "groups.json"
    main(["--quick", "--out", str(path)])
    (found,) = json.loads(path.read_text())["cases"]
    assert set(found["rows"]) == {"compiled", "gathered", "decomposed"}
    for row in found["rows"].values():
        assert len(row["seconds"]) == QUICK[0].repeats
        assert row["live_bytes"] > 0
        assert row["difference"] < 1e-5
    assert "of compiled" in capsys.readouterr().out
