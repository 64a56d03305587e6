"""How large logits can get, known from the operands' norms before any product is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sympy as sp

from cl_compiler.lang.ir import Leaf, View


def bound_text(
    expr: sp.Expr,
    leaves: Mapping[str, Leaf],
    norm: Callable[[View], str],
    largest: Callable[[sp.Expr], str],
) -> str:
    """An upper bound of |expr| over all pairs.

    ``norm``: prints the largest norm of a row of an operand; ``largest``: the largest magnitude
    of a factor that is no similarity.
    """
    terms = []
    for term in sp.Add.make_args(expr):
        factors = []
        for factor in sp.Mul.make_args(term):
            if isinstance(factor, sp.Symbol) and leaves[factor.name].kind == "similarity":
                leaf = leaves[factor.name]
                assert leaf.left is not None and leaf.right is not None
                factors += [norm(leaf.left), norm(leaf.right)]
                if leaf.scale:
                    factors.append(largest(sp.Symbol(leaf.scale)))
            elif factor.is_number:
                factors.append(repr(abs(float(factor))))
            else:
                factors.append(largest(factor))
        terms.append(" * ".join(factors))
    return " + ".join(terms)


__all__ = ["bound_text"]
