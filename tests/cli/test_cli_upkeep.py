"""``cache``, ``calibrate`` and ``doctor``."""

from __future__ import annotations

import os
import re
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cl_compiler.cli.cache import parse_age
from cl_compiler.cli.output import Table, _plain, drawn_table
from cl_compiler.hardware.calibration import Calibration, fingerprint
from tests.cli.conftest import SMALL


@pytest.fixture
def compiled(cli, cli_json) -> dict[str, object]:
    cli("compile", *SMALL)
    (entry,) = cli_json("cache", "list")["entries"]
    return entry


def test_list_names_what_was_compiled(cli, compiled, own_cache):
    assert compiled["loss"] == "clip" and compiled["hardware"] == "xeon-amx-2c"
    files = Path(compiled["path"]).parent
    assert files.is_relative_to(own_cache)
    assert compiled["bytes"] == sum(f.stat().st_size for f in files.iterdir())
    text = cli("cache", "list").stdout
    assert compiled["name"] in text and text.endswith(f"in {own_cache}\n")


def test_verify_finds_what_was_changed(cli, cli_json, compiled):
    assert cli_json("cache", "verify") == {"variants": 1, "problems": []}
    source = Path(compiled["path"])
    source.write_text(source.read_text() + "\nimport os\n")
    result = cli("cache", "verify")
    assert result.exit_code == 1
    assert "kernels.py" in result.stdout and "1 variant, 1 problem\n" in result.stdout


def test_prune_keeps_what_is_recent(cli_json, compiled):
    assert cli_json("cache", "prune", "--older-than", "1h")["removed"] == []
    assert cli_json("cache", "prune", "--max-bytes", "1GiB")["removed"] == []
    gone = cli_json("cache", "prune", "--max-bytes", "1KiB")
    assert gone["removed"] == [compiled["name"]] and gone["freed_bytes"] >= compiled["bytes"]


def test_prune_alone_removes_what_killed_processes_left(cli, cli_json, compiled, own_cache):
    left = Path(compiled["path"]).parents[1] / ".building-123-abcd"
    left.mkdir()
    (left / "kernels.py").write_text("half")
    os.utime(left, (0, 0))
    text = cli("cache", "prune").stdout
    assert text.startswith("removed 0 variants, 4 B; ")
    assert not left.exists()
    assert len(cli_json("cache", "list")["entries"]) == 1


def test_prune_alone_keeps_the_bound(cli_json, compiled, monkeypatch):
    monkeypatch.setenv("CL_COMPILER_CACHE_MAX_BYTES", "1")
    assert cli_json("cache", "prune")["removed"] == [compiled["name"]]


def test_clear_asks_first(cli, cli_json, compiled):
    refused = cli("cache", "clear", input="n\n")
    assert refused.exit_code == 1 and "remove 1 variant from" in refused.stderr
    assert len(cli_json("cache", "list")["entries"]) == 1
    assert cli_json("cache", "clear", "--yes")["removed"] == [compiled["name"]]
    assert cli_json("cache", "list")["entries"] == []


def test_ages():
    assert [parse_age(t) for t in ("90m", "12h", "1.5d", "2w")] == [5400, 43200, 129600, 1209600]


def test_plain_tables_align():
    table = Table("sizes", ("what", "bytes"), (("x", "12"), ("longer", "3")), frozenset({1}))
    assert list(_plain(table)) == ["sizes", "what    bytes", "x          12", "longer      3", ""]


@pytest.fixture
def measured(monkeypatch):
    """A calibration in no time: 1 GFLOP/s, on two threads that help or do not."""

    def install(thread_gain: float) -> None:
        def measure(*, quick, nominal):
            return Calibration(
                fingerprint(nominal, torch.__version__),
                gemm=(("float32", 512, 1e9),),
                rates=(("exp_per_s", 2e9),),
                bandwidths=(),
                thread_gain=thread_gain,
                threads=2,
            )

        monkeypatch.setattr("cl_compiler.hardware.calibrate.measure", measure)

    return install


def test_calibrate_keeps_rates_and_doctor_finds_them(cli, cli_json, measured, own_cache):
    before = {f["what"]: f for f in cli_json("doctor")["findings"]}
    assert before["calibration"]["status"] == "slow"
    assert "cl-compiler calibrate" in before["calibration"]["advice"]
    measured(thread_gain=1.9)
    made = cli_json("calibrate")
    assert Path(made["path"]).is_relative_to(own_cache) and not made["disturbed"]
    assert made["hardware"]["gemm_flops_per_s"]["float32"] == 1e9
    after = {f["what"]: f for f in cli_json("doctor")["findings"]}
    assert after["calibration"] == {
        "what": "calibration", "value": made["path"], "status": "ok", "advice": "",
    }  # fmt: skip
    text = cli("calibrate").stdout
    assert "gemm float32" in text and "1.0 GFLOP/s" in text and "2.00 G/s" in text
    assert "gemm bfloat16" not in text  # nominal: it was not measured


def test_a_busy_machine_is_reported(cli, cli_json, measured):
    measured(thread_gain=0.7)
    result = cli("calibrate")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: 2 threads were only 0.7 times as fast as one")
    found = {f["what"]: f for f in cli_json("doctor")["findings"]}
    assert found["calibration"]["status"] == "slow"


def test_doctor_finds_idle_cores(cli_json, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = {f["what"]: f for f in cli_json("doctor")["findings"]}
    cores = int(found["cores"]["value"].split()[0])
    if cores == 1:
        pytest.skip("one core: nothing can be idle")
    assert found["threads"]["status"] == "slow"
    assert f"set OMP_NUM_THREADS={cores}" in found["threads"]["advice"]


def test_doctor_is_exit_code_1_where_something_is_broken(cli, compiled):
    assert cli("doctor").exit_code == 0
    Path(compiled["path"]).write_text("changed")
    result = cli("doctor")
    assert result.exit_code == 1
    assert "to repair\n- cache: `cl-compiler cache verify`" in result.stdout


def test_doctor_mentions_a_cache_that_is_off(cli, monkeypatch):
    monkeypatch.setenv("CL_COMPILER_NO_CACHE", "1")
    result = cli("doctor")
    assert result.exit_code == 0
    assert "unset CL_COMPILER_NO_CACHE" in result.stdout
    assert "h100x8" in result.stdout  # presets are listed
    monkeypatch.setenv("CL_COMPILER_NO_CACHE", "false")  # which the cache reads as on
    assert "CL_COMPILER_NO_CACHE" not in cli("doctor").stdout


@pytest.mark.parametrize("width", [79, 80, 120])
def test_tables_in_a_terminal_cut_no_number_and_no_name(width):
    """Words fold; where the window is too narrow for numbers there is no drawing."""
    columns = ("schedule", "chunk", "memory", "forward", "step, even shards", "what is said of it")
    rows = (
        ("ring_owner", "512", "180.7 MiB", "9.7 ms", "does not fit", "a few words that fold"),
        ("ring_travel", "16384", "1.0 GiB", "400.4 µs", "40.6 ms", "more of them, " * 3),
    )
    table = Table("", columns, rows, frozenset({1, 2, 3, 4}))
    drawn = drawn_table(table, width)
    assert drawn is not None
    shown = Console(width=width, file=StringIO())
    shown.print(drawn)
    lines = shown.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for row in rows:
        (line,) = [line for line in lines if line.strip().startswith(row[0])]
        assert all(re.search(rf"(^| ){re.escape(cell)}( |$)", line) for cell in row[:5]), line
    assert drawn_table(table, 50) is None
