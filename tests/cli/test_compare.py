"""``cl-compiler bench --compare``: ratios, verdicts and figures follow the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cl_compiler.cli.compare import names_of, tables_of
from cl_compiler.cli.main import app
from cl_compiler.cli.output import Table
from cl_compiler.cli.results import read_results

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("cpu-*.json"))
FLOPS = 4 * 2.0 * 65536**2 * 512


def ceiling(rate: float, inner: int) -> dict[str, Any]:
    case = {"group": "ceilings", "kind": "gemm", "dtype": "bfloat16", "shape": "square", "K": inner}
    row = {"error": "", "rate": rate, "unit": "FLOP/s", "seconds": [1.0, 1.0, 1.02]}
    key = f"ceilings: gemm bfloat16 square {inner}"
    return {"key": key, "run": "r", "case": case, "rows": {"library": row}}


def timed(seconds: float, live: int = 1 << 30, **more: Any) -> dict[str, Any]:
    return {"error": "", "median_s": seconds, "seconds": [seconds] * 4, "forward_s": seconds / 4,
            "backward_s": seconds * 3 / 4, "live_bytes": live, **more}  # fmt: skip


def contest(group: str, rows: dict[str, Any], scale: float = 14.3, n: int = 65536) -> dict:
    case = {"group": group, "loss": "clip", "M": n, "N": n, "D": 512, "dtype": "bfloat16",
            "scale": scale, "flops": FLOPS, "target": 0.74 if n == 65536 else None}  # fmt: skip
    return {"key": f"{group} {n} {scale}", "run": "r", "case": case, "rows": rows}


def errors(size: float) -> dict[str, Any]:
    judged = {"value": 1e-6, "d_x": size, "d_y": size, "d_logit_scale": None}
    return {"error": "", "errors": judged, "repeats": True}


ROWS = {
    "ours": timed(FLOPS / 600e12, plan={"schedule": "spill"}),
    "ours:retain": timed(FLOPS / 500e12),
    "wrong": timed(FLOPS / 900e12),
    "memeff": timed(FLOPS / 300e12, live=1 << 28),
    "cce": {"error": "skipped: cut-cross-entropy has no clip"},
}


def write_file(folder: Path, name: str, cases: list[dict], early: str = "", **more: Any) -> Path:
    run = {"device": {"name": "NVIDIA H100", "driver": "580"}, "versions": {"torch": "2.11"},
           "commit": "c" * 40, "is_quick": False, "ended_early": early}  # fmt: skip
    path = folder / name
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps({"format": 1, "runs": {"r": run, **more}, "cases": cases}))
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    judged = {"ours": errors(2e-3), "memeff": errors(3e-3), "wrong": errors(0.4)}
    cases = [ceiling(790e12, 8192), ceiling(588e12, 512), contest("correctness", judged),
             contest("correctness", {"memeff": errors(0.9)}, scale=100.0),
             contest("speed", ROWS)]  # fmt: skip
    return write_file(tmp_path, "a.json", cases)


def table(path: Path, title: str) -> Table:
    tables = [t for results in read_results(path) for t in tables_of(results)]
    return next(t for t in tables if t.title.startswith(title))


def row_of(found: Table, name: str) -> dict[str, str]:
    row = next(r for r in found.rows if r[1].split()[0] == name)
    return dict(zip(found.columns, row, strict=True))


def test_time_is_told_beside_ours_and_beside_the_limits(results: Path):
    speed = table(results, "Speed")
    ours, memeff = row_of(speed, "ours"), row_of(speed, "memeff")
    assert ours["least work"] == "600.0 TFLOP/s" and ours["it/ours"] == ""
    assert (ours["of best"], ours["of K=D"]) == ("0.76", "1.02")
    assert memeff["it/ours"] == "2.00" and memeff["memory"] == "256.0 MiB"
    assert row_of(speed, "ours:retain")["it/ours"] == "1.20"
    assert row_of(speed, "cce")[""] == "skipped: cut-cross-entropy has no clip"


def test_a_wrong_provider_is_marked_and_rivals_nobody(results: Path):
    assert row_of(table(results, "Speed"), "wrong")[""] == "gradients wrong by 40%"
    (verdict,) = table(results, "Verdict").rows
    assert verdict[2:5] == ("memeff", "2.00", "ahead")
    assert verdict[6] == "256.0 MiB memeff"
    assert verdict[7] == ">= 0.74 of the best product: 0.76, met"


def test_errors_at_another_scale_do_not_count(results: Path):
    assert row_of(table(results, "Speed"), "memeff")[""] == ""


def test_nan_gradients_are_the_worst_errors(tmp_path: Path):
    cases = [contest("correctness", {"memeff": errors(float("nan"))}), contest("speed", ROWS)]
    speed = table(write_file(tmp_path, "n.json", cases), "Speed")
    assert row_of(speed, "memeff")[""] == "gradients wrong by inf%"


@pytest.mark.parametrize(
    ("seconds", "words"), [(FLOPS / 200e12, "BEHIND"), (FLOPS / 400e12, "ahead")]
)
def test_the_verdict_can_go_either_way(tmp_path: Path, seconds: float, words: str):
    rows = {"ours": timed(seconds), "memeff": ROWS["memeff"]}
    cases = [ceiling(790e12, 8192), contest("speed", rows)]
    (verdict,) = table(write_file(tmp_path, "v.json", cases), "Verdict").rows
    assert verdict[4] == words and verdict[7].endswith("MISSED")


def test_what_did_not_run_has_no_verdict_to_hide_behind(tmp_path: Path):
    rows = {"ours": {"error": "ArgumentError: on cuda"}, "memeff": ROWS["memeff"]}
    (verdict,) = table(write_file(tmp_path, "d.json", [contest("speed", rows)]), "Verdict").rows
    assert verdict[4] == "DID NOT RUN"


def test_of_whole_steps_those_that_keep_activations_are_compared(tmp_path: Path):
    rows = {"ours": timed(3.0, 1 << 20), "ours:uncached": timed(1.0, 1 << 30),
            "open_clip": timed(2.0, 1 << 31)}  # fmt: skip
    path = write_file(tmp_path, "s.json", [contest("step", rows)])
    (verdict,) = table(path, "Verdict").rows
    assert verdict[1:6] == ("1.0 s", "open_clip", "2.00", "ahead", "1.0 GiB, cached 1.0 MiB")
    speed = table(path, "Speed")
    assert row_of(speed, "ours")["it/ours"] == "3.00" and "forward" not in speed.columns
    rows["ours:uncached"] = {"error": "OutOfMemoryError"}
    (verdict,) = table(write_file(tmp_path, "s.json", [contest("step", rows)]), "Verdict").rows
    assert verdict[4] == "DID NOT RUN"  # the cached step does other work


def test_each_run_of_a_file_has_its_own_heading_and_limits(results: Path, tmp_path: Path):
    """A resumed run on another driver: its fractions are of its own products."""
    content = json.loads(results.read_text())
    later = [ceiling(395e12, 8192), contest("speed", {**ROWS, "ours": timed(FLOPS / 300e12)}, n=9)]
    again = {**content["runs"]["r"], "device": {"name": "NVIDIA H100", "driver": "590"},
             "ended_early": "interrupted"}  # fmt: skip
    cases = [*content["cases"], *({**case, "run": "later"} for case in later)]
    path = write_file(tmp_path, "two.json", cases, early="the time budget is spent", later=again)
    first, second = read_results(path)
    assert "driver 580" in first.about and "driver 590" in second.about
    assert (first.early, second.early) == ("", "interrupted")
    assert [(c.rate, c.K) for c in second.ceilings] == [(395e12, 8192)]
    fractions = [next(n.ceiling for n in r.lines if n.provider == "ours") for r in (first, second)]
    assert fractions == pytest.approx([600 / 790, 300 / 395])
    assert max(n.worst_error or 0.0 for n in second.lines) == 0.4  # found in the first run
    shown = CliRunner().invoke(app, ["bench", "--compare", str(path)]).output
    assert shown.index("driver 580") < shown.index("driver 590")


def test_files_of_one_name_are_told_apart(tmp_path: Path):
    paths = [write_file(tmp_path / d, "x.json", [ceiling(7e12, 8192), contest("speed", ROWS)])
             for d in ("d1", "d2")]  # fmt: skip
    out = tmp_path / "figures"
    found = CliRunner().invoke(app, ["bench", "--compare", *map(str, paths), "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert "d1-x  d2-x / it" in found.output
    assert {p.name for p in out.glob("*-time.png")} == {"d1-x-time.png", "d2-x-time.png"}
    assert len(set(names_of([paths[0], paths[0]]))) == 2


def test_spread_is_the_middle_half(tmp_path: Path):
    rows = {"ours": timed(1.0) | {"seconds": [0.9, 0.9, 1.0, 1.2, 1.2, 9.0]}}
    speed = table(write_file(tmp_path, "s.json", [contest("speed", rows)]), "Speed")
    assert row_of(speed, "ours")[""] == "spread 25%"


def test_files_are_compared_and_drawn(results: Path, tmp_path: Path):
    slower = {**ROWS, "ours": timed(FLOPS / 300e12)}
    other = write_file(tmp_path, "b.json", [ceiling(760.5e12, 8192), contest("speed", slower)],
                       early="the time budget is spent")  # fmt: skip
    out = tmp_path / "figures"
    found = CliRunner().invoke(
        app, ["bench", "--compare", str(results), str(other), "--out", str(out)]
    )
    assert found.exit_code == 0, found.output
    lines = found.output.splitlines()
    between = lines[lines.index("Between files") :]
    assert next(line for line in between if " ours " in line).split()[-1] == "2.000"
    assert next(line for line in between if "square 8192" in line).split()[-1] == "1.039"
    assert "b.json ended early: the time budget is spent" in found.output
    for name in ("a-time", "a-memory", "a-ceiling", "b-ceiling"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_of_the_cpu_benchmark_are_shown_too(path: Path, tmp_path: Path):
    found = CliRunner().invoke(app, ["bench", "--compare", str(path), "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert "compiled (retain)" in found.output and "1 threads" in found.output
    assert "forward  " not in found.output.split("Verdict")[0]  # a CPU's file does not know it
    assert (tmp_path / f"{path.stem}-time.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--compare"], 2, "results files"),
        (["pyproject.toml"], 2, "results files"),
        (["--compare", "pyproject.toml"], 1, "is no results file"),
        (["--compare", "nowhere.json"], 1, "cannot read nowhere.json"),
        (["--compare", *map(str, RESULTS), "--out", "pyproject.toml"], 1, "cannot write"),
    ],
)
def test_other_files_are_refused(arguments, code, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = CliRunner().invoke(app, ["bench", *arguments])
    assert found.exit_code == code and words in found.output
