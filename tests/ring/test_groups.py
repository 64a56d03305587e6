"""Which ranks a loss runs on, and that it behaves like any compiled loss there."""

from __future__ import annotations

import contextlib
import os
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from cl_compiler import compile_loss
from cl_compiler import lang as cl
from cl_compiler.errors import ArgumentError, LossDefinitionError, ScheduleError
from cl_compiler.lang.reference import evaluate_outputs
from cl_compiler.lang.ring import build_ring_program
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.runtime import own_group
from tests import losses_zoo as zoo
from tests.ring.members import copies, later_groups, partial_groups
from tests.ring.processes import launch
from tests.ring.shards import emit_ring, run_group, split
from tests.tiles import errors
from tests.zoo_case import Case, sample


def test_groups_of_some_ranks():
    """Not contiguous, two at once, a dimension of a mesh; made again after they were closed;
    overlapping, so that one rank has made more groups than the others; refused by one rank."""
    for rank, outcome in enumerate(launch(partial_groups, 4)):
        found = outcome.needed()
        wrong = found.pop("wrong option")
        assert "ArgumentError" in wrong and "precision='wrong'" in wrong
        assert rank == 2 or "rank 2: " in wrong
        assert "ArgumentError" in found.pop("2-D mesh")
        assert "is no DeviceMesh" in found.pop("no mesh")
        assert "ArgumentError" in found.pop("no member")
        assert max(found.values()) < 2e-6, found


def test_a_loss_on_some_ranks_leaves_other_groups_alone():
    """PyTorch names groups by how many a process knows: a loss's own do not count."""
    for rank, outcome in enumerate(launch(later_groups, 4)):
        found = outcome.needed()
        if rank < 2:
            known = 2 + (rank == 1)  # all ranks, the half, and the middle
            assert found.pop("known") == found.pop("in the profiler's list") == known
        assert len(found) == (2, 3, 1, 0)[rank], found
        assert all(wrong < 2e-6 for wrong in found.values()), found


def test_no_name_of_a_group_comes_back(monkeypatch):
    """Not even after all groups are gone: the store still has what ranks said under the old one.

    A group that did not come about is not counted: ranks that got there and ranks that did not are
    in step when they try again.
    """
    world, store = SimpleNamespace(bound_device_id="cuda:0"), dist.HashStore()
    monkeypatch.setattr(c10d, "_get_default_group", lambda: world)
    monkeypatch.setattr(c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "1")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    plain, names = c10d._process_group_name, []
    for members in ((0, 1), (0, 1), (0, 1, 2)):
        for comes in (False, True):
            with contextlib.suppress(TimeoutError), own_group._named(members, "nccl") as missing:
                assert missing() == [*range(1, len(members))]
                names.append(c10d._process_group_name([0, 1], use_hashed_name=True))
                assert world.bound_device_id is None  # else a part of its communicator is asked for
                assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "0"
                assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"
                if not comes:
                    raise TimeoutError
    assert names[::2] == names[1::2] and len(set(names)) == 3
    assert c10d._process_group_name is plain and world.bound_device_id == "cuda:0"
    assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "1"
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ


def test_a_loss_on_a_group_is_like_any_other():
    for outcome in launch(copies, 2):
        found = outcome.needed()
        assert "with_group" in found["without a group"]
        assert found["values"] == 1 and found["bitwise"]
        between, on_a_rank = re.search(
            r"GroupLoss\(clip, '(\w+)', on a rank '(\w+)'\)", found["repr"]
        ).groups()
        assert between in ("ring_owner", "ring_travel", "all_gather")
        assert f"schedule   {between}; on a rank {on_a_rank}: tiles of" in found["explained"]
        for name in ("plain", "several chunks", "deepcopy", "pickled", "whole step"):
            assert found[name] < 2e-6, (name, found[name])


def test_a_group_needs_torch_distributed():
    with pytest.raises(ArgumentError, match="init_process_group"):
        compile_loss("xeon-amx-2c", "16MiB", group=object())


@pytest.mark.parametrize("schedule", ["ring_owner", "all_gather"])
def test_bf16_shards_travel_as_they_are(schedule):
    """Against float64 of the rounded embeddings; gradients are rounded to bf16 at the end."""
    case = next(c for c in zoo.cases() if c.name == "clip")
    drawn = sample(case, 11, 15, seed=3)
    with torch.no_grad():
        for tensor in drawn.tensors.values():
            tensor.copy_(tensor.bfloat16())
    cut = split(case, 11, 15, (2, 1, 1))
    text = emit_ring(case, schedule, dtype="bfloat16")
    found = errors(run_group(text, drawn, cut, dtype=torch.bfloat16).result, drawn)
    assert max(found.values()) < 2.0**-8, found
    assert max(found["value"], found["logit_scale"]) < 1e-5, found


@cl.define_loss
def ranked(sim, logit_scale):
    s = logit_scale * sim
    lse = cl.logsumexp(s, over=cl.cols)
    spread = cl.max(lse, over=cl.rows) + cl.logsumexp(lse, over=cl.rows)
    cl.output("row_loss", lse - cl.at_positive(s, on=cl.rows))
    return spread + cl.softmean(lse, -lse, over=cl.rows)


def test_scalars_over_all_rows_and_outputs():
    """Maximum, logsumexp and softmean of a vector run over all ranks; outputs are local."""
    try:
        case = Case("ranked", ranked, {"logit_scale": 5.0})
        drawn = sample(case, 9, 12, seed=2)
        whole = drawn.reference()
    except LossDefinitionError as error:
        pytest.skip(f"not in the language: {error}")
    assert whole.isfinite()
    for schedule in ("ring_owner", "ring_travel"):
        cut = split(case, 9, 12, (1, 0, 2))
        found = errors(run_group(emit_ring(case, schedule), drawn, cut).result, drawn)
        assert max(found.values()) < 1e-11, found
    assert evaluate_outputs(ranked, drawn.tensors, drawn.parameters)["row_loss"].shape == (9,)


@cl.define_loss
def queue_statistics(sim, logit_scale):
    old = logit_scale * cl.similarity(cl.x, cl.operand("queue", cl.bank, stop=True))
    return cl.sum(cl.logsumexp(old, over=cl.rows), over=cl.bank) + cl.sum(
        cl.sum(sim, over=cl.cols), over=cl.rows
    )


def test_what_cannot_run_on_a_group_says_why():
    plan = plan_sweeps(queue_statistics, "diagonal", frozenset({"x", "y"}))
    with pytest.raises(ScheduleError, match="each rank has a copy of the queue"):
        build_ring_program(plan, owner_computes=True)
