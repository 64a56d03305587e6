"""One class per kind of user mistake.

Every message states the request, the obstacle and the fix.  All classes derive from
``CompilerError``, so ``except cl_compiler.errors.CompilerError`` catches whatever this package
raises on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "BudgetError",
    "CacheError",
    "CompilerError",
    "GroupError",
    "HardwareError",
    "LossDefinitionError",
    "NoPositiveError",
    "NonFiniteError",
    "NotPlannedError",
    "ScheduleError",
    "check_word",
    "instead_of",
]


class CompilerError(Exception):
    """Base class of every error that this package raises on purpose."""


class LossDefinitionError(CompilerError, ValueError):
    """A loss function cannot be expressed in the loss language as it is written."""


class HardwareError(CompilerError, ValueError):
    """A hardware specification is unknown, incomplete or inconsistent."""


class BudgetError(CompilerError, ValueError):
    """No plan fits the memory budget; ``least_bytes`` would do, where that is known (else 0)."""

    def __init__(self, message: str, least_bytes: int = 0) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes


class ScheduleError(CompilerError, ValueError):
    """A schedule was requested that the loss or the machine cannot use."""


class ArgumentError(CompilerError, ValueError):
    """A call's arguments have the wrong names, shapes, dtypes or devices."""


class NoPositiveError(CompilerError, ValueError):
    """No row has a positive, so the mean over positives has no element."""


class NonFiniteError(CompilerError, ValueError):
    """``nonfinite="error"`` was requested and an input or the result is not finite."""


class NotPlannedError(CompilerError, RuntimeError):
    """The plan or the source was asked for before the first call and without ``problem=``."""


class GroupError(CompilerError, RuntimeError):
    """A rank of the process group is gone, late, or in another call than the others."""


class CacheError(CompilerError, RuntimeError):
    """The cache directory cannot be used as requested."""


ELSEWHERE = {
    "simclr": ("nt_xent",),
    "bf16": ("bfloat16",),
    "half": ("float16", "fp16"),
    "fp16": ("float16",),
    "float16": ("fp16",),
    "fp32": ("float32", "ieee"),
    "float32": ("ieee",),
    "float": ("float32", "ieee"),
    "full": ("ieee",),
    "fp64": ("float64", "ieee"),
    "float64": ("ieee",),
    "double": ("float64", "ieee"),
}
"""What is called otherwise elsewhere → our words for it, of which a list may have one."""


def instead_of(word: object, known: Iterable[str], what: str = "use one of", most: int = 1) -> str:
    """For a message: the words to use instead, as ``"did you mean 'clip'? use one of clip, …"``.

    What is called so elsewhere comes first, or the nearest ``most``, if any is near; capitals make
    no difference.
    """
    from difflib import get_close_matches

    words = list(known)
    by_lower = {name.lower(): name for name in words}
    lower = str(word).lower().removeprefix("torch.")
    close = [name for name in ELSEWHERE.get(lower, ()) if name in by_lower][:1]
    close = close or get_close_matches(lower, by_lower, n=most, cutoff=0.65)
    hint = f"did you mean {' or '.join(repr(by_lower[c]) for c in close)}? " if close else ""
    return f"{hint}{what} {', '.join(words)}"


def check_word(name: str, word: object, known: Iterable[str]) -> None:
    """Refuse an argument that is none of the known words.

    Raises:
        ArgumentError: with the nearest of them.
    """
    if word not in (words := tuple(known)):
        raise ArgumentError(f"{name}={word!r} is unknown: {instead_of(word, words)}.")
