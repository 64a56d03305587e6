"""The decisions: a mapping of the loss graph onto the hardware graph.

``facts`` counts what a schedule asks for, ``memory`` and ``cost`` turn that into expressions of
bytes and seconds, ``machine`` reads the hardware graph, ``space`` and ``search`` choose, ``limits``
says what fits, ``report`` explains.
"""

from cl_compiler.plan.limits import max_batch
from cl_compiler.plan.search import choose_plan, plan_candidates
from cl_compiler.plan.types import (
    Candidate,
    LevelPlan,
    MemoryBudget,
    Plan,
    Problem,
    Request,
    Tile,
)

__all__ = [
    "Candidate",
    "LevelPlan",
    "MemoryBudget",
    "Plan",
    "Problem",
    "Request",
    "Tile",
    "choose_plan",
    "max_batch",
    "plan_candidates",
]
