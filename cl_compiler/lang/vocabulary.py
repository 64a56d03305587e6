"""The words that reduce and that name data: operands, similarities, vectors, reductions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy as sp

from cl_compiler.errors import LossDefinitionError
from cl_compiler.lang import functions as fn
from cl_compiler.lang.expr import RESERVED, Expr, is_positive, is_self, mask_of, running, value_of
from cl_compiler.lang.ir import (
    AXES,
    BANK,
    COLS,
    COLS2,
    ROWS,
    ROWS2,
    SLOTS,
    Leaf,
    Monoid,
    Operand,
    View,
    axes_of,
    ordered,
)


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

    def _refuse(self, *_: Any) -> Any:
        raise LossDefinitionError(
            f"{self.name} is an operand, not a value: only cl.similarity and cl.norm read it. "
            "Scale the similarity instead, e.g. 2 * cl.similarity(cl.x, cl.y)."
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __matmul__ = __neg__ = __pow__ = _refuse

    def _view(self, axis: str) -> View:
        trace = running()
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

    Raises:
        LossDefinitionError: other axes, or a reserved name.
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    if axes not in ((ROWS,), (COLS,), (BANK,), (ROWS, SLOTS)):
        raise LossDefinitionError(
            f"operand {name!r}: axis {axis!r} is not one of rows, cols, bank, (rows, slots)."
        )
    if RESERVED.fullmatch(name):
        raise LossDefinitionError(f"operand {name!r}: the name is reserved; choose another.")
    return OperandRef(name, axes, stop=stop)


_SECOND = {ROWS: ROWS2, COLS: COLS2}
_SETS = (ROWS, COLS, ROWS2, COLS2)


def similarity(a: OperandRef, b: OperandRef) -> Expr:
    """The matrix of inner products of the rows of ``a`` with the rows of ``b``.

    Axes: those of its operands.  Of a set with itself: (rows, rows2) for x, (cols, cols2) for y,
    (rows, cols) for z.  With an operand over (rows, slots): each row with its own K slots.

    Raises:
        LossDefinitionError: not two operands, axes that cannot be paired, different prefixes.
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
    return Expr(running().leaf(Leaf(name, "similarity", axes, left, right)))


def norm(a: OperandRef) -> Expr:
    """Euclidean norm of each row of an operand (or of a prefix): a vector.

    Raises:
        LossDefinitionError: of ``z``, whose rows and columns are one set, or of slots.
    """
    if len(a.axes) > 1 and a.axes != (ROWS, COLS):
        raise LossDefinitionError(f"cl.norm({a.name}): slots have no norm vector.")
    if a.axes == (ROWS, COLS):
        raise LossDefinitionError("cl.norm(z) is ambiguous between rows and cols; normalise z.")
    view = a._view(a.axes[0])
    name = f"norm_{view}".replace("[:", "").replace("]", "")
    return Expr(running().leaf(Leaf(name, "norm", (view.axis,), left=view)))


def row_input(name: str) -> Expr:
    """A vector [M] that the caller passes by keyword; it may require a gradient.

    Raises:
        LossDefinitionError: the name is reserved.
    """
    return _input(name, ROWS)


def col_input(name: str) -> Expr:
    """A vector [N] that the caller passes by keyword; errors are those of ``row_input``."""
    return _input(name, COLS)


def _input(name: str, axis: str) -> Expr:
    if RESERVED.fullmatch(name):
        raise LossDefinitionError(f"input {name!r}: the name is reserved; choose another.")
    return Expr(running().leaf(Leaf(name, "input", (axis,))))


def size(axis: str) -> Expr:
    """How many elements an axis has (no gradient).

    Raises:
        LossDefinitionError: there is no such axis.
    """
    if axis not in AXES:
        raise LossDefinitionError(
            f"cl.size({axis!r}): the axes are {', '.join(f'cl.{a}' for a in AXES)}."
        )
    return Expr(_count_symbol(axis))


def _count_symbol(axis: str) -> sp.Symbol:
    base = {ROWS2: ROWS, COLS2: COLS}.get(axis, axis)
    return running().leaf(Leaf(f"n_{base}", "count", ()))


# ---- reductions --------------------------------------------------------------------------------


def _bind_self(exprs: list[sp.Expr], over: str) -> list[sp.Expr]:
    """Give ``is_self`` the two axes of the expression that uses it."""
    trace = running()
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
    """Record a reduction; its symbol stands for the result.

    Raises:
        LossDefinitionError: no axis, or none of the expression's.
    """
    trace = running()
    if not over:
        raise LossDefinitionError(
            f"{trace.name}: {monoid} without over=: say which axis it folds, over=cl.rows or "
            f"over=cl.cols (or {', '.join(f'cl.{axis}' for axis in AXES[2:])})."
        )
    operand_, where_ = value_of(value), fn.ONE if mask is None else mask_of(mask)
    exprs = [operand_, where_, *([] if logits is None else [value_of(logits)])]
    exprs = _bind_self(exprs, over)
    axes: frozenset[str] = frozenset().union(*(axes_of(e, trace.leaves) for e in exprs))
    if over not in axes:
        raise LossDefinitionError(
            f"{trace.name}: {monoid} over {over}, but the expression varies over "
            f"{', '.join(ordered(axes)) or 'no axis'}. Reduce over one of its own axes."
        )
    return trace.reduce(monoid, exprs[0], over, exprs[1], exprs[2] if logits is not None else None)


def sum(value: Any, *, over: str = "", where: Any = None) -> Expr:
    """Sum over an axis of the elements that the mask leaves; 0 where it leaves none.

    Args:
        value: what is added up; it varies over ``over``, and over at most one axis besides.
        over: the axis that is folded: ``cl.rows``, ``cl.cols``, ….
        where: a mask; what it excludes is never looked at, in the gradient either.

    Returns:
        A vector over the other axis, or a scalar.

    Raises:
        LossDefinitionError: no axis, not an axis of the value, or more than pairs.
    """
    return Expr(_reduce("sum", value, over, where))


def logsumexp(value: Any, *, over: str = "", where: Any = None) -> Expr:
    """``log(sum(e^value))`` over an axis, safe for any logits.

    -inf with zero gradient where the mask leaves nothing.  Arguments, result and errors are those
    of ``cl.sum``.
    """
    return Expr(_reduce("logsumexp", value, over, where))


def max(value: Any, *, over: str = "", where: Any = None) -> Expr:
    """The largest element over an axis; the gradient is shared among ties, as in ``torch.amax``.

    -inf where the mask leaves nothing.  ``cl.maximum`` is the larger of two values.  Arguments,
    result and errors are those of ``cl.sum``.
    """
    return Expr(_reduce("max", value, over, where))


def min(value: Any, *, over: str = "", where: Any = None) -> Expr:
    """The smallest element over an axis: ``-max(-value)``.

    inf where the mask leaves nothing.  Arguments, result and errors are those of ``cl.sum``.
    """
    return -max(-Expr(value_of(value)), over=over, where=where)


def softmean(value: Any, logits: Any, *, over: str = "", where: Any = None) -> Expr:
    """``sum(softmax(logits) * value)`` over an axis; the mask restricts the softmax too.

    Arguments, result and errors are those of ``cl.sum``.
    """
    return Expr(_reduce("softmean", value, over, where, logits))


def count(*, over: str = "", where: Any = None) -> Expr:
    """How many elements of the axis the mask leaves (no gradient).

    Raises:
        LossDefinitionError: no axis or no mask was given.
    """
    if where is None:
        raise LossDefinitionError(
            "cl.count counts what a mask leaves: give where=, e.g. where=cl.is_positive; the "
            "length of an axis is cl.size(cl.cols)."
        )
    return Expr(_reduce("sum", 1, over, where))


def mean(value: Any, *, over: str = "", where: Any = None, empty: str | float = "error") -> Expr:
    """Sum divided by the number of elements that the mask leaves.

    A mean whose value uses ``at_positive`` skips elements without a positive.

    Args:
        value: as in ``cl.sum``.
        over: as in ``cl.sum``.
        where: as in ``cl.sum``.
        empty: what the mean of nothing is: a number, or "error": ``NoPositiveError`` when it
            happens, in a call; of a vector, when it happens to any of its elements.

    Raises:
        LossDefinitionError: as ``cl.sum``.
    """
    expr = value_of(value)
    mask = None if where is None else mask_of(where)
    if (has := _has_positive(expr, over)) is not None:
        mask = has if mask is None else fn.mask_and(mask, has)
    if mask is None:
        return Expr(_reduce("sum", Expr(expr), over) / _count_symbol(over))
    masked = Expr(mask, is_mask=True)
    number = _reduce("sum", 1, over, masked)
    total = _reduce("sum", Expr(expr), over, masked)
    if empty == "error":
        _require(number, f"the mean over {over} has no element")
        return Expr(total / number)
    return Expr(fn.select(fn.greater(number, fn.ZERO), total / number, value_of(empty)))


def _require(number: sp.Symbol, message: str) -> None:
    """Have calls fail where a number of elements is 0; of a vector's, where any is."""
    required: sp.Expr = number
    for axis in running().leaves[number.name].axes:
        none = fn.mask_not(fn.greater(number, fn.ZERO))
        required = 1 - _reduce("sum", 1, axis, Expr(none, is_mask=True))
        message = f"{message} for some of the {axis}"
    running().required.append((message, required))


def at_positive(value: Any, *, on: str = "") -> Expr:
    """The value at the positive of each row (``on=rows``) or column (``on=cols``): a vector.

    With several positives it is their mean.  A vector over the other axis is moved to this one.

    Raises:
        LossDefinitionError: ``on`` is neither, or the value runs over other axes.
    """
    if on not in (ROWS, COLS):
        given = f"on={on!r}" if on else "without on="
        raise LossDefinitionError(
            f"at_positive {given}: positives join rows and cols only. Say on=cl.rows for the value "
            "at each row's positive, on=cl.cols for each column's."
        )
    over = COLS if on == ROWS else ROWS
    trace = running()
    expr = _bind_self([value_of(value)], over)[0]
    trace.leaves.setdefault("is_positive", Leaf("is_positive", "is_positive", (ROWS, COLS)))
    if not axes_of(expr, trace.leaves) <= {ROWS, COLS}:
        raise LossDefinitionError("at_positive: the value must run over rows and cols only.")
    if over not in axes_of(expr, trace.leaves):
        return Expr(expr)
    symbol = trace.reduce("at_positive", expr, over, fn.ONE)
    return Expr(symbol)


def _has_positive(expr: sp.Expr, axis: str) -> sp.Expr | None:
    """A mask of the elements of ``axis`` that have a positive, if ``expr`` uses one there."""
    trace = running()
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
    """Also return a vector or a scalar, detached, under ``name``.

    The compiled loss then returns ``(value, {name: vector})``.

    Raises:
        LossDefinitionError: a matrix, or a name that was used before.
    """
    trace = running()
    expr = value_of(value)
    if not axes_of(expr, trace.leaves) <= {ROWS} and not axes_of(expr, trace.leaves) <= {COLS}:
        raise LossDefinitionError(f"output {name!r}: only vectors and scalars can be returned.")
    if name in dict(trace.outputs):
        raise LossDefinitionError(f"output {name!r} is defined twice; choose another name.")
    trace.outputs.append((name, expr))
