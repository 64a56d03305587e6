"""What ranks send each other and hold of it, as SymPy expressions in sizes and ranks.

With u = rows·D elements a shard, e bytes each, P ranks, N nodes of n; the last column is in bytes
of a chunk:

    schedule     forward       backward         on its way
    ring_owner   (P-1)ue       2(P-1)ue         2ue
    ring_travel  (P-1)ue       (P-1)u(e+4)      2ue + 12u
    all_gather   (P-1)ue       (P-1)u(e+4)      P(2ue + 12u)
    two_level    as ring_owner; of P-1 shards, N-1 travel between nodes   4ue
    half_ring    [P/2]ue       [P/2]u(e+4)      2ue + 12u
    both_ways    as ring_owner, half of it each way               4ue
    canonical    2(P-1)ue      2(P-1)ue         2ue

Statistics, a few numbers per row, are held too; they are not counted in what is sent.  Of one set,
``ring_owner`` and ``ring_travel`` make its one gradient at home, and send (P-1)ue backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import sympy as sp

from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.ring import BOTH_WAYS, CANONICAL, HALF_RING, is_local
from cl_compiler.lang.tile_ir import Accumulate, Compute, VectorRef
from cl_compiler.plan.sizes import COMPUTE_BYTES, INPUT_BYTES, count_of, least
from cl_compiler.plan.tape import Tape, tape_of
from cl_compiler.plan.types import Problem

RANKS, NODE = sp.symbols("P ranks_of_node", positive=True)
ROWS_SENT, CHUNK = sp.symbols("rows chunk", positive=True)
"""Rows of a shard, and of what travels together."""
OPERANDS, GRADIENTS, VECTORS, FOLDS = sp.symbols("w_operands w_gradients vectors folds")
"""Elements per row: of operands, of gradients, statistics that are read, and that are made."""
_OTHERS = RANKS - 1
_HALF = count_of(_OTHERS, sp.Integer(2))  # the whole part of P/2
_REST = _OTHERS - _HALF
_NODES = RANKS / NODE

SHARDS_SENT: Mapping[str, sp.Expr] = MappingProxyType({HALF_RING: _HALF})
"""How often a rank sends a shard, where it is not once to each of the others."""
CHUNKS_HELD: Mapping[str, tuple[sp.Expr, sp.Expr]] = MappingProxyType(
    {
        "ring": (least(sp.Integer(2), _OTHERS), 3 * least(sp.Integer(1), _OTHERS)),
        "all_gather": (2 * RANKS, 3 * RANKS),
        "two_level": (
            least(sp.Integer(2), _NODES - 1) + least(sp.Integer(2), NODE - 1),
            3 * (least(sp.Integer(1), _NODES - 1) + least(sp.Integer(1), NODE - 1)),
        ),
        CANONICAL: (sp.Integer(2), sp.Integer(0)),
        BOTH_WAYS: (
            least(sp.Integer(2), _HALF) + least(sp.Integer(2), _REST),
            3 * (least(sp.Integer(1), _HALF) + least(sp.Integer(1), _REST)),
        ),
        HALF_RING: (least(sp.Integer(2), _HALF), 3 * least(sp.Integer(1), _HALF)),
    }
)
"""Chunks of other ranks' operands, and of accumulators, that are on their way at once."""


@dataclass(frozen=True)
class Travel:
    """What one pass moves, in elements per row of a shard: operands, and gradients with them.

    ``vectors``, ``folds``: statistics that are read with a shard, and made with it.
    ``side``: 0 where rows travel, 1 where columns do.
    """

    phase: str
    operand_width: int
    gradient_width: int
    vectors: int = 0
    folds: int = 0
    side: int = 1


def travels_of(program: Program, problem: Problem) -> tuple[Travel, ...]:
    """What each pass of a program moves; nothing where a rank has both sides to itself."""
    backward = {id(p) for stage in program.backward for p in stage.passes}
    result = []
    for pass_ in program.passes:
        phase = "backward" if id(pass_) in backward else "forward"
        if is_local(pass_.grid):
            result.append(Travel(phase, 0, 0))
            continue
        side = 0 if pass_.sides == ("right",) else 1
        operands, gradients = _moved(program, pass_, side)
        result.append(
            Travel(
                phase,
                sum(_width(problem, name) for name in operands),
                sum(_width(problem, name) for name in gradients),
                *_statistics(pass_, side),
                side,
            )
        )
    return tuple(result)


def _moved(program: Program, pass_: Pass, side: int) -> tuple[set[str], set[str]]:
    operands, gradients = set(), set()
    for name in {*pass_.similarities, *pass_.gradients}:
        leaf = program.plan.leaves[name]
        view = (leaf.left, leaf.right)[side]
        assert view is not None
        operands.add(view.operand)
        needed = view.operand in program.plan.needs and not view.stop
        if name in pass_.gradients and needed and ("left", "right")[side] in pass_.sides:
            gradients.add(view.operand)
    return operands, gradients


def _statistics(pass_: Pass, side: int) -> tuple[int, int]:
    """(vectors that are read, accumulators that are made) along the travelling side."""
    read: set[str] = set()
    made: set[str] = set()
    for i in next(iter(pass_.programs.values())).instructions:
        if isinstance(i, Compute):
            read |= {a.name for a in i.args if isinstance(a, VectorRef) and a.dim == side}
            read |= {"ids"} if i.op == "positive_tile" else set()
        if isinstance(i, Accumulate) and 1 - i.dim == side:
            made |= set(i.targets)
    return len(read), len(made)


def _width(problem: Problem, operand: str) -> int:
    return problem.operands.get(operand, problem.D)


def shards_sent(schedule: str, ranks: int) -> int:
    """How many shards a rank sends in a pass."""
    return round(tape_of([SHARDS_SENT.get(schedule, _OTHERS)])({"P": ranks})[0])


def posted_bytes(program: Program, problem: Problem, ranks: int, schedule: str) -> tuple[int, int]:
    """(forward, backward): operands and gradients that a rank sends with shards as ``problem``.

    Statistics, a few numbers per row, are not counted.
    """
    sent = {"forward": 0, "backward": 0}
    for travel in travels_of(program, problem):
        values = _values(travel, problem, ranks) | {"rows": max(problem.M, problem.N)}
        sent[travel.phase] += round(_sent(schedule)(values)[0])
    return sent["forward"], sent["backward"]


def buffer_bytes(
    schedule: str, travel: Travel, problem: Problem, ranks: int, chunk: int, node: int = 0
) -> tuple[int, int]:
    """(shards, gradients) on their way in one pass, with their statistics, bytes.

    ``node``: of a ring of rings, the ranks of a node.
    """
    values = _values(travel, problem, ranks)
    values |= {"chunk": chunk, "ranks_of_node": node}
    shards, gradients = _held(schedule)(values)
    return round(shards), round(gradients)


def _values(travel: Travel, problem: Problem, ranks: int) -> dict[str, float]:
    return {
        "P": ranks,
        "e_in": problem.input_bytes,
        "e_c": problem.compute_bytes,
        "w_operands": travel.operand_width,
        "w_gradients": travel.gradient_width,
        "vectors": travel.vectors,
        "folds": travel.folds,
    }


@cache
def _sent(schedule: str) -> Tape:
    shards = SHARDS_SENT.get(schedule, _OTHERS)
    per_row = OPERANDS * INPUT_BYTES + GRADIENTS * COMPUTE_BYTES
    return tape_of([shards * ROWS_SENT * per_row])


@cache
def _held(schedule: str) -> Tape:
    shards, gradients = CHUNKS_HELD.get(schedule, CHUNKS_HELD["ring"])
    per_row = OPERANDS * INPUT_BYTES + VECTORS * COMPUTE_BYTES
    accumulated = (GRADIENTS + FOLDS) * COMPUTE_BYTES
    return tape_of([shards * CHUNK * per_row, gradients * CHUNK * accumulated])


__all__ = [
    "CHUNKS_HELD",
    "SHARDS_SENT",
    "Travel",
    "buffer_bytes",
    "posted_bytes",
    "shards_sent",
    "travels_of",
]
