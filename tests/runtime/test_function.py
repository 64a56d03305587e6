"""``CompiledLoss`` behaves as a PyTorch user expects; float64, so that bounds need no tuning."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from cl_compiler import compile_loss
from cl_compiler import lang as cl
from cl_compiler.api import find_loss
from cl_compiler.errors import ArgumentError, NoPositiveError, NotPlannedError
from cl_compiler.lang.reference import evaluate
from cl_compiler.runtime.function import CompiledLoss

SCALARS = {"clip": {"logit_scale": 5.0}, "siglip": {"logit_scale": 5.0, "logit_bias": -1.0}}
TOLERANCE = 1e-10


@pytest.fixture(params=sorted(SCALARS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def compiled(name: str) -> CompiledLoss:
    return compile_loss("auto", "64MiB", loss=name)


def features(seed: int, rows: int = 65, cols: int = 100, width: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def unit(length: int) -> Tensor:
        raw = torch.randn(length, width, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(raw, dim=1).requires_grad_()

    return unit(rows), unit(cols)


def scalars(name: str, shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
    return {
        n: torch.full(shape, v, dtype=torch.float64, requires_grad=True)
        for n, v in SCALARS[name].items()
    }


def expected(name: str, x: Tensor, y: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    """The reference's value and its gradients with respect to x, y and the scalars."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, y, *given.values())]
    parameters = {n: t.reshape(()) for n, t in zip(given, leaves[2:], strict=True)}
    value = evaluate(find_loss(name), {"x": leaves[0], "y": leaves[1]}, parameters)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).norm()) <= TOLERANCE * max(float(want.norm()), 1e-3)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_value_and_all_gradients(name: str, shape: tuple[int, ...]) -> None:
    x, y = features(0)
    given = scalars(name, shape)
    value = compiled(name)(x, y, **given)
    got = torch.autograd.grad(value, [x, y, *given.values()])
    want = expected(name, x, y, given)
    for ours, theirs in zip([value.detach(), *got], want, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("needed", ["x", "y", "logit_scale"])
def test_only_what_requires_a_gradient_is_differentiated(name: str, needed: str) -> None:
    x, y = features(1)
    given = scalars(name)
    everything = {"x": x, "y": y, **given}
    for key, tensor in everything.items():
        tensor.requires_grad_(key == needed)
    loss = compiled(name)
    (got,) = torch.autograd.grad(loss(x, y, **given), [everything[needed]])
    assert loss.plan.needs == frozenset({needed})
    index = list(everything).index(needed)
    assert_close(got, expected(name, x, y, given)[1 + index])


def test_backward_twice_gives_twice_the_gradient(name: str) -> None:
    x, y = features(2)
    value = compiled(name)(x, y, **SCALARS[name])
    value.backward(retain_graph=True)
    once = x.grad.clone()  # type: ignore[union-attr]
    value.backward()
    assert_close(x.grad, 2 * once)  # type: ignore[arg-type]


def test_two_forwards_before_one_backward_do_not_share_state(name: str) -> None:
    loss = compiled(name)
    (x, y), (u, v) = features(3), features(4)
    first, second = loss(x, y, **SCALARS[name]), loss(u, v, **SCALARS[name])
    (2 * first + 3 * second).backward()
    given = {n: torch.tensor(s, dtype=torch.float64) for n, s in SCALARS[name].items()}
    assert_close(x.grad, 2 * expected(name, x, y, given)[1])  # type: ignore[arg-type]
    assert_close(u.grad, 3 * expected(name, u, v, given)[1])  # type: ignore[arg-type]


def test_strided_inputs(name: str) -> None:
    x, y = features(5)
    wide = torch.zeros(65, 48, dtype=torch.float64)
    wide[:, ::2] = x.detach()
    given = {n: torch.tensor(s, dtype=torch.float64) for n, s in SCALARS[name].items()}
    want = expected(name, x, y, given)
    for strided in (wide[:, ::2], x.detach().T.contiguous().T):
        leaf = strided.requires_grad_()
        value = compiled(name)(leaf, y, **SCALARS[name])
        assert_close(value.detach(), want[0])
        assert_close(torch.autograd.grad(value, leaf)[0], want[1])


def test_no_grad_plans_without_gradients(name: str) -> None:
    x, y = features(6)
    loss = compiled(name)
    with torch.no_grad():
        value = loss(x, y, **SCALARS[name])
    assert not value.requires_grad
    assert loss.plan.needs == frozenset()


def test_second_derivatives_are_refused_in_words(name: str) -> None:
    x, y = features(7)
    (first,) = torch.autograd.grad(compiled(name)(x, y, **SCALARS[name]), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        first.square().sum().backward()


def test_nan_and_infinity_propagate(name: str) -> None:
    for bad in (float("nan"), float("inf")):
        x, y = features(8)
        with torch.no_grad():
            x[3, 2] = bad
        value = compiled(name)(x, y, **SCALARS[name])
        given = {n: torch.tensor(s, dtype=torch.float64) for n, s in SCALARS[name].items()}
        want = evaluate(find_loss(name), {"x": x.detach(), "y": y.detach()}, given)
        assert not torch.isfinite(value)
        assert torch.isnan(value) == torch.isnan(want)


@pytest.mark.parametrize("size", [8, 64, 200])
@pytest.mark.parametrize("schedule", ["dense", "spill", "recompute"])
def test_a_scale_that_is_nan_is_not_taken_for_one(name: str, schedule: str, size: int) -> None:
    """As MKL takes such a factor of a product, from 16 rows on."""
    x, y = features(18, size, size, 24)
    loss = compile_loss("auto", "16MiB", loss=name, schedule=schedule)
    value = loss(x, y, **SCALARS[name] | {"logit_scale": float("nan")})
    value.backward()
    assert value.isnan() and x.grad.isnan().all() and y.grad.isnan().all()


@cl.define_loss
def weighted_both(sim, logit_scale, weight):
    """A scalar that is only a factor: gradients need not see it in any tile."""
    s = logit_scale * sim
    row = cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows)
    col = cl.logsumexp(s, over=cl.rows) - cl.at_positive(s, on=cl.cols)
    return weight * (cl.mean(row, over=cl.rows) + cl.mean(col, over=cl.cols))


@pytest.mark.parametrize("size", [8, 200])
@pytest.mark.parametrize("schedule", ["dense", "spill", "recompute", "retain"])
def test_a_factor_that_is_nan_reaches_the_gradients(schedule: str, size: int) -> None:
    x, y = (f.detach().float().requires_grad_() for f in features(19, size, size, 24))
    loss = compile_loss("auto", "16MiB", loss=weighted_both, schedule=schedule)
    value = loss(x, y, logit_scale=3.0, weight=torch.tensor(float("nan")))
    value.backward()
    assert value.isnan() and x.grad.isnan().all() and y.grad.isnan().all()


def test_pickled_and_copied_losses_still_work(name: str) -> None:
    x, y = features(9)
    loss = compiled(name)
    value = loss(x, y, **SCALARS[name])
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert_close(other(x, y, **SCALARS[name]).detach(), value.detach())
    assert not loss.state_dict()
    assert not list(loss.parameters())


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 63, 100), (63, 63, 384), (65, 65, 640)], ids=str)
def test_any_size(name: str, size: tuple[int, int, int]) -> None:
    x, y = features(10, *size)
    given = scalars(name)
    value = compiled(name)(x, y, **given)
    got = torch.autograd.grad(value, [x, y])
    want = expected(name, x, y, given)
    assert_close(value.detach(), want[0])
    assert_close(got[0], want[1])
    assert_close(got[1], want[2])


def test_without_a_group_there_is_nothing_to_close() -> None:
    loss = compiled("clip")
    x, y = features(12)
    loss.close()
    before = loss(x, y, logit_scale=1.0)
    loss.close()
    assert torch.equal(loss(x, y, logit_scale=1.0), before)


def test_mistakes_are_named() -> None:
    loss = compiled("clip")
    x, y = features(11)
    with pytest.raises(NotPlannedError, match="problem="):
        _ = loss.plan
    with pytest.raises(ArgumentError, match="is empty"):
        loss(x[:0], y, logit_scale=1.0)
    with pytest.raises(ArgumentError, match="may not be more rows"):
        loss(y, x, logit_scale=1.0)
    with pytest.raises(ArgumentError, match="missing: logit_scale"):
        loss(x, y)
    with pytest.raises(ArgumentError, match="unknown: scale"):
        loss(x, y, scale=1.0, logit_scale=1.0)
    with pytest.raises(ArgumentError, match="D must be equal"):
        loss(x, y[:, :8], logit_scale=1.0)
    ids = torch.arange(65), torch.arange(100) + 1000
    with pytest.raises(NoPositiveError):
        loss(x, y, logit_scale=1.0, row_ids=ids[0], col_ids=ids[1])
