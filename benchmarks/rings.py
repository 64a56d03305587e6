"""Real rings beside simulated ones: Gloo processes whose products are timed waits.

    python -m benchmarks.rings --out rings.json

Every configuration is listed below, before anything is measured; links are calibrated by other
messages, with all ranks sending at once as a ring does.  Two cores cannot multiply for four ranks
and send at the same time, so a rank waits for as long as its products would take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cl_compiler.codegen.ring.render import render_ring
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.ranks import with_ranks
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.cluster import Travel, choose_cluster_plan
from cl_compiler.plan.simulate import Clock, Links, Work, run
from cl_compiler.plan.types import MemoryBudget, Problem, Request
from cl_compiler.runtime.loader import load_source

RANKS = (2, 3, 4)
ROWS, CHUNKS = (4096, 16384), (1, 4)
WIDTH = 512
RATIOS = (0.3, 1.2, 2.0)
"""Seconds of a step's products over those of its message."""
CONFIGURATIONS = tuple(
    (ranks, rows, chunks, ratio, back)
    for ranks in RANKS
    for rows in ROWS
    for chunks in CHUNKS
    for ratio in RATIOS
    for back in (False, True)
)
CALIBRATED_ROWS = (256, 1536, 6144, 12288)
REPEATS = 5


def shards_of(chunk: int) -> Any:
    """The emitted file's loop over shards, and its ring; with gradients that follow."""
    spec = with_ranks(load_hardware("xeon-amx-2c"), 4, 4)
    needs = frozenset({"x", "y", "logit_scale"})
    problem = Problem(chunk, chunk, WIDTH)
    request = Request(
        find("clip"), spec, MemoryBudget(1 << 30), problem, "paired", needs, "ieee",
        "ring_travel", 0, 4,
    )  # fmt: skip
    plan, program = choose_cluster_plan(request, plan_sweeps(request.loss, "paired", needs))
    text = render_ring(plan, program, "rings", cluster_schedule="ring_travel", chunk=chunk)
    return load_source(text, "rings")


def timed(ring: Any, module: Any, rows: int, seconds: float, back: bool) -> float:
    """Wall seconds of one pass over the ring, the slowest rank's."""
    y = torch.ones(rows, WIDTH)
    folds = [(module.SUM, torch.zeros(rows, WIDTH))] if back else []
    dist.barrier()
    began = time.perf_counter()
    for _ in module._shards(ring, "rows", (y,), folds):
        time.sleep(seconds)
    return float(ring.largest(torch.tensor([time.perf_counter() - began])))


def message_seconds(ring: Any, rows: int) -> float:
    """Of one exchange with all ranks at it; the best of some: other work runs on the machine."""
    sent, received = torch.ones(rows, WIDTH), torch.empty(rows, WIDTH)
    found = []
    for _ in range(6):
        dist.barrier()
        began = time.perf_counter()
        ring.wait(ring.exchange([sent], [received]))
        took = time.perf_counter() - began
        found.append(float(ring.largest(torch.tensor([took]))))
    return min(found)


def rank_main(rank: int, ranks: int, where: str, out: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    module = shards_of(1024)
    ring = module.Ring(dist.group.WORLD, {"rows": (1,) * ranks})
    sizes = np.array(CALIBRATED_ROWS) * WIDTH * 4
    message_seconds(ring, 64)
    seconds = [message_seconds(ring, rows) for rows in CALIBRATED_ROWS]
    s_per_byte, latency_s = np.polyfit(sizes, seconds, 1, w=1 / np.array(seconds))
    latency_s = max(float(latency_s), 0.0)
    sum_s = statistics.median(message_seconds_of_a_sum(ring) for _ in range(20))
    join_s_per_byte = join_seconds(ring) / (1024 * WIDTH * 4)
    results = []
    for of, rows, chunks, ratio, back in CONFIGURATIONS:
        if of != ranks:
            continue
        chunk = rows // chunks
        module = shards_of(chunk)
        ring = module.Ring(dist.group.WORLD, {"rows": (rows,) * ranks})
        wait_s = ratio * (latency_s + chunk * WIDTH * 4 * float(s_per_byte))
        measured = min(timed(ring, module, rows, wait_s, back) for _ in range(REPEATS))
        links = Links(np.full(ranks, float(s_per_byte)), np.full(ranks, latency_s))
        work = [Work(Travel("forward", WIDTH, WIDTH if back else 0), wait_s * chunks)]
        clock = Clock(links, np.ones(ranks), join_s_per_byte=join_s_per_byte)
        predicted = run(clock, "ring_travel", work, rows, chunk, 4, 4).seconds
        results.append(
            {
                "ranks": ranks, "rows": rows, "chunk": chunk, "ratio": ratio, "gradients": back,
                "measured_s": measured, "predicted_s": predicted,
                "products_s": wait_s * chunks * ranks,
            }
        )  # fmt: skip
    if rank == 0:
        calibrated = {"s_per_byte": float(s_per_byte), "latency_s": latency_s, "sum_s": sum_s}
        Path(out).write_text(json.dumps({"calibrated": calibrated, "results": results}))
    dist.barrier()
    dist.destroy_process_group()


def join_seconds(ring: Any) -> float:
    """To start and join 1,024 rows of a gradient, all ranks at it."""
    into, new = torch.zeros(1024, WIDTH), torch.zeros(1024, WIDTH)
    found = []
    for _ in range(10):
        dist.barrier()
        began = time.perf_counter()
        into.fill_(0.0).add_(new)
        took = time.perf_counter() - began
        found.append(float(ring.largest(torch.tensor([took]))))
    return min(found)


def message_seconds_of_a_sum(ring: Any) -> float:
    """Of one number from every rank."""
    began = time.perf_counter()
    ring.total(1.0)
    return time.perf_counter() - began


def summary(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Relative errors of the predictions, and what overlap costs."""
    errors = sorted(abs(r["predicted_s"] / r["measured_s"] - 1) for r in results)
    hidden = [r["measured_s"] / r["products_s"] - 1 for r in results if r["ratio"] >= 1.2]
    plain = [r["measured_s"] / r["products_s"] - 1 for r in results
             if r["ratio"] >= 1.2 and not r["gradients"]]  # fmt: skip
    return {
        "configurations": len(results),
        "median": statistics.median(errors),
        "p90": errors[int(0.9 * (len(errors) - 1))],
        "max": errors[-1],
        "over_products_where_hidden_median": statistics.median(hidden),
        "over_products_without_gradients_median": statistics.median(plain),
        "over_products_without_gradients_max": max(plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("rings.json"))
    arguments = parser.parse_args()
    every: list[dict[str, Any]] = []
    calibrated = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in RANKS:
            part = f"{folder}/{ranks}.json"
            mp.spawn(rank_main, (ranks, f"file://{folder}/meet{ranks}", part), nprocs=ranks)
            found = json.loads(Path(part).read_text())
            every += found["results"]
            calibrated[ranks] = found["calibrated"]
    result = {"summary": summary(every), "calibrated": calibrated, "results": every}
    arguments.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
