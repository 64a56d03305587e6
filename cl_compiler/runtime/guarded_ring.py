"""The ring of an emitted file on a ``RankGroup``: an error of one rank becomes every rank's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch

from cl_compiler.runtime.group import RankGroup


def guarded_ring(
    module: ModuleType,
    ranks: RankGroup,
    lengths: Mapping[str, Sequence[int]],
    check_backward: Callable[[torch.Tensor], None],
    two_groups: bool = False,
) -> Any:
    """The ring of an emitted file, whose waits raise on every rank when one of them fails.

    ``check_backward``: meets the other ranks before a backward; given the value's gradient.
    ``two_groups``: shards travel in both of the ranks' groups.
    """
    scales, second = ranks.scales, {"second": ranks.second_group} if two_groups else {}
    with ranks.registered():
        ring = _guarded(module)(
            ranks.group, lengths, *scales, ranks.device, ranks.control.group, **second
        )
    ring.ranks, ring.check_backward = ranks, check_backward
    return ring


@lru_cache(maxsize=256)
def _guarded(module: ModuleType) -> type[Any]:
    # It follows from sums over all ranks.  A file that needs it has a class of its own.
    shared = (module.NoPositiveError,) if hasattr(module, "NoPositiveError") else ()

    class Guarded(module.Ring):  # type: ignore[name-defined]
        def during(
            self, phase: str, factor: torch.Tensor | None = None
        ) -> contextlib.AbstractContextManager[None]:
            met = factor is None  # a forward: before it was known what runs
            context: contextlib.AbstractContextManager[None] = self.ranks.during(
                _nothing if met else partial(self.check_backward, factor),
                shared,
            )
            return context

        def wait(self, posted: Any) -> None:
            with self.ranks.watched():
                super().wait(posted)

        def settle(self) -> None:
            self.ranks.settle()

        def gathered(self, own: torch.Tensor) -> Any:
            self.ranks.settle()  # else the host would wait for a device that waits for a rank
            with self.ranks.watched(), self.ranks.registered():
                return super().gathered(own)

    for name in ("exchange", "gather", "swap", "spread"):
        if hasattr(module.Ring, name):
            setattr(Guarded, name, _watching(getattr(module.Ring, name)))
    return Guarded


def _watching(method: Callable[..., Any]) -> Callable[..., Any]:
    def post(self: Any, *tensors_and_peers: Any) -> Any:
        with self.ranks.watched(), self.ranks.registered():
            works = method(self, *tensors_and_peers)
        self.ranks.expect(works)
        return works

    return post


def _nothing() -> None:
    """What has been checked already."""


__all__ = ["guarded_ring"]
