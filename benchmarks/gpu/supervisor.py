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
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.journal import Journal, read_note
from benchmarks.record import ROOT, load, require_writable, slug_of
from cl_compiler.errors import ArgumentError

__all__ = ["INTERRUPTED", "supervise", "unpacked"]

DONE, REFUSED, BROKEN, STOPPED = 0, 2, 3, 4  # as in worker.py, which imports PyTorch
INTERRUPTED = "interrupted"
POLL_S = 0.1
GRACE_S = 10.0
"""How long a worker may go on beyond its deadline before it is ended."""
TABLES_S = 20.0
"""What tables and figures may take of the budget."""
LOADING_S = 60.0
"""What the first worker is given at least: it imports PyTorch before it can write anything."""
MOST_UNEXPLAINED = 2
"""Deaths of workers outside any provider's turn before the run is given up."""


def supervise(options: Namespace) -> tuple[Path | None, str]:
    """Measure everything that was asked for.

    Returns:
        The results file, None if nothing was begun; and "" or why the run ended early.

    Raises:
        ArgumentError: the file cannot be gone on with or written, or a wheel cannot be read.
    """
    options.started = time.time()
    run = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}-{os.getpid()}"
    options.out = options.out or _default_path(options)
    load(options.out, of_gpu=True)
    if options.resume is None and options.out.exists():
        raise ArgumentError(
            f"--out {options.out} exists: --resume {options.out} goes on with it, another name "
            "begins a file"
        )
    require_writable(options.out)
    options.deadline = _deadline(options.started, options.budget_seconds)
    try:
        why = _until_done(options, run)
    except KeyboardInterrupt:
        why = INTERRUPTED
        options.out.with_suffix(".now").unlink(missing_ok=True)
    journal = Journal(options.out, run)
    if run not in journal.content["runs"]:
        return None, why
    journal.end_run(seconds=time.time() - options.started, ended_early=why)
    return options.out, why


def _deadline(started: float, budget_s: float) -> float:
    """When workers stop, so that the whole run ends within its budget."""
    return started + max(budget_s - GRACE_S - TABLES_S, budget_s / 2)


def _until_done(options: Namespace, run: str) -> str:
    """One worker after the other; "" or why there is no further one."""
    unexplained = 0
    with unpacked(options.wheels) as search_path:
        while True:
            code, why = _one_worker(options, run, search_path)
            if code == DONE or why:
                return why
            if code not in (STOPPED, BROKEN) and not _blame(options, run, _death(code)):
                unexplained += 1
                if unexplained > MOST_UNEXPLAINED:
                    return f"workers die before they measure anything: {_death(code)}"
            if code == STOPPED or time.time() > options.deadline:
                return "the time budget is spent"


def _one_worker(options: Namespace, run: str, search_path: str) -> tuple[int, str]:
    """(how a worker ended, why the run ends with it if it does)."""
    environment = dict(os.environ)
    paths = [search_path, str(ROOT.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    options.out.with_suffix(".now").unlink(missing_ok=True)
    worker = subprocess.Popen(_command(options, run), env=environment)
    latest = max(options.deadline + GRACE_S, options.started + LOADING_S)
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
    """A file that is not there yet: only ``--resume`` goes on with one."""
    device = (slug_of(_gpu_name()) or "gpu") if options.device == "cuda" else ""
    parts = ("dry-run" if options.quick else "", device, f"{datetime.now(UTC):%Y-%m-%d}")
    name = "-".join(part for part in parts if part)
    tails = chain([""], (f"-{number}" for number in count(2)))
    found = (ROOT / "results" / f"{name}{tail}.json" for tail in tails)
    return next(path for path in found if not path.exists())


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

    Raises:
        ArgumentError: a wheel is damaged.
    """
    if wheels is None:
        yield ""
        return
    with TemporaryDirectory(prefix="peers-") as folder:
        for wheel in sorted(wheels.glob("*.whl")):
            try:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(folder)
            except (OSError, zipfile.BadZipFile) as error:
                raise ArgumentError(
                    f"--wheels: {wheel} cannot be unpacked ({error}); fetch it again with "
                    "benchmarks/fetch_peer_wheels.sh"
                ) from error
        yield folder
