"""The process that measures.  It may die of what it measures; the supervisor then starts another.

Providers of one case are warmed up one after the other and then take turns, so that a slow minute
slows all of them.
"""

from __future__ import annotations

import sys
import time
import traceback
import zlib
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo  # compile_loss imports it later, which would count as a first call
from torch import Tensor

from benchmarks.gpu.cases import Ceiling, Contest, Item, items_of
from benchmarks.gpu.ceilings import TURNS, measure_ceiling
from benchmarks.gpu.devices import (
    Times,
    clocks,
    describe_device,
    device_of,
    is_alive,
    kernel_times,
    memory_of,
    release,
    step_times,
    synchronize,
)
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.options import asked
from benchmarks.gpu.oracle import errors_of, truth_of
from benchmarks.gpu.peers import MISSING, is_importable, peer_versions
from benchmarks.gpu.providers import DESCRIPTIONS, Entrant, inputs_of, prepare
from benchmarks.measure import plan_entry
from benchmarks.providers import Skipped
from benchmarks.record import environment
from cl_compiler.runtime.measure import describe

__all__ = ["BROKEN", "DONE", "REFUSED", "STOPPED", "work"]

DONE, REFUSED, BROKEN, STOPPED = 0, 2, 3, 4
"""How a worker ends: nothing is left; what was asked for cannot be; this process is of no more use
and the next one goes on; time is up."""
ENOUGH_TURNS = 3
MOST_KERNELS = 16
SAVE_EVERY_S = 2.0
"""Between turns: a large file takes longer to write than a turn on a GPU takes."""
MOST_STRIKES = 2
"""A crash or a hang costs a new process, or the whole time that a step may take."""

Row = dict[str, Any]


class TimeUp(Exception):
    """The budget is spent."""


class ContextLost(Exception):
    """The device no longer answers in this process."""


def work(options: Namespace) -> int:
    """Measure what is left to measure; returns how it ended."""
    if not options.quick:
        _allow_recompiling()
    journal = Journal(Path(options.out), options.worker, resume=options.resume is not None)
    try:
        device = device_of(options.device)
        if device.type == "cpu":
            torch.set_num_threads(1)  # a dry run is no measurement, and should bother nobody
        journal.begin_run(_described(options, device))
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    bench = _Bench(journal, device, options.deadline)
    ending = DONE
    try:
        for item in _todo(items_of(**asked(options)), journal):
            if bench.is_profiled and item.section != "kernels":
                return BROKEN
            bench.run(item)
    except TimeUp:
        ending = STOPPED
    except ContextLost:
        return BROKEN
    journal.end_run(clocks_after=clocks(device), is_complete=ending == DONE)
    return ending


def _todo(items: Sequence[Item], journal: Journal) -> list[Item]:
    """What is left, and where contests are, the products whose fractions they will be."""
    left = [item for item in items if not _is_done(item, journal)]
    if any(item.section == "speed" for item in left):
        left = [i for i in items if i in left or (isinstance(i, Ceiling) and i.is_yardstick
                                                  and not journal.is_own(i.key))]  # fmt: skip
    return [_with_earlier(item, journal) for item in left]


def _is_done(item: Item, journal: Journal) -> bool:
    """Whether everybody who is asked for has a row, and nobody's package has come since."""
    entry = journal.entry(item.key)
    if entry is None or not entry["done"]:
        return False
    rows = entry["rows"]
    if isinstance(item, Ceiling) or "inputs" in rows:
        return True
    return all(
        name in rows
        and not (MISSING in rows[name]["error"] and is_importable(name.partition(":")[0]))
        for name in item.providers
    )


def _with_earlier(item: Item, journal: Journal) -> Item:
    """A case with those, too, who had a row before: they take turns with whoever comes."""
    entry = journal.entry(item.key)
    if entry is None or isinstance(item, Ceiling):
        return item
    before = entry["case"]["providers"] if journal.is_own(item.key) else entry["rows"]
    names = dict.fromkeys((*item.providers, *(n for n in before if n != "inputs")))
    return replace(item, providers=tuple(names))


def _described(options: Namespace, device: torch.device) -> dict[str, Any]:
    about = environment()
    about["versions"] |= peer_versions()
    about["commit"] = about["commit"] or options.commit
    return {
        **about,
        "device": describe_device(device),
        "clocks_before": clocks(device),
        "is_quick": options.quick,
        "providers": DESCRIPTIONS,
    }


def _allow_recompiling() -> None:
    """One function is compiled for many sizes here; beyond its limit PyTorch would go eager."""
    config: Any = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, 64)


class _Bench:
    """Runs one item after the other and writes each result as soon as it exists."""

    def __init__(self, journal: Journal, device: torch.device, deadline: float) -> None:
        self.journal, self.device, self.deadline = journal, device, deadline
        self.is_profiled = False
        """A GPU's profiler may go on costing launches what it cost them while it looked."""

    def run(self, item: Item) -> None:
        """Measure one item.

        Raises:
            TimeUp, ContextLost: what exists is written.
        """
        self.check_time()
        print(f"{item.key}", file=sys.stderr, flush=True)
        entry = self._entry(item)
        started = time.perf_counter()
        self.journal.write(entry)
        if isinstance(item, Ceiling):
            turns = TURNS if self.device.type == "cuda" else 2
            if "library" not in entry["rows"]:  # it took an earlier process down
                self.attempt(entry, "library", lambda: measure_ceiling(item, self.device, turns))
        else:
            self._contest(item, entry)
            names = [n for n in ("inputs", *item.providers) if n in entry["rows"]]
            entry["rows"] = {name: entry["rows"][name] for name in names}
        entry |= {"done": True, "seconds": time.perf_counter() - started}
        entry["clocks"] = clocks(self.device)
        self.journal.write(entry)
        release(self.device)

    def _entry(self, item: Item) -> dict[str, Any]:
        alone = item.section in ("correctness", "kernels")  # nobody takes turns: rows stay
        rows = self.journal.kept(item.key, finished=alone)
        case = {**asdict(item), "group": item.section}
        if isinstance(item, Contest):
            seed = zlib.crc32(f"{self.journal.run} {item.key}".encode())
            case |= {"flops": item.flops, "target": item.target, "seed": seed}
        return {"key": item.key, "section": item.section, "case": case, "rows": rows,
                "done": False}  # fmt: skip

    def check_time(self) -> None:
        if time.time() > self.deadline:
            raise TimeUp

    def attempt(self, entry: dict[str, Any], provider: str, call: Callable[[], Row]) -> bool:
        """Add what ``call`` returns to a provider's row, or its error; returns whether it worked.

        Raises:
            ContextLost: the device is gone, which the row says too.
        """
        row = entry["rows"].setdefault(provider, {"error": ""})
        with self.journal.doing(entry["key"], provider):
            error, trace = _outcome(call, row, self.device)
            if error:
                row["error"] = error
                if trace:
                    self.journal.explain(entry["key"], provider, trace)
                release(self.device)
                print(f"  {provider}: {error}", file=sys.stderr, flush=True)
                if not is_alive(self.device):
                    row["fatal"] = True
                    self.journal.write(entry)
                    raise ContextLost
        return not error

    def _contest(self, contest: Contest, entry: dict[str, Any]) -> None:
        found: dict[str, Any] = {}

        def make() -> Row:
            found["leaves"] = inputs_of(contest, self.device, entry["case"]["seed"])
            if contest.section == "correctness":
                found["truth"] = truth_of(contest.loss, found["leaves"])
            return {}

        if "inputs" in entry["rows"] or not self.attempt(entry, "inputs", make):
            return
        del entry["rows"]["inputs"]
        match contest.section:
            case "correctness":
                self._correctness(contest, entry, **found)
            case "kernels":
                self._kernels(contest, entry, found["leaves"])
            case _:
                self._speed(contest, entry, found["leaves"])

    def _open(self, contest: Contest, entry: Mapping[str, Any]) -> list[str]:
        """Providers still to be measured; one that keeps taking the process down is not."""
        for name in contest.providers:
            if name not in entry["rows"] and self.journal.strikes(name) >= MOST_STRIKES:
                text = "skipped: it took its process down before"
                entry["rows"][name] = {"error": text}
        return [name for name in contest.providers if name not in entry["rows"]]

    def _kernels(self, contest: Contest, entry: dict[str, Any], leaves: dict[str, Tensor]) -> None:
        """Where a step's time goes."""
        self.is_profiled = self.device.type == "cuda"
        for name in self._open(contest, entry):
            self.check_time()

            def look(name: str = name) -> Row:
                entrant = prepare(name, contest, leaves)
                found = kernel_times(entrant.step, self.device)[:MOST_KERNELS]
                return {"kernels": found} | _plan_of(entrant)

            self.attempt(entry, name, look)
            self.journal.write(entry)

    # ---- correctness ------------------------------------------------------------------------

    def _correctness(
        self, contest: Contest, entry: dict[str, Any], leaves: dict[str, Tensor], truth: Any
    ) -> None:
        for name in self._open(contest, entry):
            self.check_time()

            def judge(name: str = name) -> Row:
                entrant = prepare(name, contest, leaves)
                value = entrant.step()
                synchronize(self.device)
                errors = errors_of(truth, value, leaves)
                first = [value, *(t.grad for t in leaves.values())]
                second = [entrant.step(), *(t.grad for t in leaves.values())]
                return {"errors": errors, "repeats": _equal(first, second)} | _plan_of(entrant)

            self.attempt(entry, name, judge)
            for leaf in leaves.values():
                leaf.grad = None
            self.journal.write(entry)

    # ---- speed ------------------------------------------------------------------------------

    def _speed(self, contest: Contest, entry: dict[str, Any], leaves: dict[str, Tensor]) -> None:
        entrants: dict[str, Entrant] = {}
        for name in self._open(contest, entry):
            self.check_time()

            def warm(name: str = name) -> Row:
                entrant = prepare(name, contest, leaves)
                row = _plan_of(entrant) | _warmed(entrant, self.device)
                entrants[name] = entrant
                return row

            self.attempt(entry, name, warm)
            for leaf in leaves.values():
                leaf.grad = None
            self.journal.write(entry)
        times: dict[str, list[Times]] = {name: [] for name in entrants}
        saved = time.perf_counter()
        for turn in range(contest.turns):
            for name in list(times):
                self.check_time()
                self._turn(contest, entry, entrants[name], name, times, turn)
            if time.perf_counter() - saved > SAVE_EVERY_S:
                self.journal.write(entry)
                saved = time.perf_counter()

    def _turn(
        self,
        contest: Contest,
        entry: dict[str, Any],
        entrant: Entrant,
        name: str,
        times: dict[str, list[Times]],
        turn: int,
    ) -> None:
        row, spent = entry["rows"][name], sum(t.forward_s + t.backward_s for t in times[name])
        if (turn >= ENOUGH_TURNS and spent > contest.seconds) or spent > 4 * contest.seconds:
            return

        def measure() -> Row:
            times[name] += step_times(entrant.step, self.device, row["warm_s"])
            return _timed(times[name])

        if not self.attempt(entry, name, measure):
            del times[name]


def _outcome(call: Callable[[], Row], row: Row, device: torch.device) -> tuple[str, str]:
    """Update a row with what a call returns; ("", "") or what it raised, in a line and in full.

    The error's frames, which hold on to tensors, end with this function.
    """
    try:
        row |= call()
        synchronize(device)
    except Skipped as error:
        return f"skipped: {error}", ""
    except Exception as error:
        if str(error).startswith("skipped: "):
            return str(error), ""
        return describe(error), traceback.format_exc()
    return "", ""


def _warmed(entrant: Entrant, device: torch.device) -> Row:
    """The first call, which compiles, and a second one for memory and to know how long it takes."""
    start = time.perf_counter()
    value = entrant.step()
    synchronize(device)
    first = time.perf_counter() - start
    if not bool(torch.isfinite(value)):
        raise ArithmeticError(f"the loss is {float(value)}")
    start = time.perf_counter()
    usage = memory_of(entrant.step, device)
    synchronize(device)
    return {
        "first_s": first,
        "warm_s": time.perf_counter() - start,
        "live_bytes": usage.peak_bytes,
        "forward_bytes": usage.forward_bytes,
        "kept_bytes": usage.kept_bytes,
    }


def _timed(times: list[Times]) -> Row:
    totals = [t.forward_s + t.backward_s for t in times]
    return {
        "median_s": median(totals),
        "forward_s": median(t.forward_s for t in times),
        "backward_s": median(t.backward_s for t in times),
        "seconds": totals,
        "forward_seconds": [t.forward_s for t in times],
        "backward_seconds": [t.backward_s for t in times],
    }


def _equal(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    """Whether two calls gave the same bits."""
    pairs = zip(first, second, strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _plan_of(entrant: Entrant) -> Row:
    plan = entrant.plan
    return {} if plan is None else {"plan": {**plan_entry(plan), "template": plan.template}}
