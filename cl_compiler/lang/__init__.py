"""The loss language: ``from cl_compiler import lang as cl``.

Phases, in the order in which they run: ``trace`` (the user's function → ``LossIR``), ``resolve``
(what a positive is), ``gradient`` (symbolic derivatives), ``sweeps`` (how often which tiles are
made), ``lower`` (straight-line programs over tile buffers).  ``reference`` is the dense float64
oracle; ``graph`` shows the result as a networkx DAG.
"""

from cl_compiler.lang.ir import LossIR
from cl_compiler.lang.trace import (
    Expr,
    OperandRef,
    at_positive,
    bank,
    clamp,
    col_input,
    cols,
    cols2,
    count,
    define_loss,
    exp,
    is_positive,
    is_self,
    log,
    logaddexp,
    logsubexp,
    logsumexp,
    max,
    maximum,
    mean,
    norm,
    operand,
    output,
    relu,
    row_input,
    rows,
    rows2,
    sigmoid,
    similarity,
    size,
    slots,
    softmean,
    softplus,
    sqrt,
    stop_gradient,
    sum,
    where,
    x,
    y,
    z,
)

__all__ = [name for name in dir() if not name.startswith("_")]
