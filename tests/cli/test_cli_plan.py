"""``plan``, ``compile`` and ``inspect`` show and keep one and the same thing."""

from __future__ import annotations

import re

import pytest

from cl_compiler.cli.diff import difference_table, source_diff
from cl_compiler.cli.requests import Question, request_of
from cl_compiler.plan.record import plan_from_json
from cl_compiler.plan.report import explain
from cl_compiler.plan.search import choose_plan
from tests.cli.conftest import SMALL

QUESTION = Question(hardware="xeon-amx-2c", budget="64MiB", problem="2048x2048x64")


def test_plan_prints_the_explanation_and_its_json_is_the_plan(cli, cli_json):
    chosen = choose_plan(request_of(QUESTION))
    assert cli("plan", *SMALL).stdout == explain(chosen)
    assert plan_from_json(cli_json("plan", *SMALL)) == chosen


def test_json_is_the_same_every_time(cli):
    assert cli("plan", *SMALL, "--json").stdout == cli("plan", *SMALL, "--json").stdout


def test_max_batch_is_the_largest_that_can_be_planned(cli, cli_json):
    largest = cli_json("plan", *SMALL, "--max-batch")["max_batch"]
    size = ["--problem", f"{largest}x64"]
    assert cli("plan", *SMALL[:4], *size).exit_code == 0
    assert cli("plan", *SMALL[:4], "--problem", f"{largest + 1}x64").exit_code == 1
    assert f"M = {largest:,}" in cli("plan", *SMALL, "--max-batch").stdout


@pytest.mark.parametrize("preset", ["h100x8", "mi300x1", "rtx4090x2"])
def test_any_machine_can_be_planned_and_inspected(cli, cli_json, preset):
    machine = ["--hardware", preset, "--problem", "4096x128", "--budget", "256MiB"]
    assert cli_json("plan", *machine)["hardware_name"] == preset
    source = cli("inspect", *machine).stdout
    assert f"# hardware  {preset} " in source
    compile(source, preset, "exec")


def test_compile_keeps_what_inspect_shows(cli, cli_json, tmp_path):
    shown = cli_json("inspect", *SMALL)
    out = tmp_path / "clip.py"
    made = cli("compile", *SMALL, "--out", str(out))
    assert made.exit_code == 0 and made.stdout.startswith("compiled: ")
    again = cli_json("compile", *SMALL)
    assert again["cached"] is True
    assert again["plan"] == shown["plan"]
    assert again["path"].endswith(f"/{shown['name']}/kernels.py")
    assert out.read_text() == shown["source"] == cli("inspect", *SMALL).stdout
    # and by its name, from the cache
    assert cli("inspect", shown["name"]).stdout == shown["source"]
    assert cli_json("inspect", shown["name"]) == shown


def test_inspecting_keeps_nothing(cli, cli_json):
    cli("inspect", *SMALL)
    assert cli_json("cache", "list")["entries"] == []


def test_compile_is_what_compile_loss_finds(cli):
    from cl_compiler import Problem, compile_loss

    made = cli("compile", *SMALL).stdout
    loss_fn = compile_loss("xeon-amx-2c", "64MiB", problem=Problem(2048, 2048, 64))
    assert made == f"compiled: {loss_fn.source_path}\n"
    assert loss_fn.variants[-1].cached


def test_what_cannot_be_written_is_a_usage_error(cli, tmp_path):
    result = cli("compile", *SMALL, "--out", str(tmp_path / "nowhere" / "clip.py"))
    assert result.exit_code == 2
    assert "cannot write" in result.stderr


def test_diff_of_two_plans(cli, cli_json):
    text = cli("inspect", *SMALL, "-s", "spill", "--diff", "schedule=recompute").stdout
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["schedule"] == ["schedule", "spill", "recompute"]
    assert "loss" not in rows  # what is equal is left out
    assert "-# schedule  spill" in text and "+# schedule  recompute" in text
    both = cli_json("inspect", *SMALL, "-s", "spill", "--diff", "schedule=recompute")
    assert [both[side]["plan"]["schedule"] for side in ("before", "after")] == [
        "spill", "recompute",
    ]  # fmt: skip
    assert both["source_diff"] in text


def test_diff_of_two_plans_of_a_group_names_their_cluster_schedules(cli):
    asked = ["inspect", "--hardware", "h100x8", "--problem", "16384x128", "-s", "ring_owner"]
    text = cli(*asked, "--diff", "schedule=ring_travel").stdout
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["schedule"] == ["schedule", "ring_owner", "ring_travel"]
    assert rows["on a rank"][3:] == ["recompute", "spill"] and "ranks" not in rows


def test_equal_plans_have_no_difference(cli):
    assert "the plans are the same" in cli("inspect", *SMALL, "--diff", "budget=64MiB").stdout
    chosen = choose_plan(request_of(QUESTION))
    assert difference_table(chosen, chosen).rows == ()
    assert source_diff(("a", "x\n"), ("b", "x\n")) == ""


def test_of_two_views_every_rank_has_both(cli, cli_json):
    """A call refuses an odd number of rows, so no rank is planned with one."""
    views = ["--loss", "nt_xent", "--hardware"]
    for asked, rows in (("65544x256", 8194), ("6x256", 2), ("65536x256", 8192)):
        problem = cli_json("plan", *views, "h100x8", "--problem", asked)["problem"]
        assert (problem["M"], problem["N"]) == (rows, rows)
    for machine, odd in (("h100x8", "7x256"), ("xeon-amx-2c", "65537x256")):
        refused = cli("plan", *views, machine, "--problem", odd)
        rows = int(odd.partition("x")[0])
        assert refused.exit_code == 2
        said = " ".join(re.sub("[│╭╮╰╯─]", " ", refused.output).split())
        assert f"number is even; got M={rows}. Give {rows + 1}" in said
    machine = ["xeon-amx-2c", "--problem", "1002x64"]
    of_ranks = cli_json("plan", *views, *machine, "--speeds", "3,1,1")["rows_of_ranks"]
    assert sum(of_ranks) == 1002 and not any(n % 2 for n in of_ranks)
    tight = [*views, "xeon-amx-2c", "--problem", "100x64", "--max-batch", "--budget"]
    assert not any(cli_json("plan", *tight, f"{n}KiB")["max_batch"] % 2 for n in range(900, 905))


def test_what_a_plan_says_of_others_is_said_of_options(cli, cli_json):
    """As errors do, so that what would have helped can be pasted."""
    asked = ["plan", "--hardware", "a800-4x8", "--problem", "16777216x1024", "--budget", "1GiB"]
    report = cli(*asked).stdout
    assert "memory_budget=" not in report
    reasons = dict(cli_json(*asked)["cluster"]["rejected"])
    (least,) = re.findall(r"memory_budget=(\d+)", reasons["ring_owner"])
    (line,) = [of for of in report.splitlines() if "not ring_owner" in of]
    assert f"Give at least --budget {least}," in line
