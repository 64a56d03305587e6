"""Tell somebody how far a step is: a progress bar, or a function of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["reporter"]


@contextmanager
def reporter(
    progress: bool | Callable[[str, int, int], None],
) -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with stage, samples done and samples in all; a bar closes at the end."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda stage, done, total: None
    else:
        from rich.progress import Progress

        with Progress(transient=True) as bar:
            tasks = {}

            def advance(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=total)
                bar.update(tasks[stage], completed=done)

            yield advance
