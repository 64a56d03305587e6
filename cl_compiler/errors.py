"""One class per kind of user mistake.

Every message states the request, the obstacle and the fix.  All classes derive from
``CompilerError``, so ``except cl_compiler.errors.CompilerError`` catches whatever this package
raises on purpose.
"""

from __future__ import annotations

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
