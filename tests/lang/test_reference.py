"""The oracle agrees with formulas written by hand, in value and in every gradient."""

import pytest
import torch

from cl_compiler import lang as cl
from cl_compiler.errors import ArgumentError, NoPositiveError
from cl_compiler.lang.reference import evaluate, evaluate_outputs, positive_mask
from tests import losses_zoo as zoo
from tests.losses_zoo import cases
from tests.zoo_case import sample


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
@pytest.mark.parametrize("seed", range(3))
def test_oracle_equals_the_formula_in_value_and_gradients(case, seed):
    drawn = sample(case, seed=seed)
    expected, value = drawn.expected(), drawn.reference()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = drawn.gradients(value), drawn.gradients(expected)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-12, msg=name)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    raw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
    return torch.nn.functional.normalize(raw, dim=-1)


def inputs(m: int, n: int) -> dict[str, torch.Tensor]:
    return {"x": unit(m, 4, seed=1).requires_grad_(), "y": unit(n, 4, seed=2).requires_grad_()}


def gradient_of(value: torch.Tensor, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, list(tensors.values())))


# ---- what a positive is -------------------------------------------------------------------------


def test_the_positive_of_a_row_is_its_column():
    mask = positive_mask(zoo.clip, 2, 3)
    assert mask.tolist() == [[True, False, False], [False, True, False]]


def test_the_two_views_of_an_example_are_positives():
    mask = positive_mask(zoo.nt_xent, 4, 4)
    assert [row.nonzero().flatten().tolist() for row in mask] == [[2], [3], [0], [1]]


def test_equal_ids_are_positives_but_nothing_is_its_own():
    mask = positive_mask(zoo.nt_xent, 3, 3, ids=torch.tensor([7, 8, 7]))
    assert mask.nonzero().tolist() == [[0, 2], [2, 0]]


def test_columns_beyond_the_rows_are_negatives_of_every_row_and_have_no_loss():
    """Extra negatives change each row's softmax and add no term over columns."""
    tensors, scale = inputs(3, 5), torch.tensor(4.0, dtype=torch.float64)
    s = scale * tensors["x"] @ tensors["y"].T
    target = torch.arange(3)
    ce = torch.nn.functional.cross_entropy
    expected = (ce(s, target) + ce(s.T[:3], target)) / 2
    torch.testing.assert_close(evaluate(zoo.clip, tensors, {"logit_scale": scale}), expected)


def test_no_positive_at_all_is_an_error():
    ids = {"row_ids": torch.tensor([0, 1]), "col_ids": torch.tensor([2, 3, 4])}
    with pytest.raises(NoPositiveError, match=r"infonce: the mean over rows has no element"):
        evaluate(zoo.infonce, inputs(2, 3), {"logit_scale": 4.0}, **ids)


@pytest.mark.parametrize(
    ("loss", "m", "n", "ids", "message"),
    [
        (zoo.clip, 3, 2, {}, "3 rows but 2 columns"),
        (zoo.clip, 2, 2, {"row_ids": torch.arange(2)}, "row_ids and col_ids, or neither"),
        (zoo.clip, 2, 2, {"ids": torch.arange(2)}, "pass row_ids and col_ids"),
        (
            zoo.clip,
            2,
            2,
            {"row_ids": torch.arange(2), "col_ids": torch.arange(3)},
            r"col_ids has shape \(3,\); expected \(2,\)",
        ),
        (zoo.nt_xent, 3, 3, {}, "not two views"),
        (zoo.nt_xent, 2, 2, {"row_ids": torch.arange(2)}, "one set z: pass ids"),
    ],
)
def test_ids_that_do_not_fit(loss, m, n, ids, message):
    with pytest.raises(ArgumentError, match=message):
        positive_mask(loss, m, n, **ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "needs the tensor y="),
        ({"weight": None}, "needs the tensor weight="),
        ({"weight": torch.ones(4)}, r"weight has shape \[4\]; expected \[3\]"),
        ({"logit_scale": None}, "needs the parameter logit_scale="),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    tensors = {**inputs(3, 3), "weight": torch.ones(3).double()}
    parameters = {"logit_scale": 4.0}
    for name, value in change.items():
        target = parameters if name in parameters else tensors
        target.pop(name)
        if value is not None:
            target[name] = value
    with pytest.raises(ArgumentError, match=message):
        evaluate(zoo.weighted, tensors, parameters)


# ---- masks select, and ties share ---------------------------------------------------------------


def test_an_empty_logsumexp_is_minus_infinity_with_zero_gradient():
    @cl.define_loss
    def guarded(sim, threshold):
        lse = cl.logsumexp(sim, over=cl.cols, where=sim > threshold)
        return cl.mean(cl.logaddexp(lse, 0.5), over=cl.rows)

    tensors = inputs(3, 4)
    value = evaluate(guarded, tensors, {"threshold": 2.0})
    assert value.item() == 0.5
    assert all((g == 0).all() for g in gradient_of(value, tensors))


def test_what_a_mask_excludes_reaches_neither_value_nor_gradient():
    """log(0) and 1/0 sit on excluded pairs; a product with a zero mask would be NaN."""

    @cl.define_loss
    def excluded(sim):
        inside = cl.where(cl.is_positive, 0, cl.log(sim) + 1 / sim)
        masked = cl.sum(cl.log(sim), over=cl.cols, where=~cl.is_positive)
        return cl.sum(cl.sum(inside, over=cl.cols) + masked, over=cl.rows)

    x = torch.eye(2, dtype=torch.float64).requires_grad_()
    y = torch.tensor([[0.0, 3.0], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    value = evaluate(excluded, {"x": x, "y": y}, {})  # sim is 0 on the diagonal
    expected = sum(2 * torch.log(torch.tensor(v)) + 1 / v for v in (2.0, 3.0))
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert all(torch.isfinite(g).all() for g in gradient_of(value, {"x": x, "y": y}))


def test_a_branch_that_is_not_taken_has_no_gradient():
    @cl.define_loss
    def root(sim):
        return cl.sum(cl.sum(cl.where(sim > 0, cl.sqrt(sim), 0), over=cl.cols), over=cl.rows)

    x = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[4.0], [-1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    value = evaluate(root, {"x": x, "y": y}, {})
    grad_x, grad_y = gradient_of(value, {"x": x, "y": y})
    assert value.item() == 2.0 and grad_x.item() == 1.0
    assert grad_y.flatten().tolist() == [0.25, 0.0, 0.0]


def test_ties_of_a_maximum_share_the_gradient():
    @cl.define_loss
    def largest(sim):
        return cl.sum(cl.max(sim, over=cl.cols), over=cl.rows)

    x = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[2.0], [2.0], [1.0]], dtype=torch.float64, requires_grad=True)
    value = evaluate(largest, {"x": x, "y": y}, {})
    assert gradient_of(value, {"y": y})[0].flatten().tolist() == [0.5, 0.5, 0.0]


def test_stopped_operands_have_no_gradient():
    case = next(c for c in cases() if c.name == "queue")
    drawn = sample(case)
    bank = drawn.tensors["queue"].clone().requires_grad_()
    value = evaluate(case.loss, {**drawn.tensors, "queue": bank}, drawn.parameters)
    assert torch.autograd.grad(value, bank, allow_unused=True) == (None,)


def test_inputs_of_any_dtype_are_evaluated_in_float64():
    tensors = {name: t.detach().bfloat16().requires_grad_() for name, t in inputs(3, 3).items()}
    scale = torch.tensor([4.0], requires_grad=True)
    value = evaluate(zoo.clip, tensors, {"logit_scale": scale})
    assert value.dtype == torch.float64 and value.shape == ()
    grad = torch.autograd.grad(value, [tensors["x"], scale])
    assert grad[0].dtype == torch.bfloat16 and grad[1].shape == (1,)


def test_outputs_are_detached_and_as_long_as_their_axis():
    @cl.define_loss
    def with_outputs(sim):
        lse = cl.logsumexp(sim, over=cl.cols)
        cl.output("row_lse", lse)
        cl.output("columns", cl.sum(sim, over=cl.rows))
        cl.output("total", cl.sum(lse, over=cl.rows))
        return cl.mean(lse, over=cl.rows)

    tensors = inputs(3, 4)
    outputs = evaluate_outputs(with_outputs, tensors, {})
    s = (tensors["x"] @ tensors["y"].T).detach()
    torch.testing.assert_close(outputs["row_lse"], torch.logsumexp(s, 1))
    torch.testing.assert_close(outputs["columns"], s.sum(0))
    torch.testing.assert_close(outputs["total"], torch.logsumexp(s, 1).sum())
    assert not any(t.requires_grad for t in outputs.values())


def test_the_larger_of_two_is_nan_where_either_is():
    """As ``torch.maximum``, which tiles use."""

    @cl.define_loss
    def larger(sim):
        pairs = cl.maximum(sim, cl.row_input("a")) + cl.maximum(cl.row_input("b"), sim)
        return cl.sum(cl.sum(pairs, over=cl.cols), over=cl.rows)

    for name in ("a", "b", "x"):
        tensors = {n: t.detach() for n, t in inputs(3, 3).items()}
        tensors |= {n: torch.ones(3, dtype=torch.float64) for n in ("a", "b")}
        tensors[name].view(-1)[1] = torch.nan
        assert evaluate(larger, tensors, {}).isnan()
