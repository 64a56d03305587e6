"""Real rings beside simulated ones: Gloo processes whose products are timed waits.

    python -m benchmarks.rings --out rings.json
    python -m benchmarks.rings --list lines --out rings-lines.json
    python -m benchmarks.rings --list overlap --out rings-overlap.json

The second has shards that go half of the way around, or both ways at once, the third shards that
are cut as the planner cuts them, beside products that are longer than what is sent.  Configurations
are those of ``ring_configurations``, every one of them is in the result.  Each rank has a network
namespace of its own, whose link is shaped (``links``); with ``--loopback`` they share a loopback
device, whose rate is that of the cores left.  Links are calibrated by messages of other sizes, with
all ranks sending at once as a ring does.  Two cores cannot multiply for four ranks and send at the
same time, so a rank waits for as long as its products would take.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.links import Place, shaped
from benchmarks.ring_configurations import (
    CALIBRATED_ROWS,
    CONFIGURATIONS,
    LINES,
    OVERLAP,
    RATE_BITS_PER_S,
    REAL_PRODUCTS,
    ROW_BYTES,
    WIDTH,
    Configuration,
)
from cl_compiler.codegen.ring.render import render_ring
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.ranks import with_ranks
from cl_compiler.lang.resolve import Positives
from cl_compiler.lang.ring import HALF_RING
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.clock import Clock, Links
from cl_compiler.plan.cluster import choose_cluster_plan
from cl_compiler.plan.simulate import Line, Work, run, ways_of
from cl_compiler.plan.travel import Travel
from cl_compiler.plan.types import MemoryBudget, Problem, Request
from cl_compiler.runtime.loader import load_source

LISTS = {"rings": CONFIGURATIONS, "lines": LINES, "overlap": OVERLAP}
REPEATS = 5
ATTEMPTS = 10
LEAST_R2 = 0.98
LIMIT_S = 240.0
"""Of one group of processes: calibration and its configurations."""


def shards_of(chunk: int, schedule: str = "ring_travel") -> Any:
    """The emitted file's loop over shards, and its ring; with gradients that follow."""
    spec = with_ranks(load_hardware("xeon-amx-2c"), 4, 4)
    one_set = schedule == HALF_RING
    loss = find("nt_xent" if one_set else "clip")
    positives: Positives = "views" if one_set else "paired"
    needs = frozenset({op.name for op in loss.operands} | {"logit_scale"})
    request = Request(
        loss, spec, MemoryBudget(1 << 30), Problem(chunk, chunk, WIDTH), positives, needs, "ieee",
        schedule, 0, 4,
    )  # fmt: skip
    plan, program = choose_cluster_plan(request, plan_sweeps(loss, positives, needs))
    text = render_ring(plan, program, "rings", cluster_schedule=schedule, chunk=chunk)
    return load_source(text, "rings")


# ---- one rank -----------------------------------------------------------------------------------


def together(ring: Any, act: Callable[[], object]) -> float:
    """Seconds of this rank's ``act``, which all ranks begin at the same time."""
    begin = float(ring.largest(torch.tensor([time.perf_counter()], dtype=torch.float64))) + 5e-3
    time.sleep(max(0.0, begin - time.perf_counter()))
    act()
    return time.perf_counter() - begin


def share_of(ring: Any, module: Any, c: Configuration, first: int, past: int) -> float:
    """Of two chunks' tiles, those that this rank makes: see ``_shards`` of a half ring."""
    if past == module.FAR:
        return 1.0
    start = first if first != module.FAR else past + module.TILE_M * (ring.rank >= c.ranks // 2)
    return (2 * start + c.chunk) / (2 * c.chunk * c.chunks)


def ring_seconds(
    ring: Any, module: Any, c: Configuration, work: Callable[[float], object]
) -> float:
    """Wall seconds of one pass over the ring, until the last rank is done.

    ``work``: on some share of a chunk's products.
    """
    y = torch.ones(c.chunk * c.chunks, WIDTH)
    folds = [(module.SUM, torch.zeros(len(y), WIDTH))] if c.gradients else []

    def act() -> None:
        for shard in module._shards(ring, "rows", (y,), folds):
            half = c.schedule == HALF_RING
            work(share_of(ring, module, c, *shard[:2]) if half else 1.0)

    return float(ring.largest(torch.tensor([together(ring, act)], dtype=torch.float64)))


def arrival_seconds(ring: Any, rows: int) -> np.ndarray:
    """[ranks]: until what each rank sends has arrived, all of them sending.

    The lower quartile of some: what else runs on the machine only ever adds to it.
    """
    sent, received = torch.ones(rows, WIDTH), torch.empty(rows, WIDTH)
    ranks, rank = ring.world_size, ring.rank
    found = []

    def act() -> None:
        posted = ring.exchange([sent], [received], (rank + 1) % ranks, (rank - 1) % ranks)
        posted[0].wait()
        works.extend(posted[1:])  # to wait for one twice is to wait for ever

    for _ in range(9):
        works: list[Any] = []
        arrived = ring.numbers(together(ring, act)).flatten().numpy()
        ring.wait(works)
        found.append(np.roll(arrived, -1))  # the next rank received what this one sent
    quartile: np.ndarray = np.quantile(np.array(found), 0.25, axis=0)
    return quartile


def fitted_links(ring: Any) -> tuple[Links, float]:
    """Every rank's link, and the worst fit's R².

    Raises:
        RuntimeError: messages do not take latency plus bytes over bandwidth.
    """
    sizes = np.array(CALIBRATED_ROWS) * float(ROW_BYTES)
    for _ in range(ATTEMPTS):
        arrival_seconds(ring, CALIBRATED_ROWS[0])  # connections exist
        seconds = np.array([arrival_seconds(ring, rows) for rows in CALIBRATED_ROWS])
        s_per_byte, latency_s, r2 = [], [], []
        for of_rank in seconds.T:
            slope, latency = np.polyfit(sizes, of_rank, 1, w=1 / of_rank)
            rest = of_rank - slope * sizes - latency
            s_per_byte.append(slope)
            latency_s.append(max(0.0, latency))
            r2.append(1 - float((rest**2).sum() / ((of_rank - of_rank.mean()) ** 2).sum()))
        if min(r2) >= LEAST_R2:
            return Links(np.array(s_per_byte), np.array(latency_s)), min(r2)
    raise RuntimeError(f"links fit with R² = {min(r2):.3f}, and {LEAST_R2} is asked for")


def post_seconds(ring: Any) -> float:
    """Of posting an exchange: tensors of few bytes, not waited for."""
    ranks, rank = ring.world_size, ring.rank
    tiny = [torch.ones(1), torch.empty(1)]
    found = []
    for _ in range(30):
        began = time.perf_counter()
        works = ring.exchange(tiny[:1], tiny[1:], (rank + 1) % ranks, (rank - 1) % ranks)
        found.append(time.perf_counter() - began)
        ring.wait(works)
    return float(ring.largest(torch.tensor([statistics.median(found)])))


def memory_seconds(ring: Any) -> tuple[float, float]:
    """Per byte, all ranks at it: (to start an accumulator, to join another's part)."""
    into, new = torch.zeros(CALIBRATED_ROWS[-1], WIDTH), torch.zeros(CALIBRATED_ROWS[-1], WIDTH)
    result = []
    for act in (lambda: into.fill_(0.0), lambda: into.add_(new)):
        found = statistics.median(together(ring, act) for _ in range(9))
        result.append(float(ring.largest(torch.tensor([found]))) / (into.numel() * 4))
    return result[0], result[1]


def oversleeping_seconds() -> float:
    """What a wait takes beyond what was asked for."""
    found = []
    for _ in range(20):
        began = time.perf_counter()
        time.sleep(2e-3)
        found.append(time.perf_counter() - began - 2e-3)
    return statistics.median(found)


def rank_main(
    rank: int, ranks: int, slow: bool, listed: str, place: Place | None, where: str, out: str
) -> None:
    """Calibrate, then measure every configuration of these ranks; rank 0 writes the results."""
    if place is None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    else:
        place.enter()
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        os.nice(-15)  # what else runs on this machine is not what is measured
    dist.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    module = shards_of(CALIBRATED_ROWS[0])
    ring = module.Ring(dist.group.WORLD, {"rows": (1,) * ranks})
    links, r2 = fitted_links(ring)
    start_s, join_s = memory_seconds(ring)
    post_s, late_s = post_seconds(ring), oversleeping_seconds()

    def clock() -> Clock:
        one = np.ones(ranks)
        return Clock(links, one, start_s_per_byte=start_s, join_s_per_byte=join_s, post_s=post_s)

    results = []
    for c in LISTS[listed]:
        if (c.ranks, c.slow) != (ranks, slow):
            continue
        module = shards_of(c.chunk, c.schedule)
        ring = module.Ring(dist.group.WORLD, {"rows": (c.chunk * c.chunks,) * ranks})
        message = c.chunk * ROW_BYTES * float(links.s_per_byte.max()) + float(links.latency_s.max())
        wait_s = float(ring.largest(torch.tensor([c.ratio * message * (1 + c.gradients)])))
        measured = measured_seconds(ring, module, c, partial(_wait, wait_s))
        predicted_s = predicted_seconds(clock(), c, wait_s + late_s)
        products_s = wait_s * c.chunks * (ranks / 2 if c.schedule == HALF_RING else ranks)
        results.append(
            asdict(c) | measured | {"predicted_s": predicted_s, "products_s": products_s}
        )
    real = []
    for c in REAL_PRODUCTS if (ranks, slow) == (2, False) and listed != "lines" else ():
        module = shards_of(c.chunk)
        ring = module.Ring(dist.group.WORLD, {"rows": (c.chunk * c.chunks,) * ranks})
        message = c.chunk * ROW_BYTES * float(links.s_per_byte.max()) + float(links.latency_s.max())
        product, product_s = product_of(ring, c, c.ratio * message * (1 + c.gradients))
        measured = measured_seconds(ring, module, c, lambda _, act=product: act())
        predicted_s = predicted_seconds(clock(), c, product_s)
        products_s = product_s * c.chunks * ranks
        real.append(asdict(c) | measured | {"predicted_s": predicted_s, "products_s": products_s})
    if rank == 0:
        calibrated = {
            "ranks": ranks, "slow": slow, "bytes_per_s": [1 / s for s in links.s_per_byte],
            "latency_s": links.latency_s.tolist(), "r2": r2, "start_s_per_byte": start_s,
            "join_s_per_byte": join_s, "post_s": post_s, "oversleeping_s": late_s,
        }  # fmt: skip
        found = {"calibrated": calibrated, "results": results, "real": real}
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _wait(seconds: float, share: float) -> None:
    time.sleep(seconds * share)


def measured_seconds(
    ring: Any, module: Any, c: Configuration, work: Callable[[float], object]
) -> dict[str, float]:
    """Of some passes: the median, the fastest and the slowest."""
    found = [ring_seconds(ring, module, c, work) for _ in range(REPEATS)]
    return {
        "measured_s": statistics.median(found), "fastest_s": min(found), "slowest_s": max(found)
    }  # fmt: skip


def predicted_seconds(clock: Clock, c: Configuration, step_s: float) -> float:
    """What the simulator makes of a pass whose every step multiplies for so long."""
    work = [Work(Travel("forward", WIDTH, WIDTH if c.gradients else 0), step_s * c.chunks)]
    lines = lines_from(clock.links, c.schedule)
    found = run(clock, c.schedule, work, c.chunk * c.chunks, c.chunk, 4, 4, lines=lines)
    return found.seconds - 2 * number_seconds(clock.links)


def lines_from(links: Links, schedule: str) -> tuple[Line, ...]:
    """As ``lines_of``, over links of which each rank has one, for whomever it sends to."""
    ranks = links.ranks

    def to(places: int) -> Links:
        after = (np.arange(ranks) + places) % ranks
        return Links(links.s_per_byte, links.latency_s, after)

    return tuple(Line(to(w), to(-w * n), w, n) for w, n in ways_of(schedule, ranks))


def product_of(ring: Any, c: Configuration, seconds: float) -> tuple[Callable[[], object], float]:
    """A product of a chunk with as many rows as take about so long, and how long it takes.

    All ranks multiply at once, and nothing is sent.
    """
    y = torch.randn(c.chunk, WIDTH)

    def timed(rows: int) -> tuple[Callable[[], object], float]:
        x, out = torch.randn(rows, WIDTH), torch.empty(rows, c.chunk)
        product = partial(torch.mm, x, y.T, out=out)
        product()
        found = statistics.median(together(ring, product) for _ in range(9))
        return product, float(ring.largest(torch.tensor([found], dtype=torch.float64)))

    rows = 512
    _, took_s = timed(rows)
    return timed(max(16, round(rows * seconds / took_s)))


def number_seconds(links: Links) -> float:
    """Of a sum over all ranks, which a simulated pass begins and ends with and a loop has not."""
    clock = Clock(links, np.ones(links.ranks))
    return run(clock, "ring_travel", [], 1, 1, 4, 4).seconds


# ---- all of them --------------------------------------------------------------------------------


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Relative errors of the predictions, and what overlap costs."""

    def spread(values: Sequence[float]) -> dict[str, float]:
        ordered = sorted(values)
        at = -(-9 * len(ordered) // 10) - 1
        return {
            "median": statistics.median(ordered), "p90": ordered[at], "max": ordered[-1]
        }  # fmt: skip

    hidden = [r for r in results if r["ratio"] >= 1.2]
    kinds = {
        "operands": [r for r in hidden if not r["gradients"]],
        "operands and gradients, one chunk": [
            r for r in hidden if r["gradients"] and r["chunks"] == 1
        ],
        "operands and gradients, in chunks": [
            r for r in hidden if r["gradients"] and r["chunks"] > 1
        ],
    }
    return {
        "configurations": len(results),
        "error": spread([abs(r["predicted_s"] / r["measured_s"] - 1) for r in results]),
        "error_of_the_fastest": spread(
            [abs(r["predicted_s"] / r["fastest_s"] - 1) for r in results]
        ),
        "over_products": {
            name: spread([r["measured_s"] / r["products_s"] - 1 for r in of])
            for name, of in kinds.items()
            if of
        },
    }


def by_schedule(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Relative errors of the predictions of each schedule."""
    found = {}
    for schedule in sorted({r["schedule"] for r in results}):
        of = [r for r in results if r["schedule"] == schedule]
        errors = sorted(abs(r["predicted_s"] / r["measured_s"] - 1) for r in of)
        found[schedule] = {
            "configurations": len(of), "median": statistics.median(errors), "max": errors[-1]
        }  # fmt: skip
    return found


def measure_group(ranks: int, slow: bool, listed: str, loopback: bool) -> dict[str, Any]:
    """Run one group of processes.

    Raises:
        RuntimeError: a process failed, or took too long.
    """
    rates = [RATE_BITS_PER_S * (0.5 if slow and rank == 1 else 1.0) for rank in range(ranks)]
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        places: Sequence[Place | None] = [None] * ranks
        if not loopback:
            places = stack.enter_context(shaped(rates))
        out = f"{folder}/results.json"
        processes = [
            context.Process(
                target=rank_main,
                args=(rank, ranks, slow, listed, places[rank], f"file://{folder}/meet", out),
                daemon=True,
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        limit = time.monotonic() + LIMIT_S
        try:
            for process in processes:
                process.join(max(0.0, limit - time.monotonic()))
            if any(process.exitcode != 0 for process in processes):
                raise RuntimeError(f"{ranks} ranks: a process failed, or took over {LIMIT_S:g} s")
        finally:
            for process in processes:
                process.kill()
        result: dict[str, Any] = json.loads(Path(out).read_text())
        return result


def main() -> None:
    """Measure every configuration and write them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("rings.json"))
    parser.add_argument("--loopback", action="store_true", help="links that all ranks share")
    parser.add_argument(
        "--list", choices=LISTS, default="rings", help="which of the lists of configurations"
    )
    arguments = parser.parse_args()
    groups = sorted({(c.ranks, c.slow) for c in LISTS[arguments.list]})
    if arguments.loopback:  # no link of it can be slower than another
        groups = [(ranks, slow) for ranks, slow in groups if not slow]
    before = os.getloadavg()[0]
    found, failures = [], []
    for ranks, slow in groups:
        try:
            found.append(measure_group(ranks, slow, arguments.list, arguments.loopback))
        except RuntimeError as error:  # what the other groups measured is not lost
            failures.append(str(error))
    every = [r for part in found for r in part["results"]]
    result = {
        "summary": by_schedule(every) if arguments.list == "lines" else summary(every),
        "with_real_products": [
            {"error": r["predicted_s"] / r["measured_s"] - 1,
             "over_products": r["measured_s"] / r["products_s"] - 1}
            for part in found for r in part["real"]
        ],
        "machine": {
            "cores": os.cpu_count(), "load_before": before, "torch": torch.__version__,
            "links": "loopback" if arguments.loopback else f"{RATE_BITS_PER_S:.0f} bit/s each",
        },
        "failures": failures,
        "calibrated": [part["calibrated"] for part in found],
        "results": every,
        "real_products": [r for part in found for r in part["real"]],
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    shown = {key: result[key] for key in ("summary", "with_real_products")}
    print(json.dumps(shown, indent=1))
    if failures:
        raise SystemExit("not all groups were measured: " + "; ".join(failures))


if __name__ == "__main__":
    main()
