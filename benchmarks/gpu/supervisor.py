"""Runs workers until nothing is left or time is up; neither a crash nor a hang ends a run.

A kernel that reads out of bounds breaks its process's context for good, and one that waits for a
lock can wait for ever.  So a process of its own measures, leaves a note of what it is about to do,
and is replaced when it dies or stands still; the provider in the note gets the blame.  This process
imports neither PyTorch nor anything that touches the device.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.journal import Journal, read_note
from benchmarks.record import ROOT, slug_of

__all__ = ["INTERRUPTED", "supervise", "unpacked"]

DONE, REFUSED, BROKEN, STOPPED = 0, 2, 3, 4  # as in worker.py, which imports PyTorch
INTERRUPTED = "interrupted"
POLL_S = 0.1
GRACE_S = 10.0
"""How long a worker may go on beyond the budget before it is ended."""
LOADING_S = 60.0
"""What a worker is given at least: it imports PyTorch before it can write anything."""
MOST_UNEXPLAINED = 2
"""Deaths of workers outside any provider's turn before the run is given up."""


def supervise(options: Namespace) -> tuple[Path, str]:
    """Measure everything that was asked for.

    Returns:
        The results file, and "" or why the run ended early.
    """
    started = time.time()
    run = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}-{os.getpid()}"
    options.out = options.out or _default_path(options)
    options.deadline = started + options.budget_seconds
    try:
        why = _until_done(options, run)
    except KeyboardInterrupt:
        why = INTERRUPTED
        options.out.with_suffix(".now").unlink(missing_ok=True)
    journal = Journal(options.out, run)
    if run in journal.content["runs"]:
        journal.end_run(seconds=time.time() - started, ended_early=why)
    return options.out, why


def _until_done(options: Namespace, run: str) -> str:
    """One worker after the other; "" or why there is no further one."""
    unexplained = 0
    with unpacked(options.wheels) as search_path:
        while True:
            code, why = _one_worker(options, run, search_path)
            if code == STOPPED:
                return "the time budget is spent"
            if code == DONE or why:
                return why
            if code == BROKEN or _blame(options, run, _death(code)):
                continue
            unexplained += 1
            if unexplained > MOST_UNEXPLAINED:
                return f"workers die before they measure anything: {_death(code)}"


def _one_worker(options: Namespace, run: str, search_path: str) -> tuple[int, str]:
    """(how a worker ended, why the run ends with it if it does)."""
    environment = dict(os.environ)
    paths = [search_path, str(ROOT.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    options.out.with_suffix(".now").unlink(missing_ok=True)
    worker = subprocess.Popen(_command(options, run), env=environment)
    latest = max(options.deadline + GRACE_S, time.time() + LOADING_S)
    try:
        while worker.poll() is None:
            time.sleep(POLL_S)
            if time.time() > latest:
                _end(worker)
                _blame(options, run, "ended: the time budget was spent")
                return STOPPED, ""
            note = read_note(options.out.with_suffix(".now"))
            if note and time.time() - note["since"] > options.provider_seconds:
                _end(worker)
                text = f"TimeoutError: no result within {options.provider_seconds:g} s"
                _blame(options, run, text)
                return BROKEN, ""
    except BaseException:
        _end(worker)
        raise
    return worker.returncode, "refused, see above" if worker.returncode == REFUSED else ""


def _command(options: Namespace, run: str) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", run]
    command += ["--deadline", repr(options.deadline), "--only", *options.only]
    command += ["--losses", *options.losses]
    for name in ("out", "resume", "device", "commit"):
        value = getattr(options, name)
        if value and not (name == "out" and options.resume):
            command += [f"--{name}", str(value)]
    if options.providers is not None:
        command += ["--providers", *options.providers]
    return command + (["--quick"] if options.quick else [])


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait()


def _blame(options: Namespace, run: str, error: str) -> bool:
    """Write down whose turn it was when a worker ended; whether that is known."""
    note = read_note(options.out.with_suffix(".now"))
    if note is None or note["run"] != run:
        return False
    print(f"  {note['provider']}: {error}", file=sys.stderr, flush=True)
    Journal(options.out, run).blame(note, error)
    return True


def _death(code: int) -> str:
    if code < 0:
        return f"crashed: the process got {signal.Signals(-code).name}"
    return f"crashed: the process ended with {code}"


def _default_path(options: Namespace) -> Path:
    name = "" if options.device == "cpu" else _gpu_name()
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    return ROOT / "results" / f"{slug_of(name) if name else 'dry-run'}-{today}.json"


def _gpu_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0]


@contextmanager
def unpacked(wheels: Path | None) -> Iterator[str]:
    """A folder to import the peers from: their wheels unpacked, as they are pure Python.

    Triton reads its kernels' source from files, so they cannot stay in the archives.
    """
    if wheels is None:
        yield ""
        return
    with TemporaryDirectory(prefix="peers-") as folder:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        yield folder
