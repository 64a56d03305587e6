"""A thread beside a rank that tells the others how it is, and hears when one of them has failed.

Waiting for a rank that has failed would last until the timeout.  So a failure is written to the
store that the ranks met in ("poison"), every rank's thread looks there, and breaks the connections
of its own group: whatever waits in it then raises.  Each thread also counts ("beat"), so that a
rank that is stopped can be told from one that is late.

Who keeps the store may be what has stopped: then no call of it returns.  The thread may wait there
for ever, nothing else may (``within``).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import Store

from cl_compiler.runtime.guard import ranks_in_words

INTERVAL_S = 0.1
"""Between two looks at the store; longer where there are more than 50 ranks."""
DIAGNOSIS_S = 0.7
"""For how long beats are compared: several intervals of a small group."""
STORE_GONE = "rank 0 gave no sign of life any more, or what kept the store of the ranks did not"
CLOSED = "closed its loss"
"""The last phase of a rank that needs its group no more."""
_POISON = "poison"
_LOST_AFTER = 5
"""Looks at a store that fails until it counts as gone."""
_PATIENCE_S = 1.5
"""How long a rank that has seen an error waits for the store; it never answers if it is stopped."""

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """What a call returns, or raises.

    Raises:
        TimeoutError: it takes longer; it goes on in a thread of its own, which nobody waits for.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="cl_compiler store", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"the store of the ranks gave no answer within {seconds:g} s")
    return answers[0]


@dataclass
class Beat:
    """What a rank says of itself: it counts, and names the call it is in (-1: none so far)."""

    count: int = 0
    sequence: int = -1
    phase: str = ""

    @property
    def entered(self) -> str:
        """What the rank entered last."""
        return "no call yet" if self.sequence < 0 else f"the {self.phase} of call {self.sequence}"

    @property
    def where(self) -> str:
        """Where the rank is, or was when it closed its loss."""
        if self.sequence < 0:
            return "before its first call"
        return f"after call {self.sequence}" if self.phase == CLOSED else f"in {self.entered}"


def absent(silent: Sequence[int], beats: Mapping[int, Beat]) -> str:
    """Why these ranks are not heard of: those that closed their loss, if there are any, say so."""
    closed = {r: beats[r] for r in silent if r in beats and beats[r].phase == CLOSED}
    if not closed:
        return f"{ranks_in_words(silent)} gave no sign of life any more."
    return "; ".join(f"rank {r} {CLOSED} {beat.where}" for r, beat in closed.items()) + "."


@dataclass(eq=False)
class Watch:
    """This rank's thread; ``reason`` is (rank, text) of the first failure that it heard of.

    ``break_up`` makes everything that waits in the group raise; ``look`` says why it should, as far
    as this rank knows by itself.
    """

    store: Store
    rank: int
    world_size: int
    break_up: Callable[[], None]
    reason: tuple[int, str] | None = None
    beat: Beat = field(default_factory=Beat)
    look: Callable[[], str] = str

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._mute = False  # the store gave no answer once, and is not asked any more
        self._interval_s = max(INTERVAL_S, self.world_size / 500)
        with contextlib.suppress(Exception):
            self.store = self.store.clone()  # type: ignore[attr-defined]  # its own connection
        self.store.set_timeout(timedelta(seconds=2))
        self._say()
        self._thread = threading.Thread(target=self._run, name="cl_compiler watch", daemon=True)
        if self.world_size > 1:
            self._thread.start()
        _alive.add(self)
        _hear_exceptions()

    def close(self) -> None:
        """End the thread."""
        if self._stop.is_set():
            return
        self._stop.set()
        _alive.discard(self)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(0.1 if self._mute else 5.0)
        del self.store, self.break_up, self.look

    def say_closed(self) -> None:
        """Tell the others that this rank leaves in an orderly way, unless it heard of a failure."""
        if self.reason is None and self._thread.is_alive():
            self.beat.phase = CLOSED
            with contextlib.suppress(Exception):
                self._ask(self._say)

    def enter(self, phase: str, sequence: int) -> None:
        """This rank begins a phase of a call."""
        self.beat.phase, self.beat.sequence = phase, sequence

    def poison(self, text: str) -> None:
        """Tell the others that this rank has failed; the first word counts."""

        def tell() -> None:
            if not self.store.check([_POISON]):
                self.store.set(_POISON, json.dumps([self.rank, text]))

        with contextlib.suppress(Exception):
            self._ask(tell)

    def heard(self) -> tuple[int, str] | None:
        """The failure that another rank reported, if any."""
        if self.reason is None:
            with contextlib.suppress(Exception):
                self._ask(self._look)
        return self.reason

    def others(self) -> tuple[list[int], dict[int, Beat]] | None:
        """(ranks that do not count any more, every rank's last beat); None: the store is gone."""
        before = self._beats()
        if before:
            time.sleep(max(DIAGNOSIS_S, 4 * self._interval_s))
        after = self._beats()
        if self.rank not in after:
            return None
        silent = [
            rank
            for rank in range(self.world_size)
            if rank != self.rank
            and (rank not in after or after[rank].count == before.get(rank, Beat()).count)
        ]
        return silent, after

    def _beats(self) -> dict[int, Beat]:
        """Of every rank that has said something; of none where the store is gone."""

        def read() -> dict[int, Beat]:
            keys = {rank: f"beat/{rank}" for rank in range(self.world_size)}
            known = {rank: key for rank, key in keys.items() if self.store.check([key])}
            return {rank: Beat(*json.loads(self.store.get(k))) for rank, k in known.items()}

        with contextlib.suppress(Exception):
            return self._ask(read)
        return {}

    def _ask(self, call: Callable[[], T]) -> T:
        """An answer of the store, from outside of the thread.

        Raises:
            Exception: the store is gone, or stopped.
        """
        if self._mute:
            raise TimeoutError("the store of the ranks is stopped")
        try:
            return within(_PATIENCE_S, call)
        except TimeoutError:
            self._mute = True
            raise

    def _look(self) -> None:
        """Whether another rank has failed."""
        if self.store.check([_POISON]):
            rank, text = json.loads(self.store.get(_POISON))
            if rank != self.rank:
                self.reason = rank, text

    def _say(self) -> None:
        self.beat.count += 1
        content = [self.beat.count, self.beat.sequence, self.beat.phase]
        self.store.set(f"beat/{self.rank}", json.dumps(content))

    def _run(self) -> None:
        failures = 0
        broken = False
        while not self._stop.wait(self._interval_s):
            try:
                if not broken and self.look():
                    broken = True  # whoever waits for the group's device comes back and says why
                    self.break_up()
                self._look()
                if self.reason is not None:
                    break
                self._say()
                failures = 0
            except Exception:
                failures += 1
                if failures >= _LOST_AFTER:
                    self.reason = 0, STORE_GONE
                    break
        if self.reason is not None and not self._stop.is_set():
            self.break_up()


_alive: weakref.WeakSet[Watch] = weakref.WeakSet()
_hearing = False


def _end_threads() -> None:
    """Before the interpreter ends.

    A thread that comes back from the store while it does cannot have the interpreter any more, and
    is ended inside of C++ code, which ends the process: "terminate called without an active
    exception".
    """
    for watch in list(_alive):
        watch.close()


def _hear_exceptions() -> None:
    """Poison every group of this process when an exception ends it."""
    global _hearing
    if _hearing:
        return
    _hearing = True
    atexit.register(_end_threads)
    before = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> Any:
        watches = [w for w in list(_alive) if w.world_size > 1]
        for watch in watches:
            watch.poison(f"{kind.__name__}: {error}")
        if watches:
            time.sleep(4 * INTERVAL_S)  # this process may be the one that keeps the store
        return before(kind, error, traceback)

    sys.excepthook = hook


__all__ = ["CLOSED", "STORE_GONE", "Beat", "Watch", "absent", "within"]
