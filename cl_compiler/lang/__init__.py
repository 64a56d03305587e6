"""The loss language: ``from cl_compiler import lang as cl``.

Phases, in the order in which they run: ``trace`` (the user's function → ``LossIR``), ``resolve``
(what a positive is), ``gradient`` (symbolic derivatives), ``sweeps`` (how often which tiles are
made), ``lower`` (straight-line programs over tile buffers).  ``reference`` is the dense float64
oracle; ``graph`` shows the result as a networkx DAG.
"""

from typing import TYPE_CHECKING, NoReturn

from cl_compiler.lang.expr import (
    Expr,
    clamp,
    exp,
    is_positive,
    is_self,
    log,
    logaddexp,
    logsubexp,
    maximum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    stop_gradient,
    where,
)
from cl_compiler.lang.ir import LossIR
from cl_compiler.lang.trace import define_loss
from cl_compiler.lang.vocabulary import (
    OperandRef,
    at_positive,
    bank,
    col_input,
    cols,
    cols2,
    count,
    logsumexp,
    max,
    mean,
    min,
    norm,
    operand,
    output,
    row_input,
    rows,
    rows2,
    similarity,
    size,
    slots,
    softmean,
    sum,
    x,
    y,
    z,
)
from cl_compiler.lang.words import no_such_word

__all__ = [
    "Expr",
    "LossIR",
    "OperandRef",
    "at_positive",
    "bank",
    "clamp",
    "col_input",
    "cols",
    "cols2",
    "count",
    "define_loss",
    "exp",
    "is_positive",
    "is_self",
    "log",
    "logaddexp",
    "logsubexp",
    "logsumexp",
    "max",
    "maximum",
    "mean",
    "min",
    "norm",
    "operand",
    "output",
    "relu",
    "row_input",
    "rows",
    "rows2",
    "sigmoid",
    "similarity",
    "size",
    "slots",
    "softmean",
    "softplus",
    "sqrt",
    "stop_gradient",
    "sum",
    "where",
    "x",
    "y",
    "z",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> NoReturn:
        """Say which words there are."""
        raise AttributeError(f"the loss language has no cl.{name}. {no_such_word(name)}")
