"""A loss's own process group: made, guarded, and taken down when a rank fails."""

from __future__ import annotations

import contextlib
import json
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from cl_compiler.errors import ArgumentError, GroupError
from cl_compiler.runtime.guard import Record, listed, ranks_in_words
from cl_compiler.runtime.own_group import OwnGroup
from cl_compiler.runtime.watch import STORE_GONE, Watch, within

GradConvention = Literal["mean", "sum", "global"]
CONVENTIONS: tuple[GradConvention, ...] = ("mean", "sum", "global")


def process_group(group: Any, mesh: Any) -> dist.ProcessGroup:
    """The group that ``group=`` or ``mesh=`` names.

    Raises:
        ArgumentError: both or neither are given, this process is in neither, or the mesh has more
            than one dimension.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ArgumentError(
            "group= needs torch.distributed: call torch.distributed.init_process_group(…) first, "
            "under torchrun."
        )
    if group is not None and mesh is not None:
        raise ArgumentError("give group= or mesh=, not both: a 1-D mesh is a group.")
    if mesh is not None:
        if getattr(mesh, "ndim", None) != 1:
            raise ArgumentError(
                f"mesh={mesh!r}: a loss lives on one dimension of a mesh; pass mesh['dp'], or what "
                "the data-parallel dimension is called."
            )
        group = mesh.get_group()
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ArgumentError(
            f"group={group!r}: give a ProcessGroup that this process is a member of."
        )
    return group


class RankGroup:
    """The ranks that a loss runs on, with a process group of its own.

    Args:
        parent: whose members, in its order, are the ranks; their shards follow in that order.
        timeout_s: how long a rank waits for another before it raises.
        convention: what returned gradients are (see ``scales``).

    Every rank of ``parent`` makes it, in the same order as other groups.

    Raises:
        ArgumentError: the timeout is no positive number, or there is no such convention.
    """

    def __init__(
        self, parent: dist.ProcessGroup, timeout_s: float, convention: GradConvention
    ) -> None:
        check_group_options(timeout_s, convention)
        self.parent, self.timeout_s, self.convention = parent, float(timeout_s), convention
        self._own = OwnGroup(parent, _backend_of(parent), self.timeout_s)
        self.rank, self.world_size = self._own.rank, self._own.world_size
        self.device = torch.device("cpu")
        if self._own.backend != "gloo":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.calls = 0
        self._failed = ""
        self._store = PrefixStore("cl_compiler", self._own.group.get_group_store())
        # The thread holds the group, not this object: who forgets to close it leaves no thread.
        self._watch = Watch(self._store, self.rank, self.world_size, self._own.break_up)
        weakref.finalize(self, self._watch.close).atexit = False

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group in which shards travel."""
        return self._own.group

    @property
    def scales(self) -> tuple[float, float]:
        """What gradients of shards, and of scalars, are multiplied by.

        With g = dL/dx of the global value L, "mean" returns P·g (DDP and FSDP divide by P
        afterwards), "sum" and "global" g.  dL/ds of a replicated scalar is returned whole, by "sum"
        as the P-th part: its mean, its sum or itself is then dL/ds.
        """
        p = float(self.world_size)
        return {"mean": (p, 1.0), "sum": (1.0, 1.0 / p), "global": (1.0, 1.0)}[self.convention]

    def meet(self, record: Record) -> list[Record]:
        """Every rank's record, in their order, before anything else is sent.

        Raises:
            GroupError: a rank is gone or late.
        """
        self.check_alive()
        self._watch.enter(record.phase, record.sequence)
        own = torch.frombuffer(bytearray(record.pack()), dtype=torch.uint8).to(self.device)
        with self.watched():
            table = self._own.all_gather(own).cpu().numpy()
        return [Record.unpack(row.tobytes()) for row in table]

    def tell(self, key: str, text: str) -> list[str]:
        """Every rank's text: for messages, where digests differ.  Every rank calls it."""
        texts = ["unknown"] * self.world_size

        def read() -> None:
            self._store.set(f"{key}/{self.rank}", text)
            for rank in range(self.world_size):
                left = max(0.01, limit - time.monotonic())
                self._store.wait([f"{key}/{rank}"], timedelta(seconds=left))
                texts[rank] = self._store.get(f"{key}/{rank}").decode()

        limit = time.monotonic() + min(self.timeout_s, 5.0)
        with contextlib.suppress(Exception):  # it is only what a message says
            within(min(self.timeout_s, 5.0) + 1.0, read)
        return texts

    def agree(self, error: Exception | None) -> None:
        """Whether every rank can go on; before anything else, and on all of them.

        Raises:
            error: of this rank.
            ArgumentError: another rank has one.
            GroupError: a rank did not say in time.
        """
        keys = [f"asked/{rank}" for rank in range(self.world_size)]

        def read() -> dict[int, str]:
            self._store.set(keys[self.rank], "" if error is None else str(error))
            if error is None:
                self._store.wait(keys, timedelta(seconds=self.timeout_s))
            known = keys if error is None else ()
            return {rank: self._store.get(key).decode() for rank, key in enumerate(known)}

        try:
            said = within(self.timeout_s + 1.0, read)
        except (RuntimeError, TimeoutError) as late:
            raise error or self.failure(late) from late
        if error is not None:
            raise error
        wrong = [f"rank {rank}: {text}" for rank, text in said.items() if text]
        if wrong:
            raise ArgumentError(f"compile_loss on a group: {'; '.join(wrong)}")

    def share(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, as JSON values, on every rank.

        Raises:
            GroupError: rank 0 did not say in time.
        """
        made = json.dumps(make()) if self.rank == 0 else ""

        def read() -> Any:
            if made:
                self._store.set("shared", made)
            self._store.wait(["shared"], timedelta(seconds=self.timeout_s))
            return json.loads(self._store.get("shared"))

        try:
            return within(self.timeout_s + 1.0, read)
        except (RuntimeError, TimeoutError) as error:
            raise self.failure(error) from error

    @contextlib.contextmanager
    def closing_on_error(self) -> Iterator[None]:
        """While it is entered, an error takes the group down."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """While it is entered, errors of communication become a ``GroupError`` on every rank."""
        return _Watched(self)

    def registered(self) -> contextlib.AbstractContextManager[None]:
        """While it is entered, functions of ``torch.distributed`` take the group."""
        return self._own.registered()

    def check_alive(self) -> None:
        """Raise if the group has failed.

        Raises:
            GroupError: it has; the message quotes the failure.
        """
        heard = self._watch.heard() if not self._failed and self._watch.reason else None
        if heard is not None:
            self._failed = _quote(*heard)
        if self._failed:
            raise GroupError(f"{self._failed} The group is of no use any more: make another.")

    def fail(self, error: BaseException | str) -> None:
        """Tell the other ranks that this one has failed: they raise and quote it."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self._watch.poison(text)
        if not self._failed:
            self._failed = f"this rank failed: {text}"

    def failure(self, error: BaseException) -> GroupError:
        """What to raise after an error of communication; the other ranks hear of it."""
        if self._failed:
            return GroupError(self._failed)
        heard = self._watch.heard()
        if heard is None:
            seen = self._watch.others()
            heard = self._watch.heard()
            if heard is None and seen is None:
                heard = 0, STORE_GONE
        if heard is not None:
            text = _quote(*heard)
        else:
            assert seen is not None
            silent, beats = seen
            mine = self._watch.beat
            where = f"in the {mine.phase} of call {mine.sequence}"
            late = "imed out" in str(error) or "imeout" in str(error)
            what = f"waited {self.timeout_s:g} s {where}" if late else f"lost a connection {where}"
            text = f"rank {self.rank} {what}; "
            if silent:
                text += f"{ranks_in_words(silent)} gave no sign of life any more."
            else:
                places = {r: f"{b.phase} (call {b.sequence})" for r, b in beats.items()}
                shown = listed([places.get(r, "unknown") for r in range(self.world_size)])
                text += f"all ranks are alive, and last entered: {shown}."
            self._watch.poison(text)
        self._failed = text
        self._own.break_up()
        return GroupError(text)

    def close(self) -> None:
        """End the thread and the process group; every rank calls it."""
        self._failed = self._failed or "the group was closed."
        self._watch.close()
        self._own.destroy()
        del self._own, self._store  # and their connections


def _quote(rank: int, text: str) -> str:
    return text if text.startswith("rank ") else f"rank {rank} failed: {text}"


def _backend_of(parent: dist.ProcessGroup) -> str:
    """One backend, also where the parent has one for each kind of device."""
    backend = str(dist.get_backend(parent))
    if backend in ("gloo", "nccl"):
        return backend
    return "nccl" if torch.cuda.is_available() else "gloo"


def check_group_options(timeout_s: Any, convention: Any) -> None:
    """Whether a group can be made with these.

    Raises:
        ArgumentError: the timeout is no positive number, or there is no such convention.
    """
    if not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise ArgumentError(f"timeout_s={timeout_s!r}: give seconds above zero.")
    if convention not in CONVENTIONS:
        known = ", ".join(CONVENTIONS)
        raise ArgumentError(f"grad_convention={convention!r}: use one of {known}.")


class _Watched:
    def __init__(self, ranks: RankGroup) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # torch raises RuntimeError, and DistBackendError and others that derive from it
        if isinstance(error, RuntimeError) and not isinstance(error, GroupError):
            raise self.ranks.failure(error) from error


def guarded_ring(
    module: ModuleType,
    ranks: RankGroup,
    lengths: Mapping[str, Sequence[int]],
    check_backward: Callable[[], None],
) -> Any:
    """The ring of an emitted file, whose waits raise on every rank when one of them fails.

    ``check_backward``: meets the other ranks before a backward.
    """
    shard_scale, scalar_scale = ranks.scales
    with ranks.registered():
        ring = _guarded(module)(ranks.group, lengths, shard_scale, scalar_scale, ranks.device)
    ring.ranks, ring.check_backward = ranks, check_backward
    return ring


@lru_cache(maxsize=256)
def _guarded(module: ModuleType) -> type[Any]:
    class Guarded(module.Ring):  # type: ignore[name-defined]
        def enter(self, phase: str) -> None:
            if phase == "backward":
                self.check_backward()

        def wait(self, posted: Any) -> None:
            with self.ranks.watched():
                super().wait(posted)

    for name in ("exchange", "gather", "swap", "spread"):
        if hasattr(module.Ring, name):
            setattr(Guarded, name, _watching(getattr(module.Ring, name)))
    return Guarded


def _watching(method: Callable[..., Any]) -> Callable[..., Any]:
    def post(self: Any, *tensors_and_peers: Any) -> Any:
        with self.ranks.watched(), self.ranks.registered():
            return method(self, *tensors_and_peers)

    return post


__all__ = [
    "CONVENTIONS",
    "GradConvention",
    "RankGroup",
    "check_group_options",
    "guarded_ring",
    "process_group",
]
