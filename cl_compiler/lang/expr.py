"""Symbolic values: ``Expr`` with ordinary operators, elementwise functions, and the running trace.

A value wraps a SymPy expression; leaves and reductions register themselves with the trace of the
loss function that is being run (see ``trace.define_loss``).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NoReturn

import sympy as sp

from cl_compiler.errors import LossDefinitionError
from cl_compiler.lang import functions as fn
from cl_compiler.lang.ir import (
    COLS,
    ROWS,
    Leaf,
    Monoid,
    Operand,
    Reduction,
    check_pair,
    ordered,
    reduction_axes,
)
from cl_compiler.lang.words import OPERATORS, no_such_word

RESERVED = re.compile(
    r"x|y|z|ids|row_ids|col_ids|self|group"  # arguments of every call
    r"|logits\w*|n_(rows|cols|slots|bank)|(a_)?[rtv]\d+"  # symbols that the compiler makes
)
SELF = "is_self"
_current: ContextVar[Trace | None] = ContextVar("cl_compiler_trace", default=None)


class Trace:
    """What one run of a loss function has recorded so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.leaves: dict[str, Leaf] = {}
        self.operands: dict[str, Operand] = {}
        self.reductions: list[Reduction] = []
        self.outputs: list[tuple[str, sp.Expr]] = []
        self.required: list[tuple[str, sp.Expr]] = []

    def leaf(self, leaf: Leaf) -> sp.Symbol:
        known = self.leaves.setdefault(leaf.name, leaf)
        if known != leaf:
            raise LossDefinitionError(
                f"{self.name}: the name {leaf.name!r} is used for two different things "
                f"({known.kind} over {known.axes} and {leaf.kind} over {leaf.axes}); rename one."
            )
        return leaf.symbol

    def reduce(
        self,
        monoid: Monoid,
        operand: sp.Expr,
        over: str,
        where: sp.Expr,
        logits: sp.Expr | None = None,
    ) -> sp.Symbol:
        for known in self.reductions:
            if (known.monoid, known.over, known.operand, known.where, known.logits) == (
                monoid,
                over,
                operand,
                where,
                logits,
            ):
                return self.leaves[known.name].symbol
        name = f"r{len(self.reductions)}"
        red = Reduction(name, monoid, over, operand, where, logits)
        full = reduction_axes(red, self.leaves)
        check_pair(full, f"{self.name}: {monoid} over {over}")
        self.reductions.append(red)
        return self.leaf(Leaf(name, "reduction", ordered(full - {over})))


@contextmanager
def tracing(trace: Trace) -> Iterator[None]:
    """Let the words of the language record into ``trace``."""
    token = _current.set(trace)
    try:
        yield
    finally:
        _current.reset(token)


def running() -> Trace:
    """The trace of the loss function that is being run.

    Raises:
        LossDefinitionError: none is.
    """
    trace = _current.get()
    if trace is None:
        raise LossDefinitionError(
            "the loss language is only spoken inside a function decorated with @define_loss; "
            "move this call into the loss function."
        )
    return trace


@dataclass(frozen=True, eq=False)
class Expr:
    """A value of the language: a SymPy expression that knows whether it is a mask."""

    expr: sp.Expr
    is_mask: bool = False

    def __add__(self, other: Any) -> Expr:
        return _combine(lambda a, b: a + b, self, other)

    def __radd__(self, other: Any) -> Expr:
        return _combine(lambda a, b: a + b, other, self)

    def __sub__(self, other: Any) -> Expr:
        return _combine(lambda a, b: a - b, self, other)

    def __rsub__(self, other: Any) -> Expr:
        return _combine(lambda a, b: a - b, other, self)

    def __mul__(self, other: Any) -> Expr:
        return _combine(lambda a, b: a * b, self, other)

    def __rmul__(self, other: Any) -> Expr:
        return _combine(lambda a, b: a * b, other, self)

    def __truediv__(self, other: Any) -> Expr:
        return _combine(lambda a, b: a / b, self, other)

    def __rtruediv__(self, other: Any) -> Expr:
        return _combine(lambda a, b: a / b, other, self)

    def __pow__(self, other: Any) -> Expr:
        return _combine(lambda a, b: a**b, self, other)

    def __rpow__(self, other: Any) -> Expr:
        return _combine(lambda a, b: a**b, other, self)

    def __neg__(self) -> Expr:
        return _combine(lambda a, b: a * b, -1, self)

    def __abs__(self) -> Expr:
        return _apply(fn.absolute, self)

    def __gt__(self, other: Any) -> Expr:
        return Expr(fn.greater(value_of(self), value_of(other)), is_mask=True)

    def __ge__(self, other: Any) -> Expr:
        return Expr(fn.greater_equal(value_of(self), value_of(other)), is_mask=True)

    def __lt__(self, other: Any) -> Expr:
        return Expr(fn.greater(value_of(other), value_of(self)), is_mask=True)

    def __le__(self, other: Any) -> Expr:
        return Expr(fn.greater_equal(value_of(other), value_of(self)), is_mask=True)

    def __eq__(self, other: object) -> bool:
        if other is self:
            return True
        raise LossDefinitionError(
            "== and != compare no values of the language: rounding would decide. Elements that "
            "attain a maximum are those with s >= cl.max(s, over=cl.cols); cl.is_positive says "
            "which ids are equal."
        )

    __hash__ = object.__hash__

    def __and__(self, other: Any) -> Expr:
        return Expr(fn.mask_and(mask_of(self), mask_of(other)), is_mask=True)

    def __or__(self, other: Any) -> Expr:
        return Expr(fn.mask_or(mask_of(self), mask_of(other)), is_mask=True)

    def __invert__(self) -> Expr:
        return Expr(fn.mask_not(mask_of(self)), is_mask=True)

    def __bool__(self) -> bool:
        raise LossDefinitionError(
            "a symbolic value has no truth value: `if`, `and`, `or`, `not` and chained "
            "comparisons cannot be traced. Use cl.where(mask, a, b), &, | and ~."
        )

    def __float__(self) -> float:
        raise LossDefinitionError(
            "a symbolic value is not a number: math.* and float() cannot be traced. Use cl.exp, "
            "cl.log, cl.sqrt and the other functions of the language."
        )

    def __iter__(self) -> Any:
        raise LossDefinitionError("a symbolic value cannot be iterated; reduce it over an axis.")

    def _not_smooth(self, *_: Any) -> NoReturn:
        raise LossDefinitionError(
            "`//` and `%` are not in the loss language: they have no useful derivative. Use / and "
            "compare the quotient, e.g. cl.where(sim / 2 > 1, a, b)."
        )

    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = _not_smooth

    def _no_product(self, *_: Any) -> NoReturn:
        raise LossDefinitionError(
            "`@` multiplies matrices, and the only product of matrices in the loss language is "
            "cl.similarity(a, b) of two operands; * multiplies elementwise."
        )

    __matmul__ = __rmatmul__ = _no_product

    def __getitem__(self, key: Any) -> NoReturn:
        raise LossDefinitionError(
            "a symbolic value has no elements to pick: cl.at_positive(v, on=cl.rows) is the one at "
            "each row's positive, where=mask in a reduction selects pairs, and operands take "
            "prefixes, e.g. cl.x[:64]."
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # Python's own questions, such as copy's for __deepcopy__
            raise AttributeError(name)
        raise LossDefinitionError(
            f"a symbolic value has no .{name}: it is neither a tensor nor an array. "
            f"{no_such_word(name)}"
        )

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        name = getattr(function, "__name__", "…").strip("_")
        if name.removeprefix("r") in OPERATORS.values():
            raise LossDefinitionError(
                "a tensor cannot enter a loss expression: pass numbers as arguments of the loss, "
                "and vectors as cl.row_input(name) or cl.col_input(name)."
            )
        raise LossDefinitionError(
            f"torch.{name} does not know a symbolic value. {no_such_word(name)}"
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **_: Any) -> Any:
        """NumPy's numbers may stand on the left of an operator; nothing else of it is known."""
        word = OPERATORS.get(ufunc.__name__)
        numbers = [_plain(a) for a in args]
        if method == "__call__" and word and all(isinstance(n, (Expr, Real)) for n in numbers):
            return getattr(operator, word)(*numbers)
        raise LossDefinitionError(
            f"numpy.{ufunc.__name__} does not know a symbolic value. {no_such_word(ufunc.__name__)}"
        )


def _plain(value: Any) -> Any:
    """Python's number for one of NumPy's, or for an array that is one; anything else as it is."""
    if isinstance(value, (Expr, sp.Basic)):
        return value
    if getattr(value, "shape", None) == ():
        value = value.item()
    if not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


class _MaskConstant(Expr):
    """``is_positive`` and ``is_self``: leaves that join the trace when they are used."""


is_positive = _MaskConstant(sp.Symbol("is_positive", real=True), is_mask=True)
is_self = _MaskConstant(sp.Symbol(SELF, real=True), is_mask=True)


def _raw(value: Any) -> sp.Expr:
    if isinstance(value, Expr):
        for constant in (is_positive, is_self):
            if value.expr.has(constant.expr) and (trace := _current.get()) is not None:
                # is_self is bound to its two axes by the reduction that uses it
                axes = (ROWS, COLS) if constant is is_positive else ()
                trace.leaves.setdefault(
                    constant.expr.name, Leaf(constant.expr.name, constant.expr.name, axes)
                )
        return value.expr
    if isinstance(value, bool) or not isinstance(value, (Real, sp.Expr)):
        raise LossDefinitionError(
            f"{value!r} ({type(value).__name__}) cannot enter a loss expression; use numbers, the "
            "function's arguments and what cl.* returns."
        )
    return sp.sympify(_plain(value))


def value_of(value: Any) -> sp.Expr:
    """As a number: a mask becomes 1 where it holds, else 0.

    Raises:
        LossDefinitionError: the value is none of the language's, and no number.
    """
    raw = _raw(value)
    return fn.select(raw, fn.ONE, fn.ZERO) if isinstance(value, Expr) and value.is_mask else raw


def mask_of(value: Any) -> sp.Expr:
    """A mask as an expression that is 0 or 1.

    Raises:
        LossDefinitionError: the value is not a mask.
    """
    if not (isinstance(value, Expr) and value.is_mask):
        raise LossDefinitionError(
            f"{value!r} is not a mask; masks are cl.is_positive, cl.is_self, comparisons and "
            "their combinations with &, | and ~."
        )
    return _raw(value)


def _is_constant_select(expr: sp.Expr) -> bool:
    return isinstance(expr, fn.select) and all(
        a.is_number or _is_constant_select(a) for a in expr.args[1:]
    )


def _combine(op: Callable[[sp.Expr, sp.Expr], sp.Expr], left: Any, right: Any) -> Expr:
    """Apply ``op``; a mask used as a number selects between the two results."""
    a, b = value_of(left), value_of(right)
    if _is_constant_select(a):
        mask, on, off = a.args
        return Expr(fn.select(mask, op(on, b), op(off, b)))
    if _is_constant_select(b):
        mask, on, off = b.args
        return Expr(fn.select(mask, op(a, on), op(a, off)))
    return Expr(op(a, b))


def _apply(function: Any, *args: Any) -> Expr:
    return Expr(function(*(value_of(a) for a in args)))


def exp(a: Any) -> Expr:
    """``e^a``; prefer ``logsumexp`` and ``softplus`` to writing them out, they cannot overflow."""
    return _apply(sp.exp, a)


def log(a: Any) -> Expr:
    """Natural logarithm; -inf at 0 and NaN below, as in PyTorch."""
    return _apply(sp.log, a)


def sqrt(a: Any) -> Expr:
    """Square root; its derivative at 0 is infinite, so add a small number under the root."""
    return _apply(sp.sqrt, a)


def sigmoid(a: Any) -> Expr:
    """``1 / (1 + e^-a)`` without overflow."""
    return _apply(fn.sigmoid, a)


def softplus(a: Any) -> Expr:
    """``log(1 + e^a)`` without overflow."""
    return _apply(fn.softplus, a)


def relu(a: Any) -> Expr:
    """``max(a, 0)``; its derivative at 0 is 0."""
    return _apply(fn.relu, a)


def maximum(a: Any, b: Any) -> Expr:
    """The larger of two values, elementwise; at a tie the gradient goes to ``b``.

    ``cl.max`` is the maximum over an axis.
    """
    return _apply(fn.maximum, a, b)


def clamp(a: Any, low: Any = None, high: Any = None) -> Expr:
    """``min(max(a, low), high)``; the gradient is zero outside."""
    result = value_of(a)
    if low is not None:
        result = fn.select(fn.greater(value_of(low), result), value_of(low), result)
    if high is not None:
        result = fn.select(fn.greater(result, value_of(high)), value_of(high), result)
    return Expr(result)


def logaddexp(a: Any, b: Any) -> Expr:
    """``log(e^a + e^b)`` without overflow."""
    return _apply(fn.logaddexp, a, b)


def logsubexp(a: Any, b: Any, floor: Any) -> Expr:
    """``max(log(e^a - e^b), floor)``, safe for any a and b; the gradient is zero at the floor."""
    return _apply(fn.logsubexp, a, b, floor)


def where(mask: Any, a: Any, b: Any) -> Expr:
    """``a`` where the mask holds, else ``b``; the other branch is never looked at.

    Raises:
        LossDefinitionError: ``mask`` is not a mask.
    """
    return Expr(fn.select(mask_of(mask), value_of(a), value_of(b)))


def stop_gradient(a: Any) -> Expr:
    """The value without its gradient, as ``Tensor.detach``."""
    return _apply(fn.stop_gradient, a)
