"""A GPU's results file becomes the README's table."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from tests.cli.test_compare import FLOPS, ROWS, ceiling, contest, errors, write_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(tmp_path):
    found = runpy.run_path(str(ROOT / "docs" / "measurements.py"))
    names = found["gpu_measurements"].__globals__
    names |= {"ROOT": tmp_path, "README": tmp_path / "README.md", "RESULTS": tmp_path,
              "IMAGES": tmp_path}  # fmt: skip
    return found


def test_each_size_is_a_line_beside_the_fastest_other(script, tmp_path):
    cases = [ceiling(790e12, 8192), contest("correctness", {"wrong": errors(0.4)}),
             contest("speed", ROWS), contest("speed", {"ours": ROWS["ours"]}, n=16384),
             contest("speed", {"memeff": ROWS["memeff"]}, n=32768)]  # fmt: skip
    text = script["gpu_measurements"](write_file(tmp_path, "gpu.json", cases))
    seconds = FLOPS / 600e12
    lines = text.splitlines()
    assert lines[4] == (
        f"| clip | 65,536 D=512 | {seconds * 250:.1f} ms | {seconds * 750:.1f} ms "
        f"| {seconds * 1e3:.1f} ms | 0.76 | 1.0 GiB | `memeff`, {seconds * 2e3:.1f} ms | 2.00 "
        "| 256.0 MiB |"
    )
    assert lines[5].endswith("| none ran |  |  |") and "16,384" in lines[5]
    assert lines[6] == "" and len(lines) == 8  # where the compiled loss did not run is no line
    assert "NVIDIA H100" in lines[0] and "[gpu.json](gpu.json)" in lines[0]


def test_the_readme_says_nothing_of_a_gpu_until_it_has_a_place_for_it(script, tmp_path):
    readme = tmp_path / "README.md"
    path = write_file(tmp_path, "gpu.json", [ceiling(790e12, 8192), contest("speed", ROWS)])
    with pytest.raises(SystemExit, match=r"gpu.json is not committed"):
        script["main"](["--write", str(path)])
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True, timeout=60)
    subprocess.run([*git, "add", str(path)], check=True, timeout=60)
    readme.write_text("text\n")
    with pytest.raises(SystemExit, match="has no <!-- gpu measurements: begin -->"):
        script["main"](["--write", str(path)])
    before = "text\n<!-- gpu measurements: begin -->\nold\n<!-- gpu measurements: end -->\nmore\n"
    readme.write_text(before)
    script["main"](["--write", str(path)])
    after = readme.read_text()
    assert "old" not in after and "| clip | 65,536 D=512 |" in after
    assert after.startswith("text\n") and after.endswith("end -->\nmore\n")
    assert (tmp_path / "gpu-time.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads(path.read_text())
    content["runs"]["r"]["is_quick"] = True
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="dry run"):
        script["main"](["--write", str(path)])


def test_the_readme_claims_nothing_of_a_gpu_without_a_file(script):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("### On a GPU")[2].partition("\n##")[0]
    begin, end = script["GPU_BEGIN"], script["GPU_END"]
    if begin not in section:
        assert "No GPU has run these kernels" in readme.partition("### Not measured yet")[2]
        assert section and not re.search(r"\d\s*(x|\u00d7|%|[mµ]?s|[TG]FLOP|[GM]iB)\b", section)
        return
    shown = section.partition(begin)[2].partition(end)[0].strip()
    path = ROOT / re.search(r"\]\((benchmarks/results/.*?\.json)\)", shown)[1]
    script["gpu_measurements"].__globals__["ROOT"] = ROOT
    assert shown == script["gpu_measurements"](path)
