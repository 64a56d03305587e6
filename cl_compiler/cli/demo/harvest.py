"""Harvest (description, code) pairs from installed Python sources with ``ast``.

Second stage of the demonstration: files in, a deduplicated and deterministic tuple of pairs out.
The description is the first paragraph of a function's docstring; the code is the function's body
without any docstring, comment or signature and with the function's own name blanked, so that
neither the text nor the name can be found in the code by looking for it.
"""

from __future__ import annotations

import ast
import hashlib
import re
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

from cl_compiler.cli.demo.sources import SourceFile

__all__ = ["HARVEST_VERSION", "Pair", "Split", "deduplicate", "harvest", "pairs_of_source", "split"]

HARVEST_VERSION = 1

_MIN_WORDS = 4
_MIN_CODE_TOKENS = 6
_MAX_TEXT_CHARACTERS = 600
_MAX_CODE_CHARACTERS = 3000
_OWN_NAME = "_own_name"
_FILES_PER_TASK = 16

_WORD = re.compile(r"[A-Za-z0-9]+")
_TOKEN = re.compile(r"\w+|[^\w\s]")
_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Pair:
    """``text`` describes what ``code`` does; ``module`` is the file that both come from."""

    module: str
    text: str
    code: str


@dataclass(frozen=True)
class Split:
    """Three sets of pairs with no module in common."""

    train: tuple[Pair, ...]
    valid: tuple[Pair, ...]
    test: tuple[Pair, ...]


def pairs_of_source(source: str | bytes, module: str) -> list[Pair]:
    """Every usable pair of one file, in source order; [] for a file that does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's files
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return []
    pairs = []
    functions = [node for node in ast.walk(tree) if isinstance(node, _FunctionNode)]
    functions.sort(key=lambda node: node.lineno)
    described = [(node, ast.get_docstring(node)) for node in functions]
    _strip_docstrings(tree)
    for node, docstring in described:
        pair = _pair(node, docstring, module) if docstring else None
        if pair is not None:
            pairs.append(pair)
    return pairs


def harvest(
    files: Sequence[SourceFile],
    *,
    workers: int = 2,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[Pair, ...]:
    """Parse ``files`` in ``workers`` processes; ``advance(n)`` is told of every n files finished.

    The result depends on the files alone, not on the order in which workers finish.
    """
    tasks = [
        tuple(files[start : start + _FILES_PER_TASK])
        for start in range(0, len(files), _FILES_PER_TASK)
    ]
    pairs: list[Pair] = []
    for task, found in zip(tasks, _in_order(tasks, workers), strict=True):
        pairs.extend(found)
        advance(len(task))
    return deduplicate(pairs)


def deduplicate(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """Keep the first pair of every description and of every code, compared by their words."""
    texts: set[str] = set()
    codes: set[str] = set()
    kept = []
    for pair in pairs:
        text = " ".join(_WORD.findall(pair.text.lower()))
        code = " ".join(_TOKEN.findall(pair.code))
        if text in texts or code in codes:
            continue
        texts.add(text)
        codes.add(code)
        kept.append(pair)
    return tuple(kept)


def split(pairs: Iterable[Pair], *, test_share: float = 0.1, valid_share: float = 0.1) -> Split:
    """Divide ``pairs`` by a hash of their module: the same module always goes to the same side."""
    parts: tuple[list[Pair], list[Pair], list[Pair]] = ([], [], [])
    for pair in pairs:
        digest = hashlib.sha256(pair.module.encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        side = 2 if position < test_share else 1 if position < test_share + valid_share else 0
        parts[side].append(pair)
    train, valid, test = (tuple(part) for part in parts)
    return Split(train, valid, test)


def _pair(node: _FunctionNode, docstring: str, module: str) -> Pair | None:
    text = " ".join(docstring.strip().split("\n\n")[0].split())[:_MAX_TEXT_CHARACTERS]
    if len(_WORD.findall(text)) < _MIN_WORDS:
        return None
    body = [statement for statement in node.body if not isinstance(statement, ast.Pass)]
    try:
        code = "\n".join(ast.unparse(statement) for statement in body)
    except (RecursionError, ValueError):
        return None
    code = re.sub(rf"\b{re.escape(node.name)}\b", _OWN_NAME, code)[:_MAX_CODE_CHARACTERS]
    if len(_TOKEN.findall(code)) < _MIN_CODE_TOKENS:
        return None
    return Pair(module, text, code)


def _strip_docstrings(tree: ast.AST) -> None:
    """Remove every docstring below ``tree``, nested functions and classes included."""
    for node in ast.walk(tree):
        if isinstance(node, _FunctionNode | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]


def _in_order(tasks: Sequence[tuple[SourceFile, ...]], workers: int) -> Iterator[list[Pair]]:
    """The pairs of each task, in the order of ``tasks``."""
    done = 0
    if workers > 1 and len(tasks) > 1:
        try:
            for found in _in_processes(tasks, workers):
                done += 1
                yield found
        except (BrokenProcessPool, OSError):
            pass  # no processes to be had here: the rest is parsed in this one
    for task in tasks[done:]:
        yield _parse_files(task)


def _in_processes(tasks: Sequence[tuple[SourceFile, ...]], workers: int) -> Iterator[list[Pair]]:
    # Spawned, not forked: the caller may already run threads (PyTorch's, a progress bar's).
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_ignore_interrupts)
    futures: list[Future[list[Pair]]] = []
    try:
        futures = [pool.submit(_parse_files, task) for task in tasks]
        for future in futures:
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches the whole process group; only the parent answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _parse_files(files: Sequence[SourceFile]) -> list[Pair]:
    pairs = []
    for file in files:
        try:
            source = file.path.read_bytes()
        except OSError:
            continue
        pairs.extend(pairs_of_source(source, file.module))
    return pairs
