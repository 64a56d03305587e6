"""``verify=True`` looks before it trusts, and leaves no trace; requests that mean what they say."""

import pytest
import torch

import cl_compiler as cl
from cl_compiler import compile_loss
from cl_compiler.errors import ArgumentError, HardwareError
from cl_compiler.hardware import load_hardware
from cl_compiler.plan.precision import products_of
from cl_compiler.verify import SAMPLE_ROWS


def pairs(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(rows, 24, generator=generator), dim=1)
    y = torch.nn.functional.normalize(torch.randn(cols, 24, generator=generator), dim=1)
    return x.requires_grad_(), y.requires_grad_()


def test_the_plan_is_the_callers_not_the_samples():
    x, y = pairs(300, 300)
    loss_fn = compile_loss("auto", "16MiB", verify=True)
    value = loss_fn(x, y, logit_scale=10.0)
    assert (loss_fn.plan.problem.M, loss_fn.plan.problem.N) == (300, 300)
    assert value == compile_loss("auto", "16MiB")(x, y, logit_scale=10.0)


def test_a_failed_check_is_not_forgotten(monkeypatch):
    def wrong(*_, **__):
        return torch.tensor(1e6, dtype=torch.float64)

    monkeypatch.setattr("cl_compiler.lang.reference.evaluate", wrong)
    x, y = pairs(9, 11)
    loss_fn = compile_loss("auto", "16MiB", verify=True)
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="please report"):
            loss_fn(x, y, logit_scale=10.0)
    monkeypatch.undo()
    assert torch.isfinite(loss_fn(x, y, logit_scale=10.0))


@pytest.mark.parametrize("loss", ["clip", "supcon"])
def test_ids_that_meet_late(loss):
    """No id of the first rows is among the first columns."""
    count = 4 * SAMPLE_ROWS
    ids = torch.arange(count)
    x, y = pairs(count, count)
    loss_fn = compile_loss("auto", "16MiB", loss=loss, verify=True)
    if loss == "supcon":
        z, ids = torch.cat((x, y)), torch.cat((ids, ids.flip(0)))
        assert torch.isfinite(loss_fn(z, logit_scale=10.0, ids=ids))
    else:
        value = loss_fn(x, y, logit_scale=10.0, row_ids=ids, col_ids=ids.flip(0))
        assert torch.isfinite(value)


def test_verification_sees_a_wrong_kernel(monkeypatch):
    from cl_compiler.runtime.loader import load_source

    def broken(source, name, path=None):
        source = source.replace("value = torch.as_tensor(", "value = 1.01 * torch.as_tensor(")
        return load_source(source, name)

    monkeypatch.setattr("cl_compiler.api.load_source", broken)
    x, y = pairs(40, 50)
    with pytest.raises(ArithmeticError, match="relative error"):
        compile_loss("auto", "16MiB", verify=True)(x, y, logit_scale=10.0)


@pytest.mark.parametrize("schedule", ["recompute", "spill", "panel", "retain", "dense"])
@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_a_fixed_schedule_serves_evaluation_too(loss, schedule):
    if (loss, schedule) == ("siglip", "retain"):
        pytest.skip("siglip forms its gradients in the forward sweep: it keeps nothing")
    x, y = pairs(70, 90)
    more = {"logit_bias": -3.0} if loss == "siglip" else {}
    loss_fn = compile_loss("auto", "16MiB", loss=loss, schedule=schedule)
    trained = loss_fn(x, y, logit_scale=10.0, **more)
    assert loss_fn.plan.schedule == schedule
    with torch.no_grad():
        evaluated = loss_fn(x, y, logit_scale=10.0, **more)
    torch.testing.assert_close(evaluated, trained.detach(), rtol=1e-6, atol=0.0)


def test_a_plan_for_all_gradients_serves_a_fixed_scale():
    problem = cl.Problem(256, 256, 24)
    loss_fn = compile_loss("auto", "16MiB", problem=problem)
    x, y = pairs(256, 256)
    loss_fn(x, y, logit_scale=14.3).backward()
    assert len(loss_fn.variants) == 1
    assert x.grad is not None and y.grad is not None
    loss_fn(x, y.detach(), logit_scale=14.3)  # a locked tower saves a product: its own variant
    assert len(loss_fn.variants) == 2


def test_bf16_products_are_for_inputs_and_machines_that_have_them():
    epyc, xeon = load_hardware("xeon-amx-2c"), load_hardware("xeon-amx-2c")
    plain = tuple(r for r in epyc.gemm_flops_per_s if r[0] != "bfloat16")
    from dataclasses import replace

    epyc = replace(epyc, gemm_flops_per_s=plain)
    assert products_of("auto", "bfloat16", xeon) == "bf16"
    assert products_of("auto", "bfloat16", epyc) == "ieee"
    assert products_of("bf16", "float32", xeon) == "bf16"
    with pytest.raises(HardwareError, match=r"has no such products \(no AMX"):
        products_of("bf16", "float32", epyc)
    for dtype in ("float64", "float16"):
        with pytest.raises(ArgumentError, match=f"with {dtype} inputs"):
            products_of("bf16", dtype, xeon)
    with pytest.raises(ArgumentError, match="fp7"):
        products_of("fp7", "float32", xeon)
