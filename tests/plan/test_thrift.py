"""A schedule that needs far less memory for little more time is named, with what chooses it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.plan.cluster import choose_cluster_plan
from cl_compiler.plan.report import explain
from cl_compiler.plan.thrift import Cost, thrifty, told
from cl_compiler.plan.types import MemoryBudget, Plan, Request
from tests.ring.test_plan import request

NOTE = re.compile(
    r"- (\w+) would need 1/([\d.]+) of the memory \(.*\) for (?:([\d.]+)% more|about the same) "
    r"time: memory_budget=(\d+) chooses it"
)


def over_links(latency_s: float) -> Request:
    """Ranks whose messages take long to begin: one gather is quicker than fifteen steps."""
    asked = request("auto", 16, 2048, 256)
    links = tuple(replace(link, latency_s=latency_s) for link in asked.hardware.links)
    return replace(asked, hardware=replace(asked.hardware, links=links))


def planned(asked: Request) -> Plan:
    return choose_cluster_plan(asked, plan_sweeps(asked.loss, asked.positives, asked.needs))[0]


def test_what_is_said_is_what_the_budget_chooses():
    """Between links over which a ring is quicker, and those over which it is far slower."""
    low, high = 1e-4, 2e-2
    for _ in range(20):
        asked = over_links((low * high) ** 0.5)
        plan = planned(asked)
        note = NOTE.search(explain(plan))
        if note:
            break
        if plan.cluster.schedule == "all_gather":
            high = asked.hardware.links[0].latency_s
        else:
            low = asked.hardware.links[0].latency_s
    else:
        pytest.fail("no latency at which another schedule needs far less memory")
    other = planned(replace(asked, budget=MemoryBudget(int(note[4]))))
    assert plan.cluster.schedule == "all_gather" and other.cluster.schedule == note[1]
    assert plan.peak_bytes / other.peak_bytes == pytest.approx(float(note[2]), rel=0.05)
    assert plan.peak_bytes >= 2 * other.peak_bytes
    more = 100 * (other.seconds / plan.seconds - 1)
    assert more == pytest.approx(float(note[3] or 0), abs=0.06) and more <= 10
    assert not NOTE.search(explain(other)), "nothing takes half of that"


def test_nothing_is_said_of_what_is_far_slower_or_no_smaller():
    taken = Cost(1000, 1.0)
    assert thrifty({"a": taken, "b": Cost(501, 1.0), "c": Cost(100, 1.11)}, "a") is None
    costs = {"a": taken, "b": Cost(500, 1.01), "c": Cost(150, 1.032), "d": Cost(100, 2.0)}
    assert thrifty(costs, "a") == "c" and thrifty(costs, "c") is None
    assert told("c", costs["c"], taken, "this") == (
        "c would need 1/6.7 of the memory (150 B) for 3.2% more time: this chooses it"
    )
    assert "for about the same time" in told("b", Cost(100, 0.99), taken, "this")


def test_what_is_asked_for_is_not_compared():
    asked = replace(over_links(1e-3), schedule="all_gather")
    assert not NOTE.search(explain(planned(asked)))
