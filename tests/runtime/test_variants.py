"""Which calls need code of their own, which share it; ``problem=``, ``verify=``, ``nonfinite=``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cl_compiler import Problem, compile_loss
from cl_compiler.api import find_loss
from cl_compiler.errors import ArgumentError, BudgetError, NonFiniteError, NotPlannedError
from cl_compiler.hardware import load_hardware
from cl_compiler.lang.reference import evaluate
from cl_compiler.runtime.function import CompiledLoss
from tests.runtime.dense_case import EXACT, LOSSES, compiled, dense, embeddings, error


def run(loss: CompiledLoss, *sizes: int, dtype: torch.dtype = torch.float64) -> float:
    """Call clip at some sizes; the error of its value."""
    x, y = embeddings(sum(sizes), *sizes, dtype=dtype)
    return error(loss(x, y, logit_scale=5.0), dense("clip", x, y, 5.0).detach().double())


def count_after(loss: CompiledLoss, *sizes: int, dtype: torch.dtype = torch.float64) -> int:
    assert run(loss, *sizes, dtype=dtype) < (EXACT if dtype == torch.float64 else 1e-5)
    return len(loss.variants)


def test_a_last_smaller_batch_of_the_same_class_needs_no_new_code() -> None:
    """60 and 40 rows lie between the same powers of two; 32 and 65 do not."""
    loss = compiled("clip")
    assert count_after(loss, 60, 100, 24) == 1
    assert count_after(loss, 60, 100, 24) == 1
    assert count_after(loss, 40, 70, 24) == 1
    assert count_after(loss, 32, 100, 24) == 2
    assert count_after(loss, 65, 100, 24) == 3
    assert count_after(loss, 60, 100, 24) == 3  # the first one is still there


def test_widths_dtypes_and_gradients_need_code_of_their_own() -> None:
    loss = compiled("clip")
    assert count_after(loss, 40, 50, 24) == 1
    assert count_after(loss, 40, 50, 25) == 2
    assert count_after(loss, 40, 50, 24, dtype=torch.float32) == 3
    with torch.no_grad():
        assert count_after(loss, 40, 50, 24) == 4
    assert loss.plan.needs == frozenset()
    assert count_after(loss, 40, 50, 24) == 4
    assert loss.plan.needs == {"x", "y"}


def test_ids_need_code_of_their_own() -> None:
    loss = compiled("clip")
    x, y = embeddings(1, 40, 50)
    plain = loss(x, y, logit_scale=5.0)
    ids = {"row_ids": torch.arange(40), "col_ids": torch.arange(50)}
    assert error(loss(x, y, logit_scale=5.0, **ids), plain.detach()) < EXACT
    assert len(loss.variants) == 2


def test_a_problem_compiles_ahead_of_time_for_all_smaller_batches() -> None:
    loss = compiled("clip", problem=Problem(200, 300, 24, "float64"))
    assert len(loss.variants) == 1 and loss.plan.problem.M == 200
    before = loss.plan
    x, y = embeddings(2, 200, 300)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    for rows, cols in ((200, 300), (3, 300), (17, 19), (1, 2)):
        left, right = x[:rows], y[:cols]
        value = loss(left, right, logit_scale=scale)
        assert error(value, dense("clip", left, right, scale.detach()).detach()) < 1e-10
        assert loss.plan.schedule == before.schedule
    # A larger one than planned is another plan, not an error.
    bigger = embeddings(3, 210, 300)
    loss(*bigger, logit_scale=scale)
    assert loss.plan.problem.M == 210


def test_every_variant_holds_the_budget_or_says_so() -> None:
    loss = compile_loss("auto", "1MiB", loss="clip")
    x, y = embeddings(4, 100, 100, 64)
    loss(x, y, logit_scale=5.0)
    assert loss.plan.peak_bytes <= 2**20
    x, y = embeddings(5, 1500, 1500, 64)  # gradients alone are 1.5 MiB
    with pytest.raises(BudgetError, match=r"budget 1\.0 MiB"):
        loss(x, y, logit_scale=5.0)
    x, y = embeddings(6, 100, 100, 64)  # and what was compiled before goes on
    assert error(loss(x, y, logit_scale=5.0), dense("clip", x, y, 5.0).detach()) < EXACT


@pytest.mark.parametrize("preset", ["h100x1", "rtx4090x1", "xeon-amx-2c"])
def test_without_a_budget_a_preset_gives_a_quarter_of_its_own_memory(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's memory says nothing about that one's."""
    monkeypatch.setattr("cl_compiler.hardware.cpu.free_memory_bytes", lambda: 1 << 20)
    problem = Problem(4096, 4096, 256)
    memory = load_hardware(preset).device_memory_bytes
    plan = compile_loss(preset, None, problem=problem).plan
    assert 0.21 * memory < plan.budget.device_bytes <= 0.25 * memory  # four leading bits
    with pytest.raises(BudgetError, match=r"budget 256\.0 KiB"):
        compile_loss("auto", None, problem=problem)


def test_copies_that_strides_force_are_in_the_plan() -> None:
    loss = compiled("clip")
    x, y = embeddings(7, 64, 64)
    loss(x, y, logit_scale=5.0)
    packed = loss.plan.peak_bytes
    loss(x.T.contiguous().T, y, logit_scale=5.0)
    assert loss.plan.peak_bytes - packed == 64 * 24 * 8


def test_before_the_first_call_there_is_no_plan() -> None:
    loss = compiled("clip")
    assert loss.variants == ()
    for look in ("plan", "source", "source_path", "latest"):
        with pytest.raises(NotPlannedError, match="problem="):
            getattr(loss, look)
    run(loss, 8, 8, 4)
    assert "def forward(x, y, logit_scale)" in loss.source
    assert loss.explain().startswith("clip on ")


# ---- verify ------------------------------------------------------------------------------------


def test_verify_accepts_right_code() -> None:
    loss = compiled("clip", verify=True)
    assert run(loss, 70, 90, 24) < EXACT
    assert run(loss, 30, 31, 24) < EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_verify_refuses_wrong_code_at_the_first_call(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = compiled("clip", verify=True)
    whole = loss._specialise

    class Wrong:
        """Code that errs by a percent."""

        def __call__(self, call: object) -> object:
            variant = whole(call)  # type: ignore[arg-type]
            right = variant.module.forward

            def forward(*args: Tensor) -> tuple[object, ...]:
                value, *others = right(*args)
                return (value * 1.01, *others)

            monkeypatch.setattr(variant.module, "forward", forward)
            return variant

    monkeypatch.setattr(loss, "_specialise", Wrong())
    with pytest.raises(ArithmeticError, match="relative error"):
        run(loss, 70, 90, 24, dtype=dtype)


# ---- nonfinite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "y", "logit_scale"])
def test_nonfinite_inputs_are_named(name: str, bad: float, where: str) -> None:
    x, y = embeddings(8)
    given: dict[str, object] = {"x": x, "y": y, **LOSSES[name]}
    loss = compiled(name, nonfinite="error")
    assert torch.isfinite(loss(**given))
    if where == "logit_scale":
        given[where] = bad
    else:
        changed = given[where].detach().clone()  # type: ignore[attr-defined]
        changed[5, 3] = bad
        given[where] = changed
    with pytest.raises(NonFiniteError, match=f"{where} has NaN or infinite"):
        loss(**given)


def test_a_value_that_overflows_is_named() -> None:
    """Finite inputs whose products are not."""
    x = torch.full((4, 8), 1e30)
    loss = compiled("clip", nonfinite="error")
    with pytest.raises(NonFiniteError, match="the inputs are finite"):
        loss(x, -x, logit_scale=1e30)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_elements_reach_what_they_reach_in_the_reference(name: str, bad: float) -> None:
    """One bad element of x: nothing that is lost there is silently a number here."""

    def reference(x: Tensor, y: Tensor, **given: float) -> Tensor:
        parameters = {k: torch.tensor(v, dtype=torch.float64) for k, v in given.items()}
        return evaluate(find_loss(name), {"x": x, "y": y}, parameters)

    found = []
    for loss in (compiled(name), reference):
        x, y = embeddings(9)
        with torch.no_grad():
            x[3, 2] = bad
        value = loss(x, y, **LOSSES[name])
        value.backward()
        found.append((value.detach(), x.grad, y.grad))
    assert not torch.isfinite(found[0][0])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None
        both = torch.isfinite(ours) & torch.isfinite(theirs)
        assert torch.allclose(ours[both], theirs[both], rtol=EXACT, atol=EXACT)
        assert not (torch.isfinite(ours) & ~torch.isfinite(theirs)).any()


@pytest.mark.parametrize("option", [{"nonfinite": "ignore"}, {"precision": "tf64"}])
def test_unknown_options_are_named(option: dict[str, str]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(option.values()))):
        compile_loss("auto", "1MiB", **option)  # type: ignore[arg-type]
