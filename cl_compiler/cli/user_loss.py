"""``--loss``: a shipped loss by name, or one of the user's as ``path/to/file.py:name``."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import typer

from cl_compiler.errors import CompilerError, LossDefinitionError

if TYPE_CHECKING:
    from cl_compiler.lang.ir import LossIR

__all__ = ["find_loss"]


def find_loss(text: str) -> LossIR:
    """The loss that ``text`` names.

    Args:
        text: a shipped loss, ``file.py:name`` or ``module:name``; the name may be left out where
            the file defines one loss.

    Raises:
        typer.BadParameter: there is none.
        LossDefinitionError: its file does not run, or the loss leaves the language.
    """
    where, colon, name = text.rpartition(":")
    if not colon:
        where, name = (text, "") if text.endswith(".py") else ("", text)
    if not where:
        from cl_compiler.losses import find

        try:
            return find(name)
        except LossDefinitionError as error:
            said = str(error).partition("; or pass")[0].rstrip(".")
            raise typer.BadParameter(
                f"--loss: {said}; or name your own as path/to/file.py:name"
            ) from error
    return _pick(_load(where), where, name)


def _load(where: str) -> ModuleType:
    if not where.endswith(".py"):
        # A console script, unlike `python -m`, does not look in the current directory.
        sys.path.insert(0, "")
        try:
            return _run(where, lambda: import_module(where))
        finally:
            sys.path.remove("")
    path = Path(where).expanduser()
    if not path.is_file():
        raise typer.BadParameter(f"--loss {where}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module, loader = importlib.util.module_from_spec(spec), spec.loader

    def execute() -> ModuleType:
        loader.exec_module(module)
        return module

    return _run(where, execute)


def _run(where: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except CompilerError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and where.split(".")[0] == error.name.split(".")[0]:
            raise typer.BadParameter(
                f"--loss {where}: {error}; name a module that Python finds, or path/to/file.py:name"
            ) from error
        raise _failed(where, error) from error
    except Exception as error:
        raise _failed(where, error) from error


def _failed(where: str, error: Exception) -> LossDefinitionError:
    """The file's own error, with the place that it names or, failing that, happened at."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        file, line, text = error.filename, error.lineno, error.msg
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        file, line, text = last.filename, last.lineno, str(error)
    place = f"{Path(file).name}, line {line}"
    return LossDefinitionError(f"--loss {where}: {place}: {type(error).__name__}: {text}")


def _pick(module: ModuleType, where: str, name: str) -> LossIR:
    from cl_compiler.lang.ir import LossIR

    losses = {n: v for n, v in vars(module).items() if isinstance(v, LossIR)}
    if not name and len(losses) == 1:
        return next(iter(losses.values()))
    if name in losses:
        return losses[name]
    known = f"it defines {', '.join(losses)}" if losses else "it defines none"
    raise typer.BadParameter(
        f"--loss {where}:{name}: {known}; a loss is a function under @cl.define_loss"
        if name
        else f"--loss {where}: {known}; say which as {where}:name"
    )
