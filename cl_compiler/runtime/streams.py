"""What a group has posted on a device's streams, and whether it comes to an end.

NCCL's ``work.wait()`` makes the stream wait, and returns: a peer that is gone or late shows where
the host next waits for the device, and there for ever, or until NCCL's watchdog ends the process.
So calls that were posted are looked at from two places: the rank's own thread (``watch``), which
breaks the group up when nothing ends any more, whatever the host waits for; and the end of a pass,
where the host waits for the last message, while the device still works on it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

POLL_S = 50e-6
"""Between two looks of a host that waits; a shard takes far longer."""


class Posted:
    """Calls on the streams of one device that have not ended yet, in the order of posting.

    ``timeout_s``: how long the first of them may stay the first.  What it waits for includes this
    rank's own products of one step.
    """

    def __init__(self, timeout_s: float, device: torch.device) -> None:
        self.timeout_s, self.device = timeout_s, device
        self.error = ""
        """Why nothing ends any more."""
        self._works: deque[Any] = deque()
        self._lock = threading.Lock()
        self._since = 0.0

    def add(self, works: Iterable[Any]) -> None:
        """What was just posted."""
        with self._lock:
            if not self._works:
                self._since = time.monotonic()
            self._works.extend(works)

    def look(self) -> str:
        """Take out what has ended.  Returns ``error``: "" where all is well so far."""
        with self._lock:
            while self._works and not self.error:
                if not self._works[0].is_completed():
                    if time.monotonic() - self._since > self.timeout_s:
                        self.error = f"timed out: no message ended for {self.timeout_s:g} s"
                    break
                ended = self._works.popleft()
                self._since = time.monotonic()
                self.error = _error_of(ended)
            return self.error

    def look_from_thread(self) -> str:
        """As ``look``, in a thread that has not used the device before."""
        if not self._works:
            return self.error
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            torch.cuda.set_device(self.device)
        return self.look()

    def settle(self, check: Callable[[], None]) -> None:
        """Wait until everything has ended; ``check`` raises if another rank has failed.

        Raises:
            RuntimeError: something went wrong, or nothing ends any more.
        """
        while True:
            error = self.look()
            check()  # a group that was broken up ends everything, too
            if error:
                raise RuntimeError(error)
            if not self._works:
                return
            time.sleep(POLL_S)

    def forget(self) -> None:
        """Nothing is waited for any more: the group is of no use."""
        with self._lock:
            self._works.clear()


def _error_of(ended: Any) -> str:
    try:
        ended.wait()  # it has ended: this only raises what went wrong
    except RuntimeError as error:
        return str(error)
    return ""


__all__ = ["POLL_S", "Posted"]
