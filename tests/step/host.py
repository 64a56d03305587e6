"""A host beside the "device" that tests run on: NumPy's memory, unseen by ``LiveBytes``."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cl_compiler.step.offload import Link, Pending, Room


@dataclass(frozen=True)
class Arrived(Pending):
    tensor: Tensor

    def get(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Shelf:
    kept: np.ndarray

    def put(self, start: int, rows: Tensor) -> None:
        self.kept[start : start + len(rows)] = rows.detach().numpy()

    def begin(self, start: int, stop: int) -> Pending:
        return Arrived(torch.from_numpy(self.kept[start:stop]).clone())


@dataclass
class NumpyHost(Link):
    """Copies at once, and notes when a copy to the device begins."""

    separate = True
    log: list[str] = field(default_factory=list)

    def holds(self, tensor: Tensor) -> bool:
        return False

    def begin(self, tensor: Tensor) -> Pending:
        self.log.append(f"copy {len(tensor)}")
        return Arrived(tensor.clone())

    def room(self, like: Tensor, rows: int) -> Room:
        return Shelf(
            np.empty((rows, *like.shape[1:]), dtype=torch.empty(0, dtype=like.dtype).numpy().dtype)
        )
