"""What the user sees while the demonstration runs, and how Ctrl-C is answered.

Into a pipe or a file nothing is animated: only finished lines are printed.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["Interrupt", "Screen", "interruptible"]

_SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[str, float, float], None]
"""(what is being done, done so far, in all)."""


class Interrupt:
    """``requested`` once Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.requested = False


class Screen:
    """Lines and progress bars on ``console``."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, line: str) -> None:
        # A pipe gets whole lines; whoever reads it can fold them.
        self._console.print(Text(line), soft_wrap=not self._console.is_terminal)

    @contextmanager
    def bar(self, what: str) -> Iterator[Advance]:
        """A bar for one part of the run; in a pipe, a line when it begins and at times after."""
        if not self._console.is_terminal:
            self.say(f"{what} ...")
            yield self._lines()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(what, total=None)
            yield lambda what, done, total: progress.update(
                task, description=what, completed=done, total=total
            )

    def _lines(self) -> Advance:
        said = time.monotonic()

        def advance(what: str, done: float, total: float) -> None:
            nonlocal said
            if time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                self.say(f"  {done / max(total, 1e-9):4.0%}  {what}")

        return advance


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Inside the block the first Ctrl-C only sets ``requested``; a second one raises at once.

    Outside the main thread signals cannot be handled, and a shell's background jobs are told to
    ignore them: there the flag is never set.
    """
    interrupt = Interrupt()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield interrupt
        return

    def answer(number: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    before = signal.signal(signal.SIGINT, answer)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
