"""What a loss and a call look like: names, sizes and dtypes as values, without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class LossSignature:
    """What a loss is called with: names and kinds, nothing of how it is computed.

    ``operands``: (name, axes); ``inputs``: (name, axis); ``parameters``: names; ``one_positive``:
    the formula has no meaning where a row has several; ``compared``: pairs of operands of one
    width; ``prefixes``: (operand, columns) that are compared alone.
    """

    name: str
    operands: tuple[tuple[str, tuple[str, ...]], ...]
    inputs: tuple[tuple[str, str], ...]
    parameters: tuple[str, ...]
    uses_positives: bool
    stops: frozenset[str] = frozenset()
    one_positive: bool = False
    compared: tuple[tuple[str, str], ...] = ()
    prefixes: tuple[tuple[str, int], ...] = ()

    @property
    def single_set(self) -> bool:
        return any(axes == ("rows", "cols") for _, axes in self.operands)

    @cached_property
    def positional(self) -> tuple[str, ...]:
        """Operands that may be given by position."""
        return tuple(n for n, _ in self.operands if n in ("x", "y", "z"))

    def positives(self, rows: int, cols: int) -> str:
        """The kind of positives (see ``cl_compiler.lang.resolve``) of a call without ids."""
        if self.single_set:
            return "views"
        return "paired" if self.uses_positives and rows == cols else "diagonal"


@dataclass(frozen=True)
class CallSignature:
    """What of a call decides its code: sizes, dtype, positives, required gradients."""

    M: int
    N: int
    D: int
    dtype: str
    widths: tuple[tuple[str, int], ...] = ()
    slots: int = 0
    bank: int = 0
    positives: str = "diagonal"
    needs: frozenset[str] = frozenset()
    contiguous_copies: int = 0

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Computed once: the signature of a call like an earlier one is that earlier object."""
        return hash((self.M, self.N, self.bank, self.dtype, self.positives, self.needs))

    @property
    def size_class(self) -> tuple[int, ...]:
        """Sizes up to the next power of two share a variant."""
        return tuple((s - 1).bit_length() for s in (self.M, self.N, self.bank))

    def covers(self, other: CallSignature) -> bool:
        """Whether a plan for this signature also serves ``other``."""
        same = replace(
            other, M=self.M, N=self.N, bank=self.bank, contiguous_copies=self.contiguous_copies
        )
        return (
            same == self
            and other.M <= self.M
            and other.N <= self.N
            and other.bank <= self.bank
            and other.contiguous_copies <= self.contiguous_copies
        )


@dataclass(frozen=True)
class LoadedVariant:
    """Generated code that is ready to run, and where it came from."""

    signature: CallSignature
    module: ModuleType
    plan: Any
    source: str
    source_path: str | None
    cached: bool


__all__ = ["CallSignature", "LoadedVariant", "LossSignature"]
