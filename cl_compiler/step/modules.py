"""What an encoder consists of: the modules behind it, their buffers, and who reduces gradients.

An encoder is an ``nn.Module``, a method of one, a ``partial``, or any function; in a function the
modules are looked for among the names that it uses, and in objects, lists and mappings there.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "Buffers",
    "devices_of_modules",
    "is_compiled",
    "leaves_of",
    "modules_of",
    "owner_of",
    "reducers_of",
    "without_reduction",
]

_SEARCHED_ENTRIES = 64
"""A longer list holds data, not modules."""
_SEARCHED_DEPTH = 6
"""Steps from an encoder to what it uses: a method's object, its attribute, an entry of that."""
_LIBRARIES = frozenset({"builtins", "functools", "logging", "numpy", "pathlib", "torch", "typing"})
"""Whose objects hold no modules of an encoder."""


def owner_of(encoder: Callable[..., Any]) -> nn.Module | None:
    """The one module whose parameters are all that the encoder can train; None if unknown."""
    if isinstance(encoder, nn.Module):
        return encoder
    if isinstance(encoder, functools.partial) and not (encoder.args or encoder.keywords):
        return owner_of(encoder.func)
    owner = getattr(encoder, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def modules_of(*values: Any) -> tuple[nn.Module, ...]:
    """The modules behind encoders, each once, outermost first."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    for value in values:
        _search(value, found, seen)
    return tuple(found.values())


def _search(value: Any, found: dict[int, nn.Module], seen: set[int], depth: int = 0) -> None:
    if id(value) in seen or depth > _SEARCHED_DEPTH:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        found[id(value)] = value
        return
    for part in _parts(value):
        _search(part, found, seen, depth + 1)


def _parts(value: Any) -> Iterable[Any]:
    """What a value that is no module may reach modules through."""
    if isinstance(value, list | tuple):
        return value if len(value) <= _SEARCHED_ENTRIES else ()
    if isinstance(value, Mapping):
        return value.values() if len(value) <= _SEARCHED_ENTRIES else ()
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if inspect.ismethod(value):
        return (value.__self__, value.__func__)
    if inspect.isfunction(value):
        return _used_by(value)
    library = type(value).__module__.partition(".")[0] in _LIBRARIES
    if library or isinstance(value, type) or inspect.ismodule(value):
        return ()
    return list(getattr(value, "__dict__", {}).values())


def _used_by(function: Any) -> Iterable[Any]:
    """What a function finds by name: outside of it, and of its own file."""
    try:
        used = inspect.getclosurevars(function)
    except ValueError:  # a name that is bound later: nothing of it runs yet
        return ()
    here = [
        v
        for v in used.globals.values()
        if not inspect.isfunction(v) or v.__module__ == function.__module__
    ]
    return (*used.nonlocals.values(), *here)


def leaves_of(values: Iterable[Tensor]) -> list[Tensor]:
    """The tensors without a history that values depend on and that train."""
    leaves = [v for v in values if v.requires_grad and v.is_leaf]
    nodes = [v.grad_fn for v in values if v.grad_fn is not None]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return leaves


def parts_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules and all inside them, each once."""
    return list({id(part): part for module in modules for part in module.modules()}.values())


def devices_of_modules(modules: Iterable[nn.Module]) -> frozenset[torch.device]:
    """The devices of their parameters and buffers."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return frozenset(t.device for t in tensors)


def is_compiled(encoder: Callable[..., Any], modules: Iterable[nn.Module]) -> bool:
    """Whether ``torch.compile`` has a hand in it."""
    if hasattr(encoder, "_torchdynamo_orig_callable"):
        return True
    return any(
        hasattr(part, "_torchdynamo_orig_callable")
        or getattr(part, "_compiled_call_impl", None) is not None
        for part in parts_of(modules)
    )


class Buffers:
    """The buffers of modules as they are now; ``restore`` brings them back, in place.

    Restoring does not count as a change for autograd: graphs that saved a buffer stay valid.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [
            (part, name, tensor, tensor.detach().clone())
            for part in parts_of(modules)
            for name, tensor in part._buffers.items()
            if tensor is not None
        ]

    def forget_unchanged(self) -> Buffers:
        """Keep only buffers that have changed since; return their present values."""
        self._kept = [
            (part, name, tensor, value)
            for part, name, tensor, value in self._kept
            if part._buffers.get(name) is not tensor or not _equal(tensor, value)
        ]
        now = Buffers(())
        for part, name, _, _ in self._kept:
            tensor = part._buffers.get(name)
            if tensor is not None:
                now._kept.append((part, name, tensor, tensor.detach().clone()))
        return now

    def restore(self) -> None:
        """Give every buffer its kept value; one that was replaced by another tensor comes back."""
        for part, name, tensor, value in self._kept:
            part._buffers[name] = tensor
            tensor.data.copy_(value)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def reducers_of(modules: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """The modules that reduce gradients across ranks during a backward."""
    return tuple(
        p for p in parts_of(modules) if isinstance(p, DistributedDataParallel) or _is_sharded(p)
    )


def _is_sharded(part: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied; whoever did that has imported its module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(part, fsdp.FSDPModule)


@contextmanager
def without_reduction(reducers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, forwards and backwards accumulate gradients on each rank alone."""
    with ExitStack() as stack:
        for reducer in reducers:
            if isinstance(reducer, DistributedDataParallel):
                stack.enter_context(reducer.no_sync())
            else:
                stack.enter_context(_unreduced(reducer))
        yield


@contextmanager
def _unreduced(sharded: Any) -> Iterator[None]:
    """The same for one module of ``fully_shard``, which has no such block of its own."""
    state = sharded._get_fsdp_state()
    reduces = all(group.reduce_grads for group in getattr(state, "_fsdp_param_groups", ()))
    sharded.set_requires_gradient_sync(False, recurse=False)
    sharded.set_is_last_backward(False)
    try:
        yield
    finally:
        sharded.set_requires_gradient_sync(reduces, recurse=False)
        sharded.set_is_last_backward(True)
