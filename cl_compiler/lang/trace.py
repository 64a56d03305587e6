"""``define_loss``: run the user's function once on symbols and keep what it reduced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any

import sympy as sp

from cl_compiler.errors import LossDefinitionError
from cl_compiler.lang.expr import RESERVED, SELF, Expr, Trace, is_self, tracing, value_of
from cl_compiler.lang.ir import Leaf, LossIR, axes_of, ordered
from cl_compiler.lang.vocabulary import similarity, x, y


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
    if not callable(function):
        raise LossDefinitionError(
            f"define_loss got {function!r} ({type(function).__name__}), which is no function; "
            "decorate one whose arguments are sim and scalars, and which returns the loss."
        )
    trace = Trace(getattr(function, "__name__", type(function).__name__))
    with tracing(trace):
        args, parameters = {}, []
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise LossDefinitionError(
                    f"{trace.name}: {parameter} cannot be traced; name each parameter, and make "
                    "a factory for structural constants."
                )
            if parameter.default is not parameter.empty:
                raise LossDefinitionError(
                    f"{trace.name}: {parameter} has a default, which a compiled loss cannot keep; "
                    "pass the value in each call, or make a factory for structural constants."
                )
            if name == "sim":
                args[name] = similarity(x, y)
            elif name in ("x", "y", "z"):
                raise LossDefinitionError(
                    f"{trace.name}: the argument {name!r} is reserved; use cl.{name} for operands."
                )
            elif RESERVED.fullmatch(name):
                raise LossDefinitionError(
                    f"{trace.name}: the argument {name!r} is reserved; choose another name."
                )
            else:
                parameters.append(name)
                args[name] = Expr(trace.leaf(Leaf(name, "parameter", ())))
        returned = function(**args)
        if returned is None:
            raise LossDefinitionError(
                f"{trace.name} returns nothing: end it with `return` and the loss, a scalar."
            )
        if isinstance(returned, (tuple, list, dict)):
            raise LossDefinitionError(
                f"{trace.name} returns a {type(returned).__name__}: return the loss alone, a "
                "scalar; whatever else is wanted beside it goes to cl.output(name, value)."
            )
        value = value_of(returned)
        results = (value, *(e for _, e in trace.outputs))
        folded = tuple(e for red in trace.reductions for e in red.expressions)
        if any(e.has(sp.zoo, sp.nan) for e in (*results, *folded)):
            raise LossDefinitionError(
                f"{trace.name} divides by zero, or has a constant that is no number, whatever the "
                "similarities are; look for a division by a constant that can be 0."
            )
        if any(e.has(is_self.expr) for e in results):
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
    _check_similarity(trace, value)
    trace.leaves.pop(SELF, None)
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


def _check_similarity(trace: Trace, value: sp.Expr) -> None:
    """Whether the value depends on a similarity, directly or through what it reduces.

    Raises:
        LossDefinitionError: it does not, so there is nothing to tile and no gradient.
    """
    reductions = {red.name: red for red in trace.reductions}
    waiting: list[sp.Expr] = [value]
    seen: set[sp.Symbol] = set()
    while waiting:
        for symbol in waiting.pop().free_symbols - seen:
            seen.add(symbol)
            if trace.leaves[symbol.name].kind == "similarity":
                return
            if symbol.name in reductions:
                waiting += reductions[symbol.name].expressions
    made = ("reduction", "count")
    used = ", ".join(sorted(s.name for s in seen if trace.leaves[s.name].kind not in made))
    raise LossDefinitionError(
        f"{trace.name}: the value depends on no similarity, {'only on ' * bool(used)}"
        f"{used or 'on nothing at all'}; there is nothing to compile. Let what is returned use sim "
        "or cl.similarity(a, b), e.g. "
        "cl.mean(cl.logsumexp(logit_scale * sim, over=cl.cols), over=cl.rows)."
    )
