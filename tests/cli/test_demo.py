"""The whole demonstration at toy size, with a stand-in for the compiled loss."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from cl_compiler.cli.demo import command, sources
from cl_compiler.cli.demo.arms import PlannedLoss, dense_loss, measure_bytes
from cl_compiler.cli.demo.command import INTERRUPTED, run_demo
from cl_compiler.cli.demo.settings import QUICK, DemoSettings
from cl_compiler.cli.demo.training import learning_rate
from cl_compiler.errors import ArgumentError

# A dependency of a dependency: 350 pairs, harvested in a second.
ROOTS = tuple(root for root in sources.installed_roots(("mpmath",)) if root.package == "mpmath")


class Clock:
    """Training's clock: every look at it takes a millisecond, however busy the machine is."""

    def __init__(self) -> None:
        self.looks = 0

    def perf_counter(self) -> float:
        self.looks += 1
        return self.looks / 1000


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_compiler.cli.demo.training.time", Clock())


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that keeps the pairs, for tests that are not about the harvest."""
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture
def drawn() -> None:
    """A test that asks for this gets its figures drawn, which takes longer than the rest."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("cl_compiler.cli.demo.figures._svg", lambda figure: "<svg/>")


def settings(out: Path) -> DemoSettings:
    return replace(
        QUICK,
        out=out,
        batch=64,
        budget_bytes=40_000,
        dim=16,
        max_files=None,
        seconds=0.2,
    )


def planned(function: Callable[[Tensor, Tensor, Tensor], Tensor] = dense_loss) -> Any:
    """A stand-in: the dense loss, which promises what it needs."""

    def plan(batch: int, dim: int, budget_bytes: int) -> PlannedLoss:
        bytes_ = measure_bytes(dense_loss, batch, dim, "meta")
        return PlannedLoss(function, bytes_, "a plan with <angles> & ampersands", "/some/file.py")

    return plan


def run(out: Path, cache: Path, plan: Any, **changes: Any) -> tuple[int, str]:
    file = io.StringIO()
    code = run_demo(
        replace(settings(out), **changes),
        console=Console(file=file, width=80),
        cache_directory=cache,
        roots=ROOTS,
        plan=plan,
    )
    return code, file.getvalue()


def test_a_run_writes_tables_a_page_and_numbers_that_agree(
    tmp_path: Path, kept: Path, drawn: None
) -> None:
    code, printed = run(tmp_path / "out", kept, planned())
    assert code == 0
    assert "\x1b" not in printed  # a pipe gets no escape sequences
    assert (
        max(
            len(line)
            for line in printed.splitlines()
            if "%" in line and line[:4] in ("comp", "PyTo", "same", "    ")
        )
        <= 80
    )
    assert "…" not in printed

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["ended"] == "complete"
    assert {(run["arm"], run["rate"]) for run in results["runs"]} == {
        (arm["name"], learning_rate(multiple, arm["batch"]))
        for arm in results["arms"]
        for multiple in QUICK.multiples
    }
    assert sorted(run["arm"] for run in results["runs"] if run["is_chosen"]) == [
        "compiled",
        "dense",
    ]
    assert all(run["is_complete"] for run in results["runs"])
    assert 0 < results["untrained"]["recall_at_10"] < 1
    assert [each["what"] for each in results["comparisons"]] == ["same time", "same epochs"]
    recall = results["comparisons"][0]["compiled"]["reported"]["test"]["recall_at_10"]
    assert f"{recall:.1%}" in printed

    same = results["same_batch"]
    assert same["batch"] == 64
    assert len(same["compiled"]["losses"]) == QUICK.same_batch_steps
    # Here both losses are the dense one.
    assert same["compiled"]["losses"] == same["dense"]["losses"]
    assert same["largest_difference"] == 0
    assert f"{same['dense']['losses'][-1]:.5f}" in printed

    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{recall:.1%}" in page
    assert "a plan with &lt;angles&gt; &amp; ampersands" in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []  # loads nothing
    assert page.count("data:image/svg+xml") == 3
    assert sorted(os.listdir(tmp_path / "out")) == ["report.html", "results.json"]


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path, kept: Path) -> None:
    found = []
    for name in ("a", "b"):
        run(tmp_path / name, kept, planned())
        results = json.loads((tmp_path / name / "results.json").read_text())
        runs = [[each["train_loss"] for each in run["evaluations"]] for run in results["runs"]]
        found.append((runs, results["same_batch"]["compiled"]["losses"]))
    assert found[0] == found[1]


def test_a_second_run_reads_the_pairs_that_the_first_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "out", tmp_path / "cache", planned())
    monkeypatch.setattr("cl_compiler.cli.demo.collection.harvest", None)
    code, printed = run(tmp_path / "out", tmp_path / "cache", planned())
    assert code == 0
    assert f"kept in {tmp_path / 'cache'}" in printed


def test_an_interrupt_in_training_reports_what_was_done(tmp_path: Path, kept: Path) -> None:
    calls = 0

    def interrupting(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return dense_loss(x, y, scale)

    before = signal.getsignal(signal.SIGINT)
    code, printed = run(tmp_path / "out", kept, planned(interrupting), seconds=60)
    assert code == INTERRUPTED
    assert "Run the same command again" in printed
    assert signal.getsignal(signal.SIGINT) is before
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["ended"] == "interrupted"
    assert [run["is_complete"] for run in results["runs"]] == [False, False]
    assert "ended early (interrupted)" in (tmp_path / "out" / "report.html").read_text()


def test_an_interrupt_in_the_harvest_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cl_compiler.cli.demo.collection.os.replace", interrupted)
    code, printed = run(tmp_path / "out", tmp_path / "cache", planned())
    assert code == INTERRUPTED
    assert "Run the same command again" in printed
    assert os.listdir(tmp_path / "cache") == []
    assert not (tmp_path / "out").exists(), "made by the run, and empty"
    (tmp_path / "out").mkdir()
    assert run(tmp_path / "out", tmp_path / "cache", planned())[0] == INTERRUPTED
    assert (tmp_path / "out").is_dir(), "somebody else's"


def test_an_interrupt_before_training_leaves_what_is_known(tmp_path: Path, kept: Path) -> None:
    calls = 0

    def interrupting(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:  # after the measurements at four batches, in the second step
            os.kill(os.getpid(), signal.SIGINT)
        return dense_loss(x, y, scale)

    code, printed = run(tmp_path / "out", kept, planned(interrupting))
    assert code == INTERRUPTED
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["same_batch"] is None
    assert results["runs"] == []
    assert results["comparisons"] == []
    assert "fits" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert "there is nothing to compare" in page


def test_however_little_time_every_run_takes_a_step(tmp_path: Path, kept: Path) -> None:
    code, _ = run(tmp_path / "out", kept, planned(), seconds=1e-6)
    assert code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [[each["steps"] for each in run["evaluations"]] for run in results["runs"]] == [[1]] * 4


def test_a_machine_without_the_memory_leaves_the_dense_loss_out(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cl_compiler.cli.demo.experiment.available_bytes", lambda: 50_000)
    code, printed = run(tmp_path / "out", kept, planned())
    assert code == 0
    assert "The losses were not run at the same batch" in printed
    assert "48.8 KiB" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["same_batch"] is None
    assert results["comparisons"]


def test_a_loss_beyond_its_budget_is_said_to_be(tmp_path: Path, kept: Path) -> None:
    _, printed = run(tmp_path / "out", kept, planned(), batch=128)
    assert "The compiled loss was measured to exceed the budget" in printed
    assert "The dense loss was measured" not in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 100_000}, "a batch of 100,000 needs as many training pairs.*--batch"),
        ({"budget_bytes": 100}, "does not fit.*--budget"),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_remedy(
    tmp_path: Path, kept: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        run(tmp_path / "out", kept, planned(), **changes)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="--out"):
        run(tmp_path / "file" / "out", tmp_path / "cache", planned())
    assert not (tmp_path / "cache").exists()


def test_the_command_line_reaches_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer
    from typer.testing import CliRunner

    asked: list[DemoSettings] = []

    def record(chosen: DemoSettings) -> int:
        asked.append(chosen)
        return INTERRUPTED

    monkeypatch.setattr(command, "run_demo", record)
    app = typer.Typer()
    app.command()(command.demo)
    arguments = ["--out", "o", "--batch", "4096", "--budget", "32MiB", "--dim", "32"]
    result = CliRunner().invoke(app, [*arguments, "--seconds", "7", "--seed", "5"])
    assert result.exit_code == INTERRUPTED
    expected = DemoSettings(Path("o"), 4096, 32 << 20, 7.0, 5, 32)
    assert asked == [expected]
    CliRunner().invoke(app, ["--quick", "--batch", "64"])
    assert asked[1] == replace(QUICK, out=Path("cl-compiler-demo"), batch=64)


def test_the_command_starts_without_pytorch() -> None:
    import subprocess
    import sys

    probe = "import sys, cl_compiler.cli.demo.command as c; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert found.stdout.strip() == "False", found.stderr
