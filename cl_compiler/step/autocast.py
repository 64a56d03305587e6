"""Autocast as it is at one moment: forwards are repeated under it, backwards run outside it.

Inside one ``torch.autocast`` block PyTorch keeps the low-precision copy that it made of a weight.
A copy made without a graph must not be met by a pass that needs one, or the weight silently gets
no gradient: whoever switches between the two clears these copies (``forget_casts``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

__all__ = ["AutocastState", "forget_casts"]


@dataclass(frozen=True)
class AutocastState:
    """Per type of device: (type, enabled, dtype)."""

    entries: tuple[tuple[str, bool, torch.dtype], ...]

    @staticmethod
    def now(devices: Iterable[torch.device] = ()) -> AutocastState:
        """The present state for the CPU, this machine's accelerator and the types of devices."""
        types = {"cpu", *(d.type for d in devices if d.type != "meta")}
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            types.add(accelerator.type)
        return AutocastState(
            tuple(
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in sorted(types)
            )
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, autocast is as it was."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self.entries:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, autocast is off: a backward repeats the types of its forward by itself."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self.entries:
                if enabled:
                    stack.enter_context(torch.autocast(kind, dtype, enabled=False))
            yield


def forget_casts() -> None:
    """Drop the low-precision copies of weights that an autocast block has made so far."""
    torch.clear_autocast_cache()
