"""Evaluate a ``SweepPlan`` densely in numpy float64: symbolic gradients without generated code.

Walks the plan's nodes in their order, then forms every gradient that the plan names: similarities,
positives, vectors, parameters and dots.  It knows neither tiles nor autograd, so what it checks is
``resolve`` (what a positive is), ``gradient`` (the derivatives) and the order in ``sweeps``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from operator import add, mul

import numpy as np
import sympy as sp

from cl_compiler.lang import functions as fn
from cl_compiler.lang.ir import (
    AXES,
    BANK,
    COLS,
    COLS2,
    ROWS,
    ROWS2,
    SLOTS,
    Leaf,
    Let,
    Reduction,
    View,
    axes_of,
    reduction_axes,
)
from cl_compiler.lang.sweeps import SweepPlan
from tests.zoo_case import Sample

Array = np.ndarray


@dataclass
class DensePlan:
    """A plan with one sample's numbers.  Values have one dimension per axis of the language."""

    plan: SweepPlan
    sample: Sample
    values: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arrays = {n: t.detach().numpy() for n, t in self.sample.tensors.items()}
        self.arrays = arrays
        self.parameters = {n: float(t.detach()) for n, t in self.sample.parameters.items()}
        self.positive = self.sample.is_positive.numpy()
        self.length = {ROWS: self.positive.shape[0], COLS: self.positive.shape[1]}
        self.length |= {ROWS2: self.length[ROWS], COLS2: self.length[COLS]}
        self.length |= {SLOTS: self.sample.case.slots, BANK: self.sample.case.bank}
        with np.errstate(all="ignore"):
            self._run()

    # ---- what the plan computes ----------------------------------------------------------------

    def value(self) -> float:
        with np.errstate(all="ignore"):
            return float(self.eval(self.plan.ir.value).reshape(()))

    def outputs(self) -> dict[str, Array]:
        # as long as the traced loss says: resolved, a vector may have become a constant
        traced = self.sample.case.loss
        axes = {name: axes_of(expr, traced.leaves) for name, expr in traced.outputs}
        with np.errstate(all="ignore"):
            return {n: self.full(e, axes[n]).ravel() for n, e in self.plan.ir.outputs}

    def gradients(self) -> dict[str, Array]:
        """The gradient of every operand, input and parameter in ``plan.needs``."""
        with np.errstate(all="ignore"):
            return self._gradients()

    # ---- nodes -----------------------------------------------------------------------------------

    def _run(self) -> None:
        for leaf in self.plan.leaves.values():
            if (array := self._leaf(leaf)) is not None:
                shape = [self.length[a] if a in leaf.axes else 1 for a in AXES]
                self.values[leaf.name] = np.asarray(array, dtype=np.float64).reshape(shape)
        for node in self.plan.nodes:
            if isinstance(node, Let):
                axes = self.plan.leaves[node.name].axes
                self.values[node.name] = self.full(node.expr, axes)
            else:
                self.values[node.name] = self._reduction(node)

    def _leaf(self, leaf: Leaf) -> Array | float | None:
        match leaf.kind:
            case "similarity":
                left, right = self._view(leaf.left), self._view(leaf.right)
                product = np.einsum("id,ikd->ik" if right.ndim == 3 else "id,jd->ij", left, right)
                return self._scale(leaf) * product
            case "similarity_at_positive":
                left, right = self._view(leaf.left), self._view(leaf.right)
                return self._scale(leaf) * (left * right[self._partner()]).sum(1)
            case "norm":
                return np.linalg.norm(self._view(leaf.left), axis=1)
            case "input":
                return self.arrays[leaf.name]
            case "parameter":
                return self.parameters[leaf.name]
            case "count":
                return self.length[leaf.name.removeprefix("n_")]
            case "is_positive":
                return self.positive
            case "is_self":
                return np.eye(self.length[leaf.axes[0]])
            case _:
                return None

    def _view(self, view: View | None) -> Array:
        assert view is not None
        array = self.arrays[view.operand]
        return array if view.prefix is None else array[..., : view.prefix]

    def _scale(self, leaf: Leaf) -> float:
        return 1.0 if leaf.scale is None else self.parameters[leaf.scale]

    def _partner(self) -> Array:
        """The column of each row's positive; only where every row has exactly one."""
        assert (self.positive.sum(1) == 1).all(), "positives were resolved as if they were single"
        return self.positive.argmax(1)

    def _reduction(self, red: Reduction) -> Array:
        if red.monoid == "to_rows":
            return self._to_rows(self.full(red.operand, {COLS}))
        if red.monoid == "to_cols":
            return self._to_cols(self.full(red.operand, {ROWS}))
        axes = reduction_axes(red, self.plan.leaves)
        dim = AXES.index(red.over)
        where = self.full(red.where, axes) != 0
        operand = self.full(red.operand, axes)
        match red.monoid:
            case "sum":
                return np.where(where, operand, 0.0).sum(dim, keepdims=True)
            case "max":
                return np.where(where, operand, -np.inf).max(dim, keepdims=True)
            case "logsumexp":
                return _logsumexp(np.where(where, operand, -np.inf), dim)
            case "softmean":
                logits = np.where(where, self.full(red.logits, axes), -np.inf)
                lse = _logsumexp(logits, dim)
                weight = np.where(where, np.exp(logits - lse), 0.0)
                return np.where(where, weight * operand, 0.0).sum(dim, keepdims=True)
            case _:
                raise AssertionError(f"{red.monoid} must have been resolved")

    def _to_rows(self, column: Array) -> Array:
        shape = [self.length[ROWS] if a == ROWS else 1 for a in AXES]
        return column.ravel()[self._partner()].reshape(shape)

    def _to_cols(self, row: Array) -> Array:
        result = np.zeros(self.length[COLS])
        result[self._partner()] = row.ravel()
        return result.reshape([self.length[COLS] if a == COLS else 1 for a in AXES])

    def full(self, expr: sp.Expr, axes: object) -> Array:
        """``expr`` expanded to the axes given."""
        shape = [self.length[a] if a in axes else 1 for a in AXES]  # type: ignore[operator]
        return np.broadcast_to(self.eval(expr), shape)

    def eval(self, expr: sp.Expr) -> Array:
        if isinstance(expr, sp.Symbol):
            return self.values[expr.name]
        if not expr.args:
            return np.full([1] * len(AXES), float(expr))
        args = [self.eval(a) for a in expr.args]
        if isinstance(expr, fn.to_rows):
            return self._to_rows(np.broadcast_to(args[0], self._vector(COLS)))
        if isinstance(expr, fn.to_cols):
            return self._to_cols(np.broadcast_to(args[0], self._vector(ROWS)))
        return _elementwise(expr, args)

    def _vector(self, axis: str) -> list[int]:
        return [self.length[a] if a == axis else 1 for a in AXES]

    # ---- gradients -------------------------------------------------------------------------------

    def _gradients(self) -> dict[str, Array]:
        gradient, leaves = self.plan.gradient, self.plan.leaves
        assert gradient is not None
        result = {name: np.zeros_like(self.arrays[name]) for name in self.sample.case.operands}
        unscaled: dict[tuple[str, str], Array] = {}
        for name, expr in gradient.similarities.items():
            matrix = self.full(expr, leaves[name].axes)
            self._into_operands(leaves[name], self._squeeze(matrix, name), result, unscaled)
        for name, expr in gradient.positives.items():
            vector = self.full(expr, {ROWS}).ravel()
            matrix = np.zeros(self.positive.shape)
            matrix[np.arange(len(vector)), self._partner()] = vector
            self._into_operands(leaves[f"{name}_pos"], matrix, result, unscaled)
        for name, expr in gradient.vectors.items():
            leaf = leaves[name]
            vector = self.full(expr, leaf.axes).ravel()
            if leaf.kind == "input":
                result[name] = vector
                continue
            assert leaf.left is not None
            rows = self._view(leaf.left)
            result[leaf.left.operand][:, : rows.shape[1]] += (
                vector[:, None] * rows / np.linalg.norm(rows, axis=1, keepdims=True)
            )
        for name in self.plan.needs & set(self.parameters):
            total = self.eval(gradient.parameters.get(name, fn.ZERO)).reshape(())
            for operand, weight in gradient.dots.get(name, ()):
                total = total + float(weight) * (
                    (self.arrays[operand] * unscaled[operand, name]).sum()
                    if (operand, name) in unscaled
                    else 0.0
                )
            result[name] = np.asarray(total)
        for name in self.sample.case.inputs:
            result.setdefault(name, np.zeros_like(self.arrays[name]))
        return {name: result[name] for name in sorted(self.plan.needs)}

    def _squeeze(self, matrix: Array, name: str) -> Array:
        return matrix.reshape([self.length[a] for a in self.plan.leaves[name].axes])

    def _into_operands(
        self,
        leaf: Leaf,
        matrix: Array,
        result: dict[str, Array],
        unscaled: dict[tuple[str, str], Array],
    ) -> None:
        """Add ``G @ right`` and ``G.T @ left``; ``unscaled`` collects them before the scale."""
        left, right = leaf.left, leaf.right
        assert left is not None and right is not None
        slots = self._view(right).ndim == 3
        into_left = np.einsum("ik,ikd->id" if slots else "ij,jd->id", matrix, self._view(right))
        into_right = np.einsum("ik,id->ikd" if slots else "ij,id->jd", matrix, self._view(left))
        for view, part in ((left, into_left), (right, into_right)):
            if view.stop:
                continue
            whole = np.zeros_like(self.arrays[view.operand])
            whole[..., : part.shape[-1]] = part
            result[view.operand] += self._scale(leaf) * whole
            if leaf.scale is not None:
                key = (view.operand, leaf.scale)
                unscaled[key] = unscaled.get(key, 0.0) + whole


def _logsumexp(values: Array, dim: int) -> Array:
    top = values.max(dim, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    return np.log(np.exp(values - top).sum(dim, keepdims=True)) + top


def _elementwise(expr: sp.Expr, args: list[Array]) -> Array:
    a, b = args[0], args[-1]
    match expr:
        case sp.Add():
            return reduce(add, args)
        case sp.Mul():
            return reduce(mul, args)
        case sp.Pow():
            return a**b
        case sp.exp():
            return np.exp(a)
        case sp.log():
            return np.log(a)
        case sp.Abs() | fn.absolute():
            return np.abs(a)
        case sp.sign():
            return np.sign(a)
        case fn.sigmoid():
            return _sigmoid(a)
        case fn.softplus():
            return np.logaddexp(0.0, a)
        case fn.relu():
            return np.maximum(a, 0.0)
        case fn.maximum():
            return np.maximum(a, b)
        case fn.logaddexp():
            return np.logaddexp(a, b)
        case fn.logsubexp():
            floor = args[2]
            value = args[0] + np.log(-np.expm1(np.minimum(args[1] - args[0], 0.0)))
            return np.where(args[0] > args[1], np.maximum(value, floor), floor)
        case fn.one_minus_exp():
            return np.where(a < 0, -np.expm1(np.minimum(a, 0.0)), 1.0)
        case fn.softmax_weight():
            return np.where(np.isneginf(b), 0.0, np.exp(a - b))
        case fn.stop_gradient():
            return a
        case fn.select():
            return np.where(args[0] != 0, args[1], args[2])
        case fn.greater():
            return (a > b).astype(float)
        case fn.greater_equal():
            return (a >= b).astype(float)
        case fn.equal():
            return (a == b).astype(float)
        case fn.mask_not():
            return 1.0 - a
        case fn.mask_and():
            return a * b
        case fn.mask_or():
            return np.maximum(a, b)
        case _:
            raise AssertionError(f"{expr.func} has no dense meaning")


def _sigmoid(a: Array) -> Array:
    e = np.exp(-np.abs(a))
    return np.where(a >= 0, 1.0, e) / (1.0 + e)
