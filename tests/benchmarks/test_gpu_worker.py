"""The worker's own rules, in process: who is blamed, when it stops, what it does not try again."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import worker
from benchmarks.gpu.cases import Ceiling, Contest
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.options import parse
from benchmarks.gpu.worker import ContextLost, TimeUp, _Bench
from cl_compiler.cli.results import read_results

CPU = torch.device("cpu")
COPY = Ceiling("copy", M=1 << 12)
CLIP = Contest("speed", "clip", 64, 64, 16, ("dense", "broken:raise", "chunked"), turns=2)


@pytest.fixture
def journal(tmp_path) -> Journal:
    found = Journal(tmp_path / "r.json", "run")
    found.begin_run({"device": {"name": "here"}})
    return found


@pytest.fixture
def bench(journal) -> _Bench:
    return _Bench(journal, CPU, time.time() + 600)


def rows(journal: Journal, key: str) -> dict:
    return Journal(journal.path, "run").entry(key)["rows"]


def test_a_limit_is_measured(bench, journal):
    bench.run(COPY)
    row = rows(journal, COPY.key)["library"]
    assert row["error"] == "" and row["rate"] == pytest.approx(2 * (1 << 12) / row["median_s"])
    assert journal.entry(COPY.key)["done"]


def test_a_limit_that_took_a_process_down_is_not_tried_again(bench, journal, monkeypatch):
    failed = {"library": {"error": "crashed", "fatal": True}}
    journal.write({"key": COPY.key, "section": "ceilings", "case": {}, "rows": failed,
                   "done": False})  # fmt: skip
    monkeypatch.setattr(worker, "measure_ceiling", lambda *_: pytest.fail("tried again"))
    bench.run(COPY)
    assert rows(journal, COPY.key) == failed and journal.entry(COPY.key)["done"]


def test_a_lost_context_ends_the_process_and_names_who_lost_it(bench, journal, monkeypatch):
    monkeypatch.setattr(worker, "is_alive", lambda device: False)
    with pytest.raises(ContextLost):
        bench.run(CLIP)
    found = rows(journal, CLIP.key)
    assert found["broken:raise"] == {"error": "ValueError: failed on purpose", "fatal": True}
    assert found["dense"]["error"] == "" and "chunked" not in found
    assert not journal.entry(CLIP.key)["done"]
    monkeypatch.undo()
    _Bench(Journal(journal.path, "run"), CPU, time.time() + 600).run(CLIP)  # the next process
    found = rows(journal, CLIP.key)
    assert list(found) == ["dense", "broken:raise", "chunked"]
    assert found["broken:raise"]["fatal"] and found["chunked"]["median_s"] > 0


def test_where_nobody_takes_turns_finished_rows_stay(bench, journal, monkeypatch):
    case = replace(CLIP, section="correctness")
    monkeypatch.setattr(worker, "is_alive", lambda device: False)
    with pytest.raises(ContextLost):
        bench.run(case)
    before, asked, make = rows(journal, case.key)["dense"], [], worker.prepare
    monkeypatch.undo()
    monkeypatch.setattr(
        worker, "prepare", lambda name, *more: asked.append(name) or make(name, *more)
    )
    _Bench(Journal(journal.path, "run"), CPU, time.time() + 600).run(case)
    after = rows(journal, case.key)
    assert asked == ["chunked"] and list(after) == list(case.providers)
    assert after["dense"] == before and after["chunked"]["error"] == ""


def test_a_resumed_case_is_done_when_everybody_asked_for_has_a_row(journal, monkeypatch):
    def entry(**rows: str) -> None:
        case = {"providers": list(rows)}
        found = {name: {"error": error} for name, error in rows.items()}
        journal.write({"key": CLIP.key, "case": case, "rows": found, "done": True})

    def left(*names: str) -> list[tuple[str, ...]]:
        later = Journal(journal.path, "later", resume=True)
        return [i.providers for i in worker._todo([replace(CLIP, providers=names)], later)]

    entry(dense="", chunked="ValueError: no")
    assert left("dense") == left("dense", "chunked") == []
    assert left("open_clip", "dense") == [("open_clip", "dense", "chunked")]  # they take turns
    entry(memeff="skipped: memeff cannot be imported: No module named 'memeff'")
    monkeypatch.setattr(worker, "is_importable", lambda family: False)
    assert left("memeff") == []
    monkeypatch.setattr(worker, "is_importable", lambda family: family == "memeff")
    assert left("memeff") == [("memeff",)]


def test_a_resumed_run_measures_its_own_yardsticks(bench, journal):
    """Fractions are of the same run's products; what other runs' are fractions of stays."""
    product = Ceiling("gemm", "bfloat16", "square", 64, 64, 64)
    bench.run(product)
    bench.run(COPY)
    later = Journal(journal.path, "later", resume=True)
    assert worker._todo([product, COPY], later) == []
    assert worker._todo([product, COPY, CLIP], later) == [product, CLIP]
    later.begin_run({"device": {"name": "here"}})
    _Bench(later, CPU, time.time() + 600).run(product)
    assert worker._todo([product, COPY, CLIP], later) == [CLIP]
    found = [(c["key"], c["run"]) for c in Journal(journal.path, "").content["cases"]]
    assert found == [(product.key, "run"), (COPY.key, "run"), (product.key, "later")]


def test_after_two_strikes_a_provider_is_left_out(bench, journal):
    for key in ("a", "b"):
        journal.write({"key": key, "rows": {"chunked": {"error": "crashed", "fatal": True}},
                       "done": True})  # fmt: skip
    bench.run(CLIP)
    found = rows(journal, CLIP.key)
    assert found["chunked"] == {"error": "skipped: it took its process down before"}
    assert found["dense"]["median_s"] > 0


def test_an_error_is_a_line_in_its_row_and_in_full_beside_the_results(bench, journal):
    bench.run(CLIP)
    errors = journal.path.with_suffix(".errors.txt").read_text()
    assert errors.startswith(f"==== run {CLIP.key}: broken:raise\nTraceback")
    assert errors.rstrip().endswith("ValueError: failed on purpose") and "in _break" in errors
    assert errors.count("====") == 1
    assert rows(journal, CLIP.key)["broken:raise"]["error"] == "ValueError: failed on purpose"


def test_what_is_skipped_is_no_error_to_look_into(bench, journal):
    bench.run(replace(CLIP, providers=("memeff",)))
    assert not journal.path.with_suffix(".errors.txt").exists()


def test_a_plan_s_row_says_whose_templates_ran(bench, journal):
    bench.run(replace(CLIP, providers=("ours:spill",)))
    plan = rows(journal, CLIP.key)["ours:spill"]["plan"]
    assert (plan["schedule"], plan["template"]) == ("spill", "torch")
    ((line,),) = (results.lines for results in read_results(journal.path))
    assert line.note == "spill, torch"


def test_time_is_up_between_providers_and_what_exists_is_kept(bench, journal, monkeypatch):
    warmed = worker._warmed

    def slow(entrant, device):
        bench.deadline = 0.0
        return warmed(entrant, device)

    monkeypatch.setattr(worker, "_warmed", slow)
    with pytest.raises(TimeUp):
        bench.run(CLIP)
    assert rows(journal, CLIP.key)["dense"]["live_bytes"] > 0
    assert not journal.entry(CLIP.key)["done"] and not journal.note_path.exists()


def test_a_loss_that_is_not_finite_is_an_error(bench, journal, monkeypatch):
    leaves = worker.inputs_of(CLIP, CPU, 1)
    leaves["x"].detach()[3] = torch.nan
    monkeypatch.setattr(worker, "inputs_of", lambda *_: leaves)
    bench.run(CLIP)
    assert rows(journal, CLIP.key)["dense"]["error"] == "ArithmeticError: the loss is nan"


def test_turns_alternate_and_end_when_enough_is_known(bench, journal, monkeypatch):
    order = []
    times = worker.step_times

    def watched(step, device, expected_s):
        order.append(step)
        time_each = 0.01 if step is order[0] else 1.0
        return [type(times(step, device, 1.0)[0])(time_each, 0.0)]

    monkeypatch.setattr(worker, "step_times", watched)
    contest = Contest("speed", "clip", 64, 64, 16, ("dense", "chunked"), turns=10, seconds=1.0)
    bench.run(contest)
    found = rows(journal, contest.key)
    first, second = dict.fromkeys(order)
    assert order[:4] == [first, second, first, second]
    assert len(found["dense"]["seconds"]) > len(found["chunked"]["seconds"]) == 3


def test_inputs_that_do_not_fit_are_said_and_the_case_is_done(bench, journal, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.")

    monkeypatch.setattr(worker, "inputs_of", full)
    bench.run(CLIP)
    assert rows(journal, CLIP.key) == {
        "inputs": {"error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 64.00 GiB."}
    }
    assert journal.entry(CLIP.key)["done"]


def test_every_run_draws_its_own_data(tmp_path):
    seeds = set()
    for run in ("one", "two"):
        journal = Journal(tmp_path / f"{run}.json", run)
        seeds.add(_Bench(journal, CPU, 0.0)._entry(CLIP)["case"]["seed"])
    assert len(seeds) == 2


def test_nothing_is_timed_in_a_process_that_a_profiler_has_seen(tmp_path, monkeypatch):
    """On a GPU; here a stand-in for one whose two items are a profile and a limit."""
    ran = []
    items = [Contest("kernels", "clip", 64, 64, 16, ("dense",)), COPY]
    options = parse(["--device", "cpu", "--out", str(tmp_path / "r.json"), "--worker", "run",
                     "--deadline", str(time.time() + 600)])  # fmt: skip

    def profiled(bench, item):
        ran.append(item)
        bench.is_profiled = bench.is_profiled or item.section == "kernels"
        rows = {"dense": {"error": ""}}
        bench.journal.write({"key": item.key, "rows": rows, "case": {"providers": ["dense"]},
                             "done": True})  # fmt: skip

    monkeypatch.setattr(worker, "items_of", lambda **_: items)
    monkeypatch.setattr(worker._Bench, "run", profiled)
    threads = torch.get_num_threads()
    try:
        assert worker.work(options) == worker.BROKEN and ran == items[:1]
        assert worker.work(options) == worker.DONE and ran == items
    finally:
        torch.set_num_threads(threads)
