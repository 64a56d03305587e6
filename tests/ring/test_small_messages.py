"""How often ranks stop for a few bytes, and a host for its device: counted for one step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from cl_compiler import compile_loss
from cl_compiler.errors import NoPositiveError
from cl_compiler.runtime import guarded_ring
from cl_compiler.runtime.own_group import OwnGroup

WAITS = {"aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default"}


class Waits(TorchDispatchMode):
    """Counts what would make the host wait, were the tensors on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func) in WAITS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shards(spread: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.nn.functional.normalize(torch.randn(2, 24, 8, generator=generator), dim=2)
    return [(spread * t).clone().requires_grad_() for t in drawn]


@pytest.mark.parametrize(
    ("loss", "scale", "forward", "backward"),
    [
        # The record; norms, for the exponentials' shift; totals.  The record; the scale's gradient.
        ("clip", 10.0, 3, 2),
        # Shifted, and so one question more: whether no sum went out of range.
        ("clip", 100.0, 4, 2),
        # No exponential is summed; the scale's gradient is made in the forward.
        ("siglip", 10.0, 3, 1),
        ("nt_xent", 10.0, 3, 2),
    ],
)
def test_small_messages_of_a_step(alone, monkeypatch, loss, scale, forward, backward):
    counts: Counter[str] = Counter()
    record = OwnGroup.all_gather

    def counted_record(self, own):
        counts["messages"] += 1
        return record(self, own)

    monkeypatch.setattr(OwnGroup, "all_gather", counted_record)
    loss_fn = compile_loss("xeon-amx-2c", "16MiB", loss=loss, group=dist.group.WORLD)
    x, y = shards(1.0)
    given = (x,) if loss == "nt_xent" else (x, y)
    scalars = {name: torch.tensor(scale) for name in loss_fn.signature.parameters}
    scalars["logit_scale"].requires_grad_()
    loss_fn(*given, **scalars).backward()
    ring_type = guarded_ring._guarded(loss_fn.variants[-1].module)
    gathered = ring_type.gathered

    def counted(self, own):
        counts["messages"] += 1
        return gathered(self, own)

    monkeypatch.setattr(ring_type, "gathered", counted)
    counts.clear()
    value = loss_fn(*given, **scalars)
    assert counts["messages"] == forward
    counts.clear()
    value.backward()
    assert counts["messages"] == backward
    loss_fn.close()


@pytest.mark.parametrize(("nonfinite", "waits"), [("propagate", 1), ("error", 2)])
def test_a_host_waits_once_for_all_scalars_and_once_for_all_flags(
    alone, monkeypatch, nonfinite, waits
):
    """Before anything is sent, whatever the number of scalars and of operands."""
    loss_fn = compile_loss(
        "xeon-amx-2c", "16MiB", loss="siglip", group=dist.group.WORLD, nonfinite=nonfinite
    )
    x, y = shards(1.0)
    found, meet, tolist = [], loss_fn.ranks.meet, torch.Tensor.tolist

    def met(record):
        found.append(counting.count)
        return meet(record)

    def read(self):
        counting.count += 1
        return tolist(self)

    monkeypatch.setattr(loss_fn.ranks, "meet", met)
    monkeypatch.setattr(torch.Tensor, "tolist", read)
    with Waits() as counting:
        loss_fn(x, y, logit_scale=torch.tensor(10.0), logit_bias=torch.tensor(-10.0))
    assert found == [waits]
    loss_fn.close()


def test_a_batch_without_positives_is_an_error_after_which_the_group_goes_on(alone):
    """All ranks see it in the same totals: no rank has failed."""
    loss_fn = compile_loss("xeon-amx-2c", "16MiB", group=dist.group.WORLD)
    x, y = shards(1.0)
    ids = torch.arange(24)
    with pytest.raises(NoPositiveError):
        loss_fn(x, y, logit_scale=10.0, row_ids=ids, col_ids=ids + 100)
    value = loss_fn(x, y, logit_scale=10.0, row_ids=ids, col_ids=ids.flip(0))
    assert value.isfinite()
    loss_fn.close()
