"""Cut an encoder's input into chunks of samples, whatever structure it has.

What counts as a sample's data, and what as structure around it:

* a tensor or an array (anything with a ``shape`` of at least one dimension) has one sample per
  entry of its first dimension;
* mappings (``BatchEncoding`` too), tuples, named tuples, dataclasses, and lists that hold such a
  tensor anywhere are structure: every part is cut, and the chunk has the same type;
* any other list is data, one entry per sample: strings, lists of token numbers, dictionaries;
* everything else (numbers, strings, None, tensors without dimensions) goes to every chunk.

``Whole`` and ``Rows`` overrule this: the one for a tensor that every chunk needs whole, the other
for a list of one tensor per sample.  A ``Stream`` is a batch that is never there at once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cl_compiler.errors import ArgumentError

__all__ = ["Rows", "Stream", "Tokens", "Whole", "chunk_ranges", "cut", "devices_of", "mapped"]
__all__ += ["lengths_of", "ranges_of", "sample_count", "tensors_of"]


@dataclass(frozen=True)
class Whole:
    """A part of an input that every chunk gets whole; the encoder sees ``value``."""

    value: Any


@dataclass(frozen=True)
class Rows:
    """A list with one entry per sample, whatever the entries are; the encoder sees a list.

    Any sequence will do: each chunk takes a slice of it, in both passes, so that one that reads its
    samples from disk never holds more than a chunk.
    """

    value: Sequence[Any]


@dataclass(frozen=True)
class Stream:
    """A batch that comes in parts from what can be read twice: a list of files, a ``DataLoader``.

    A step reads it once for each pass, and holds one part and what is cut from it.  Both times it
    has to give the same parts; no chunk spans two of them.

    parts: makes a new iterator each time; each part is an input of any structure.
    samples: of all parts together.
    """

    parts: Iterable[Any]
    samples: int

    def __post_init__(self) -> None:
        if isinstance(self.parts, Iterator):
            raise ArgumentError(
                f"Stream({type(self.parts).__name__}): a step reads its input twice, and this is "
                "used up after once. Give what makes a new iterator each time: a list, a "
                "DataLoader, an object with __iter__."
            )
        if self.samples < 1:
            raise ArgumentError(f"Stream(samples={self.samples}): give at least one sample.")


@dataclass(frozen=True)
class Tokens:
    """A chunk size in tokens: consecutive samples as long as they take at most ``per_chunk``.

    per_chunk: a number, or "auto" where chunk sizes are planned for a memory budget.

    lengths: of an input, the number of tokens of each sample; without it every sample counts as
        long as the second dimension of the first tensor, as it is when padding is not cut off.
    padded: a chunk takes its samples times its longest; False: the sum of lengths, for encoders
        that pack their samples.

    A single sample that is longer makes a chunk of its own.
    """

    per_chunk: int | Literal["auto"]
    lengths: Callable[[Any], Sequence[int] | Tensor] | None = None
    padded: bool = True


def _has_rows(value: Any) -> bool:
    shape = getattr(value, "shape", None)
    return not isinstance(value, type) and isinstance(shape, tuple) and len(shape) > 0


def _children(value: Any) -> list[tuple[str, Any]] | None:
    """The parts of a structure by name; None for a leaf."""
    if isinstance(value, Whole | Rows | Stream | Tensor | str | bytes) or _has_rows(value):
        return None
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, tuple) or (isinstance(value, list) and _holds_rows(value)):
        return [(f"[{number}]", part) for number, part in enumerate(value)]
    return None


def _holds_rows(value: Any) -> bool:
    """Whether a tensor or an array with samples is anywhere inside."""
    if isinstance(value, list):
        return any(_holds_rows(part) for part in value)
    children = _children(value)
    if children is None:
        return _has_rows(value)
    return any(_holds_rows(part) for _, part in children)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    children = _children(value)
    if children is None:
        yield path, value
    else:
        for name, part in children:
            yield from _leaves(part, path + name)


def _samples(leaf: Any) -> int | None:
    """How many samples a leaf holds; None for one that every chunk gets whole."""
    if isinstance(leaf, Rows):
        return len(leaf.value)
    if isinstance(leaf, list):
        return len(leaf)
    return int(leaf.shape[0]) if _has_rows(leaf) else None


def sample_count(value: Any, what: str) -> int:
    """How many samples an input has.

    Args:
        value: an input of any structure.
        what: its name in errors.

    Raises:
        ArgumentError: none, or parts disagree.
    """
    counts = {path: n for path, leaf in _leaves(value) if (n := _samples(leaf)) is not None}
    if len(set(counts.values())) == 1 and any(counts.values()):
        return next(iter(counts.values()))
    if not any(counts.values()):
        raise ArgumentError(
            f"{what} has no samples: a {type(value).__name__} without a tensor, an array or a list "
            "that has entries. Give at least one sample, and skip empty batches."
        )
    found = ", ".join(f"{path or 'itself'}: {n}" for path, n in counts.items())
    raise ArgumentError(
        f"{what}: its parts differ in the number of samples ({found}), so that no chunk is a part "
        "of all. Wrap what every chunk needs whole in Whole(…), a list of one tensor per sample in "
        "Rows(…)."
    )


def cut(value: Any, start: int, stop: int) -> Any:
    """The samples start … stop - 1 of an input, in the same structure; tensors are views."""
    if isinstance(value, Whole):
        return value.value
    if isinstance(value, Rows):
        return list(value.value[start:stop])
    children = _children(value)
    if children is None:
        return value if _samples(value) is None else value[start:stop]
    return _rebuilt(value, [cut(part, start, stop) for _, part in children])


def _rebuilt(value: Any, parts: list[Any]) -> Any:
    """A structure of the same type around other parts."""
    if isinstance(value, Mapping):
        return _mapping_like(value, dict(zip(value, parts, strict=True)))
    if isinstance(value, tuple):
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return parts
    result = copy.copy(value)
    for field, part in zip(dataclasses.fields(value), parts, strict=True):
        object.__setattr__(result, field.name, part)  # frozen ones too, and no __post_init__
    return result


def _mapping_like(value: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    """A mapping of the same type, with all that it carries besides its items."""
    if type(value) is dict or not hasattr(value, "__setitem__"):
        return parts
    result: Any = copy.copy(value)
    for key, part in parts.items():
        result[key] = part
    return result


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor of an input, marked parts included."""
    found: list[Tensor] = []
    for _, leaf in _leaves(value):
        inner = leaf.value if isinstance(leaf, Whole | Rows) else leaf
        if isinstance(inner, Tensor):
            found.append(inner)
        elif isinstance(leaf, Whole):
            found += tensors_of(inner)
        elif isinstance(inner, list | tuple):
            found += [t for part in inner for t in tensors_of(part)]
    return found


def mapped(value: Any, kinds: type | tuple[type, ...], change: Callable[[Any], Any]) -> Any:
    """A chunk with every part of some kinds changed, in the same structure."""
    if isinstance(value, kinds):
        return change(value)
    if isinstance(value, list):
        return [mapped(part, kinds, change) for part in value]
    children = _children(value)
    if children is None:
        return value
    return _rebuilt(value, [mapped(part, kinds, change) for _, part in children])


def devices_of(value: Any) -> frozenset[torch.device]:
    """The devices of an input's tensors."""
    return frozenset(tensor.device for tensor in tensors_of(value))


def chunk_ranges(value: Any, size: int | Tokens, what: str) -> tuple[tuple[int, int], ...]:
    """Where an input is cut: (start, stop) of consecutive chunks that cover it.

    Raises:
        ArgumentError: no samples, or lengths that do not belong to this input.
    """
    count = sample_count(value, what)
    if isinstance(size, int):
        return tuple((a, min(a + size, count)) for a in range(0, count, size))
    return ranges_of(lengths_of(value, size, what), size)


def ranges_of(lengths: Sequence[int], size: Tokens) -> tuple[tuple[int, int], ...]:
    """The same from the lengths of the samples."""
    assert size.per_chunk != "auto"  # planned before anything is cut
    count = len(lengths)
    ranges, start, longest, total = [], 0, 0, 0
    for sample, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        tokens = (sample + 1 - start) * longest if size.padded else total
        if tokens > size.per_chunk and sample > start:
            ranges.append((start, sample))
            start, longest, total = sample, length, length
    return (*ranges, (start, count))


def lengths_of(value: Any, size: Tokens, what: str) -> list[int]:
    """The tokens of each sample.

    Raises:
        ArgumentError: no samples, or lengths that do not belong to this input.
    """
    count = sample_count(value, what)
    if size.lengths is not None:
        given = size.lengths(value)
        lengths = given.tolist() if isinstance(given, Tensor) else [int(n) for n in given]
        if len(lengths) != count:
            raise ArgumentError(
                f"{what} has {count} samples, but Tokens(lengths=…) returned {len(lengths)} "
                "lengths; it must return one number of tokens per sample."
            )
        return lengths
    for _, leaf in _leaves(value):
        if _has_rows(leaf) and len(leaf.shape) > 1:
            return [int(leaf.shape[1])] * count
        if isinstance(leaf, list) and all(hasattr(entry, "__len__") for entry in leaf):
            return [len(entry) for entry in leaf]
    raise ArgumentError(
        f"{what}: its samples have no second dimension to count tokens in; give "
        "Tokens(per_chunk, lengths=…), a function from the input to one number per sample."
    )
