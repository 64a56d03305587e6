"""``simulate``: every schedule on a cluster that is not here."""

from __future__ import annotations

import random
import re
from contextlib import contextmanager
from itertools import pairwise

import pytest

from cl_compiler.cli import simulate_report
from cl_compiler.cli.simulate_report import chart, first_steps, heights, legible
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.ranks import with_ranks
from cl_compiler.lang.ring import CLUSTER_SCHEDULES
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan import clock
from cl_compiler.plan.clock import GRADIENT, STATISTICS, Event
from cl_compiler.plan.cluster import choose_cluster_plan
from cl_compiler.plan.simulate import simulate
from cl_compiler.plan.types import MemoryBudget, Problem, Request
from cl_compiler.units import format_seconds, parse_bytes

DRAWN = ("compute", "send", GRADIENT, STATISTICS, "wait")

CLUSTER = ["--hardware", "a800-4x8", "--problem", "32768x256"]


def test_json_and_table_have_every_schedule(cli, cli_json):
    found = cli_json("simulate", *CLUSTER)
    assert found["ranks"] == 32
    seconds = {name: s["seconds"] for name, s in found["schedules"].items()}
    assert set(seconds) == set(CLUSTER_SCHEDULES) - {"half_ring"}
    assert found["fastest"] == min(seconds, key=seconds.get)
    text = cli("simulate", *CLUSTER).stdout
    assert "32 ranks with shards of 1024 x 1024" in text
    assert "on one rank in float32, by their formulas\n" in text
    half = cli("simulate", *CLUSTER, "--dtype", "bfloat16").stdout
    assert "in float32, by their formulas (ours above: bfloat16)\n" in half
    assert all(name in text for name in (*seconds, "Inf-CL", "bound by"))


def test_ranks_of_a_machine_and_a_chart(cli, cli_json, tmp_path):
    path = tmp_path / "chart.png"
    machine = ["--hardware", "xeon-amx-2c", "--ranks", "3", "--dtype", "float32"]
    machine += ["--problem", "3000x64"]
    page = tmp_path / "report.html"
    found = cli_json("simulate", *machine, "--gantt", str(path), "--html", str(page))
    assert found["ranks"] == 3
    text = page.read_text()
    assert text.count("data:image/png;base64,iVBOR") == len(found["schedules"]) >= 3
    assert all(word in text for word in (*found["schedules"], "Inf-CL", "not two_level"))
    assert all(f'alt="Gantt chart of {name}"' in text for name in found["schedules"])
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.parametrize(("schedule", "loss"), [("ring_travel", "clip"), ("all_gather", "clip"),
    ("half_ring", "nt_xent")])  # fmt: skip
def test_what_a_forward_sends_back_is_drawn_as_statistics(schedule, loss):
    """No gradient is on its way before the backward; a legend has each kind that is drawn, once,
    in a colour of its own, beside a title and not on it."""
    spec = with_ranks(load_hardware("xeon-amx-2c"), 4, 4)
    positives = "views" if loss == "nt_xent" else "diagonal"
    needs = frozenset({"z"} if loss == "nt_xent" else {"x", "y"})
    budget, problem = MemoryBudget(1 << 30), Problem(600, 600, 64)
    asked = Request(
        find(loss), spec, budget, problem, positives, needs, schedule=schedule, group_size=4
    )
    plan, program = choose_cluster_plan(asked, plan_sweeps(asked.loss, positives, needs))
    run = simulate(plan, program, spec, drawn_ranks=2)
    last = {what: max(e.end_s for e in run.events if e.what == what) for what in DRAWN}
    first = {what: min(e.start_s for e in run.events if e.what == what) for what in DRAWN}
    assert first["statistics"] < run.forward_s <= first["gradient"] < last["gradient"]
    figure = chart(run, "a title " * 9)
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    sent = ["gradients on their way back", "statistics on their way back"]
    assert names == ["computing", "shards and totals", *sent, "waiting"]
    assert len({patch.get_facecolor() for patch in legend.get_patches()}) == len(names)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert legend.get_window_extent().y1 < axes.xaxis.label.get_window_extent().y0


@pytest.mark.parametrize("kept", [12, None])
def test_a_chart_of_a_part_of_a_run_says_so(monkeypatch, kept):
    spec = with_ranks(load_hardware("xeon-amx-2c"), 4, 4)
    needs = frozenset({"x", "y"})
    asked = Request(
        find("clip"), spec, MemoryBudget(1 << 30), Problem(600, 600, 64), "diagonal", needs,
        schedule="ring_travel", group_size=4,
    )  # fmt: skip
    plan, program = choose_cluster_plan(asked, plan_sweeps(asked.loss, "diagonal", needs))
    if kept is not None:
        monkeypatch.setattr(clock, "EVENTS", kept)
    run = simulate(plan, program, spec, drawn_ranks=2)
    title = chart(run, "clip").axes[0].get_title(loc="left")
    if kept is None:
        assert title == "clip"
        return
    assert 2 * kept <= len(run.events) < 2 * kept + 2
    monkeypatch.setattr(simulate_report, "_FIRST", first := kept // 2)
    title = chart(run, "clip").axes[0].get_title(loc="left")
    drawn = first_steps(run)
    assert {e.rank for e in drawn} == {0, 1} and sum(not e.rank for e in drawn) == first
    part, whole = format_seconds(max(e.end_s for e in drawn)), format_seconds(run.seconds)
    assert title == f"clip\nits first steps: {part} of {whole}"


def test_what_bounds_a_step_of_small_shards_is_what_its_plan_says(cli):
    """Shards of 1,024 rows: the device waits for launches, not for products."""
    asked = ["--hardware", "a800-4x8", "--problem", "32768x768", "--dtype", "bfloat16"]
    text = cli("simulate", *asked, "--schedule", "ring_travel", "--explain").stdout
    bound, share, most = re.search(r": bound by (\w+) \((\d+%) (.+)\); hides", text).groups()
    time_of_plan = text.partition("\ntime\n")[2].partition("\n\n")[0]
    parts = dict(re.findall(r"^  (\S.*?)  .* (\d+)%$", time_of_plan, re.MULTILINE))
    assert bound == "computing" and most == "launches that the device waits for"
    del parts["exchange that is not hidden"]
    assert next(iter(parts)) == most and int(share[:-1]) >= int(parts[most])


@pytest.mark.parametrize("loss", ["nt_xent", "siglip"])
def test_other_losses(cli_json, loss):
    found = cli_json("simulate", *CLUSTER, "--loss", loss)
    assert all(s["seconds"] > 0 for s in found["schedules"].values())


def test_ranks_that_differ_get_shards_that_differ(cli, cli_json):
    """One of four is half as fast: shards in proportion take less than even ones."""
    machine = ["--hardware", "xeon-amx-2c", "--ranks", "4", "--dtype", "float32"]
    machine += ["--problem", "28000x64", "--speeds", "2,2,1,2"]
    found = cli_json("simulate", *machine)
    assert found["advised_rows"] == [8000, 8000, 4000, 8000]
    for of in found["schedules"].values():
        assert of["seconds"] == of["advised_shards_s"] < 0.85 * of["even_shards_s"]
    alike = cli_json("simulate", *machine[:-2])["schedules"]
    assert all(of["seconds"] > alike[name]["seconds"] for name, of in found["schedules"].items())
    text = cli("simulate", *machine).stdout
    assert "8000 on 3 of them, 4000 on 1 of them" in text and "step, even shards" in text
    best = found["schedules"][found["fastest"]]
    assert best["seconds"] == min(of["seconds"] for of in found["schedules"].values())
    (line,) = [x for x in text.splitlines() if x.startswith(found["fastest"])]
    for seconds in (best["seconds"], best["even_shards_s"]):
        assert format_seconds(seconds) in line


def test_bars_too_narrow_to_see_are_joined_and_keep_their_lengths():
    rng = random.Random(7)
    events, now = [], [0.0, 0.0]
    for _ in range(6000):
        rank, what = rng.randrange(2), rng.choice(["compute", "wait"])
        until = now[rank] + rng.expovariate(1e3) * (500 if rng.random() < 0.01 else 1)
        events.append(Event(rank, what, now[rank], until))
        now[rank] = until
    bars, pixel_s = legible(events), max(now) / 1200
    assert len(bars) < 4800 < len(events)  # of two kinds, at most one each in two pixels
    for rank in range(2):
        for what in ("compute", "wait"):
            length = sum(e.end_s - e.start_s for e in bars if (e.rank, e.what) == (rank, what))
            exact = sum(e.end_s - e.start_s for e in events if (e.rank, e.what) == (rank, what))
            assert length == pytest.approx(exact)
        lane = [e for e in bars if e.rank == rank]
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(lane))
    wide = [e for e in events if e.end_s - e.start_s > pixel_s]
    assert wide and set(wide) <= set(bars)


def test_bars_of_the_same_time_do_not_hide_each_other():
    rng = random.Random(11)
    bars = []
    for _ in range(300):
        start = 20 * rng.random()
        what = rng.choice(["send", "gradient", "statistics"])
        bars.append(Event(rng.randrange(3), what, start, start + rng.expovariate(1.0)))
    bars += [Event(0, "compute", t, t + 1) for t in range(20)]  # one after the other
    drawn = list(zip(bars, heights(bars), strict=True))
    for k, (one, (low, high)) in enumerate(drawn):
        assert low < high
        for other, (below, above) in drawn[:k]:
            at_once = min(one.end_s, other.end_s) - max(one.start_s, other.start_s) > 1e-9
            assert not at_once or min(high, above) - max(low, below) < 1e-9
    assert {round(high - low, 6) for e, (low, high) in drawn if e.what == "compute"} == {0.4}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--gantt x.banana", "the suffix is one of .png, .svg"),
        ("--gantt missing/x.png", "there is no such folder"),
        ("--html missing/x.html", "there is no such folder"),
        ("--html x.banana", "the suffix is one of .html"),
        ("--html folder.html", "this is a folder"),
        ("--problem 0x64", "--problem: 0x64 has a size of 0"),
        ("--hardware h100x1", "one rank: nothing is exchanged; use `cl-compiler plan`"),
        ("--ranks 1", "one rank: nothing is exchanged; use `cl-compiler plan`"),
        ("--schedule spill", "--schedule 'spill': use one of auto, ring_owner, ring_travel, "),
        ("--schedule canonical", "'canonical' is not simulated: use one of auto, ring_owner, "),
    ],
)
def test_what_could_not_be_written_or_read_is_refused_before_the_work(
    cli, options, words, tmp_path, monkeypatch
):
    (tmp_path / "folder.html").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cl_compiler.cli.simulate.simulated", None)
    result = cli("simulate", *options.split())
    assert result.exit_code == 2 and words in " ".join(result.output.replace("│", " ").split())
    assert "--M " not in result.output


@pytest.mark.parametrize("budget", ["--budget 1KiB", f"--budgets {','.join(['1KiB'] * 32)}"])
def test_nothing_fits(cli, budget):
    result = cli("simulate", *CLUSTER, *budget.split())
    assert result.exit_code == 1 and not result.stdout
    lines = [x.removeprefix("not ") for x in result.stderr.splitlines() if x.startswith("not ")]
    reasons = {
        name: why
        for x in lines
        for names, _, why in [x.partition(": ")]
        for name in names.split(", ")
    }
    assert set(reasons) == set(CLUSTER_SCHEDULES)
    assert len(set(reasons.values())) == len(lines)  # none is said twice
    assert all("KiB" in why or "MiB" in why for n, why in reasons.items() if n != "half_ring")


def test_one_schedule_of_those_that_there_are(cli, cli_json):
    every = cli_json("simulate", *CLUSTER)["schedules"]
    for name in ("ring_owner", "two_level"):
        found = cli_json("simulate", *CLUSTER, "--schedule", name)
        assert found["fastest"] == name and found["schedules"] == {name: every[name]}
        assert not found["refused"]
    result = cli("simulate", *CLUSTER, "--schedule", "half_ring")
    assert result.exit_code == 1 and not result.stdout
    assert "half_ring" in result.stderr and "not half_ring" not in result.stderr


def test_ranks_of_little_memory_get_fewer_rows(cli, cli_json):
    machine = ["--hardware", "xeon-amx-2c", "--problem", "16384x256", "--dtype", "float32"]
    budgets = ["--budgets", "64MiB,64MiB,8MiB,64MiB"]
    found = cli_json("simulate", *machine, *budgets, "--max-batch", "--schedule", "ring_owner")
    assert found["ranks"] == 4 and found["schedules"].keys() == {"ring_owner"}
    for of in found["schedules"].values():
        rows, peaks = of["advised_rows"], of["peak_bytes_of_ranks"]
        assert sum(rows) == 16384 and rows[2] < 4096 < min(rows[0], rows[1], rows[3])
        assert peaks[2] <= 8 << 20 and of["even_shards_s"] is None
        # gradients alone fill 8 MiB at 4096 rows, so even shards stop below 16384
        assert of["max_batch"] > 5 * 16384
    asked = [*machine, "--budgets", "64MiB,16MiB,64MiB", "--speeds", "2,2,1"]
    text = cli("plan", *asked).stdout
    # what is printed is asked for by all ranks, so nothing is rounded off it
    told = re.search(r"^memory_budget for all of them: (.+), with schedule", text, re.MULTILINE)[1]
    assert parse_bytes(told) == cli_json("plan", *asked)["memory_budget_bytes"]


def test_why_schedules_are_not_taken_is_said_once_for_all_of_them(cli):
    text = cli("simulate", *CLUSTER, "--dtype", "bfloat16", "--budget", "2MiB").stdout
    reasons = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("not ")]
    assert len(reasons) == len(set(reasons)) and "memory_budget" not in text
    (line,) = [x for x in text.splitlines() if x.startswith("not two_level, both_ways: ")]
    least = re.search(r"needs at least .+ on each rank: --budget (\d+)$", line)[1]
    enough = cli("simulate", *CLUSTER, "--dtype", "bfloat16", "--budget", least).stdout
    assert re.search(r"^two_level +\d+", enough, re.MULTILINE)


def test_the_largest_batch_says_where_its_inputs_are(cli, cli_json):
    """Where it is that of shards in host memory, the plan's own schedule has one of its own."""
    asked = ["plan", "--hardware", "h100x8", "--problem", "32768x512", "--budget", "1GiB"]
    text = cli(*asked, "--max-batch").stdout
    whole = int(
        re.search(r"largest batch that fits.*M = ([\d,]+)$", text, re.M)[1].replace(",", "")
    )
    name, own = re.search(r"^with this plan's schedule, (\w+): M = ([\d,]+)$", text, re.M).groups()
    rows = int(own.replace(",", ""))
    assert 32768 < rows < whole
    found = cli_json(*asked, "--max-batch", "--schedule", name)
    assert found["max_batch"] == rows and found["cluster"]["schedule"] == name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--speeds 1,2 --ranks 4", "2 numbers for 4 ranks"),
        ("--speeds 1,x", "give numbers"),
        ("--speeds 1,0", "a number above 0"),
        ("--speeds 1,inf", "a number above 0"),
        ("--budgets 1GiB,2Gig", "cannot read '2Gig'"),
        ("--budgets 1GiB,2GiB --speeds 1,2,3", "one of each for every rank"),
        ("--budgets 1GiB,1GiB --budget 1GiB", "leave out --budget"),
        ("--budgets 1GiB,1GiB --ranks 3", "2 amounts for 3 ranks"),
    ],
)
def test_what_is_no_list_of_ranks(cli, options, words):
    result = cli("simulate", "--hardware", "xeon-amx-2c", *options.split())
    assert result.exit_code == 2 and words in " ".join(result.output.replace("│", " ").split())
    if "--ranks" not in options:
        assert cli("plan", "--hardware", "xeon-amx-2c", *options.split()).exit_code == 2


def test_the_largest_batch_is_in_the_table(cli, cli_json, monkeypatch):
    options = [*CLUSTER, "--budget", "96MiB", "--max-batch"]
    found = cli_json("simulate", *options)["schedules"]
    assert all(of["max_batch"] % 32 == 0 and of["max_batch"] >= 32768 for of in found.values())
    begun: list[str] = []

    @contextmanager
    def noted(what, steps):
        waiting = iter(steps)
        yield lambda: begun.append(next(waiting))
        assert begun == steps

    monkeypatch.setattr("cl_compiler.cli.simulate.working", noted)
    assert f"{found['ring_owner']['max_batch']:,}" in cli("simulate", *options).stdout
    assert {f"{name}, the largest batch" for name in CLUSTER_SCHEDULES} < set(begun)


def test_plan_and_simulate_name_the_same_step_of_ranks_that_differ(cli, cli_json, tmp_path):
    """The plan's own time is of ranks that all have the largest shard, and is said to be."""
    path = tmp_path / "three.toml"
    machine = with_ranks(load_hardware("xeon-amx-2c"), 3, 3)
    path.write_text(machine.to_toml())
    asked = ["--hardware", str(path), "--problem", "6000x64", "--speeds", "2,2,1"]
    simulated = cli_json("simulate", *asked)
    planned = cli_json("plan", *asked)
    assert planned["step_s"] == simulated["schedules"][simulated["fastest"]]["seconds"]
    assert planned["step_s"] < planned["seconds"]
    step = format_seconds(planned["step_s"])
    said = f"step +{step} simulated of these ranks; the time is of ranks that all have 2400 rows"
    for command in (["plan"], ["simulate", "--explain"]):
        text = cli(*command, *asked).stdout
        time_of_plan = re.search(rf"^  (time .*)\n  {said}", text, re.MULTILINE)[1]
        assert format_seconds(planned["seconds"]) in time_of_plan
    even = cli("simulate", "--explain", *asked[:-2]).stdout
    assert re.search(r"^  step +\S+ \S+ simulated, message by message$", even, re.MULTILINE)
    assert "simulated" not in cli("plan", *asked[:-2]).stdout
