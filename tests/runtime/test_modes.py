"""A compiled loss where training code puts it: autocast, compiled code, threads, DDP, copies."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_compiler.runtime.function import CompiledLoss
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


@pytest.fixture(params=LOSSES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- grad modes and autocast -------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(name: str, mode: type) -> None:
    x, y = embeddings(1)
    loss = compiled(name)
    with mode():
        value = loss(x, y, **scalars(name))
    assert not value.requires_grad
    assert loss.plan.needs == frozenset()
    assert error(value.clone(), expected(name, x=x, y=y, **scalars(name))[0]) < EXACT


def test_a_call_without_gradients_does_not_spoil_the_next(name: str) -> None:
    x, y = embeddings(2)
    loss = compiled(name)
    with torch.no_grad():
        quiet = loss(x, y, **LOSSES[name])
    value = loss(x, y, **LOSSES[name])
    value.backward()
    want = expected(name, x=x, y=y, **scalars(name))
    assert max(errors(value, {"x": x, "y": y}, want).values()) < EXACT
    assert error(quiet, value.detach()) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing_inside_the_loss(name: str, dtype: torch.dtype) -> None:
    """fp32 inputs stay fp32: a bf16 product of them would err in the third digit."""
    found = []
    for enabled in (False, True):
        x, y = embeddings(3, dtype=torch.float32)
        given = scalars(name, dtype=torch.float32)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            value = compiled(name)(x, y, **given)
            value.backward()
        assert value.dtype == torch.float32
        found.append([value.detach(), *(t.grad for t in (x, y, *given.values()))])
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)


def test_behind_encoders_under_autocast(name: str) -> None:
    """bf16 activations, a scale that is a parameter: gradients are fp32, near float64's.

    Against the same bf16 activations, so that only the returned gradient's rounding and the
    encoder's own product are between: three roundings of 2**-8.
    """
    torch.manual_seed(4)
    encoder, log_scale = nn.Linear(10, 24), nn.Parameter(torch.tensor(1.6))
    first, second = torch.randn(40, 10), torch.randn(40, 10)
    others = {k: v for k, v in LOSSES[name].items() if k != "logit_scale"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, y = encoder(first), encoder(second)
        value = compiled(name)(x, y, logit_scale=log_scale.exp(), **others)
    value.backward()
    assert x.dtype == torch.bfloat16 and value.dtype == torch.float32
    assert encoder.weight.grad is not None and encoder.weight.grad.dtype == torch.float32
    exact = (t.detach().double().requires_grad_() for t in (x, y))
    leaves = [*exact, log_scale.detach().double().requires_grad_()]
    want = dense(name, *leaves[:2], logit_scale=leaves[2].exp(), **others)
    d_x, d_y, d_scale = torch.autograd.grad(want, leaves)
    weight = d_x.T @ first.double() + d_y.T @ second.double()
    assert error(value, want.detach()) < 1e-5
    assert error(encoder.weight.grad, weight) < 3 * 2**-8
    assert log_scale.grad is not None and error(log_scale.grad, d_scale) < 2**-8


# ---- torch.compile -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inside_a_function_that_is_compiled(name: str, backend: str) -> None:
    """The loss is a break between two graphs; values and gradients are those of plain code."""
    torch._dynamo.reset()
    loss = compiled(name)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return 2 * loss(F.normalize(x.tanh(), dim=1), y, **LOSSES[name]) + x.sum()

    found = []
    for function in (step, torch.compile(step, backend=backend)):
        x, y = embeddings(5)
        value = function(x, y)
        value.backward()
        found.append((value.detach(), x.grad, y.grad))
    for plain, ours in zip(*found, strict=True):
        assert plain is not None and error(ours, plain) < EXACT


def test_compiling_the_loss_itself(name: str) -> None:
    torch._dynamo.reset()
    x, y = embeddings(6)
    value = torch.compile(compiled(name), backend="eager")(x, y, **LOSSES[name])
    value.backward()
    want = expected(name, x=x, y=y, **scalars(name))
    assert max(errors(value, {"x": x, "y": y}, want).values()) < EXACT


# ---- threads and processes ---------------------------------------------------------------------


def test_threads_with_shapes_of_their_own(name: str) -> None:
    """One object, many threads: each gets its own variant, value and gradients."""
    loss, start = compiled(name), threading.Barrier(4)
    worst: dict[int, float] = {}

    def work(seed: int) -> None:
        start.wait()
        found = []
        for repeat in range(6):
            x, y = embeddings(10 * seed + repeat, 11 * seed + repeat % 2, 61 + seed)
            value = loss(x, y, **LOSSES[name])
            value.backward()
            want = expected(name, x=x, y=y, **scalars(name))
            found.append(max(errors(value, {"x": x, "y": y}, want).values()))
        worst[seed] = max(found)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(worst) == {1, 2, 3, 4}
    assert max(worst.values()) < EXACT


def test_backward_in_another_thread(name: str) -> None:
    x, y = embeddings(7)
    value = compiled(name)(x, y, **LOSSES[name])
    thread = threading.Thread(target=value.backward)
    thread.start()
    thread.join()
    want = expected(name, x=x, y=y, **scalars(name))
    assert max(errors(value, {"x": x, "y": y}, want).values()) < EXACT


class Towers(nn.Module):
    """Two encoders and the loss as a submodule, the way training scripts have it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.image, self.text = (nn.Linear(6, 16, dtype=torch.float64) for _ in range(2))
        self.scalars = nn.ParameterDict(
            {k: nn.Parameter(v.detach()) for k, v in scalars(name).items()}
        )
        self.loss = compiled(name)

    def embed(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        value: Tensor = self.loss(*self.embed(images, texts), **self.scalars)
        return value


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(30, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second


def reference_gradients(name: str, model: Towers, data: tuple[Tensor, Tensor]) -> list[Tensor]:
    value = dense(name, *model.embed(*data), **model.scalars)
    return list(torch.autograd.grad(value, list(model.parameters())))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch without gloo")
@pytest.mark.skipif(sys.platform != "linux", reason="the loopback device has another name")
def test_under_distributed_data_parallel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """World size one: DDP's hooks take the gradients, in buckets, as they come."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # no name service is asked
    store = torch.distributed.HashStore()
    limit = timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=limit)
    try:
        model = Towers(name)
        wants = [reference_gradients(name, model, batch(seed)) for seed in (20, 21)]
        gots = [gradients_of_wrapped(model, seed) for seed in (20, 21)]
    finally:
        torch.distributed.destroy_process_group()
    for got, want in zip(gots, wants, strict=True):
        for a, b in zip(got, want, strict=True):
            assert error(a, b) < EXACT


def gradients_of_wrapped(model: Towers, seed: int) -> list[Tensor]:
    """The wrapper is gone before its group: the last owner of a group joins the group's threads,
    and a wrapper would do so with the interpreter locked, for ever if one of them needs it."""
    wrapped = nn.parallel.DistributedDataParallel(model)
    model.zero_grad()
    wrapped(*batch(seed)).backward()
    return [p.grad.clone() for p in model.parameters()]


# ---- a module among modules --------------------------------------------------------------------


def test_state_of_a_model_does_not_know_the_loss(name: str) -> None:
    """Checkpoints of a model with the loss load into one without, and the other way round."""
    model = Towers(name)
    keys = {"image.weight", "image.bias", "text.weight", "text.bias"}
    assert set(model.state_dict()) == keys | {f"scalars.{k}" for k in LOSSES[name]}
    model(*batch(22)).backward()
    other = Towers(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(model.state_dict(), strict=True)
    assert error(other(*batch(22)), model(*batch(22)).detach()) < EXACT
    assert list(model.loss.parameters()) == list(model.loss.buffers()) == []


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_used_model_train_alike(name: str, way: str) -> None:
    model = Towers(name)
    model(*batch(23)).backward()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    for changed in (model, other):
        changed.zero_grad()
        changed(*batch(24)).backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.grad is not None and error(two.grad, one.grad) < EXACT
    assert isinstance(other.loss, CompiledLoss) and other.loss is not model.loss


def test_moving_and_switching_a_model_leaves_the_loss_as_it_is(name: str) -> None:
    model = Towers(name)
    before = model(*batch(25))
    for changed in (model.eval(), model.train(), model.to("cpu"), model.float().double()):
        changed.zero_grad()
    assert error(model(*batch(25)), before.detach()) < 1e-6  # parameters went through fp32
    assert name in repr(model)
