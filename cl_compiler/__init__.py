"""A compiler for contrastive losses whose similarity matrix never has to exist.

``from cl_compiler import compile_loss, Problem, HardwareSpec, MemoryBudget, lang as cl``: names are
loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_compiler import lang, losses
    from cl_compiler.api import compile_loss
    from cl_compiler.hardware.spec import HardwareSpec
    from cl_compiler.plan.types import MemoryBudget, Problem
    from cl_compiler.step.grad_cache import GradientCache
    from cl_compiler.step.planner import plan_step

__version__ = "0.1.0"

__all__ = [
    "GradientCache",
    "HardwareSpec",
    "MemoryBudget",
    "Problem",
    "compile_loss",
    "lang",
    "losses",
    "plan_step",
]

_HOME = {
    "compile_loss": "cl_compiler.api",
    "GradientCache": "cl_compiler.step.grad_cache",
    "HardwareSpec": "cl_compiler.hardware.spec",
    "MemoryBudget": "cl_compiler.plan.types",
    "Problem": "cl_compiler.plan.types",
    "plan_step": "cl_compiler.step.planner",
}


def __getattr__(name: str) -> Any:
    if name in ("lang", "losses"):
        return import_module(f"cl_compiler.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'cl_compiler' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
