"""A tape gives what SymPy gives."""

from __future__ import annotations

import math
import random

import pytest
import sympy as sp

from cl_compiler.plan.sizes import least
from cl_compiler.plan.tape import tape_of

A, B, C = sp.symbols("a b c", positive=True)
RATE = sp.Function("rate")
EXPRESSIONS = [
    3 * A * B + C / A - 7,
    sp.Max(A * B, C, A + 1, evaluate=False) / least(A, B),
    sp.ceiling(A / B, evaluate=False) * sp.ceiling(C / 2, evaluate=False),
    sp.sqrt(A) * B**3 + RATE(A * B) / C,
    A,
    sp.Rational(3, 7),
]


def truth(expr: sp.Expr, values: dict[str, float]) -> float:
    numbers = {sp.Symbol(n, positive=True): v for n, v in values.items()}
    doubled = expr.replace(RATE, lambda x: 2 * x)
    return float(doubled.subs(numbers).doit().evalf(30))


def test_a_tape_evaluates_every_kind_of_node_as_sympy_does() -> None:
    tape = tape_of(EXPRESSIONS, {"rate": lambda x: 2 * x})
    draw = random.Random(0)
    for _ in range(20):
        values = {name: draw.uniform(0.5, 9.0) for name in "abc"}
        for expr, found in zip(EXPRESSIONS, tape(values), strict=True):
            assert math.isclose(found, truth(expr, values), rel_tol=1e-12), expr


def test_binding_some_symbols_changes_no_value_and_leaves_less_to_do() -> None:
    tape = tape_of(EXPRESSIONS, {"rate": lambda x: 2 * x})
    values = {"a": 2.5, "b": 1.5, "c": 4.0}
    for given in ("a", "ab", "c", "abc", ""):
        bound = tape.bind({n: values[n] for n in given})
        rest = {n: v for n, v in values.items() if n not in given}
        assert bound(rest) == tape(values)
        assert not given or len(bound.steps) < len(tape.steps)
    assert tape.bind(values).steps == ()


def test_equal_subexpressions_are_evaluated_once() -> None:
    calls = []
    shared = RATE(A + B)
    tape = tape_of([shared * C, shared + 1], {"rate": lambda x: calls.append(x) or x})
    tape({"a": 1.0, "b": 2.0, "c": 3.0})
    assert calls == [3.0]


def test_a_symbol_without_a_value_is_an_error() -> None:
    with pytest.raises(KeyError, match="b"):
        tape_of([A + B])({"a": 1.0})
