"""Evaluate SymPy expressions at many points, soon after they were made.

``sympy.lambdify`` takes longer to compile an expression than the search takes to use it, so here an
expression becomes a tape: every distinct subexpression once, in order, with a Python function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import add, mul

import sympy as sp

Step = tuple[Callable[..., float], tuple[int, ...]]


@dataclass(frozen=True)
class Tape:
    """Expressions, ready to be evaluated.

    ``symbols`` are the names that ``__call__`` reads, ``constants`` the numbers that follow them;
    ``steps`` append one value each; ``results`` are the places of the expressions' values.
    """

    symbols: tuple[str, ...]
    constants: tuple[float, ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]

    def __call__(self, values: Mapping[str, float]) -> tuple[float, ...]:
        """The expressions' values.

        Raises:
            KeyError: a symbol has no value.
        """
        at: list[float] = [values[name] for name in self.symbols]
        at += self.constants
        for function, args in self.steps:
            at.append(function(*[at[a] for a in args]))
        return tuple([at[r] for r in self.results])

    def bind(self, values: Mapping[str, float]) -> Tape:
        """The same expressions with some symbols given: what depends on them alone is evaluated."""
        symbols = tuple(name for name in self.symbols if name not in values)
        known = {i: values[name] for i, name in enumerate(self.symbols) if name in values}
        known |= dict(enumerate(self.constants, len(self.symbols)))
        place = {self.symbols.index(name): index for index, name in enumerate(symbols)}
        start, rest = len(self.symbols) + len(self.constants), []
        for index, (function, args) in enumerate(self.steps, start):
            if all(a in known for a in args):
                known[index] = function(*(known[a] for a in args))
            else:
                rest.append((index, function, args))
        used = {a for _, _, args in rest for a in args} | set(self.results)
        constants = [i for i in known if i in used]
        place |= {old: len(symbols) + new for new, old in enumerate(constants)}
        place |= {old: len(place) + new for new, (old, _, _) in enumerate(rest)}
        return Tape(
            symbols,
            tuple(known[i] for i in constants),
            tuple((function, tuple(place[a] for a in args)) for _, function, args in rest),
            tuple(place[r] for r in self.results),
        )


def tape_of(
    expressions: Sequence[sp.Expr], functions: Mapping[str, Callable[[float], float]] | None = None
) -> Tape:
    """Order the subexpressions of ``expressions``.

    ``functions``: meanings of undefined functions, by name.
    """
    symbols = sorted({s.name for e in expressions for s in e.free_symbols})
    place: dict[sp.Expr, int] = {}
    names = {name: index for index, name in enumerate(symbols)}
    numbers: dict[float, int] = {}
    order: list[sp.Expr] = []
    stack = list(expressions)
    seen: set[sp.Expr] = set()
    while stack:  # parents before children; reversed below
        expr = stack.pop()
        if expr in seen:
            continue
        seen.add(expr)
        if expr.is_Symbol:
            place[expr] = names[expr.name]
        elif expr.is_number:
            value = float(expr)
            numbers.setdefault(value, len(symbols) + len(numbers))
            place[expr] = numbers[value]
        else:
            order.append(expr)
            stack.extend(a for a in expr.args if not (expr.is_Pow and a is expr.exp))
    steps: list[Step] = []
    start = len(symbols) + len(numbers)
    for expr in _by_depth(order):
        args = expr.args[:1] if expr.is_Pow else expr.args
        steps.append((_function(expr, functions or {}), tuple(place[a] for a in args)))
        place[expr] = start + len(steps) - 1
    return Tape(tuple(symbols), tuple(numbers), tuple(steps), tuple(place[e] for e in expressions))


def _by_depth(exprs: list[sp.Expr]) -> list[sp.Expr]:
    """Arguments before what reads them."""
    inside, depth = set(exprs), dict[sp.Expr, int]()

    def measure(expr: sp.Expr) -> int:
        if expr not in depth:
            depth[expr] = 1 + max((measure(a) for a in expr.args if a in inside), default=0)
        return depth[expr]

    return sorted(exprs, key=measure)


def _sum(*terms: float) -> float:
    return sum(terms)


def _reciprocal(x: float) -> float:
    return 1.0 / x


def _function(
    expr: sp.Expr, functions: Mapping[str, Callable[[float], float]]
) -> Callable[..., float]:
    match expr:
        case sp.Add():
            return add if len(expr.args) == 2 else _sum
        case sp.Mul():
            return mul if len(expr.args) == 2 else _product
        case sp.Pow(exp=sp.core.numbers.NegativeOne()):
            return _reciprocal
        case sp.Pow():
            power = float(expr.exp)
            return lambda x: x**power
        case sp.Min():
            return min
        case sp.Max():
            return max
        case sp.ceiling():
            return math.ceil
        case sp.floor():
            return math.floor
        case _:
            return functions[expr.func.__name__]


def _product(*factors: float) -> float:
    return math.prod(factors)


__all__ = ["Tape", "tape_of"]
