"""A loss's own process group: made, guarded, and taken down when a rank fails."""

from __future__ import annotations

import contextlib
import json
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from cl_compiler.errors import ArgumentError, CompilerError, GroupError, instead_of
from cl_compiler.runtime.guard import AFTER_FAILURE, Record, listed
from cl_compiler.runtime.own_group import WATCHDOG_S, OwnGroup
from cl_compiler.runtime.streams import Posted
from cl_compiler.runtime.watch import STORE_GONE, Beat, Watch, absent, within

GradConvention = Literal["mean", "sum", "global"]
CONVENTIONS: tuple[GradConvention, ...] = ("mean", "sum", "global")

_PATIENCE_S = 10.0
"""A rank that has nothing to wait for, its own arguments being wrong, gives the others so long."""


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
        if not hasattr(mesh, "get_group"):
            raise ArgumentError(
                f"mesh={mesh!r} is no DeviceMesh; give one of torch.distributed.init_device_mesh, "
                "or pass a ProcessGroup as group=."
            )
        if mesh.ndim != 1:
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
        self.control = OwnGroup(parent, "gloo", self.timeout_s)
        self._groups = [self.control]
        self._shards: OwnGroup = self.control
        self._second: OwnGroup | None = None
        self._posted: Posted | None = None
        self.device = torch.device("cpu")
        """From where shards travel."""
        self.rank, self.world_size = self.control.rank, self.control.world_size
        self.calls, self.loss = 0, ""  # its name, for messages
        self._failed = ""
        self._alike: weakref.ref[CompilerError] | None = None
        self._store = PrefixStore("cl_compiler", self.control.group.get_group_store())
        # The thread holds the groups, not this object: who forgets to close it leaves no thread.
        broken_up = partial(_break_up, self._groups)
        self._watch = Watch(self._store, self.rank, self.world_size, broken_up)
        weakref.finalize(self, self._watch.close).atexit = False

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group in which shards travel."""
        return self._shards.group

    @property
    def second_group(self) -> dist.ProcessGroup:
        """That of shards that travel at the same time as others."""
        assert self._second is not None, "connect makes it"
        return self._second.group

    def connect(self, device: torch.device, two_groups: bool = False) -> None:
        """Make the groups in which shards on a device travel, each once.  Every rank calls it.

        ``two_groups``: a second one, so that what passes there waits for nothing in the first.

        Raises:
            ArgumentError: this PyTorch cannot send from there.
            GroupError: a rank is gone or late.
        """
        if device.type != "cpu" and self._posted is None:
            if not dist.is_nccl_available():
                raise ArgumentError(
                    f"shards on {device} travel through NCCL, and this PyTorch was built without "
                    "it: install one that has it, or give the loss CPU tensors and hardware."
                )
            self._posted, self.device = Posted(self.timeout_s, device), device
            self._watch.look = self._posted.look_from_thread
            self._shards = self._another()
        if two_groups and self._second is None:
            self._second = self._another()

    def _another(self) -> OwnGroup:
        """One more group, in which shards travel.

        Ranks meet first: who waits for another hears there at once that it failed, and why.
        """
        in_host = self.device.type == "cpu"
        with self.watched():
            self.control.all_gather(torch.zeros(1))
        try:
            own = OwnGroup(
                self.parent,
                "gloo" if in_host else "nccl",
                self.timeout_s if in_host else WATCHDOG_S,
            )
        except GroupError as error:
            raise self.failure(error) from error
        self._groups.append(own)
        with self.watched():
            if own.backend == "nccl":
                # Later calls may be without ranks whose shards are empty; the first needs them all.
                self.expect([own.group.allreduce([torch.zeros(1, device=self.device)])])
                self.settle()
        return own

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
        own = torch.frombuffer(bytearray(record.pack()), dtype=torch.uint8)
        with self.watched():
            table = self.control.all_gather(own).numpy()
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
            else:  # whoever still connects would find this rank's end closed, and no reason
                with contextlib.suppress(RuntimeError):
                    patience_s = min(self.timeout_s, _PATIENCE_S)
                    self._store.wait(keys, timedelta(seconds=patience_s))
            known = keys if error is None else ()
            return {rank: self._store.get(key).decode() for rank, key in enumerate(known)}

        try:
            said = within(self.timeout_s + 1.0, read)
        except (RuntimeError, TimeoutError) as late:
            raise error or self.failure(late) from late
        if error is not None:
            raise error
        if any(said.values()):
            shown = listed([said[rank] for rank in range(self.world_size)], but="")
            raise ArgumentError(f"compile_loss on a group: {shown}")

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
            self._failed = self._failed or "the group was not made."
            self.close()
            raise

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """While it is entered, errors of communication become a ``GroupError`` on every rank."""
        return _Watched(self)

    @contextlib.contextmanager
    def registered(self) -> Iterator[None]:
        """While it is entered, functions of ``torch.distributed`` take the groups."""
        with contextlib.ExitStack() as stack:
            for own in self._groups:
                stack.enter_context(own.registered())
            yield

    def expect(self, works: Iterable[Any]) -> None:
        """These were posted, and have to end; the host need not have waited for them."""
        if self._posted is not None:
            self._posted.add(works)

    def settle(self) -> None:
        """Wait until everything that was posted has ended, where waits only queue.

        Raises:
            GroupError: a rank is gone or late.
        """
        if self._posted is not None:
            with self.watched():
                self._posted.settle(self.check_alive)

    @contextlib.contextmanager
    def during(
        self, check: Callable[[], None], shared: tuple[type[Exception], ...] = ()
    ) -> Iterator[None]:
        """Entered while a pass runs: the others hear of its errors, and its messages end in it.

        ``check``: meets the other ranks first.  ``shared``: errors that every rank raises alike.
        """
        alike: tuple[type[Exception], ...] = (CompilerError, *shared)  # or told already
        try:
            check()
            yield
            self.settle()
        except alike as error:
            if isinstance(error, CompilerError):
                self.raised_alike(error)
            raise
        except BaseException as error:
            self.fail(error)
            raise

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """While it is entered, an exception that leaves it is told to the other ranks, and goes on.

        They raise a ``GroupError`` that quotes it, in this call of the loss or their next one,
        whatever becomes of it here (one that ends the process is told anyway).  Errors of the loss
        that every rank raises alike are no failure: the group goes on.
        """
        try:
            yield
        except BaseException as error:
            if self._alike is None or self._alike() is not error:
                self.fail(error)
            raise

    def raised_alike(self, error: CompilerError) -> None:
        """Every rank raises this, or has been told of it."""
        self._alike = weakref.ref(error)

    def check_alive(self) -> None:
        """Raise if the group has failed.

        Raises:
            GroupError: it has; the message quotes the failure.
        """
        heard = self._watch.heard() if not self._failed and self._watch.reason else None
        if heard is not None:
            self._failed = _quote(*heard)
        if self._failed:
            raise self._of_no_use()

    def _of_no_use(self) -> GroupError:
        """What is raised since the group has failed, where that is seen and in later calls."""
        of = f"{self.loss}: " if self.loss else ""
        stop = "" if self._failed.endswith((".", "!", "?")) else "."
        return GroupError(f"{of}{self._failed}{stop} {AFTER_FAILURE}")

    def fail(self, error: BaseException | str) -> None:
        """Tell the other ranks that this one has failed: they raise and quote it."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self._watch.poison(text)
        if not self._failed:
            self._failed = f"this rank failed: {text}"
        if self._posted is not None:
            self._posted.forget()

    def failure(self, error: BaseException) -> GroupError:
        """What to raise after an error of communication; the other ranks hear of it."""
        if self._failed:
            return self._of_no_use()
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
            where = self._watch.beat.where
            late = "imed out" in str(error) or "imeout" in str(error)
            what = f"waited {self.timeout_s:g} s {where}" if late else f"lost a connection {where}"
            text = f"rank {self.rank} {what}; "
            if silent:
                text += absent(silent, beats)
            else:
                entered = [beats.get(r, Beat()).entered for r in range(self.world_size)]
                text += f"all ranks are alive, and last entered: {listed(entered)}."
            self._watch.poison(text)
        self._failed = text
        _break_up(self._groups)
        return self._of_no_use()

    def close(self) -> None:
        """End the thread and the process group; every rank calls it, once or more often."""
        if not self._groups:  # it was closed
            return
        if not self._failed:
            self._watch.say_closed()
            self._failed = "the group was closed."
        self._watch.close()
        for own in reversed(self._groups):
            own.destroy()
        self._groups.clear()
        self._posted = None
        self._second = None
        del self.parent, self.control, self._shards, self._store  # and their connections


def _quote(rank: int, text: str) -> str:
    return text if text.startswith("rank ") else f"rank {rank} failed: {text}"


def _break_up(groups: Sequence[OwnGroup]) -> None:
    for own in groups:
        own.break_up()


def check_group_options(timeout_s: Any, convention: Any) -> None:
    """Whether a group can be made with these.

    Raises:
        ArgumentError: the timeout is no positive number, or there is no such convention.
    """
    if not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise ArgumentError(f"timeout_s={timeout_s!r}: give seconds above zero.")
    if convention not in CONVENTIONS:
        raise ArgumentError(
            f"grad_convention={convention!r}: {instead_of(convention, CONVENTIONS)}."
        )


class _Watched:
    def __init__(self, ranks: RankGroup) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # torch raises RuntimeError, and DistBackendError and others that derive from it
        if isinstance(error, RuntimeError) and not isinstance(error, GroupError):
            raise self.ranks.failure(error) from error


__all__ = ["CONVENTIONS", "GradConvention", "RankGroup", "check_group_options", "process_group"]
