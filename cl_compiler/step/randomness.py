"""Take down the state of every random number generator that an encoder may draw from, and set it.

PyTorch's default generators on the CPU and on the devices involved, Python's ``random`` and, where
it is loaded, NumPy's.  A ``torch.Generator`` that an encoder owns is not seen: it should draw from
the default one.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["RandomState", "accelerators"]


def accelerators(devices: Iterable[torch.device]) -> tuple[torch.device, ...]:
    """The devices that have a generator besides the CPU's, sorted, each once."""
    found = {d for d in devices if d.type not in ("cpu", "meta")}
    return tuple(sorted(found, key=str))


@dataclass(frozen=True)
class RandomState:
    """The states of all generators at one moment; ``set`` brings that moment back.

    cpu: [5056] uint8; devices: (device, state) each; python, numpy: as their modules return them.
    """

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]
    python: Any
    numpy: Any

    @staticmethod
    def now(devices: Iterable[torch.device] = ()) -> RandomState:
        """The present state, of the CPU's generators and those of ``devices``."""
        states = tuple(
            (device, torch.get_device_module(device).get_rng_state(*_which(device)))
            for device in accelerators(devices)
        )
        numpy = sys.modules.get("numpy")
        drawn = None if numpy is None else numpy.random.get_state()
        return RandomState(torch.get_rng_state(), states, random.getstate(), drawn)

    def set(self) -> None:
        """Make the generators go on from here."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, *_which(device))
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def same_as(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two."""
        return (
            torch.equal(self.cpu, other.cpu)
            and all(
                torch.equal(a, b)
                for (_, a), (_, b) in zip(self.devices, other.devices, strict=True)
            )
            and self.python == other.python
            and _same_numpy(self.numpy, other.numpy)
        )


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """The argument that names a device; MPS has one only, and takes none."""
    return () if device.type == "mps" else (device,)


def _same_numpy(a: Any, b: Any) -> bool:
    """Legacy states are (name, keys [624], position, has_gauss, cached_gaussian)."""
    if a is None or b is None:
        return a is b
    return bool((a[1] == b[1]).all()) and a[0] == b[0] and a[2:] == b[2:]
