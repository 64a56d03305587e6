"""What every rank says about a call before anything is sent: one record of 64 bytes.

A receiver that expects another shape gets garbage or hangs, so ranks compare first.  Each of them
decides from the same table of records, and so all of them raise the same error.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from cl_compiler.errors import ArgumentError, GroupError, NonFiniteError

RECORD_BYTES = 64
MAGIC = b"CLcr"
VERSION = 2
_LAYOUT = struct.Struct("<4sHBBIIIIBBH8s8s8s8sI")
PHASES = ("forward", "backward")
DTYPES = ("float64", "float32", "bfloat16", "float16")
POSITIVES = ("paired", "diagonal", "views", "ids")
FAILED, NOT_FINITE, IN_HOST = 1, 2, 4
AFTER_FAILURE = "Compile the loss again, on a new group if a rank is gone."
"""What to do where a group of ranks is of no use any more."""
_ROUNDINGS = 2.0**-20
"""How far numbers may be apart, relatively, that ranks compute from equal ones: a few roundings of
fp32.  A gradient's own rounding is as large."""
_SHOWN = 8
"""Ranks that a message lists, at most."""


def digest(text: str) -> bytes:
    """Eight bytes of a text's SHA-256."""
    return hashlib.sha256(text.encode()).digest()[:8]


@dataclass(frozen=True)
class Record:
    """One rank's view of one call; digests stand for what does not fit.

    ``sequence``: which call it is, and in a backward of which call; ``flags``: FAILED (this rank's
    arguments are wrong), NOT_FINITE, IN_HOST (shards are in host memory, and the device is another
    one).  ``needs``: a bit per argument that needs a gradient.
    ``request``: everything else that the plan depends on; ``shapes``: widths of further operands,
    slots and queue; ``scalars``: the parameters' values, which were compared in a forward, and in a
    backward ``packed_factor``.  ``copies_kib``: of contiguous copies.
    """

    phase: str
    sequence: int
    rows: int = 0
    cols: int = 0
    width: int = 0
    dtype: str = "float32"
    positives: str = "paired"
    needs: int = 0
    flags: int = 0
    loss: bytes = bytes(8)
    request: bytes = bytes(8)
    shapes: bytes = bytes(8)
    scalars: bytes = bytes(8)
    copies_kib: int = 0
    version: int = VERSION

    def pack(self) -> bytes:
        """The record's 64 bytes."""
        return _LAYOUT.pack(
            MAGIC,
            self.version,
            PHASES.index(self.phase),
            self.flags,
            self.sequence,
            self.rows,
            self.cols,
            self.width,
            DTYPES.index(self.dtype),
            POSITIVES.index(self.positives),
            self.needs,
            self.loss,
            self.request,
            self.shapes,
            self.scalars,
            self.copies_kib,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Record:
        """The record that ``pack`` wrote.

        Raises:
            GroupError: these are other bytes.
        """
        magic, version, phase, flags, sequence, rows, cols, width, dtype, positives, *rest = (
            _LAYOUT.unpack(data)
        )
        if magic != MAGIC:
            raise GroupError(
                "a rank of the group sent something that is no record of a call: give every loss "
                "a group of its own, and let no other code communicate in it."
            )
        if version != VERSION:  # whatever its other fields mean
            return cls("forward", 0, version=version)
        needs, loss, request, shapes, scalars, copies_kib = rest
        return cls(
            PHASES[phase],
            sequence,
            rows,
            cols,
            width,
            DTYPES[dtype],
            POSITIVES[positives],
            needs,
            flags,
            loss,
            request,
            shapes,
            scalars,
            copies_kib,
            version,
        )


_NAMES = {
    "version": (
        "the version of cl_compiler's group protocol",
        "Install the same cl_compiler on every rank.",
    ),
    "loss": (
        "the loss",
        "Compile one loss on all of them; equal names with other fingerprints are other formulas: "
        "the ranks then run different code.",
    ),
    "request": ("what compile_loss was asked for", "Pass the same on every rank."),
    "shapes": ("the widths of further operands, the slots or the queue", ""),
    "scalars": (
        "the values of the scalar arguments",
        "Pass the same number on every rank: a parameter under DDP or FSDP is, another one is "
        "broadcast first.",
    ),
    "width": ("D, the operands' number of columns,", ""),
    "dtype": ("the operands' dtype", "Cast them alike."),
    "needs": (
        "which arguments need a gradient",
        "Freeze the same towers, and the scale, on every rank.",
    ),
}
"""Field → what it is called, and what to do where ranks differ in it."""
_COMPILED = ("version", "loss", "request")
"""Fields that say which code a rank runs, and first how records are to be read: compared before
anybody's arguments are looked at."""
_DIGESTS = ("loss", "request", "shapes", "scalars")


def packed(parts: Mapping[str, str]) -> str:
    """Named values as one text, of which a message shows those that differ."""
    return json.dumps(dict(parts), sort_keys=True)


def differing(texts: Sequence[str]) -> str:
    """Of every rank's ``packed`` values those that are not the same on all: who has which."""
    try:
        parts = [json.loads(text) for text in texts]
        names = list(dict.fromkeys(name for of in parts for name in of))
    except (ValueError, TypeError):  # a rank did not say
        return listed(texts)
    found = {name: [f"{name}={of.get(name, 'none')}" for of in parts] for name in names}
    return "; ".join(listed(values) for values in found.values() if len(set(values)) > 1)


def check_compiled(
    name: str, records: Sequence[Record], describe: Callable[[str], Sequence[str]]
) -> None:
    """Raise, on every rank, where ranks are in different calls, or run different code.

    Args:
        name: the loss's, for messages; left out where ranks have different ones.
        records: of every rank, in their order.
        describe: field → what it stands for on every rank, as text; called where digests differ.

    Raises:
        GroupError: ranks are in different calls or phases.
        ArgumentError: they compiled another loss, or were asked for something else.
    """
    of = f"{name}: "
    if len({(r.version, r.loss) for r in records}) > 1:
        of = ""  # each rank's own name: the message would not be the same on all of them
    _compare(of, records, _COMPILED[:1], describe)
    places = [(r.phase, r.sequence) for r in records]
    if len(set(places)) > 1:
        shown = listed([f"the {phase} of call {n}" for phase, n in places])
        raise GroupError(
            f"{of}ranks are out of step: {shown}. Every rank calls the loss, and its backward, "
            f"equally often and in the same order. {AFTER_FAILURE}"
        )
    _compare(of, records, _COMPILED[1:], describe)


def _compare(
    of: str,
    records: Sequence[Record],
    names: Sequence[str],
    describe: Callable[[str], Sequence[str]],
) -> None:
    for field in names:
        found = [getattr(r, field) for r in records]
        if len(set(found)) == 1:
            continue
        if field not in (*_DIGESTS, "needs"):
            shown = listed([str(value) for value in found])
        else:
            texts = describe(field)
            shown = listed(texts) if field in ("loss", "needs") else differing(texts)
        what, fix = _NAMES[field]
        raise ArgumentError(f"{of}{what} must be the same on every rank: {shown}. {fix}".rstrip())


def check_agreement(
    name: str, records: Sequence[Record], describe: Callable[[str], Sequence[str]]
) -> None:
    """Raise what every rank has to raise, if anything, where all run the same code.

    Args:
        name: the loss's, for messages.
        records: of every rank, in their order.
        describe: field → what it stands for on every rank, as text; called where digests differ.

    Raises:
        NonFiniteError: some rank has inputs that are not finite, and asked to be told.
        ArgumentError: a rank's arguments are wrong, differ between ranks, or are all empty.
    """
    if any(r.flags & FAILED for r in records):
        shown = listed([of.removeprefix(f"{name}: ") for of in describe("failed")], but="")
        raise ArgumentError(f"{name}: {shown}")
    if any(r.flags & NOT_FINITE for r in records):
        bad = [k for k, r in enumerate(records) if r.flags & NOT_FINITE]
        raise NonFiniteError(f"{name}: NaN or infinite elements on {ranks_in_words(bad)}.")
    _compare(f"{name}: ", records, [field for field in _NAMES if field not in _COMPILED], describe)
    if len({r.flags & IN_HOST for r in records}) > 1:
        shown = listed(["in host memory" if r.flags & IN_HOST else "on a device" for r in records])
        raise ArgumentError(f"{name}: shards must be in one kind of memory on every rank: {shown}.")
    if len({r.positives == "ids" for r in records}) > 1:
        shown = listed(["ids" if r.positives == "ids" else "no ids" for r in records])
        raise ArgumentError(f"{name}: pass ids on every rank or on none: {shown}.")
    if sum(r.rows for r in records) == 0 or sum(r.cols for r in records) == 0:
        raise ArgumentError(
            f"{name}: the shards of all {len(records)} ranks are empty together; a loss needs at "
            "least one row and one column. Skip empty batches on every rank."
        )


def packed_factor(factor: float) -> bytes:
    """Of a record in a backward, eight bytes for what the value is multiplied by: its gradient."""
    return struct.pack("<d", factor)


def check_factors(name: str, records: Sequence[Record]) -> None:
    """Raise, on every rank, where ranks differentiate different multiples of the value.

    Raises:
        ArgumentError: the message names ranks and factors.
    """
    factors: list[float] = [struct.unpack("<d", r.scalars)[0] for r in records]
    if all(_alike(factor, factors[0]) for factor in factors):
        return
    raise ArgumentError(
        f"{name}: the value's gradient, what a rank multiplies the loss by before its backward, "
        f"must be the same on every rank: {listed([f'{factor:.9g}' for factor in factors])}. The "
        "loss is that of all ranks together: divide by a number of all ranks, not by a rank's own."
    )


def _alike(one: float, other: float) -> bool:
    return (one != one and other != other) or math.isclose(one, other, rel_tol=_ROUNDINGS)


def check_chunks(name: str, records: Sequence[Record], chunk: int) -> None:
    """Raise where a shard is no whole number of chunks.

    Raises:
        ArgumentError: the message names ranks and sizes.
    """
    if any(r.rows % chunk or r.cols % chunk for r in records):
        shown = listed([f"{r.rows} rows and {r.cols} columns" for r in records])
        raise ArgumentError(
            f'{name}: deterministic="canonical" adds up chunks of {chunk}, so that it does not '
            f"depend on where shards end, and every shard is a multiple of {chunk} rows and "
            f"columns: {shown}. Give ranks such shards, or compile with deterministic=True."
        )


def check_place(name: str, records: Sequence[Record], schedule: str, in_host: bool) -> None:
    """Raise where shards are not in the memory that a plan reads them from.

    Args:
        name: the loss's, for messages.
        records: of every rank; all of them have shards in one kind of memory.
        schedule: the plan's.
        in_host: whether it streams shards from host memory.

    Raises:
        ArgumentError: the message says where they have to be.
    """
    given = bool(records[0].flags & IN_HOST)
    if given == in_host:
        return
    if in_host:
        raise ArgumentError(
            f"{name}: shards are on a device, and the plan, schedule={schedule!r}, streams them "
            "from host memory: nothing else was asked for, or fits the budget (explain() says). "
            "Pass CPU tensors, pinned so that copies overlap, or give a larger memory_budget and "
            "another schedule."
        )
    raise ArgumentError(
        f"{name}: shards are in host memory, and the plan, schedule={schedule!r}, reads them on a "
        "device. Move them with .to('cuda'), or compile with schedule='host', which streams them."
    )


def joint_positives(records: Sequence[Record]) -> str:
    """The kind of positives that covers every rank's shard."""
    kinds = {r.positives for r in records}
    return "diagonal" if kinds == {"paired", "diagonal"} else kinds.pop()


def listed(values: Sequence[str], but: str | None = None) -> str:
    """What ranks have, ranks with the same value together; ranks that have ``but`` left out."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        if value != but:
            groups.setdefault(value, []).append(rank)
    return "; ".join(f"{ranks_in_words(ranks)}: {value}" for value, ranks in groups.items())


def ranks_in_words(ranks: Sequence[int]) -> str:
    """ "rank 2", "ranks 0, 2", "ranks 0-3, 7" or "ranks 0, 2, … (97 ranks)"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts: list[str] = []
    for run in runs:
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(rank) for rank in run]
    shown = ", ".join(parts[:_SHOWN])
    return f"ranks {shown}" + (f", … ({len(ranks)} ranks)" if len(parts) > _SHOWN else "")


assert _LAYOUT.size == RECORD_BYTES and len(fields(Record)) == 15

__all__ = [
    "AFTER_FAILURE",
    "FAILED",
    "IN_HOST",
    "NOT_FINITE",
    "RECORD_BYTES",
    "Record",
    "check_agreement",
    "check_chunks",
    "check_compiled",
    "check_factors",
    "check_place",
    "differing",
    "digest",
    "joint_positives",
    "listed",
    "packed",
    "packed_factor",
    "ranks_in_words",
]
