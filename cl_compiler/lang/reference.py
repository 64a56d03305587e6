"""The dense float64 oracle: what a loss means, in plain torch operations and autograd.

It evaluates the *traced* loss, so it shares nothing with ``resolve``, ``gradient`` and ``sweeps``:
positives are a mask over the whole matrix, every pair is computed, and gradients are autograd's.
Every other implementation is measured against this one, and tolerances are derived from it.

Every value is a tensor with one dimension per axis of the language (rows, cols, rows2, cols2,
slots, bank), of length 1 where the value does not vary; torch's broadcasting does the rest.

Masks select, also in the gradient.  Each sub-expression is evaluated under a *guard*, the pairs
that are looked at; elsewhere every intermediate result is 1, so that an excluded ``log(0)`` or
``0 * inf`` can reach neither the value nor, through a zero cotangent, the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add, mul
from typing import TYPE_CHECKING, Any

import sympy as sp

from cl_compiler.errors import ArgumentError, NoPositiveError
from cl_compiler.lang import functions as fn
from cl_compiler.lang.ir import (
    AXES,
    COLS,
    COLS2,
    ROWS,
    ROWS2,
    Leaf,
    LossIR,
    Reduction,
    View,
    axes_of,
    reduction_axes,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["evaluate", "evaluate_outputs", "positive_mask"]


def evaluate(
    ir: LossIR,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, float | Tensor],
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """The loss as a float64 scalar, differentiable with respect to every tensor passed in.

    Args:
        ir: a traced loss, as ``define_loss`` returns it.
        tensors: operands ([length, D], or [M, K, D] over slots) and vectors ([M] or [N]) by name.
        parameters: scalars by name; tensors of shape [] or [1] may require a gradient.
        row_ids: int64 [M]; pairs with equal ids are positive.  Together with ``col_ids`` [N].
        col_ids: int64 [N].
        ids: int64 [2b], of a loss over one set ``z``; without them i and i + b are two views.

    Raises:
        ArgumentError: an argument is missing, or the shapes do not fit together.
        NoPositiveError: a mean has no element, e.g. because no row has a positive.
    """
    dense = _run(ir, tensors, parameters, row_ids, col_ids, ids)
    return dense.evaluate(ir.value).reshape(())


def evaluate_outputs(
    ir: LossIR,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, float | Tensor],
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """What ``cl.output`` returns: detached float64 tensors, [M] or [N] or [], by name.

    Arguments and errors are those of ``evaluate``.
    """
    dense = _run(ir, tensors, parameters, row_ids, col_ids, ids)
    result = {}
    for name, expr in ir.outputs:
        axes = axes_of(expr, ir.leaves)
        whole = dense.evaluate(expr).expand(dense.shape(axes))
        result[name] = whole.reshape([dense.lengths[a] for a in AXES if a in axes]).detach()
    return result


def positive_mask(
    ir: LossIR,
    m: int,
    n: int,
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """Which pairs are positive, bool [M, N].

    Raises:
        ArgumentError: the ids do not fit the loss or the shapes; more rows than columns; an odd
            number of embeddings that are to be two views.
    """
    import torch

    if ir.is_single_set:
        if row_ids is not None or col_ids is not None:
            raise ArgumentError(f"{ir.name} has one set z: pass ids, not row_ids or col_ids.")
        if ids is not None:
            _check_ids("ids", ids, m)
            return (ids[:, None] == ids[None, :]) & ~torch.eye(m, dtype=torch.bool)
        if m % 2:
            raise ArgumentError(
                f"{ir.name}: z has {m} rows, which are not two views of each example; pass ids=."
            )
        return torch.eye(m, dtype=torch.bool).roll(m // 2, dims=1)
    if ids is not None or (row_ids is None) != (col_ids is None):
        raise ArgumentError(
            f"{ir.name} has rows and columns: pass row_ids and col_ids, or neither."
        )
    if row_ids is not None and col_ids is not None:
        _check_ids("row_ids", row_ids, m)
        _check_ids("col_ids", col_ids, n)
        return row_ids[:, None] == col_ids[None, :]
    if m > n and ir.uses_positives:
        raise ArgumentError(
            f"{ir.name}: {m} rows but {n} columns; without ids the positive of row i is column i, "
            "so there must be at least as many columns. Swap x and y, or pass row_ids and col_ids."
        )
    return torch.eye(m, n, dtype=torch.bool)


def _check_ids(name: str, ids: Tensor, length: int) -> None:
    if tuple(ids.shape) != (length,):
        raise ArgumentError(f"{name} has shape {tuple(ids.shape)}; expected ({length},).")


def _run(
    ir: LossIR,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, float | Tensor],
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    ids: Tensor | None,
) -> _Dense:
    """Place the leaves, evaluate every reduction in order and check what must not be empty."""
    import torch

    operands = {op.name: _argument(ir, tensors, op.name) for op in ir.operands}
    operands = {
        op.name: operands[op.name].detach() if op.stop else operands[op.name] for op in ir.operands
    }
    dense = _Dense(ir.leaves, _lengths(ir, operands))
    for leaf in ir.leaves.values():
        match leaf.kind:
            case "similarity":
                matrix = _similarity(leaf, operands)
                if leaf.scale is not None:
                    matrix = matrix * torch.as_tensor(parameters[leaf.scale], dtype=torch.float64)
                dense.place(leaf, matrix)
            case "norm":
                assert leaf.left is not None
                dense.place(leaf, torch.linalg.vector_norm(_rows(leaf.left, operands), dim=-1))
            case "input":
                dense.place(leaf, _argument(ir, tensors, leaf.name))
            case "parameter":
                if leaf.name not in parameters:
                    raise ArgumentError(f"{ir.name} needs the parameter {leaf.name}=.")
                value = torch.as_tensor(parameters[leaf.name], dtype=torch.float64)
                dense.place(leaf, value.reshape(()))
            case "count":
                length = dense.lengths[leaf.name.removeprefix("n_")]
                dense.place(leaf, torch.tensor(float(length), dtype=torch.float64))
            case "is_self":
                dense.place(leaf, torch.eye(dense.lengths[leaf.axes[0]], dtype=torch.float64))
            case _:
                pass
    if ir.uses_positives:
        mask = positive_mask(
            ir, dense.lengths[ROWS], dense.lengths[COLS], row_ids=row_ids, col_ids=col_ids, ids=ids
        )
        dense.place(Leaf("is_positive", "is_positive", (ROWS, COLS)), mask.double())
    for red in ir.reductions:
        dense.values[red.name] = dense.reduction(red)
    for message, expr in ir.required:
        if not bool((dense.evaluate(expr) > 0).all()):
            raise NoPositiveError(
                f"{ir.name}: {message}; pass ids that some row and some column share, or define "
                "the mean with empty=0."
            )
    return dense


def _argument(ir: LossIR, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ArgumentError(
            f"{ir.name} needs the tensor {name}=; got {', '.join(sorted(tensors))}."
        )
    return tensors[name].double()


def _lengths(ir: LossIR, operands: Mapping[str, Tensor]) -> dict[str, int]:
    """The length of every axis that an operand has."""
    lengths: dict[str, int] = {}
    for op in ir.operands:
        tensor = operands[op.name]
        sizes = (tensor.shape[0],) * 2 if op.axes == (ROWS, COLS) else tensor.shape
        for axis, length in zip(op.axes, sizes, strict=False):
            if lengths.setdefault(axis, length) != length:
                raise ArgumentError(
                    f"{ir.name}: operand {op.name} has {length} {axis}, others {lengths[axis]}."
                )
    for axis, second in ((ROWS, ROWS2), (COLS, COLS2)):
        if axis in lengths:
            lengths[second] = lengths[axis]
    return lengths


def _rows(view: View, operands: Mapping[str, Tensor]) -> Tensor:
    tensor = operands[view.operand]
    tensor = tensor if view.prefix is None else tensor[..., : view.prefix]
    return tensor.detach() if view.stop else tensor


def _similarity(leaf: Leaf, operands: Mapping[str, Tensor]) -> Tensor:
    import torch

    assert leaf.left is not None and leaf.right is not None
    left, right = _rows(leaf.left, operands), _rows(leaf.right, operands)
    return torch.einsum("id,ikd->ik" if right.ndim == 3 else "id,jd->ij", left, right)


@dataclass
class _Dense:
    """Values by leaf name, each with one dimension per axis of the language."""

    leaves: Mapping[str, Leaf]
    lengths: Mapping[str, int]
    values: dict[str, Tensor] = field(default_factory=dict)

    def shape(self, axes: Any) -> list[int]:
        return [self.lengths[a] if a in axes else 1 for a in AXES]

    def place(self, leaf: Leaf, tensor: Tensor) -> None:
        """Store a tensor whose dimensions are the leaf's axes, in the language's order."""
        expected = [self.lengths[a] for a in leaf.axes]
        if list(tensor.shape) != expected:
            raise ArgumentError(
                f"{leaf.name} has shape {list(tensor.shape)}; expected {expected} "
                f"({', '.join(leaf.axes) or 'a scalar'})."
            )
        self.values[leaf.name] = tensor.reshape(self.shape(leaf.axes))

    def evaluate(self, expr: sp.Expr, guard: Tensor | None = None) -> Tensor:
        """``expr`` where the guard holds, 1 elsewhere (everywhere without a guard)."""
        import torch

        value = self.node(expr, guard)
        return value if guard is None else torch.where(guard, value, torch.ones_like(value))

    def mask(self, expr: sp.Expr, guard: Tensor | None = None) -> Tensor:
        mask: Tensor = self.evaluate(expr, guard) != 0
        return mask if guard is None else mask & guard

    def node(self, expr: sp.Expr, guard: Tensor | None) -> Tensor:
        import torch

        if isinstance(expr, sp.Symbol):
            return self.values[expr.name]
        if not expr.args:
            return torch.tensor(float(expr), dtype=torch.float64)
        if isinstance(expr, fn.select):
            condition, a, b = expr.args
            chosen = self.mask(condition, guard)
            other = ~chosen if guard is None else guard & ~chosen
            return torch.where(chosen, self.evaluate(a, chosen), self.evaluate(b, other))
        if isinstance(expr, fn.logsubexp):
            a, b, floor = (self.evaluate(e, guard) for e in expr.args)
            gap = torch.where(a > b, b - a, torch.full_like(b - a, -1.0))
            value = torch.where(a > b, a + torch.log(-torch.expm1(gap)), floor)
            return torch.where(value > floor, value, floor)
        return _elementwise(expr, [self.evaluate(e, guard) for e in expr.args])

    def reduction(self, red: Reduction) -> Tensor:
        """One reduction with its axis kept at length 1; what the mask excludes is not looked at."""
        import torch

        where = IS_POSITIVE if red.monoid == "at_positive" else red.where
        axes = reduction_axes(red, self.leaves) | axes_of(where, self.leaves)
        dim, shape = AXES.index(red.over), self.shape(axes)
        kept = self.mask(where).expand(shape)
        some = kept.any(dim, keepdim=True)
        value = self.evaluate(red.operand, kept).expand(shape)
        nothing = torch.full_like(value, -torch.inf)
        match red.monoid:
            case "sum":
                return torch.where(kept, value, 0.0).sum(dim, keepdim=True)
            case "at_positive":
                total = torch.where(kept, value, 0.0).sum(dim, keepdim=True)
                return total / kept.sum(dim, keepdim=True).clamp(min=1)
            case "max":
                return torch.where(kept, value, nothing).amax(dim, keepdim=True)
            case "logsumexp":
                safe = torch.where(kept, value, torch.where(some, nothing, 0.0))
                total = torch.logsumexp(safe, dim, keepdim=True)
                return torch.where(some, total, torch.full_like(total, -torch.inf))
            case "softmean":
                logits = self.evaluate(red.logits, kept).expand(shape)
                safe = torch.where(kept, logits, torch.where(some, nothing, 0.0))
                weight = torch.softmax(safe, dim)
                return torch.where(kept, weight * value, 0.0).sum(dim, keepdim=True)
            case _:
                raise AssertionError(f"{red.monoid} does not occur in a traced loss")


IS_POSITIVE = sp.Symbol("is_positive", real=True)


def _elementwise(expr: sp.Expr, args: list[Tensor]) -> Tensor:
    """One node of an expression, its arguments already evaluated."""
    import torch
    from torch.nn import functional

    a, b = args[0], args[-1]
    match expr:
        case sp.Add():
            return reduce(add, args)
        case sp.Mul():
            return reduce(mul, args)
        case sp.Pow():
            return torch.pow(a, float(expr.exp)) if expr.exp.is_number else torch.pow(a, b)
        case sp.exp():
            return torch.exp(a)
        case sp.log():
            return torch.log(a)
        case fn.sigmoid():
            return torch.sigmoid(a)
        case fn.softplus():
            return -functional.logsigmoid(-a)
        case fn.relu():
            return torch.relu(a)
        case fn.absolute() | sp.Abs():
            return torch.abs(a)
        case fn.maximum():
            return torch.where((a > b) | a.isnan(), a, b)
        case fn.logaddexp():
            return torch.logaddexp(a, b)
        case fn.stop_gradient():
            return a.detach()
        case fn.greater():
            return (a > b).double()
        case fn.greater_equal():
            return (a >= b).double()
        case fn.mask_not():
            return 1 - a
        case fn.mask_and():
            return a * b
        case fn.mask_or():
            return torch.maximum(a, b)
        case _:
            raise AssertionError(f"{expr.func} has no dense meaning")
