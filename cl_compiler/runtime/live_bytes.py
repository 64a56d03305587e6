"""Count the bytes of live tensors, on any device and on a CPU too: how a budget is checked.

    with LiveBytes() as live:
        value = loss_fn(x, y, logit_scale=scale)
        value.backward()
    live.peak_bytes

What is seen: every storage that a PyTorch operator creates inside the block, from its creation
until it is freed: results, tensors saved for the backward, gradients, workspaces; growth by
``resize_`` and ``out=``; also on the meta device, where nothing is really allocated.  A storage is
counted once, however many views share it.

What is not seen: what existed before the block (inputs, and workspaces kept from an earlier call);
scratch memory that a kernel takes and returns within one operator (packed GEMM panels, a
``contiguous()`` copy inside a softmax), so that a sum over large operators is a lower bound;
rounding and caching by the allocator; memory that does not belong to a dense tensor (sparse
layouts, NumPy arrays, Python objects); operators that run in a Python thread other than the
block's own (the autograd engine's threads are seen).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A block in which tensor storages are counted; see the module's docstring.

    After the block ``peak_bytes`` stays what it was; ``live_bytes`` goes on falling as what the
    block left alive is freed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        # Address of a live StorageImpl -> (bytes it had from outside the block, bytes now).
        self._sizes: dict[int, tuple[int, int]] = {}
        self._lock = threading.RLock()  # a finalizer may run inside the locked section

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = dict(kwargs or {})
        given = _storages((args, keywords))
        with self._lock:
            for storage in given:
                self._see(storage, created=False)
        result = func(*args, **keywords)
        with self._lock:
            for storage in (*given, *_storages(result)):  # the given ones may have grown
                self._see(storage, created=True)
        return result

    def _see(self, storage: torch.UntypedStorage, *, created: bool) -> None:
        """Count ``storage`` if the block created it; of one from outside, only its growth."""
        address = storage._cdata
        size_bytes = storage.nbytes()
        if address not in self._sizes:
            base_bytes = 0 if created else size_bytes
            self._sizes[address] = (base_bytes, base_bytes)
            # The wrapper lives as long as the StorageImpl, held from Python or only from C++.
            weakref.finalize(storage, self._free, address).atexit = False
        base_bytes, before_bytes = self._sizes[address]
        now_bytes = max(base_bytes, size_bytes)
        self._sizes[address] = (base_bytes, now_bytes)
        self._add(now_bytes - before_bytes)

    def _free(self, address: int) -> None:
        with self._lock:
            base_bytes, now_bytes = self._sizes.pop(address)
            self._add(base_bytes - now_bytes)

    def _add(self, change_bytes: int) -> None:
        self.live_bytes += change_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """The storages of every dense tensor in ``tree``, a nest of tuples, lists and dicts."""
    return [
        leaf.untyped_storage()
        for leaf in tree_leaves(tree)
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided
    ]
