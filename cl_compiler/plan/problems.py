"""Whether a loss can be called with a problem's sizes, before anything is planned for it."""

from __future__ import annotations

from cl_compiler.errors import ArgumentError
from cl_compiler.lang.ir import LossIR
from cl_compiler.lang.resolve import Positives
from cl_compiler.plan.types import Problem


def check_problem(problem: Problem, loss: LossIR, positives: Positives) -> None:
    """Refuse sizes that no call of the loss could have, and sizes that nothing would read.

    Raises:
        ArgumentError: they are such; the message says which would do.
    """
    if loss.is_single_set and problem.M != problem.N:
        raise ArgumentError(
            f"{loss.name} compares one set with itself, so M = N; got M={problem.M} N={problem.N}."
        )
    if positives == "views" and problem.M % 2:
        raise ArgumentError(
            f"{loss.name}: without ids rows i and i + b of 2b are two views, so their number is "
            f"even; got M={problem.M}. Give {problem.M + 1}; or use ids, where any rows may be "
            "views (--positives ids; in Python, call the loss with ids and compile without a "
            "problem)."
        )
    if loss.uses_positives and positives == "diagonal" and problem.M > problem.N:
        raise ArgumentError(
            f"{loss.name}: row i's positive is column i, so N is at least M; got M={problem.M} "
            f"N={problem.N}. Swap the operands; or use ids, where any column may be positive "
            "(--positives ids; in Python, call the loss with ids and compile without a problem)."
        )
    further = [op.name for op in loss.operands if op.name not in ("x", "y", "z")]
    unknown = [name for name in problem.operands if name not in further]
    if unknown:
        raise ArgumentError(
            f"{loss.name} has no operand {', '.join(unknown)}; "
            + (f"it has {', '.join(further)}." if further else "leave its width out.")
        )
    axes = {axis for op in loss.operands for axis in op.axes}
    for axis, size in (("slots", problem.slots), ("bank", problem.bank)):
        if axis in axes and not size:
            raise ArgumentError(
                f"{loss.name} reads {axis}: give their number as Problem({axis}=…)."
            )
        if axis not in axes and size:
            raise ArgumentError(
                f"{loss.name} has no {axis}, so Problem({axis}={size}) would have no effect; leave "
                "it out."
            )


__all__ = ["check_problem"]
