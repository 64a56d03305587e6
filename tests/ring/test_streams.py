"""Groups whose waits only queue, as NCCL's: without a GPU, by calls of Gloo that none waits for."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cl_compiler.errors import ArgumentError, GroupError
from cl_compiler.runtime import group as group_module
from cl_compiler.runtime.own_group import NCCL_ENVIRONMENT, WATCHDOG_S, OwnGroup
from cl_compiler.runtime.streams import Posted
from cl_compiler.runtime.watch import Watch
from tests.ring import queued
from tests.ring.processes import launch
from tests.ring.test_failures import GONE, SLACK_S, survive


class Call:
    """A call on a stream: it ends when it is told to."""

    def __init__(self, error: str = "") -> None:
        self.ended, self.error = threading.Event(), error

    def is_completed(self) -> bool:
        return self.ended.is_set()

    def wait(self) -> None:
        assert self.ended.is_set(), "the host would wait for the device"
        if self.error:
            raise RuntimeError(self.error)


def test_calls_end_in_order_and_each_has_the_whole_timeout():
    posted = Posted(0.3, torch.device("cpu"))
    calls = [Call() for _ in range(4)]
    posted.add(calls)
    for call in calls[:3]:
        time.sleep(0.2)
        call.ended.set()
        assert posted.look() == ""
    time.sleep(0.35)
    assert "timed out" in posted.look()
    calls[3].ended.set()  # as whatever was broken up does
    assert "timed out" in posted.look()


def test_an_error_of_a_call_is_that_of_the_group():
    posted = Posted(5.0, torch.device("cpu"))
    call = Call("NCCL communicator was aborted on rank 1")
    posted.add([call])
    call.ended.set()
    with pytest.raises(RuntimeError, match="communicator was aborted"):
        posted.settle(lambda: None)


def test_a_host_that_waits_for_its_device_is_freed():
    """``.item()`` of what depends on a message that never comes: the thread breaks the group up."""
    posted, device = Posted(0.5, torch.device("cpu")), threading.Event()
    watch = Watch(dist.HashStore(), 0, 2, device.set, look=posted.look_from_thread)
    try:
        posted.add([Call()])
        began = time.monotonic()
        assert device.wait(5.0)
        assert 0.5 <= time.monotonic() - began < 0.5 + SLACK_S
        with pytest.raises(RuntimeError, match="timed out"):
            posted.settle(lambda: None)
    finally:
        watch.close()


def test_nccl_groups_do_not_end_the_process(monkeypatch):
    """What a group of NCCL is made with: its watchdog comes last, and only aborts the group."""
    made = {}

    def new_group(members, **options):
        made.update(options, environment={key: os.environ[key] for key in NCCL_ENVIRONMENT})
        raise InterruptedError

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "new_group", new_group)
        with pytest.raises(InterruptedError):
            OwnGroup(dist.group.WORLD, "nccl", WATCHDOG_S)
    finally:
        dist.destroy_process_group()
    assert made["backend"] == "nccl" and made["timeout"] == timedelta(days=1)
    assert made["environment"]["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"
    assert made["environment"]["TORCH_NCCL_BLOCKING_WAIT"] == "0"


def test_ranks_connect_once_and_all_of_them(monkeypatch):
    """The first call in a group of NCCL takes every rank, also those whose shards are empty."""
    made = []

    class Fake:
        def __init__(self, parent, backend, timeout_s):
            self.backend, self.rank, self.world_size, self.calls = backend, 0, 1, []
            self.met = 0
            self.group = self
            made.append(self)

        def allreduce(self, tensors):
            self.calls.append(tensors[0].device)
            work = Call()
            work.ended.set()
            return work

        def all_gather(self, own):
            self.met += 1

        def get_group_store(self):
            return dist.HashStore()

        def destroy(self):
            self.backend = "gone"

        break_up = destroy

    monkeypatch.setattr(group_module, "OwnGroup", Fake)
    ranks = group_module.RankGroup(None, 1.0, "mean")
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(ArgumentError, match="built without it"):
        ranks.connect(torch.device("meta"))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    for device in ("cpu", "meta", "meta"):
        ranks.connect(torch.device(device))
    assert [own.backend for own in made] == ["gloo", "nccl"]
    assert ranks.group is made[1] and ranks.control is made[0]
    assert made[1].calls == [torch.device("meta")] and made[0].calls == []
    for _ in range(2):
        ranks.connect(torch.device("meta"), two_groups=True)
    assert [own.backend for own in made] == ["gloo", "nccl", "nccl"]
    assert ranks.group is made[1] and ranks.second_group is made[2]
    assert made[2].calls == [torch.device("meta")]
    assert made[0].met == 2, "ranks meet before they make a group"
    ranks.loss = "clip"
    ranks.fail(ValueError("my loader broke"))
    with pytest.raises(GroupError) as caught:
        ranks.check_alive()
    assert str(caught.value) == (
        "clip: this rank failed: ValueError: my loader broke. "
        "Compile the loss again, on a new group if a rank is gone."
    )
    ranks.close()
    ranks.fail("after the end")  # nobody hears, and nothing breaks
    assert {own.backend for own in made} == {"gone"}


@pytest.mark.parametrize("how", ["SIGSTOP", "SIGKILL"])
def test_a_rank_is_gone_while_the_others_only_queue(how, tmp_path):
    """No wait of the ring returns an error; all the same there is one, in time, that names it."""
    limit_s = queued.TIMEOUT_S + SLACK_S
    survive(limit_s, 1, GONE.format(1), 3, queued.die, how, tmp_path / "at")


def test_an_exception_in_a_backward_reaches_the_others():
    """In the middle of a pass, and caught: nothing ends the process, and nothing is late.

    Who waits for a rank that is well is woken, also where other connections are closed already.
    """
    outcomes = launch(queued.run_out_of_memory, 3, 1)
    for rank, outcome in enumerate(outcomes):
        text, seconds, woken_after_s = outcome.needed()
        assert seconds < 3.0 and woken_after_s < 2.0, (seconds, woken_after_s, text)
        assert "MemoryError" in text and ("GroupError" in text) == (rank != 1), text


def test_a_group_error_says_what_happened():
    posted = Posted(5.0, torch.device("cpu"))
    posted.add([Call()])

    def check():
        raise GroupError("rank 1 failed: ValueError")

    with pytest.raises(GroupError, match="ValueError"):
        posted.settle(check)
