"""LiveBytes against sums done by hand: KIB is one tensor of 256 fp32 elements."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from cl_compiler.runtime.live_bytes import LiveBytes

KIB = 1024


def kib(count: int = 1, **options: object) -> torch.Tensor:
    return torch.ones(256 * count, **options)  # type: ignore[arg-type]


def test_views_share_one_count() -> None:
    with LiveBytes() as live:
        whole = kib(4)
        views = [whole[:256], whole.view(32, 32), whole.reshape(32, 32).T, whole.detach()]
    assert live.live_bytes == live.peak_bytes == 4 * KIB
    assert len(views) == 4


def test_a_view_of_an_outside_tensor_counts_nothing() -> None:
    outside = kib(4)
    with LiveBytes() as live:
        view = outside.view(32, 32).T
        kept = view[0].detach()
    assert live.peak_bytes == 0
    assert kept.numel() == 32


def test_frees_are_seen_inside_and_after_the_block() -> None:
    with LiveBytes() as live:
        first = kib(3)
        del first
        assert live.live_bytes == 0
        second = kib(2)
        assert live.live_bytes == 2 * KIB
    assert live.peak_bytes == 3 * KIB
    del second
    assert live.live_bytes == 0
    assert live.peak_bytes == 3 * KIB


def test_in_place_and_out_allocate_nothing() -> None:
    outside, result = kib(), kib()
    with LiveBytes() as live:
        outside.add_(1).exp_()
        torch.mul(outside, 2, out=result)
    assert live.peak_bytes == 0


def test_growth_of_an_outside_tensor_counts_what_was_added() -> None:
    outside = torch.empty(0)
    grown = kib(2)
    with LiveBytes() as live:
        torch.mul(kib(3), 2, out=outside)  # the operand of 3 KiB is freed afterwards
        grown.resize_(256 * 5)
        assert live.live_bytes == (3 + 3) * KIB
    del outside
    assert live.live_bytes == 3 * KIB
    del grown
    assert live.live_bytes == 0


def test_what_only_the_autograd_graph_holds_is_counted_until_the_backward() -> None:
    x = kib(1, requires_grad=True)
    with LiveBytes() as live:
        value = x.exp().sum()  # exp saves its result, 1 KiB, for the backward
        gc.collect()
        assert live.live_bytes == KIB + 4
        value.backward()
        del value
        assert live.live_bytes == KIB  # x.grad alone
    assert x.grad is not None


def test_a_training_step_of_a_dense_loss() -> None:
    """Forward S and two log-softmaxes; the backward adds gradients of their size."""
    count, dim = 256, 8
    x = torch.randn(count, dim, requires_grad=True)
    y = torch.randn(count, dim, requires_grad=True)
    with LiveBytes() as live:
        sim = x @ y.T
        target = torch.arange(count)
        (F.cross_entropy(sim, target) + F.cross_entropy(sim.T, target)).backward()
        del sim, target
        gc.collect()
    matrix_bytes = count * count * 4
    assert 4 * matrix_bytes <= live.peak_bytes <= 6 * matrix_bytes
    assert live.live_bytes == 2 * count * dim * 4  # the two gradients


@pytest.mark.parametrize("count", [64, 257])
def test_the_meta_device_counts_what_the_real_one_does(count: int) -> None:
    def peak(device: str) -> int:
        x = torch.ones(count, 16, device=device, requires_grad=True)
        with LiveBytes() as live:
            sim = 3.0 * x @ x.T
            F.cross_entropy(sim, torch.arange(count, device=device)).backward()
        return live.peak_bytes

    assert peak("meta") == peak("cpu")
