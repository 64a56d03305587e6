"""A compiled loss is one differentiable function among others in PyTorch's graph.

Inputs are float64, so that bounds need no tuning.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.runtime.dense_case import (
    EXACT,
    LOSSES,
    compiled,
    dense,
    embeddings,
    error,
    errors,
    expected,
    scalars,
)

SUBSETS = [
    (name, subset)
    for name, values in LOSSES.items()
    for size in range(3 + len(values))
    for subset in itertools.combinations(("x", "y", *values), size)
]


@pytest.fixture(params=LOSSES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(("name", "required"), SUBSETS)
def test_exactly_the_required_gradients(name: str, required: tuple[str, ...]) -> None:
    x, y = embeddings(1)
    tensors = {"x": x, "y": y, **scalars(name)}
    for key, tensor in tensors.items():
        tensor.requires_grad_(key in required)
    loss = compiled(name)
    value = loss(**tensors)
    want = expected(name, **tensors)
    assert loss.plan.needs == set(required)
    assert value.requires_grad == bool(required)
    if required:
        value.backward()
    wanted = {key: tensors[key] for key in required}
    assert max(errors(value, wanted, want).values()) < EXACT
    assert all(t.grad is None for key, t in tensors.items() if key not in required)


@pytest.mark.parametrize("schedule", ["recompute", "spill", "retain", "dense"])
def test_finite_differences_agree_with_every_schedule(schedule: str) -> None:
    """They know nothing of formulas.  65 rows are more than one tile."""
    x, y = embeddings(2, 65, 70, 3)
    loss = compiled("clip", schedule=schedule)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, y, s: loss(x, y, logit_scale=s), (x, y, scale), fast_mode=True
    )
    assert loss.plan.schedule == schedule


@pytest.mark.parametrize("schedule", ["spill", "panel"])
def test_finite_differences_agree_with_fused_schedules(schedule: str) -> None:
    x, y = embeddings(3, 5, 8, 4)
    given = scalars("siglip")
    loss = compiled("siglip", schedule=schedule)
    assert torch.autograd.gradcheck(
        lambda x, y, s, b: loss(x, y, logit_scale=s, logit_bias=b), (x, y, *given.values())
    )


def test_finite_differences_agree_in_fp32(name: str) -> None:
    """Directional derivatives of scalars whose inputs are fp32: differences of a float64 formula.

    A central difference of step h errs by h² times a third derivative, here below 1e-6.
    """
    x, y = embeddings(4, dtype=torch.float32)
    given = scalars(name, dtype=torch.float32)
    compiled(name)(x, y, **given).backward()
    doubles = x.detach().double(), y.detach().double()
    for key in given:
        step = {k: 1e-4 * (k == key) for k in given}
        ends = [
            dense(name, *doubles, **{k: v.item() + sign * step[k] for k, v in given.items()})
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / 2e-4
        assert error(given[key].grad, slope) < 4e-6


def test_any_gradient_may_arrive(name: str) -> None:
    """The value is scaled, negated and added to itself, as mixed-precision training does."""
    x, y = embeddings(5)
    given = scalars(name)
    tensors = {"x": x, "y": y, **given}
    value = compiled(name)(x, y, **given)
    want = expected(name, **tensors)
    (65536.0 * value - 3.0 * value.square()).backward()
    factor = 65536.0 - 6.0 * want[0]
    for key, tensor in tensors.items():
        assert error(tensor.grad, factor * want[1][key]) < EXACT


def test_a_scaled_fp32_loss_has_exactly_scaled_gradients(name: str) -> None:
    """A power of two changes no bit but the exponent."""
    found = []
    for factor in (1.0, 2.0**12):
        x, y = embeddings(6, dtype=torch.float32)
        given = scalars(name, dtype=torch.float32)
        (factor * compiled(name)(x, y, **given)).backward()
        found.append([t.grad / factor for t in (x, y, *given.values())])  # type: ignore[operator]
    for plain, scaled in zip(*found, strict=True):
        assert torch.equal(plain, scaled)


def test_a_retained_graph_can_be_walked_again(name: str) -> None:
    x, y = embeddings(7)
    given = scalars(name)
    inputs = {"x": x, "y": y, **given}
    value = compiled(name)(x, y, **given)
    _, want = expected(name, **inputs)
    for factor in (1.0, -2.0, 0.5):
        seed = torch.tensor(factor, dtype=torch.float64)
        got = torch.autograd.grad(value, list(inputs.values()), seed, retain_graph=factor != 0.5)
        for gradient, reference in zip(got, want.values(), strict=True):
            assert error(gradient, factor * reference) < EXACT
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, [x])


def test_what_a_caller_does_to_a_gradient_stays_with_the_caller(name: str) -> None:
    """``zero_grad(set_to_none=False)`` and clipping work in place; the graph must not notice."""
    x, y = embeddings(8)
    value = compiled(name)(x, y, **LOSSES[name])
    _, want = expected(name, x=x, y=y, **scalars(name))
    value.backward(retain_graph=True)
    for tensor in (x, y):
        assert tensor.grad is not None
        tensor.grad.zero_()
    value.backward()
    assert error(x.grad, want["x"]) < EXACT
    assert error(y.grad, want["y"]) < EXACT


def test_gradients_accumulate_over_micro_batches(name: str) -> None:
    x, y = embeddings(9, 40, 40)
    loss = compiled(name)
    total_x, total_y = torch.zeros_like(x), torch.zeros_like(y)
    for start in (0, 10, 24):
        rows = slice(start, start + 14)
        (loss(x[rows], y[rows], **LOSSES[name]) / 3).backward()
        part = expected(name, x=x[rows], y=y[rows], **scalars(name))[1]
        total_x[rows] += part["x"] / 3
        total_y[rows] += part["y"] / 3
    assert error(x.grad, total_x.detach()) < EXACT
    assert error(y.grad, total_y.detach()) < EXACT


def test_gradients_flow_into_what_made_the_inputs(name: str) -> None:
    """Inputs that are not leaves, one of which is made of the other's encoder."""
    generator = torch.Generator().manual_seed(10)
    weight = torch.randn(12, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    first, second = (torch.randn(k, 12, generator=generator, dtype=torch.float64) for k in (37, 53))

    def value(loss: object) -> Tensor:
        x, y = torch.tanh(first @ weight), torch.tanh(second @ weight)
        others = {k: v for k, v in LOSSES[name].items() if k != "logit_scale"}
        return loss(x=x, y=y, logit_scale=log_scale.exp(), **others)  # type: ignore[operator]

    leaves = [weight, log_scale]
    want = torch.autograd.grad(value(lambda **given: dense(name, **given)), leaves)
    got = torch.autograd.grad(value(compiled(name)), leaves)
    for ours, theirs in zip(got, want, strict=True):
        assert error(ours, theirs) < EXACT


def test_one_tensor_as_both_operands(name: str) -> None:
    x, _ = embeddings(11)
    compiled(name)(x, x, **LOSSES[name]).backward()
    other = x.detach().clone().requires_grad_()
    dense(name, other, other, **LOSSES[name]).backward()
    assert other.grad is not None
    assert error(x.grad, other.grad) < EXACT


def test_hooks_see_and_change_gradients(name: str) -> None:
    x, y = embeddings(12)
    seen: list[Tensor] = []
    x.register_hook(lambda g: seen.append(g.clone()) or -g)
    after: list[Tensor] = []
    y.register_post_accumulate_grad_hook(lambda t: after.append(t.grad.clone()))  # type: ignore[union-attr]
    value = compiled(name)(x, y, **LOSSES[name])
    value.register_hook(lambda g: 2 * g)
    value.backward()
    _, want = expected(name, x=x, y=y, **scalars(name))
    assert error(seen[0], 2 * want["x"]) < EXACT
    assert error(x.grad, -2 * want["x"]) < EXACT
    assert error(after[0], 2 * want["y"]) < EXACT


def test_an_input_that_changed_since_is_never_used_silently(name: str) -> None:
    """Either PyTorch's error, or the gradient where the forward was."""
    x, y = embeddings(13)
    _, want = expected(name, x=x, y=y, **scalars(name))
    value = compiled(name)(x, y, **LOSSES[name])
    with torch.no_grad():
        x.mul_(2)
    try:
        value.backward()
    except RuntimeError as raised:
        assert "modified by an inplace operation" in str(raised)
    else:
        assert error(y.grad, want["y"]) < EXACT


def test_inside_an_activation_checkpoint(name: str) -> None:
    """The forward runs twice, the second time in the backward."""
    x, y = embeddings(14)
    loss = compiled(name)
    call = lambda a, b: loss(a.tanh(), b, **LOSSES[name])  # noqa: E731
    checkpoint(call, x, y, use_reentrant=False).backward()
    other = x.detach().clone().requires_grad_()
    dense(name, other.tanh(), y.detach(), **LOSSES[name]).backward()
    assert other.grad is not None
    assert error(x.grad, other.grad) < EXACT


def test_what_was_given_is_left_as_it_was(name: str) -> None:
    x, y = embeddings(15)
    given = scalars(name)
    before = [t.detach().clone() for t in (x, y, *given.values())]
    compiled(name)(x, y, **given).backward()
    for tensor, copy in zip((x, y, *given.values()), before, strict=True):
        assert torch.equal(tensor, copy)
