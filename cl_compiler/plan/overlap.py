"""What of the exchange products hide, phase by phase: nothing of a forward hides in a backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cl_compiler.lang.program import Program
from cl_compiler.lang.ring import HALF_RING, HOST, TRAVEL, is_local
from cl_compiler.lang.tile_ir import Gemm
from cl_compiler.plan.exchange import Hop, exchange_seconds, hiding_rows
from cl_compiler.plan.travel import travels_of
from cl_compiler.plan.types import Problem

PHASES = ("forward", "backward")


def shares_of_passes(program: Program) -> tuple[float, ...]:
    """Of a program's matrix products, those of each pass."""
    weights = []
    for pass_ in program.passes:
        code = next(iter(pass_.programs.values()))
        gemms = sum(isinstance(i, Gemm) for i in code.instructions)
        weights.append(gemms + len(pass_.sides) * len(code.gradients) or 1)
    return tuple(w / sum(weights) for w in weights)


@dataclass(frozen=True)
class Phase:
    """What a forward or a backward moves of a shard, all passes together.

    ``share``: of a program's products, those that are made while shards are on their way.
    ``gradient_bytes``: what is accumulated on its way, of ``shard_bytes``.  ``messages``: of a
    chunk at a hop.  ``held``: of a chunk of its own, what a rank computes while the last of it
    comes home.
    """

    name: str
    share: float
    shard_bytes: float
    gradient_bytes: float
    messages: int
    held: float = 0.0


def phases_of(program: Program, problem: Problem, resident: int = 0) -> tuple[Phase, ...]:
    """The phases of a program in which something travels.

    ``resident``: of shards in host memory, the rows for which the others travel once.
    """
    rows = max(problem.M, problem.N)
    shares, travels = shares_of_passes(program), travels_of(program, problem)
    result = []
    for name in PHASES:
        of = [
            (share, travel)
            for share, travel, pass_ in zip(shares, travels, program.passes, strict=True)
            if travel.phase == name and not is_local(pass_.grid)
        ]
        if not of:
            continue
        operands = (
            sum(t.operand_width * t.rounds(problem, resident) for _, t in of) * problem.input_bytes
        )
        gradients = (
            sum(t.gradient_width * t.rounds(problem, resident) for _, t in of)
            * problem.compute_bytes
        )
        share = sum(s for s, _ in of)
        messages = sum(t.messages * t.rounds(problem, resident) for _, t in of)
        held = max(t.held_back(problem.input_bytes, problem.compute_bytes) for _, t in of)
        whole, back = rows * float(operands + gradients), rows * float(gradients)
        result.append(Phase(name, share, whole, back, messages, held))
    return tuple(result)


@dataclass(frozen=True)
class Overlap:
    """Seconds of the exchange, those that products do not hide, and from how many rows they do.

    ``rows``: (phase, rows per rank from which on nothing of it is left over) of each.
    """

    exchange_s: float
    exposed_s: float
    rows: tuple[tuple[str, int], ...]


def overlap_of(
    phases: Sequence[Phase],
    schedule: str,
    problem: Problem,
    hops: tuple[Hop, ...],
    ranks: int,
    chunk: int,
    compute_s: float,
    products_s: float,
) -> Overlap:
    """How products and messages of a step lie beside each other.

    Args:
        phases: of the program.
        schedule: how shards travel.
        problem: of one rank.
        hops: that its shards pass over.
        ranks: of the group.
        chunk: rows that travel together.
        compute_s: of everything that a rank computes in a step.
        products_s: of the matrix products of one shard with one other.
    """
    rows = max(problem.M, problem.N)
    chunks = -(-rows // chunk)
    exchange_s = exposed_s = 0.0
    hidden = []
    for phase in phases:
        needed = hiding_rows(
            products_s * phase.share, problem, phase.shard_bytes, hops, phase.messages, chunk
        )
        hidden.append((phase.name, needed))
        if not hops:
            continue
        part_s, whole = compute_s * phase.share, phase.shard_bytes
        if schedule == "all_gather":
            # a gather is one message of all ranks' parts, and the first and the last are waited for
            calls = chunks * phase.messages * _rounds(ranks)
            sent_s = max(h.sends * whole / h.bytes_per_s + calls * h.latency_s for h in hops)
            waited_s = sent_s - part_s * (chunks - 1) / chunks
            left_s = sent_s / chunks
        else:
            sent_s = exchange_seconds(hops, whole, chunks * phase.messages)
            shard_s = part_s / ranks / chunks
            # what was accumulated of the last chunk comes home when nothing is left to multiply
            # but what was held back
            last = phase.gradient_bytes * (rows - (chunks - 1) * chunk) / rows
            left_s = max(last / h.bytes_per_s + h.latency_s for h in hops) if last else 0.0
            if schedule in (TRAVEL, HALF_RING):
                left_s = max(0.0, left_s - shard_s * phase.held)
            if schedule == HOST:  # a chunk's last step hides nothing: the next one is being copied
                waited_s = sent_s - part_s * (ranks - 1) / ranks
            else:
                messages = [
                    (h, whole / chunks / h.bytes_per_s + phase.messages * h.latency_s) for h in hops
                ]
                nested = schedule == "two_level"
                waited_s = max(
                    _waited_s(hop, seconds, ranks, chunks, shard_s, nested, nested and bool(inner))
                    for inner, (hop, seconds) in enumerate(messages)
                )
        exchange_s += sent_s
        exposed_s += max(left_s, waited_s)
    return Overlap(exchange_s, exposed_s, tuple(hidden))


def _waited_s(
    hop: Hop, message_s: float, ranks: int, chunks: int, shard_s: float, nested: bool, inner: bool
) -> float:
    """Seconds that a rank waits for what passes over one kind of hop.

    A message hides behind ``hop.steps`` shards' products of ``shard_s`` each, the first of all
    behind the own shard's (of rings that are ``nested``, the own node's).  The first of every
    further chunk sets out with the last message of the chunk before, and has what is left of the
    products of a circle to hide behind; the ``inner`` circle begins anew each time.
    """
    step_s = hop.steps * shard_s
    first_s = step_s if nested else shard_s
    between_s = first_s if inner else ranks * shard_s - (hop.sends - 1) * step_s
    later = chunks * (hop.sends - 1) * max(0.0, message_s - step_s)
    firsts = (chunks - 1) * max(0.0, message_s - between_s) + max(0.0, message_s - first_s)
    return later + firsts


def _rounds(ranks: int) -> int:
    """Of a collective: a message doubles who has it."""
    return math.ceil(math.log2(max(ranks, 2)))


__all__ = ["PHASES", "Overlap", "Phase", "overlap_of", "phases_of", "shares_of_passes"]
