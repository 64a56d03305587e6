"""Turn verified source text into a module: the last step before generated code runs.

The loader is given text, never a path to read: what the cache verified is what is executed, even
if the file changes in between.  Lines are registered so that tracebacks and ``inspect.getsource``
(which Triton needs) show them, and the module sits in ``sys.modules`` so that what it defines can
be pickled by reference within a process.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.abc
import importlib.util
import linecache
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

__all__ = ["PACKAGE", "forget_sizes", "load_source", "sizes_as_they_were"]

PACKAGE = "cl_compiler_generated"

_loaded: dict[str, ModuleType] = {}  # sha256 of the source -> its module
_loading = threading.RLock()
_processes: dict[object, Any] = {}
"""PyTorch's setting of fp32 products -> what files know of its uses: a process has one of each."""


def load_source(source: str, name: str, path: Path | None = None) -> ModuleType:
    """Execute ``source`` as a module; the same text gives the same module.

    Args:
        source: the Python text, already verified.
        name: the variant's name, e.g. ``"loss-3f9a1c7e02b4"``; the module is called
            ``cl_compiler_generated.clip_3f9a1c7e02b4_<first 12 digits of the text's sha256>``.
        path: the file that holds the text, for tracebacks and ``__file__``; it is not read.
            None for source that lives in memory only.

    Raises:
        SyntaxError: the text is not Python.
        Whatever the module raises while it is executed.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()
    with _loading:
        module = _loaded.get(digest)
        if module is None:
            module_name = f"{PACKAGE}.{re.sub(r'[^0-9A-Za-z_]', '_', name)}_{digest[:12]}"
            module = _execute(
                source, module_name, f"<{module_name}>" if path is None else str(path)
            )
            if "_process" in vars(module):  # see templates/torch/precision.py.jinja
                own = vars(module)["_process"]
                vars(module)["_process"] = _processes.setdefault(own.setting, own)
            _loaded[digest] = module
        return module


def forget_sizes() -> None:
    """Let oneDNN multiply for further sizes of batches, though it keeps code for each.

    For what measures one variant after the other: what comes late would be left to BLAS.
    """
    for sizes in _sizes():
        sizes.clear()


@contextlib.contextmanager
def sizes_as_they_were() -> Iterator[None]:
    """What is measured meanwhile takes no places of the batches around it."""
    before = [(sizes, set(sizes)) for sizes in _sizes()]
    try:
        yield
    finally:
        forget_sizes()
        for sizes, known in before:
            sizes.update(known)


def _sizes() -> list[set[tuple[object, ...]]]:
    """Of batches for which oneDNN keeps code, (module, shapes)."""
    return [process.sizes for process in _processes.values() if hasattr(process, "sizes")]


def _forked() -> None:
    """In a child, where a thread that was loading a file is not."""
    global _loading
    _loading = threading.RLock()
    for process in _processes.values():
        process.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class _VerifiedSource(importlib.abc.InspectLoader):
    """Import-system face of one text: ``inspect`` and ``traceback`` ask a module's loader."""

    def __init__(self, source: str, filename: str) -> None:
        self._source = source
        self._filename = filename

    def get_source(self, fullname: str) -> str:
        return self._source

    def get_code(self, fullname: str) -> CodeType:
        # dont_inherit: this file's own __future__ imports are none of the generated code's.
        return compile(self._source, self._filename, "exec", dont_inherit=True)


def _execute(source: str, module_name: str, filename: str) -> ModuleType:
    loader = _VerifiedSource(source, filename)
    spec = importlib.util.spec_from_loader(module_name, loader, origin=filename)
    assert spec is not None  # only a loader of None gives none
    spec.has_location = True  # sets __file__
    module = importlib.util.module_from_spec(spec)
    _register_package()
    # A modification time of None tells linecache never to compare with, or reread, the file.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    sys.modules[module_name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _register_package() -> None:
    """Pickle imports ``package.module`` by name, which needs the package to exist."""
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE, "Modules that cl_compiler generated in this process.")
        package.__path__ = []
        sys.modules[PACKAGE] = package
