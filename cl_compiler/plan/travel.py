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
    host         as ring_owner, once for every block of r rows    3ue
    canonical    2(P-1)ue      2(P-1)ue         2ue

Statistics, a few numbers per row, are held too; they are not counted in what is sent.  Of one set,
``ring_owner`` and ``ring_travel`` make its one gradient at home, and send (P-1)ue backward.

Of ``host``, with B = P·b rows of all ranks, [b/r]·B·D·e bytes pass over all ranks' host links
while the shards of a pass travel, [b/r]·ue over one rank's; blocks of r rows that stay, r·D(e+4)
with a gradient, take ue there and 4u back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import sympy as sp

from cl_compiler.lang.ir import BANK, SLOTS
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.ring import (
    BOTH_WAYS,
    CANONICAL,
    HALF_RING,
    HOST,
    is_local,
    operand_along,
)
from cl_compiler.lang.tile_ir import Accumulate, Compute, VectorRef
from cl_compiler.plan.sizes import COMPUTE_BYTES, INPUT_BYTES, count_of, largest, least
from cl_compiler.plan.tape import Tape, tape_of
from cl_compiler.plan.types import Problem

RANKS, NODE = sp.symbols("P ranks_of_node", positive=True)
ROWS_SENT, CHUNK = sp.symbols("rows chunk", positive=True)
"""Rows of a shard, and of what travels together."""
OPERANDS, GRADIENTS, VECTORS, FOLDS = sp.symbols("w_operands w_gradients vectors folds")
"""Elements per row: of operands, of gradients, statistics that are read, and that are made."""
_TWO = sp.Integer(2)
_OTHERS = RANKS - 1
_HALF = count_of(_OTHERS, _TWO)  # the whole part of P/2
_REST = _OTHERS - _HALF
_NODES = RANKS / NODE
_TURNS = count_of(ROWS_SENT, CHUNK)

SHARDS_SENT: Mapping[str, sp.Expr] = MappingProxyType({HALF_RING: _HALF})
"""How often a rank sends a shard, where it is not once to each of the others."""
CHUNKS_HELD: Mapping[str, tuple[sp.Expr, sp.Expr]] = MappingProxyType(
    {
        "ring": (least(_TWO, _OTHERS * _TURNS), 3 * least(sp.Integer(1), _OTHERS)),
        "all_gather": (2 * RANKS, 3 * RANKS),
        "two_level": (
            least(_TWO, (_NODES - 1) * _TURNS) + least(_TWO, NODE - 1),
            3 * (least(sp.Integer(1), _NODES - 1) + least(sp.Integer(1), NODE - 1)),
        ),
        CANONICAL: (_TWO, sp.Integer(0)),
        BOTH_WAYS: (
            least(_TWO, _HALF * _TURNS) + least(_TWO, _REST * _TURNS),
            3 * (least(sp.Integer(1), _HALF) + least(sp.Integer(1), _REST)),
        ),
        # of its own shard a rank has the chunk that is sent; alone, the one that follows, too
        HOST: (least(_TWO, _OTHERS), 3 * least(sp.Integer(1), _OTHERS)),
        HALF_RING: (least(_TWO, _HALF * _TURNS), 3 * least(sp.Integer(1), _HALF)),
    }
)
"""Chunks of other ranks' operands, and of accumulators, that are on their way at once."""


@dataclass(frozen=True)
class Travel:
    """What one pass moves, in elements per row of a shard: operands, and gradients with them.

    ``vectors``, ``folds``: statistics that are read with a shard, and made with it.
    ``side``: 0 where rows travel, 1 where columns do.
    ``home_width``, ``gain_width``: of operands that stay, and of gradients that are made there;
    ``adds``: to those of an earlier pass.  Where a rank has both sides to itself nothing travels,
    and ``whole`` are elements of operands that have no rows.  ``again``: tiles must be cut in one
    pass as they were in another.
    """

    phase: str
    operand_width: int
    gradient_width: int
    vectors: int = 0
    folds: int = 0
    side: int = 1
    home_width: int = 0
    gain_width: int = 0
    adds: bool = False
    whole: int = 0
    again: bool = False

    def held_back(self, input_bytes: int, compute_bytes: int) -> float:
        """Of a chunk of its own rows, what a rank computes last of all: see ``_own_pieces`` in
        ``templates/ring/travel.py.jinja``.

        The first rows of others come while it computes the rest, and the last gradients come home
        while it computes these.
        """
        if self.again or not self.gradient_width:
            return 0.0
        there = self.operand_width * input_bytes + self.vectors * compute_bytes
        back = self.gradient_width * compute_bytes
        return round(8 * back / (there + back)) / 8

    @property
    def is_local(self) -> bool:
        """Whether a rank makes the pass without the others."""
        return not self.operand_width + self.vectors + self.folds

    @property
    def messages(self) -> int:
        """Of a chunk at a hop: what is read; what is accumulated follows a step later."""
        reads, accumulates = self.operand_width + self.vectors, self.gradient_width + self.folds
        return bool(reads) + bool(accumulates)

    def home_rows(self, problem: Problem) -> int:
        """Rows of what stays."""
        return problem.M if self.side else problem.N

    def rounds(self, problem: Problem, resident: int) -> int:
        """How often shards travel: once for every block of what stays; 0: all of it does."""
        return max(1, -(-self.home_rows(problem) // resident)) if resident else 1

    def block_rows(self, problem: Problem, resident: int) -> int:
        """Rows of a block; of a local pass it is as large as that many of one matrix."""
        if self.is_local:
            resident = max(1, resident * problem.D // max(self.home_width, 1))
        return min(resident, self.home_rows(problem))


def travels_of(program: Program, problem: Problem) -> tuple[Travel, ...]:
    """What each pass of a program moves; nothing where a rank has both sides to itself."""
    backward = {id(p) for stage in program.backward for p in stage.passes}
    again = bool(program.plan.full_maxima)
    result = []
    made: set[str] = set()
    for pass_ in program.passes:
        phase = "backward" if id(pass_) in backward else "forward"
        if is_local(pass_.grid):
            result.append(_local(program, pass_, problem, phase))
            made |= _moved(program, pass_, 0)[1] | _moved(program, pass_, 1)[1]
            continue
        side = 0 if pass_.sides == ("right",) else 1
        operands, gradients = _moved(program, pass_, side)
        stay, gains = _moved(program, pass_, 1 - side)
        read, accumulated = _statistics(pass_, side)
        if not operands and not read:
            operands = {operand_along(program.plan, pass_.grid[side])}
        result.append(
            Travel(
                phase,
                sum(_width(problem, name) for name in operands),
                sum(_width(problem, name) for name in gradients),
                read,
                accumulated,
                side,
                sum(_width(problem, name) for name in stay),
                sum(_width(problem, name) for name in gains),
                not made.isdisjoint(gains),
                again=again,
            )
        )
        made |= gradients | gains
    return tuple(result)


def _local(program: Program, pass_: Pass, problem: Problem, phase: str) -> Travel:
    """A pass over slots or a queue."""
    (left, to_left), (right, to_right) = (_moved(program, pass_, side) for side in (0, 1))
    axes = {op.name: op.axes for op in program.plan.ir.operands}

    def per_row(names: set[str]) -> int:
        """Of those that have rows, elements of each."""
        return sum(
            _width(problem, name) * (problem.slots if SLOTS in axes[name] else 1)
            for name in names
            if BANK not in axes[name]
        )

    queues = [name for name in left | right if BANK in axes[name]]
    whole = problem.bank * sum(_width(problem, name) for name in queues)
    gains = per_row(to_left | to_right)
    return Travel(
        phase, 0, 0, home_width=per_row(left | right), gain_width=gains, adds=gains > 0, whole=whole
    )


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


def posted_bytes(
    program: Program, problem: Problem, ranks: int, schedule: str, resident: int = 0
) -> tuple[int, int]:
    """(forward, backward): operands and gradients that a rank sends with shards as ``problem``.

    Statistics, a few numbers per row, are not counted.  ``resident``: rows that stay on a device.
    """
    sent = {"forward": 0, "backward": 0}
    for travel in travels_of(program, problem):
        values = _values(travel, problem, ranks) | {"rows": max(problem.M, problem.N)}
        rounds = travel.rounds(problem, resident)
        sent[travel.phase] += rounds * round(_sent(schedule)(values)[0])
    return sent["forward"], sent["backward"]


@dataclass(frozen=True)
class HostLink:
    """Bytes of matrices between a rank's host memory and its device, in one phase.

    ``streamed``: shards, copied while others are computed; ``stays``: blocks of what stays, and
    queues, for which products wait; ``returned``: their gradients.
    """

    streamed: int = 0
    stays: int = 0
    returned: int = 0

    @property
    def total(self) -> int:
        return self.streamed + self.stays + self.returned


def host_link_of(travel: Travel, problem: Problem, resident: int) -> HostLink:
    """Of one pass with shards as ``problem``."""
    home, rows = travel.home_rows(problem), (problem.M, problem.N)[travel.side]
    gained = home * travel.gain_width * problem.compute_bytes
    return HostLink(
        travel.rounds(problem, resident) * rows * travel.operand_width * problem.input_bytes,
        (home * travel.home_width + travel.whole) * problem.input_bytes + gained * travel.adds,
        gained,
    )


def host_link_bytes(program: Program, problem: Problem, resident: int) -> tuple[HostLink, HostLink]:
    """(forward, backward) of one rank with shards as ``problem``."""
    found = {"forward": HostLink(), "backward": HostLink()}
    for travel in travels_of(program, problem):
        a, b = found[travel.phase], host_link_of(travel, problem, resident)
        found[travel.phase] = HostLink(
            a.streamed + b.streamed, a.stays + b.stays, a.returned + b.returned
        )
    return found["forward"], found["backward"]


def buffer_bytes(
    schedule: str,
    travel: Travel,
    problem: Problem,
    ranks: int,
    chunk: int,
    node: int = 0,
    resident: int = 0,
) -> tuple[int, int, int]:
    """(shards, gradients) on their way in one pass, with their statistics, and blocks that stay of
    shards in host memory, bytes.

    ``node``: of a ring of rings, the ranks of a node; ``resident``: rows of a block.
    """
    values = _values(travel, problem, ranks)
    home, rows = travel.home_rows(problem), (problem.M, problem.N)[travel.side]
    values |= {"chunk": chunk, "rows": rows, "ranks_of_node": node, "resident": resident}
    if resident:
        values |= {"home": home, "w_home": travel.home_width}
        values |= {"w_gain": travel.gain_width}
        values["resident"] = travel.block_rows(problem, resident)
    shards, gradients = _held(schedule)(values)
    if not resident:
        return round(shards), round(gradients), 0
    own, blocks = _of_host()(values)
    return round(shards + own), round(gradients), round(blocks)


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


@cache
def _of_host() -> Tape:
    """What ``host`` holds of this rank's own shards: chunks that set out, a block that stays."""
    resident, home = sp.symbols("resident home", positive=True)
    w_home, w_gain = sp.symbols("w_home w_gain")
    turns = count_of(home, resident) * count_of(ROWS_SENT, CHUNK)
    alone = largest([sp.Integer(1), least(_TWO, turns) - _OTHERS])
    return tape_of(
        [
            alone * CHUNK * OPERANDS * INPUT_BYTES,
            resident * (w_home * INPUT_BYTES + w_gain * COMPUTE_BYTES),
        ]
    )


__all__ = [
    "CHUNKS_HELD",
    "SHARDS_SENT",
    "HostLink",
    "Travel",
    "buffer_bytes",
    "host_link_bytes",
    "host_link_of",
    "posted_bytes",
    "shards_sent",
    "travels_of",
]
