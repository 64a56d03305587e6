"""``define_loss``: run the user's function once on symbols and record what it reduces.

This is the whole surface that a loss author sees.  ``Expr`` wraps a SymPy expression with ordinary
operators; reductions and leaves register themselves with the trace that is running.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import sympy as sp

from cl_compiler.errors import LossDefinitionError
from cl_compiler.lang import functions as fn
from cl_compiler.lang.ir import (
    BANK,
    COLS,
    COLS2,
    ROWS,
    ROWS2,
    SLOTS,
    Leaf,
    LossIR,
    Monoid,
    Operand,
    Reduction,
    View,
    axes_of,
    check_pair,
    ordered,
    reduction_axes,
)

_RESERVED = frozenset({"x", "y", "z", "ids", "row_ids", "col_ids", "self", "group"})
_SELF = "is_self"
_current: ContextVar[_Trace | None] = ContextVar("cl_compiler_trace", default=None)


class _Trace:
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


def _trace() -> _Trace:
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
        return Expr(fn.greater(_value(self), _value(other)), is_mask=True)

    def __ge__(self, other: Any) -> Expr:
        return Expr(fn.greater_equal(_value(self), _value(other)), is_mask=True)

    def __lt__(self, other: Any) -> Expr:
        return Expr(fn.greater(_value(other), _value(self)), is_mask=True)

    def __le__(self, other: Any) -> Expr:
        return Expr(fn.greater_equal(_value(other), _value(self)), is_mask=True)

    def __and__(self, other: Any) -> Expr:
        return Expr(fn.mask_and(_mask(self), _mask(other)), is_mask=True)

    def __or__(self, other: Any) -> Expr:
        return Expr(fn.mask_or(_mask(self), _mask(other)), is_mask=True)

    def __invert__(self) -> Expr:
        return Expr(fn.mask_not(_mask(self)), is_mask=True)

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


class _MaskConstant(Expr):
    """``is_positive`` and ``is_self``: leaves that join the trace when they are used."""


is_positive = _MaskConstant(sp.Symbol("is_positive", real=True), is_mask=True)
is_self = _MaskConstant(sp.Symbol(_SELF, real=True), is_mask=True)


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
    if isinstance(value, bool) or not isinstance(value, (int, float, sp.Expr)):
        raise LossDefinitionError(
            f"{value!r} ({type(value).__name__}) cannot enter a loss expression; use numbers, the "
            "function's arguments and what cl.* returns."
        )
    return sp.sympify(value)


def _value(value: Any) -> sp.Expr:
    """As a number: a mask becomes 1 where it holds, else 0."""
    raw = _raw(value)
    return fn.select(raw, fn.ONE, fn.ZERO) if isinstance(value, Expr) and value.is_mask else raw


def _mask(value: Any) -> sp.Expr:
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
    a, b = _value(left), _value(right)
    if _is_constant_select(a):
        mask, on, off = a.args
        return Expr(fn.select(mask, op(on, b), op(off, b)))
    if _is_constant_select(b):
        mask, on, off = b.args
        return Expr(fn.select(mask, op(a, on), op(a, off)))
    return Expr(op(a, b))


def _apply(function: Any, *args: Any) -> Expr:
    return Expr(function(*(_value(a) for a in args)))


def exp(a: Any) -> Expr:
    return _apply(sp.exp, a)


def log(a: Any) -> Expr:
    return _apply(sp.log, a)


def sqrt(a: Any) -> Expr:
    return _apply(sp.sqrt, a)


def sigmoid(a: Any) -> Expr:
    return _apply(fn.sigmoid, a)


def softplus(a: Any) -> Expr:
    """``log(1 + e^a)`` without overflow."""
    return _apply(fn.softplus, a)


def relu(a: Any) -> Expr:
    return _apply(fn.relu, a)


def maximum(a: Any, b: Any) -> Expr:
    return _apply(fn.maximum, a, b)


def clamp(a: Any, low: Any = None, high: Any = None) -> Expr:
    """``min(max(a, low), high)``; the gradient is zero outside."""
    result = _value(a)
    if low is not None:
        result = fn.select(fn.greater(_value(low), result), _value(low), result)
    if high is not None:
        result = fn.select(fn.greater(result, _value(high)), _value(high), result)
    return Expr(result)


def logaddexp(a: Any, b: Any) -> Expr:
    return _apply(fn.logaddexp, a, b)


def logsubexp(a: Any, b: Any, floor: Any) -> Expr:
    """``max(log(e^a - e^b), floor)``."""
    return _apply(fn.logsubexp, a, b, floor)


def where(mask: Any, a: Any, b: Any) -> Expr:
    return Expr(fn.select(_mask(mask), _value(a), _value(b)))


def stop_gradient(a: Any) -> Expr:
    return _apply(fn.stop_gradient, a)


# ---- operands, matrices, vectors ---------------------------------------------------------------


@dataclass(frozen=True)
class OperandRef:
    """``x``, ``y``, ``z`` or a named operand; ``x[:d]`` is a prefix of its columns."""

    name: str
    axes: tuple[str, ...]
    prefix: int | None = None
    stop: bool = False

    def __getitem__(self, key: slice) -> OperandRef:
        whole = isinstance(key, slice) and key.start is None and key.step is None
        if not whole or not isinstance(key.stop, int) or key.stop < 1:
            raise LossDefinitionError(
                f"{self.name}[{key!r}]: only prefixes of the columns exist, e.g. {self.name}[:64]."
            )
        return replace(self, prefix=key.stop)

    def _view(self, axis: str) -> View:
        trace = _trace()
        known = trace.operands.setdefault(self.name, Operand(self.name, self.axes, self.stop))
        if "z" in trace.operands and trace.operands.keys() & {"x", "y"}:
            raise LossDefinitionError(
                f"{trace.name} uses z beside x or y; z is the only set then. (The argument sim is "
                "similarity(x, y): leave it out and use cl.similarity(cl.z, cl.z).)"
            )
        if known.axes != self.axes or known.stop != self.stop:
            raise LossDefinitionError(
                f"operand {self.name!r} is declared twice with different axes or stop; "
                "declare it once and reuse it."
            )
        return View(self.name, axis, self.prefix, self.stop)


rows, cols, rows2, cols2, slots, bank = ROWS, COLS, ROWS2, COLS2, SLOTS, BANK
x = OperandRef("x", (ROWS,))
y = OperandRef("y", (COLS,))
z = OperandRef("z", (ROWS, COLS))


def operand(name: str, axis: str | tuple[str, str], *, stop: bool = False) -> OperandRef:
    """A further matrix that the caller passes by keyword.

    ``axis``: ``cl.rows``, ``cl.cols``, ``cl.bank`` ([length, D]) or ``(cl.rows, cl.slots)``
    ([M, K, D]).  ``stop=True``: it never has a gradient.
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    if axes not in ((ROWS,), (COLS,), (BANK,), (ROWS, SLOTS)):
        raise LossDefinitionError(
            f"operand {name!r}: axis {axis!r} is not one of rows, cols, bank, (rows, slots)."
        )
    if name in _RESERVED:
        raise LossDefinitionError(f"operand {name!r}: the name is reserved; choose another.")
    return OperandRef(name, axes, stop=stop)


_SECOND = {ROWS: ROWS2, COLS: COLS2}
_SETS = (ROWS, COLS, ROWS2, COLS2)


def similarity(a: OperandRef, b: OperandRef) -> Expr:
    """The matrix of inner products of the rows of ``a`` with the rows of ``b``.

    Axes: those of its operands.  Of a set with itself: (rows, rows2) for x, (cols, cols2) for y,
    (rows, cols) for z.  With an operand over (rows, slots): each row with its own K slots.
    """
    if not (isinstance(a, OperandRef) and isinstance(b, OperandRef)):
        raise LossDefinitionError("cl.similarity takes two operands, e.g. similarity(cl.x, cl.y)")
    if a.axes == (ROWS, COLS) and b.axes == (ROWS, COLS):
        axes = (ROWS, COLS)
    elif SLOTS in b.axes:
        axes = (ROWS, SLOTS)
        if a.axes != (ROWS,):
            raise LossDefinitionError(f"slots belong to rows; {a.name!r} runs over {a.axes}.")
    elif a.axes == b.axes and a.axes[0] in _SECOND:
        axes = (a.axes[0], _SECOND[a.axes[0]])
    else:
        axes = (a.axes[0], b.axes[0])
    if axes not in ((ROWS, COLS), (ROWS, ROWS2), (COLS, COLS2), (ROWS, BANK), (ROWS, SLOTS)):
        raise LossDefinitionError(
            f"cl.similarity({a.name}, {b.name}) runs over {axes}; possible are rows with cols, "
            "rows, bank or slots, and cols with cols. Swap the arguments if they are reversed."
        )
    if a.prefix != b.prefix:
        raise LossDefinitionError(
            f"cl.similarity of {a.prefix or 'all'} columns of {a.name} with {b.prefix or 'all'} of "
            f"{b.name}: inner products need equally many. Take the same prefix of both."
        )
    left, right = a._view(axes[0]), b._view(axes[1])
    is_xy = (str(left), str(right)) in (("x", "y"), ("z", "z")) and not (a.stop or b.stop)
    name = "sim" if is_xy else f"sim_{left}_{right}".replace("[:", "").replace("]", "")
    return Expr(_trace().leaf(Leaf(name, "similarity", axes, left, right)))


def norm(a: OperandRef) -> Expr:
    """Euclidean norm of each row of an operand (or of a prefix): a vector."""
    if len(a.axes) > 1 and a.axes != (ROWS, COLS):
        raise LossDefinitionError(f"cl.norm({a.name}): slots have no norm vector.")
    if a.axes == (ROWS, COLS):
        raise LossDefinitionError("cl.norm(z) is ambiguous between rows and cols; normalise z.")
    view = a._view(a.axes[0])
    name = f"norm_{view}".replace("[:", "").replace("]", "")
    return Expr(_trace().leaf(Leaf(name, "norm", (view.axis,), left=view)))


def row_input(name: str) -> Expr:
    """A vector [M] that the caller passes by keyword; it may require a gradient."""
    return _input(name, ROWS)


def col_input(name: str) -> Expr:
    """A vector [N] that the caller passes by keyword; it may require a gradient."""
    return _input(name, COLS)


def _input(name: str, axis: str) -> Expr:
    if name in _RESERVED:
        raise LossDefinitionError(f"input {name!r}: the name is reserved; choose another.")
    return Expr(_trace().leaf(Leaf(name, "input", (axis,))))


def size(axis: str) -> Expr:
    """How many elements an axis has (no gradient)."""
    return Expr(_count_symbol(axis))


def _count_symbol(axis: str) -> sp.Symbol:
    base = {ROWS2: ROWS, COLS2: COLS}.get(axis, axis)
    return _trace().leaf(Leaf(f"n_{base}", "count", ()))


# ---- reductions --------------------------------------------------------------------------------


def _bind_self(exprs: list[sp.Expr], over: str) -> list[sp.Expr]:
    """Give ``is_self`` the two axes of the expression that uses it."""
    trace = _trace()
    symbol = is_self.expr
    if not any(e.has(symbol) for e in exprs):
        return exprs
    axes = frozenset({over}).union(*(axes_of(e, trace.leaves) for e in exprs))
    single = any(op.axes == (ROWS, COLS) for op in trace.operands.values())
    if len(axes) == 1:  # e.g. a count: the other axis is that of the same set
        partner = {ROWS: COLS, COLS: ROWS} if single else {ROWS: ROWS2, COLS: COLS2}
        axes |= {{ROWS2: ROWS, COLS2: COLS, **partner}[over]} if over in _SETS else set()
    pair = ordered(axes)
    if pair not in ((ROWS, ROWS2), (COLS, COLS2)) and not (pair == (ROWS, COLS) and single):
        raise LossDefinitionError(
            f"{trace.name}: cl.is_self compares a set with itself, here the axes are {pair}. "
            "Use it with similarity(z, z), similarity(x, x) or similarity(y, y)."
        )
    bound = trace.leaf(Leaf(f"is_self_{pair[0]}_{pair[1]}", "is_self", pair))
    return [e.subs(symbol, bound) for e in exprs]


def _reduce(
    monoid: Monoid, value: Any, over: str, mask: Any = None, logits: Any = None
) -> sp.Symbol:
    trace = _trace()
    operand_, where_ = _value(value), fn.ONE if mask is None else _mask(mask)
    exprs = [operand_, where_, *([] if logits is None else [_value(logits)])]
    exprs = _bind_self(exprs, over)
    axes: frozenset[str] = frozenset().union(*(axes_of(e, trace.leaves) for e in exprs))
    if over not in axes:
        raise LossDefinitionError(
            f"{trace.name}: {monoid} over {over}, but the expression varies over "
            f"{', '.join(ordered(axes)) or 'no axis'}. Reduce over one of its own axes."
        )
    return trace.reduce(monoid, exprs[0], over, exprs[1], exprs[2] if logits is not None else None)


def sum(value: Any, *, over: str, where: Any = None) -> Expr:
    return Expr(_reduce("sum", value, over, where))


def logsumexp(value: Any, *, over: str, where: Any = None) -> Expr:
    """Safe for any logits; -inf with zero gradient where the mask leaves nothing."""
    return Expr(_reduce("logsumexp", value, over, where))


def max(value: Any, *, over: str, where: Any = None) -> Expr:
    """The gradient is shared among ties, as in ``torch.amax``."""
    return Expr(_reduce("max", value, over, where))


def softmean(value: Any, logits: Any, *, over: str, where: Any = None) -> Expr:
    """``sum(softmax(logits) * value)`` over an axis."""
    return Expr(_reduce("softmean", value, over, where, logits))


def count(*, over: str, where: Any) -> Expr:
    """How many elements of the axis the mask leaves."""
    return Expr(_reduce("sum", 1, over, where))


def mean(value: Any, *, over: str, where: Any = None, empty: str | float = "error") -> Expr:
    """Sum divided by the number of elements that the mask leaves.

    A mean whose value uses ``at_positive`` skips elements without a positive.  ``empty``: what
    the mean of nothing is, ``"error"`` (raised when it happens) or 0.
    """
    trace = _trace()
    expr = _value(value)
    mask = None if where is None else _mask(where)
    if (has := _has_positive(expr, over)) is not None:
        mask = has if mask is None else fn.mask_and(mask, has)
    if mask is None:
        return Expr(_reduce("sum", Expr(expr), over) / _count_symbol(over))
    masked = Expr(mask, is_mask=True)
    number = _reduce("sum", 1, over, masked)
    total = _reduce("sum", Expr(expr), over, masked)
    if empty == "error":
        if not trace.leaves[number.name].axes:
            trace.required.append((f"the mean over {over} has no element", number))
        return Expr(total / number)
    return Expr(fn.select(fn.greater(number, fn.ZERO), total / number, _value(empty)))


def at_positive(value: Any, *, on: str) -> Expr:
    """The value at the positive of each row (``on=rows``) or column (``on=cols``).

    With several positives it is their mean.  A vector over the other axis is moved to this one.
    """
    if on not in (ROWS, COLS):
        raise LossDefinitionError(f"at_positive(on={on!r}): positives join rows and cols only.")
    over = COLS if on == ROWS else ROWS
    trace = _trace()
    expr = _bind_self([_value(value)], over)[0]
    trace.leaves.setdefault("is_positive", Leaf("is_positive", "is_positive", (ROWS, COLS)))
    if not axes_of(expr, trace.leaves) <= {ROWS, COLS}:
        raise LossDefinitionError("at_positive: the value must run over rows and cols only.")
    if over not in axes_of(expr, trace.leaves):
        return Expr(expr)
    symbol = trace.reduce("at_positive", expr, over, fn.ONE)
    return Expr(symbol)


def _has_positive(expr: sp.Expr, axis: str) -> sp.Expr | None:
    """A mask of the elements of ``axis`` that have a positive, if ``expr`` uses one there."""
    trace = _trace()
    if axis not in (ROWS, COLS):
        return None
    by_name = {r.name: r for r in trace.reductions}
    stack, seen = [expr], set()
    while stack:
        for symbol in stack.pop().free_symbols:
            red = by_name.get(symbol.name)
            if red is None or red.name in seen:
                continue
            seen.add(red.name)
            if red.monoid == "at_positive" and red.over != axis:
                other = COLS if axis == ROWS else ROWS
                number = trace.reduce("sum", fn.ONE, other, is_positive.expr)
                return fn.greater(number, fn.ZERO)
            if axis in trace.leaves[red.name].axes:
                stack.extend(red.expressions)
    return None


def output(name: str, value: Any) -> None:
    """Also return a row vector (or a scalar), detached, under ``name``."""
    trace = _trace()
    expr = _value(value)
    if not axes_of(expr, trace.leaves) <= {ROWS} and not axes_of(expr, trace.leaves) <= {COLS}:
        raise LossDefinitionError(f"output {name!r}: only vectors and scalars can be returned.")
    if name in dict(trace.outputs):
        raise LossDefinitionError(f"output {name!r} is defined twice; choose another name.")
    trace.outputs.append((name, expr))


# ---- define_loss -------------------------------------------------------------------------------


def define_loss(
    function: Callable[..., Any] | None = None, *, constants: Iterable[tuple[str, object]] = ()
) -> Any:
    """Trace a loss function once and return its ``LossIR``.

    The argument ``sim`` is the matrix ``similarity(x, y)``; every other argument is a scalar
    parameter that the caller passes by keyword, as a float or a tensor.
    ``constants`` name the structural constants of a factory, e.g. ``[("prefixes", (64, 128))]``.

    Raises:
        LossDefinitionError: the function leaves the language; the message says where.
    """
    if function is None:
        return lambda f: define_loss(f, constants=constants)
    trace = _Trace(function.__name__)
    token = _current.set(trace)
    try:
        args, parameters = {}, []
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise LossDefinitionError(
                    f"{trace.name}: {parameter} cannot be traced; name each parameter, and make "
                    "a factory for structural constants."
                )
            if name == "sim":
                args[name] = similarity(x, y)
            elif name in _RESERVED:
                raise LossDefinitionError(
                    f"{trace.name}: the argument {name!r} is reserved; use cl.{name} for operands."
                )
            else:
                parameters.append(name)
                args[name] = Expr(trace.leaf(Leaf(name, "parameter", ())))
        value = _value(function(**args))
        if any(e.has(is_self.expr) for e in (value, *(e for _, e in trace.outputs))):
            raise LossDefinitionError(
                f"{trace.name} uses cl.is_self outside of a reduction, where it has no axes; "
                "use it in the value or the mask that a reduction folds."
            )
        axes = axes_of(value, trace.leaves)
        if axes:
            raise LossDefinitionError(
                f"{trace.name} returns something that varies over {', '.join(ordered(axes))}; "
                "a loss is a scalar. Reduce it, e.g. with cl.mean(…, over=cl.rows)."
            )
    finally:
        _current.reset(token)
    operands = {op for op in trace.operands}
    if not operands:
        raise LossDefinitionError(f"{trace.name} uses no similarity; there is nothing to tile.")
    trace.leaves.pop(_SELF, None)
    order = {"x": 0, "y": 1, "z": 0}
    return LossIR(
        name=trace.name,
        doc=inspect.getdoc(function) or "",
        operands=tuple(sorted(trace.operands.values(), key=lambda o: order.get(o.name, 2))),
        parameters=tuple(parameters),
        leaves=MappingProxyType(trace.leaves),
        reductions=tuple(trace.reductions),
        value=value,
        outputs=tuple(trace.outputs),
        constants=tuple(constants),
        required=tuple(trace.required),
    )
