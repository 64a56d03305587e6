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
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.links import Place, shaped
from benchmarks.processes import run_processes
from benchmarks.ring_calibration import (
    come_first,
    fitted_links,
    memory_seconds,
    oversleeping_seconds,
    post_seconds,
    together,
)
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
from benchmarks.ring_summary import summary
from cl_compiler.codegen.ring.render import render_ring
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.ranks import with_ranks
from cl_compiler.lang.resolve import Positives
from cl_compiler.lang.ring import HALF_RING, TWO_GROUPS
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.clock import Clock, Links
from cl_compiler.plan.cluster import choose_cluster_plan
from cl_compiler.plan.lines import Line, ways_of
from cl_compiler.plan.simulate import run
from cl_compiler.plan.travel import Travel
from cl_compiler.plan.types import MemoryBudget, Problem, Request
from cl_compiler.plan.work import Work
from cl_compiler.runtime.loader import load_source

LISTS = {"rings": CONFIGURATIONS, "lines": LINES, "overlap": OVERLAP}
REPEATS = 5
LIMIT_S = 420.0
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


@dataclass(frozen=True)
class Group:
    """Processes and the links between them, as of some configurations."""

    ranks: int
    slow: bool
    own_wires: bool

    @property
    def bits_per_s(self) -> float:
        """Of each link; of own wires, of which two are in use, half: both are what one link is."""
        return RATE_BITS_PER_S / 2 if self.own_wires else RATE_BITS_PER_S


def group_of(c: Configuration) -> Group:
    """Which group measures a configuration."""
    return Group(c.ranks, c.slow, c.own_wires)


# ---- one rank -----------------------------------------------------------------------------------


def share_of(ring: Any, module: Any, c: Configuration, shard: Sequence[Any]) -> float:
    """Of two chunks' tiles, those that this rank makes of what ``_shards`` gives."""
    rows = len(shard[1 if c.schedule != HALF_RING else 2][0])
    if c.schedule != HALF_RING:
        return rows / c.chunk
    first, past = shard[:2]
    if past == module.FAR:
        return 1.0
    start = first if first != module.FAR else past + module.TILE_M * (ring.rank >= c.ranks // 2)
    return rows / c.chunk * (2 * start + rows) / (2 * c.chunk * c.chunks)


def ring_seconds(
    ring: Any, module: Any, c: Configuration, work: Callable[[float], object]
) -> tuple[float, float]:
    """Wall seconds until the last rank is done: of one pass over the ring, of its products alone.

    ``work``: on some share of a chunk's products.
    """
    y = torch.ones(c.chunk * c.chunks, WIDTH)
    folds = [(module.SUM, torch.zeros(len(y), WIDTH))] if c.gradients else []
    shares: list[float] = []

    def act() -> None:
        for shard in module._shards(ring, "rows", (y,), folds):
            shares.append(share_of(ring, module, c, shard))
            work(shares[-1])

    def products() -> None:
        for share in shares:
            work(share)

    took = [together(ring, act), together(ring, products)]
    whole, alone = ring.largest(*(torch.tensor([s], dtype=torch.float64) for s in took)).tolist()
    return whole, alone


def rank_main(
    rank: int, group: Group, listed: str, place: Place | None, where: str, out: str
) -> None:
    """Calibrate, then measure every configuration of these ranks; rank 0 writes the results."""
    if place is None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    else:
        place.enter()
    ranks = group.ranks
    torch.set_num_threads(1)
    come_first(at_once=True)
    dist.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    second = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
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
        if group != group_of(c):
            continue
        module = shards_of(c.chunk, c.schedule)
        groups = {"second": second} if c.schedule in TWO_GROUPS else {}
        ring = module.Ring(dist.group.WORLD, {"rows": (c.chunk * c.chunks,) * ranks}, **groups)
        message = c.chunk * ROW_BYTES * float(links.s_per_byte.max()) + float(links.latency_s.max())
        wait_s = float(ring.largest(torch.tensor([c.ratio * message * (1 + c.gradients)])))
        measured = measured_seconds(ring, module, c, partial(_wait, wait_s))
        predicted_s = predicted_seconds(clock(), c, wait_s + late_s)
        results.append(asdict(c) | measured | {"predicted_s": predicted_s})
    come_first(at_once=False)
    real = []
    for c in REAL_PRODUCTS if listed != "lines" else ():
        if group != group_of(c):
            continue
        module = shards_of(c.chunk)
        ring = module.Ring(dist.group.WORLD, {"rows": (c.chunk * c.chunks,) * ranks})
        message = c.chunk * ROW_BYTES * float(links.s_per_byte.max()) + float(links.latency_s.max())
        product, product_s = product_of(ring, c, c.ratio * message * (1 + c.gradients))
        measured = measured_seconds(ring, module, c, product)
        predicted_s = predicted_seconds(clock(), c, product_s)
        real.append(asdict(c) | measured | {"predicted_s": predicted_s})
    if rank == 0:
        calibrated = {
            **asdict(group), "bytes_per_s": [1 / s for s in links.s_per_byte],
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
    """Of some passes: the median, the fastest and the slowest; and the median of their products,
    made as often and as long when nothing is sent."""
    passes, alone = zip(*(ring_seconds(ring, module, c, work) for _ in range(REPEATS)), strict=True)
    return {
        "measured_s": statistics.median(passes), "fastest_s": min(passes),
        "slowest_s": max(passes), "products_s": statistics.median(alone),
    }  # fmt: skip


def predicted_seconds(clock: Clock, c: Configuration, step_s: float) -> float:
    """What the simulator makes of a pass whose every step multiplies for so long."""
    work = [Work(Travel("forward", WIDTH, WIDTH if c.gradients else 0), step_s * c.chunks)]
    lines = lines_from(clock.links, c)
    found = run(clock, c.schedule, work, c.chunk * c.chunks, c.chunk, 4, 4, lines=lines)
    return found.seconds - 2 * number_seconds(clock.links)


def lines_from(links: Links, c: Configuration) -> tuple[Line, ...]:
    """As ``lines_of``, over links of which each rank has one for whomever it sends to, or one for
    each."""
    ranks = links.ranks

    def to(places: int) -> Links:
        after, wires = (np.arange(ranks) + places) % ranks, np.full(ranks, places * c.own_wires)
        return Links(links.s_per_byte, links.latency_s, after, wires=wires)

    return tuple(Line(to(w), to(-w * n), w, n) for w, n in ways_of(c.schedule, ranks))


def product_of(
    ring: Any, c: Configuration, seconds: float
) -> tuple[Callable[[float], object], float]:
    """A product of a share of a chunk with as many rows as take about so long, and how long it
    takes for a whole one.

    All ranks multiply at once, and nothing is sent.
    """
    y = torch.randn(c.chunk, WIDTH)

    def timed(rows: int) -> tuple[Callable[[float], object], float]:
        x, out = torch.randn(rows, WIDTH), torch.empty(rows * c.chunk)

        def product(share: float) -> None:
            n = round(share * c.chunk)
            torch.mm(x, y[:n].T, out=out[: rows * n].view(rows, n))

        product(1.0)
        found = statistics.median(together(ring, partial(product, 1.0)) for _ in range(9))
        return product, float(ring.largest(torch.tensor([found], dtype=torch.float64)))

    rows = 512
    _, took_s = timed(rows)
    return timed(max(16, round(rows * seconds / took_s)))


def number_seconds(links: Links) -> float:
    """Of a sum over all ranks, which a simulated pass begins and ends with and a loop has not."""
    clock = Clock(links, np.ones(links.ranks))
    return run(clock, "ring_travel", [], 1, 1, 4, 4).seconds


# ---- all of them --------------------------------------------------------------------------------


def measure_group(group: Group, listed: str, loopback: bool) -> dict[str, Any]:
    """Run one group of processes.

    Raises:
        RuntimeError: a process failed, or took too long.
    """
    ranks = group.ranks
    rates = [group.bits_per_s * (0.5 if group.slow and rank == 1 else 1.0) for rank in range(ranks)]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        places: Sequence[Place | None] = [None] * ranks
        if not loopback:
            places = stack.enter_context(shaped(rates, own_wires=group.own_wires))
        out = f"{folder}/results.json"
        meet = f"file://{folder}/meet"
        given = [(rank, group, listed, places[rank], meet, out) for rank in range(ranks)]
        run_processes(rank_main, given, LIMIT_S)
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
    groups = sorted({group_of(c) for c in LISTS[arguments.list]}, key=str)
    if arguments.loopback:  # no link of it can be slower than another
        groups = [group for group in groups if not (group.slow or group.own_wires)]
    before = os.getloadavg()[0]
    found, failures = [], []
    for group in groups:
        try:
            found.append(measure_group(group, arguments.list, arguments.loopback))
        except RuntimeError as error:  # what the other groups measured is not lost
            failures.append(str(error))
    every = [r for part in found for r in part["results"]]
    result = {
        "summary": summary(every),
        "with_real_products": [
            {"error": r["predicted_s"] / r["measured_s"] - 1,
             "over_products": r["measured_s"] / r["products_s"] - 1}
            for part in found for r in part["real"]
        ],
        "machine": {
            "cores": os.cpu_count(), "load_before": before, "torch": torch.__version__,
            "links": "loopback" if arguments.loopback else f"{RATE_BITS_PER_S:.0f} bit/s of a rank",
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
