"""A compiled loss under autograd behaves like any other differentiable function of PyTorch."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_compiler import compile_loss
from cl_compiler.runtime.function import CompiledLoss

MACHINE, BUDGET = "xeon-amx-2c", "256MiB"
LOSSES = {  # one whose backward recomputes, one whose forward makes the gradients
    "clip": {"logit_scale": 14.3},
    "siglip": {"logit_scale": 10.0, "logit_bias": -5.0},
}
_compiled: dict[str, CompiledLoss] = {}


def compiled(name: str) -> CompiledLoss:
    """One object for the whole file: its variants are reused."""
    if name not in _compiled:
        _compiled[name] = compile_loss(MACHINE, BUDGET, loss=name)
    return _compiled[name]


def dense(name: str, x: Tensor, y: Tensor, logit_scale, logit_bias=0.0) -> Tensor:
    """The textbook formula, in the precision of its inputs."""
    logits = logit_scale * (x @ y.T) + logit_bias
    target = torch.arange(len(x))
    if name == "clip":
        columns = F.cross_entropy(logits.T[: len(x)], target)
        return (F.cross_entropy(logits, target) + columns) / 2
    sign = 2 * torch.eye(*logits.shape, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(x)


def embeddings(seed: int, m: int = 37, n: int = 53, d: int = 24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(k, d, generator=generator) for k in (m, n))
    y = noise.clone()
    y[:m] = x[:n] + 0.5 * noise[:m]
    return tuple(F.normalize(t, dim=1).to(dtype).requires_grad_() for t in (x, y))


def scalars(name: str, *, shape=(), dtype=torch.float32) -> dict[str, Tensor]:
    return {k: torch.full(shape, v, dtype=dtype).requires_grad_() for k, v in LOSSES[name].items()}


def expected(name: str, grad_output: float = 1.0, **tensors) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients of the dense formula in float64."""
    doubles = {
        k: v.detach().double().reshape(() if v.numel() == 1 else v.shape).requires_grad_()
        for k, v in tensors.items()
    }
    value = dense(name, **doubles)
    grads = torch.autograd.grad(value, list(doubles.values()), torch.tensor(grad_output).double())
    return value.detach(), dict(zip(doubles, grads, strict=True))


def close(got: Tensor, want: Tensor, tolerance: float = 5e-6) -> None:
    error = (got.double() - want.reshape(got.shape)).norm() / want.norm()
    assert error <= tolerance, f"relative error {error:.1e}"


# ---- which gradients ---------------------------------------------------------------------------

SUBSETS = [
    (name, subset)
    for name, values in LOSSES.items()
    for size in range(3 + len(values))
    for subset in itertools.combinations(("x", "y", *values), size)
]


@pytest.mark.parametrize(("name", "required"), SUBSETS)
def test_exactly_the_required_gradients(name, required):
    x, y = embeddings(1)
    tensors = {"x": x, "y": y, **scalars(name)}
    for key, tensor in tensors.items():
        tensor.requires_grad_(key in required)
    value = compiled(name)(**tensors)
    want_value, want = expected(name, 3.0, **tensors)
    close(value.detach(), want_value)
    assert value.requires_grad == bool(required)
    if required:
        (3.0 * value).backward()
    for key, tensor in tensors.items():
        if key in required:
            close(tensor.grad, want[key])
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_scalars_keep_their_shape_and_dtype(name, shape, dtype):
    x, y = embeddings(2)
    given = scalars(name, shape=shape, dtype=dtype)
    compiled(name)(x, y, **given).backward()
    _, want = expected(name, x=x, y=y, **given)
    for key, tensor in given.items():
        assert (tensor.grad.shape, tensor.grad.dtype) == (shape, dtype)
        close(tensor.grad, want[key], 5e-6 if dtype != torch.bfloat16 else 2**-8)


@pytest.mark.parametrize("name", LOSSES)
def test_floats_and_integers_are_scalars(name):
    x, y = embeddings(3)
    numbers = dict.fromkeys(LOSSES[name], 2)
    value = compiled(name)(x, y, **numbers)
    want, _ = expected(name, x=x, y=y, **{k: torch.tensor(2.0) for k in numbers})
    close(value.detach(), want)
    assert value.shape == () and value.dtype == torch.float32


# ---- how inputs lie in memory ------------------------------------------------------------------

LAYOUTS = {
    "every other row": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
    "every other column": lambda t: torch.stack([t, t], 2).flatten(1)[:, ::2],
    "transposed": lambda t: t.T.contiguous().T,
    "a slice of wider rows": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "expanded rows": lambda t: t[:1].expand(len(t), -1),
    "shifted storage": lambda t: torch.cat([t[:1], t])[1:],
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(name, layout):
    x, y = embeddings(4, 32, 32)
    value = compiled(name)(LAYOUTS[layout](x), LAYOUTS[layout](y), **LOSSES[name])
    value.backward()
    xd, yd = (t.detach().double().requires_grad_() for t in (x, y))
    want = dense(name, LAYOUTS[layout](xd), LAYOUTS[layout](yd), **LOSSES[name])
    want.backward()
    close(value.detach(), want.detach())
    close(x.grad, xd.grad, 2e-5 if layout == "expanded rows" else 5e-6)
    close(y.grad, yd.grad, 2e-5 if layout == "expanded rows" else 5e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_one_tensor_as_both_operands(name):
    """Gradients of both sides add up in the one leaf."""
    x, _ = embeddings(5)
    compiled(name)(x, x, **LOSSES[name]).backward()
    xd = x.detach().double().requires_grad_()
    dense(name, xd, xd, **LOSSES[name]).backward()
    close(x.grad, xd.grad)


def test_inputs_are_left_as_they_were():
    x, y = embeddings(6)
    before = x.detach().clone(), y.detach().clone()
    compiled("clip")(x, y, logit_scale=14.3).backward()
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


# ---- modes and graphs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_backward_twice_with_a_retained_graph(name):
    x, y = embeddings(7)
    given = scalars(name)
    value = compiled(name)(x, y, **given)
    inputs = [x, y, *given.values()]
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    second = torch.autograd.grad(value, inputs, torch.tensor(-2.0), retain_graph=True)
    third = torch.autograd.grad(value, inputs)
    for a, b, c in zip(first, second, third, strict=True):
        close(b, -2.0 * a.double(), 1e-6)
        assert torch.equal(a, c)


@pytest.mark.parametrize("name", LOSSES)
def test_a_graph_that_was_not_retained_is_gone(name):
    x, y = embeddings(7)
    value = compiled(name)(x, y, **scalars(name))
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@pytest.mark.parametrize("name", LOSSES)
def test_two_forwards_before_any_backward(name):
    """What a call saved belongs to the call, whichever backward comes first."""
    pairs = [embeddings(seed) for seed in (8, 9)]
    values = [compiled(name)(x, y, **LOSSES[name]) for x, y in pairs]
    values[1].backward()
    values[0].backward()
    for x, y in pairs:
        _, want = expected(name, x=x, y=y, **scalars(name))
        close(x.grad, want["x"])
        close(y.grad, want["y"])


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_are_refused_in_words(name):
    x, y = embeddings(10)
    value = compiled(name)(x, y, **LOSSES[name])
    (first,) = torch.autograd.grad(value, [x], create_graph=True)
    close(first.detach(), expected(name, x=x, y=y, **scalars(name))[1]["x"])
    with pytest.raises(RuntimeError, match=f"{name}.*second derivatives.*densely"):
        first.square().sum().backward()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(name, mode):
    x, y = embeddings(11)
    with mode():
        value = compiled(name)(x, y, **scalars(name))
    assert not value.requires_grad
    assert compiled(name).plan.needs == frozenset()
    close(value.clone(), expected(name, x=x, y=y, **scalars(name))[0])


@pytest.mark.parametrize("name", LOSSES)
def test_inside_an_autocast_region(name):
    """fp32 inputs stay fp32, whatever autocast would make of a product."""
    x, y = embeddings(12)
    plain = compiled(name)(x, y, **LOSSES[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = compiled(name)(x, y, **LOSSES[name])
        value.backward()
    assert torch.equal(value, plain) and value.dtype == torch.float32
    close(x.grad, expected(name, x=x, y=y, **scalars(name))[1]["x"])


def test_behind_encoders_under_autocast():
    """What training does: bf16 activations from autocast, a scale that is a parameter."""
    torch.manual_seed(13)
    encoder = torch.nn.Linear(10, 16)
    log_scale = torch.nn.Parameter(torch.tensor(2.66))
    inputs, others = torch.randn(40, 10), torch.randn(40, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, y = encoder(inputs), encoder(others)
        assert x.dtype == torch.bfloat16
        value = compiled("clip")(x, y, logit_scale=log_scale.exp())
    value.backward()
    expected_value = dense("clip", x.double(), y.double(), log_scale.double().exp())
    assert abs(value.item() - expected_value.item()) < 0.02 * expected_value.item()
    (want,) = torch.autograd.grad(expected_value, [encoder.weight])
    close(encoder.weight.grad, want.double(), 0.05)
    assert log_scale.grad is not None and torch.isfinite(log_scale.grad)


@pytest.mark.parametrize("name", LOSSES)
def test_inside_a_function_that_torch_compile_sees(name):
    x, y = embeddings(14)

    def training_loss(x, y):
        return 2 * compiled(name)(F.normalize(x, dim=1), y, **LOSSES[name]) + 1

    got = torch.compile(training_loss, backend="eager")(x, y)
    got.backward()
    torch.testing.assert_close(got.detach(), training_loss(x, y).detach())
    xd = x.detach().double().requires_grad_()
    (2 * dense(name, F.normalize(xd, dim=1), y.detach().double(), **LOSSES[name])).backward()
    close(x.grad, xd.grad, 2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_two_threads_at_once(name):
    """Each thread gets the gradients of its own inputs."""
    found: dict[int, float] = {}

    def work(seed: int) -> None:
        worst = 0.0
        for repeat in range(5):
            x, y = embeddings(100 * seed + repeat)
            compiled(name)(x, y, **LOSSES[name]).backward()
            _, want = expected(name, x=x, y=y, **scalars(name))
            worst = max(worst, float((x.grad.double() - want["x"]).norm() / want["x"].norm()))
        found[seed] = worst

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {1, 2} and max(found.values()) < 5e-6


def test_gradcheck_in_float64():
    """Finite differences know nothing of formulas."""
    x, y = embeddings(15, 5, 7, 4, torch.float64)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = compiled("clip")
    assert torch.autograd.gradcheck(lambda x, y, s: loss(x, y, logit_scale=s), (x, y, scale))
