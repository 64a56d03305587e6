"""Measured rings, as they are committed: every configuration, and predictions within bounds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ring_configurations import (
    CALIBRATED_ROWS,
    CONFIGURATIONS,
    LINES,
    OVERLAP,
    RATE_BITS_PER_S,
    WIDTH,
    Configuration,
)
from benchmarks.ring_summary import HIDDEN, configuration_of
from benchmarks.rings import predicted_seconds
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.graph import hardware_graph
from cl_compiler.hardware.ranks import with_ranks
from cl_compiler.plan.clock import Clock, Links
from cl_compiler.plan.cluster import chunks_of
from cl_compiler.plan.machine import machine_of
from cl_compiler.plan.types import Problem
from tests.ring.test_both_ways import with_links

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def latest(pattern: str) -> list[dict]:
    """The results of the newest file."""
    found = sorted(RESULTS.glob(pattern), key=lambda path: path.stem[-10:])
    return json.loads(found[-1].read_text())["results"] if found else []


@pytest.mark.parametrize(
    ("pattern", "listed"),
    [
        ("rings-amd*.json", CONFIGURATIONS),
        ("rings-lines-*.json", LINES),
        ("rings-overlap-*.json", OVERLAP),
    ],
)
def test_every_configuration_is_reported_and_predicted(pattern, listed):
    """Half of them to 5 %, nine of ten to 12 %, all of them to 20 %."""
    results = latest(pattern)
    assert sorted(map(configuration_of, results), key=str) == sorted(listed, key=str)
    assert len(listed) >= 24 and not {c.chunk for c in listed} & set(CALIBRATED_ROWS)
    errors = sorted(abs(r["predicted_s"] / r["measured_s"] - 1) for r in results)
    assert statistics.median(errors) <= 0.05 and errors[-(-9 * len(errors) // 10) - 1] <= 0.12
    assert errors[-1] <= 0.20


def test_predictions_of_all_of_them_together():
    errors = sorted(
        abs(r["predicted_s"] / r["measured_s"] - 1)
        for pattern in ("rings-amd*.json", "rings-lines-*.json", "rings-overlap-*.json")
        for r in latest(pattern)
    )
    assert len(errors) == len(CONFIGURATIONS) + len(LINES) + len(OVERLAP)
    assert statistics.median(errors) <= 0.05 and errors[-(-9 * len(errors) // 10) - 1] <= 0.12


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("rings-amd*.json", 56), ("rings-overlap-*.json", 36), ("rings-lines-*.json", 36)],
)
def test_products_hide_what_is_sent(pattern, count):
    """In every step 1.2 times as long as it, or longer: within 10 % of products alone."""
    results = [r for r in latest(pattern) if configuration_of(r).least_ratio >= HIDDEN]
    assert len(results) == count
    for r in results:
        assert r["measured_s"] <= 1.1 * r["products_s"], configuration_of(r)


def test_shards_are_cut_as_the_planner_cuts_them():
    """Over links as slow as those that are measured; over faster ones short shards stay whole."""
    machine = with_ranks(load_hardware("xeon-amx-2c"), 4, 4)
    slow = with_links(machine, bandwidth_bytes_per_s=RATE_BITS_PER_S / 8)
    for c in OVERLAP:
        rows = c.chunk * c.chunks
        problem = Problem(rows, rows, WIDTH)
        assert next(chunks_of(problem, machine_of(hardware_graph(slow)))) == c.chunk
    assert next(chunks_of(Problem(512, 512, WIDTH), machine_of(hardware_graph(machine)))) == 512


CUT = [c for c in OVERLAP if c.gradients and c.ratio == 1.2]


@pytest.mark.parametrize("c", CUT, ids=lambda c: f"{c.ranks} ranks, {c.chunks} x {c.chunk}")
def test_the_last_gradients_come_home_behind_what_is_held_back(c):
    """In chunks or in one, nothing is left over.  Gloo's own time for a step is measured."""
    links = Links(np.full(c.ranks, 8 / RATE_BITS_PER_S), np.zeros(c.ranks))

    def over_products(chunk: int, chunks: int) -> float:
        step_s = 1.2 * 2 * chunk * WIDTH * 4 * 8 / RATE_BITS_PER_S
        of = Configuration(c.ranks, chunk, chunks, 1.2, True)
        clock = Clock(links, np.ones(c.ranks))
        return predicted_seconds(clock, of, step_s) / (step_s * chunks * c.ranks) - 1

    assert over_products(c.chunk, c.chunks) == pytest.approx(0.0, abs=1e-6)
    assert over_products(c.chunk * c.chunks, 1) == pytest.approx(0.0, abs=1e-6)
