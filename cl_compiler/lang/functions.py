"""The language's primitives as SymPy functions, each with its derivative.

They stay primitives on purpose.  ``softplus``, ``sigmoid``, ``logaddexp`` and ``logsubexp`` written
out with ``exp`` overflow in fp32 at a logit scale of 100, and a mask that multiplies instead of
selecting turns an excluded infinity into NaN.  Masks are 0/1 valued; their derivative is zero.
"""

from __future__ import annotations

import math
from typing import Any

import sympy as sp

ZERO, ONE = sp.Integer(0), sp.Integer(1)


class _Mask(sp.Function):
    """Base of everything that is 0 or 1 and has no derivative."""

    is_real = True

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return ZERO


class greater(_Mask):
    """``a > b``."""

    nargs = 2

    @classmethod
    def eval(cls, a: sp.Expr, b: sp.Expr) -> sp.Expr | None:
        return sp.Integer(bool(a > b)) if a.is_number and b.is_number else None


class greater_equal(_Mask):
    """``a >= b``."""

    nargs = 2

    @classmethod
    def eval(cls, a: sp.Expr, b: sp.Expr) -> sp.Expr | None:
        return sp.Integer(bool(a >= b)) if a.is_number and b.is_number else None


class equal(_Mask):
    """``a == b``: which elements attain a maximum."""

    nargs = 2


class mask_not(_Mask):
    nargs = 1

    @classmethod
    def eval(cls, a: sp.Expr) -> sp.Expr | None:
        if a.is_number:
            return ONE - a
        return a.args[0] if isinstance(a, mask_not) else None


class mask_and(_Mask):
    nargs = 2

    @classmethod
    def eval(cls, a: sp.Expr, b: sp.Expr) -> sp.Expr | None:
        if ZERO in (a, b):
            return ZERO
        if a == 1 or a == b:
            return b
        return a if b == 1 else None


class mask_or(_Mask):
    nargs = 2

    @classmethod
    def eval(cls, a: sp.Expr, b: sp.Expr) -> sp.Expr | None:
        if ONE in (a, b):
            return ONE
        if a == 0 or a == b:
            return b
        return a if b == 0 else None


class select(sp.Function):
    """``a`` where the mask holds, else ``b``; the other branch is never looked at."""

    nargs = 3
    is_real = True

    @classmethod
    def eval(cls, mask: sp.Expr, a: sp.Expr, b: sp.Expr) -> sp.Expr | None:
        if mask == 1 or a == b:
            return a
        if mask == 0:
            return b
        return select(mask.args[0], b, a) if isinstance(mask, mask_not) else None

    def _eval_derivative(self, s: sp.Symbol) -> sp.Expr:
        # not by fdiff: 0 * (derivative of the branch that is not taken) is NaN where that is inf
        mask, a, b = self.args
        return select(mask, a.diff(s), b.diff(s))


class stop_gradient(sp.Function):
    """The identity, with zero derivative."""

    nargs = 1
    is_real = True

    @classmethod
    def eval(cls, a: sp.Expr) -> sp.Expr | None:
        return a if a.is_number or isinstance(a, stop_gradient) else None

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return ZERO


class _Evaluated(sp.Function):
    """Base of functions that turn into a number where all arguments are numbers."""

    is_real = True

    @classmethod
    def eval(cls, *args: sp.Expr) -> sp.Expr | None:
        if all(a.is_number for a in args):
            return sp.Float(cls.number(*(float(a) for a in args)), 17)
        return None

    @staticmethod
    def number(*args: float) -> float:
        raise NotImplementedError


def _softplus(a: float) -> float:
    return max(a, 0.0) + math.log1p(math.exp(-abs(a)))


class sigmoid(_Evaluated):
    nargs = 1

    @staticmethod
    def number(*args: float) -> float:
        return math.exp(-_softplus(-args[0]))

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return sigmoid(self.args[0]) * sigmoid(-self.args[0])


class softplus(_Evaluated):
    nargs = 1

    @staticmethod
    def number(*args: float) -> float:
        return _softplus(args[0])

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return sigmoid(self.args[0])


class relu(_Evaluated):
    """``max(a, 0)``; its derivative at 0 is 0."""

    nargs = 1

    @staticmethod
    def number(*args: float) -> float:
        return max(args[0], 0.0)

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return select(greater(self.args[0], ZERO), ONE, ZERO)


class maximum(_Evaluated):
    """``max(a, b)``; at a tie the derivative goes to ``b``."""

    nargs = 2

    @staticmethod
    def number(*args: float) -> float:
        return max(args)

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        a, b = self.args
        on, off = (ONE, ZERO) if argindex == 1 else (ZERO, ONE)
        return select(greater(a, b), on, off)


class absolute(_Evaluated):
    nargs = 1

    @staticmethod
    def number(*args: float) -> float:
        return abs(args[0])

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        a = self.args[0]
        return select(greater(a, ZERO), ONE, select(greater(ZERO, a), -ONE, ZERO))


class logaddexp(_Evaluated):
    nargs = 2

    @staticmethod
    def number(*args: float) -> float:
        return args[1] + _softplus(args[0] - args[1])

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        a, b = self.args
        return sigmoid(a - b) if argindex == 1 else sigmoid(b - a)


class logsubexp(sp.Function):
    """``max(log(e^a - e^b), floor)``, safe for any a and b."""

    nargs = 3
    is_real = True

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        a, b, floor = self.args
        above = greater(self, floor)
        if argindex == 3:
            return select(above, ZERO, ONE)
        share = ONE / one_minus_exp(b - a)
        return select(above, share if argindex == 1 else -sp.exp(b - a) * share, ZERO)


class expm1(_Evaluated):
    nargs = 1

    @staticmethod
    def number(*args: float) -> float:
        return math.expm1(args[0])


class one_minus_exp(_Evaluated):
    """``1 - e^d`` for d < 0, and 1 elsewhere (only ever read where d < 0)."""

    nargs = 1

    @staticmethod
    def number(*args: float) -> float:
        return -math.expm1(args[0]) if args[0] < 0 else 1.0


class softmax_weight(sp.Function):
    """``exp(u - lse)`` where lse is the logsumexp of u: the derivative of a logsumexp.

    Kept whole so that the lowering may take it from an exponential that several reductions share.
    """

    nargs = 2
    is_real = True

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return self if argindex == 1 else -self


class to_rows(sp.Function):
    """A column vector read at each row's positive: ``v[positive(i)]``."""

    nargs = 1
    is_real = True
    is_number = False  # a vector, even of a constant


class to_cols(sp.Function):
    """A row vector put at each row's positive column; 0 in columns without a positive."""

    nargs = 1
    is_real = True
    is_number = False  # a vector, even of a constant


MASK_FUNCTIONS: tuple[Any, ...] = (greater, greater_equal, equal, mask_not, mask_and, mask_or)


def is_mask(expr: sp.Expr, mask_symbols: frozenset[sp.Symbol] = frozenset()) -> bool:
    """Whether ``expr`` is 0/1 valued by construction."""
    return isinstance(expr, MASK_FUNCTIONS) or expr in mask_symbols
