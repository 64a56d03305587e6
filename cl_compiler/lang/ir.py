"""The loss as a value: axes, leaves, reductions, the final scalar (all frozen).

A pair expression is a SymPy expression whose symbols are *leaves*.  A leaf has a name, a kind and
axes; ``LossIR.leaves`` is the symbol table.  A reduction folds one axis of a pair expression and
its result is again a leaf, so reductions nest without further machinery.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

import sympy as sp

from cl_compiler.errors import LossDefinitionError
from cl_compiler.lang.functions import maximum, to_cols, to_rows

ROWS, COLS, ROWS2, COLS2, SLOTS, BANK = AXES = ("rows", "cols", "rows2", "cols2", "slots", "bank")
"""rows2 and cols2: second copies of rows and cols; slots: K items per row; bank: a queue."""

Monoid = Literal["sum", "logsumexp", "max", "softmean", "at_positive", "to_rows", "to_cols"]
Kind = Literal[
    "similarity",  # axes (a, b): the matrix <left_a, right_b>
    "similarity_at_positive",  # axes (rows,): the same matrix at each row's positive
    "is_positive",
    "is_self",
    "input",  # a row_input or col_input
    "norm",  # Euclidean norm of an operand's rows
    "parameter",
    "count",  # length of an axis
    "reduction",
    "adjoint",
]


@dataclass(frozen=True)
class View:
    """An operand or a prefix of its columns.  ``axis``: which axis its rows run along."""

    operand: str
    axis: str
    prefix: int | None = None
    stop: bool = False

    def __str__(self) -> str:
        return self.operand if self.prefix is None else f"{self.operand}[:{self.prefix}]"


@dataclass(frozen=True)
class Leaf:
    """One symbol of the table."""

    name: str
    kind: Kind
    axes: tuple[str, ...]
    left: View | None = None
    right: View | None = None
    scale: str | None = None
    """Of a similarity: the parameter that multiplies it in every use (the logit scale)."""

    @property
    def symbol(self) -> sp.Symbol:
        positive = True if self.kind in ("count", "norm") else None
        return sp.Symbol(self.name, real=True, positive=positive)

    @property
    def is_symmetric(self) -> bool:
        """A similarity of a set with itself: the matrix equals its transpose."""
        a, b = self.left, self.right
        return a is not None and b is not None and (a.operand, a.prefix) == (b.operand, b.prefix)


@dataclass(frozen=True)
class Operand:
    """A matrix that the caller passes: [length of axis, D], or [rows, slots, D]."""

    name: str
    axes: tuple[str, ...]
    stop: bool = False


@dataclass(frozen=True)
class Reduction:
    """``name = monoid over axis of operand, where mask``; softmean also has its logits."""

    name: str
    monoid: Monoid
    over: str
    operand: sp.Expr
    where: sp.Expr = sp.S.One
    logits: sp.Expr | None = None

    @property
    def expressions(self) -> tuple[sp.Expr, ...]:
        """Every expression that the reduction reads."""
        extra = () if self.logits is None else (self.logits,)
        return (self.operand, self.where, *extra)

    @property
    def free_symbols(self) -> set[sp.Symbol]:
        return set().union(*(e.free_symbols for e in self.expressions))


@dataclass(frozen=True, repr=False)
class LossIR:
    """A traced loss.  ``reductions`` are in dependency order; ``value`` is a scalar."""

    name: str
    doc: str
    operands: tuple[Operand, ...]
    parameters: tuple[str, ...]
    leaves: Mapping[str, Leaf]
    reductions: tuple[Reduction, ...]
    value: sp.Expr
    outputs: tuple[tuple[str, sp.Expr], ...] = ()
    constants: tuple[tuple[str, object], ...] = ()
    """Structural constants of the factory that made this loss (prefixes, ks, directions)."""
    required: tuple[tuple[str, sp.Expr], ...] = ()
    """Scalars that must be above zero at run time, with the message of the error otherwise."""

    def __repr__(self) -> str:
        """What it is called with; the maths is in its fields."""
        inputs = [name for name, leaf in self.leaves.items() if leaf.kind == "input"]
        names = [*(op.name for op in self.operands), *inputs, *self.parameters]
        return f"<loss {self.name}({', '.join(names)})>"

    def __reduce__(self) -> tuple[object, ...]:
        fields = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return (_rebuild, (LossIR, {**fields, "leaves": dict(self.leaves)}))

    @property
    def is_single_set(self) -> bool:
        """Rows and columns are one set of embeddings, ``z``."""
        return any(op.axes == (ROWS, COLS) for op in self.operands)

    @property
    def uses_positives(self) -> bool:
        return "is_positive" in self.leaves or any(
            r.monoid == "at_positive" for r in self.reductions
        )


def _rebuild(cls: type[LossIR], fields: dict[str, object]) -> LossIR:
    fields["leaves"] = MappingProxyType(dict(fields["leaves"]))  # type: ignore[call-overload]
    return cls(**fields)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Let:
    """``name = expr``: a vector or a scalar, no pair in it."""

    name: str
    expr: sp.Expr


@dataclass(frozen=True)
class GradientIR:
    """What ``differentiate`` adds to a loss.

    ``steps`` are lets and further reductions in dependency order.  ``similarities[s]`` is
    dL/ds[i, j]; ``positives[s]`` is the extra dL/ds at each row's positive, a row vector;
    ``vectors`` holds the gradients of inputs and norms, ``parameters`` those of scalars.
    """

    leaves: Mapping[str, Leaf]
    steps: tuple[Let | Reduction, ...]
    similarities: Mapping[str, sp.Expr]
    positives: Mapping[str, sp.Expr]
    vectors: Mapping[str, sp.Expr]
    parameters: Mapping[str, sp.Expr]
    dots: Mapping[str, tuple[tuple[str, Fraction], ...]] = field(default_factory=dict)
    """parameter -> (operand, weight): dL/dparameter gets sum of weight * <operand, d operand>."""


def axes_of(expr: sp.Expr, leaves: Mapping[str, Leaf]) -> frozenset[str]:
    """The axes along which ``expr`` varies."""
    if isinstance(expr, sp.Symbol):
        return frozenset(leaves[expr.name].axes)
    if isinstance(expr, to_rows):
        return frozenset({ROWS})
    if isinstance(expr, to_cols):
        return frozenset({COLS})
    result: frozenset[str] = frozenset()
    for arg in expr.args:
        result |= axes_of(arg, leaves)
    return result


def may_be_infinite(expr: sp.Expr, leaves: Mapping[str, Leaf]) -> bool:
    """Whether a vector may be infinite where a mask leaves nothing: a statistic, 1/count, log.

    Such a factor must stay under its mask.  Adjoints and inputs are finite where the value is.
    """
    if not axes_of(expr, leaves):
        return False
    if isinstance(expr, sp.Symbol):
        return leaves[expr.name].kind == "reduction"
    if isinstance(expr, sp.Pow) and isinstance(expr.base, maximum):
        return expr.base.args[1].is_positive is not True  # 1 / max(count, 1)
    if isinstance(expr, sp.log) or (isinstance(expr, sp.Pow) and expr.exp.is_positive is not True):
        return True
    return any(may_be_infinite(part, leaves) for part in expr.args)


def ordered(axes: Iterable[str]) -> tuple[str, ...]:
    """Axes in the language's fixed order, so that text never depends on hashing."""
    present = set(axes)
    return tuple(a for a in AXES if a in present)


def reduction_axes(red: Reduction, leaves: Mapping[str, Leaf]) -> frozenset[str]:
    """The axes that a reduction runs through, its own included."""
    result: frozenset[str] = frozenset({red.over})
    if red.monoid == "at_positive":  # also of a vector: it moves to the other axis
        result |= {ROWS, COLS}
    for expr in red.expressions:
        result |= axes_of(expr, leaves)
    return result


def check_pair(axes: Iterable[str], what: str) -> None:
    """Raise where an expression spans more than two axes (triples are not in the language)."""
    if len(set(axes)) > 2:
        raise LossDefinitionError(
            f"{what} spans the axes {', '.join(ordered(axes))}; the language has pairs only. "
            "Reduce one axis first, or give one row per positive pair."
        )
