"""The decisions: a mapping of the loss graph onto the hardware graph.

``facts`` counts what a schedule asks for, ``memory`` and ``cost`` turn that into expressions of
bytes and seconds, ``machine`` reads the hardware graph, ``space`` and ``search`` choose, ``limits``
says what fits, ``report`` explains.
"""

from cl_compiler.plan.limits import max_batch
from cl_compiler.plan.record import plan_from_json, plan_to_json
from cl_compiler.plan.report import explain
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
    "explain",
    "max_batch",
    "plan_candidates",
    "plan_from_json",
    "plan_to_json",
]
