"""How inputs lie in memory, which dtypes they have, and what counts as a scalar."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_compiler import compile_loss
from cl_compiler.errors import ArgumentError
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


def pooled(t: Tensor) -> Tensor:
    """Features as a channels-last network gives them: [M, D] with the strides of [M, D, 2, 2]."""
    images = t[:, :, None, None].expand(-1, -1, 2, 2).contiguous(memory_format=torch.channels_last)
    return images[:, :, 0, 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other row": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
    "every other column": lambda t: torch.stack([t, t], 2).flatten(1)[:, ::2],
    "transposed": lambda t: t.T.contiguous().T,
    "a slice of wider rows": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "rows in reverse": lambda t: t.flip(0),
    "one row, expanded": lambda t: t[:1].expand(len(t), -1),
    "one column, expanded": lambda t: t[:, :1].expand(-1, t.shape[1]),
    "overlapping rows": lambda t: t.flatten()[: 2 * len(t)].unfold(0, len(t), 1)[:32, :24],
    "shifted storage": lambda t: torch.cat([t[:1], t])[1:],
    "channels last": pooled,
    "permuted batch": lambda t: t.view(4, 8, -1).permute(1, 0, 2).flatten(0, 1),
}


@pytest.fixture(params=LOSSES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", [0, 1], ids=["x", "y"])
def test_layouts(name: str, layout: str, side: int) -> None:
    found = []
    for loss in (compiled(name), lambda *a, **k: dense(name, *a, **k)):
        leaves = embeddings(1, 32, 32)
        given = [LAYOUTS[layout](t) if i == side else t for i, t in enumerate(leaves)]
        value = loss(*given, **LOSSES[name])
        value.backward()
        found.append((value.detach(), *(t.grad for t in leaves)))
    for ours, theirs in zip(*found, strict=True):
        assert theirs is not None and error(ours, theirs) < EXACT


def test_views_of_one_storage_get_their_own_gradients(name: str) -> None:
    """x and y are interleaved columns of one leaf, as a fused projection makes them."""
    both, _ = embeddings(2, 40, 40, 48)
    compiled(name)(both[:, :24], both[:, 24:], **LOSSES[name]).backward()
    other = both.detach().clone().requires_grad_()
    dense(name, other[:, :24], other[:, 24:], **LOSSES[name]).backward()
    assert other.grad is not None
    assert error(both.grad, other.grad) < EXACT


# ---- dtypes ------------------------------------------------------------------------------------

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
SUBNORMAL = {torch.bfloat16: 0.0, torch.float16: 2.0**-25, torch.float32: 0.0}
"""Half of the smallest step of fp16: small gradients lose bits to it."""


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("precision", ["auto", "ieee"])
def test_sixteen_and_thirty_two_bits(name: str, dtype: torch.dtype, precision: str) -> None:
    """Beyond fp32's own error, a gradient is rounded once: to the dtype in which it is returned.

    Where products are bf16 ones (16-bit inputs and "auto"), gradient tiles are rounded, too.
    """
    x, y = embeddings(3, 130, 150, 48, dtype)
    given = scalars(name, dtype=torch.float32)
    tensors = {"x": x, "y": y, **given}
    value = compiled(name, precision=precision)(x, y, **given)
    value.backward()
    want = expected(name, **tensors)
    plain = {k: t.detach().float().requires_grad_() for k, t in tensors.items()}
    other = dense(name, **plain)
    other.backward()
    single = errors(other, plain, want)
    found = errors(value, tensors, want)
    assert value.dtype == torch.float32
    roundings = 2 if precision == "auto" and dtype == torch.bfloat16 else 1
    for key, bound in single.items():
        bound = max(2e-6, 3 * bound)
        if key in ("x", "y"):
            lost = SUBNORMAL[dtype] * tensors[key].numel() ** 0.5 / float(want[1][key].norm())
            bound += roundings * ROUNDING[dtype] + lost
            assert tensors[key].grad.dtype == dtype  # type: ignore[union-attr]
        assert found[key] <= bound, (found, single)


def test_operands_of_two_dtypes_are_promoted_as_pytorch_does(name: str) -> None:
    """And each gradient has its own operand's dtype."""
    for first, second, outer in (
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ):
        x, _ = embeddings(4, dtype=first)
        _, y = embeddings(4, dtype=second)
        value = compiled(name)(x, y, **LOSSES[name])
        value.backward()
        want = expected(name, x=x, y=y, **scalars(name))
        assert value.dtype == outer
        found = errors(value, {"x": x, "y": y}, want)
        for tensor, key in ((x, "x"), (y, "y")):
            assert tensor.grad is not None and tensor.grad.dtype == tensor.dtype
            assert found[key] <= 2e-6 + ROUNDING.get(tensor.dtype, 0.0)
        assert found["value"] <= 2e-6


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_other_dtypes_are_refused(bad: torch.dtype) -> None:
    x = torch.ones(4, 3).to(bad)
    with pytest.raises(ArgumentError, match=str(bad)):
        compiled("clip")(x, x, logit_scale=1.0)


@pytest.mark.parametrize("odd", ["x", "y"])
def test_integers_beside_floats_are_refused(odd: str) -> None:
    """They would be promoted, and have no gradient."""
    given = {"x": torch.ones(4, 3), "y": torch.ones(4, 3)}
    given[odd] = given[odd].long()
    with pytest.raises(ArgumentError, match=rf"clip: {odd} is torch.int64; operands .*\.float\(\)"):
        compiled("clip")(**given, logit_scale=1.0)


# ---- scalars -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scalars_keep_shape_and_dtype_in_their_gradients(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """5 and -1 are exact in any of these dtypes; the gradient is rounded once."""
    x, y = embeddings(5)
    given = scalars(name, shape=shape, dtype=dtype)
    compiled(name)(x, y, **given).backward()
    _, want = expected(name, x=x, y=y, **given)
    for key, tensor in given.items():
        assert tensor.grad is not None
        assert (tensor.grad.shape, tensor.grad.dtype) == (torch.Size(shape), dtype)
        assert error(tensor.grad, want[key]) <= ROUNDING.get(dtype, EXACT)


@pytest.mark.parametrize(
    "make",
    [int, float, torch.tensor, lambda v: torch.tensor([int(v)]), lambda v: torch.tensor(float(v))],
    ids=["int", "float", "integer tensor", "[1] integers", "fp32 tensor"],
)
def test_what_counts_as_a_number(name: str, make: Callable[[int], object]) -> None:
    x, y = embeddings(6)
    numbers = {k: int(v) for k, v in LOSSES[name].items()}
    given = {k: make(v) for k, v in numbers.items()}
    value = compiled(name)(x, y, **given)
    value.backward()
    exact = {k: torch.tensor(float(v), dtype=torch.float64) for k, v in numbers.items()}
    want = expected(name, x=x, y=y, **exact)
    assert value.shape == ()
    assert max(errors(value, {"x": x, "y": y}, want).values()) < EXACT


@pytest.mark.parametrize("wrong", [torch.ones(2), "5", None, [5.0]], ids=repr)
def test_what_does_not(wrong: object) -> None:
    x, y = embeddings(7)
    with pytest.raises(ArgumentError, match="logit_scale must be a number"):
        compiled("clip")(x, y, logit_scale=wrong)


def test_a_new_number_in_a_later_call_is_used(name: str) -> None:
    """Calls are recognised by their shapes; their values are not remembered."""
    x, y = embeddings(8)
    loss = compiled(name)
    for factor in (1.0, 7.5, 0.25):
        given = {k: factor * v for k, v in LOSSES[name].items()}
        want = dense(name, x, y, **given)
        assert error(loss(x, y, **given), want) < EXACT


# ---- ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_ids_of_any_integer_dtype_and_stride(dtype: torch.dtype) -> None:
    z, _ = embeddings(9, 48, 48)
    ids = (torch.arange(96, dtype=torch.int64) * 7 % 11).to(dtype)[::2]
    loss = compile_loss("auto", "64MiB", loss="supcon")
    value = loss(z, ids=ids, logit_scale=4.0)
    logits = (4.0 * z @ z.T).masked_fill(torch.eye(48, dtype=torch.bool), -torch.inf)
    same = (ids[:, None] == ids[None]) & ~torch.eye(48, dtype=torch.bool)
    chosen = F.log_softmax(logits, 1).masked_fill(~same, 0.0).sum(1)
    want = (-chosen / same.sum(1)).mean()
    assert error(value, want) < EXACT
    (got,) = torch.autograd.grad(value, z)
    assert error(got, torch.autograd.grad(want, z)[0]) < EXACT


def test_other_ids_in_a_later_call_are_used() -> None:
    z, _ = embeddings(10, 24, 24)
    loss = compile_loss("auto", "64MiB", loss="supcon")
    for ids in (torch.arange(24) // 2, torch.arange(24) % 4, torch.arange(24) // 2 + 90):
        fresh = compile_loss("auto", "64MiB", loss="supcon")(z, ids=ids, logit_scale=4.0)
        assert torch.equal(loss(z, ids=ids, logit_scale=4.0), fresh)
