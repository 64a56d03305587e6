"""``compile_loss`` takes what a person writes, and refuses the rest before it does anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cl_compiler import Problem, compile_loss
from cl_compiler.errors import ArgumentError, ScheduleError
from cl_compiler.losses.cross_entropy import clip
from cl_compiler.variants import fetch_variant
from tests.losses_zoo import hard_negatives
from tests.plan.requests import request


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"verify": "x"}, "verify='x': use True or False"),
        (
            {"deterministic": "ranks"},
            r"deterministic='ranks': use True or False, or \"canonical\"\.$",
        ),
        (
            {"precision": "int4"},
            "precision='int4': use one of auto, ieee, bf16, fp16, tf32",
        ),
        ({"nonfinite": "warn"}, "nonfinite='warn': use 'propagate' or 'error'"),
        (
            {"schedule": "spil"},
            "schedule='spil': did you mean 'spill'[?] use one of auto, recompute",
        ),
        ({"problem": (64, 64, 8)}, r"give Problem\(64, 64, 8\)"),
        ({"problem": Problem(64, 64, 8, slots=4)}, "clip has no slots"),
        ({"problem": Problem(64, 64, 8, bank=4)}, "clip has no bank"),
        ({"problem": Problem(64, 32, 8)}, "N is at least M"),
    ],
)
def test_an_argument_that_would_be_ignored_or_fail_later_is_refused(
    arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises((ArgumentError, ScheduleError), match=said):
        compile_loss("auto", "16MiB", **arguments)


def test_sizes_as_text_compile_ahead() -> None:
    loss_fn = compile_loss("xeon-amx-2c", "16MiB", problem="64x96x8", schedule="recompute")
    assert loss_fn.plan.problem == Problem(64, 96, 8)
    assert loss_fn.plan.schedule == "recompute"


def test_the_graph_of_a_loss_with_slots_needs_no_call() -> None:
    graph = compile_loss("xeon-amx-2c", "16MiB", loss=hard_negatives).graph
    assert "value" in graph


def test_a_variant_is_fetched_without_being_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_compiler.api.load_source", None)
    r = request(clip, rows=64, budget="16MiB")
    assert not fetch_variant(r).hit
    again = fetch_variant(r)
    assert again.hit and again.plan["problem"]["M"] == 64


def test_a_machine_of_several_devices_is_planned_as_a_group() -> None:
    """What each rank runs can be read; to call it takes the ranks."""
    loss_fn = compile_loss("h100x8", "1GiB", problem="8192x8192x512", schedule="ring_owner")
    assert loss_fn.plan.problem.M == 1024 and loss_fn.plan.cluster is not None
    assert loss_fn.plan.cluster.schedule == "ring_owner"
    assert "torch.distributed" in loss_fn.source
    with pytest.raises(ArgumentError, match="pass group= on every rank"):
        loss_fn(torch.randn(8, 4), torch.randn(8, 4), logit_scale=1.0)
    with pytest.raises(ScheduleError, match="use one of auto, ring_owner"):
        compile_loss("h100x8", "1GiB", schedule="spill")
