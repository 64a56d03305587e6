"""Long lines of emitted text → lines of at most ``WIDTH`` characters, laid out as ruff would.

A small part of a formatter: the last bracket of a line is opened, its content goes on a line of its
own, or one element to a line.  Emission must not depend on a formatter being installed.
"""

from __future__ import annotations

import re
import textwrap

__all__ = ["WIDTH", "drop_unused", "fit", "wrap"]

WIDTH = 100
_OPEN, _CLOSE = "([{", ")]}"


def wrap(text: str, indent: int = 0) -> str:
    """Prose of a docstring or a comment; further lines are indented."""
    return textwrap.fill(
        text,
        WIDTH - indent,
        break_long_words=False,
        break_on_hyphens=False,
        subsequent_indent="    ",
    )


def drop_unused(text: str) -> str:
    """A file without locals and imports that nothing reads."""
    head, *functions = re.split(r"\n(?=(?:def|class|@)\b|@)", text)
    text = "\n".join([head, *map(_without_unused_locals, functions)])
    return text if "math." in text else text.replace("import math\n", "")


def _without_unused_locals(function: str) -> str:
    while True:
        for match in re.finditer(r"^    (\w+) = (?!.*(?:_sweep|_store)\w*\().*\n", function, re.M):
            complete = match.group().count("(") == match.group().count(")")
            if complete and len(re.findall(rf"\b{match.group(1)}\b", function)) == 1:
                function = function[: match.start()] + function[match.end() :]
                break
        else:
            return function


def fit(text: str) -> str:
    """A file with its long lines of code laid out; docstrings and comments stay as they are."""
    result: list[str] = []
    inside = False
    for line in text.split("\n"):
        quotes = line.count('"""')
        if inside or quotes or line.lstrip().startswith("#") or len(line) <= WIDTH:
            result.append(line)
        else:
            result += _laid_out(line)
        inside ^= quotes % 2 == 1
    return "\n".join(result)


def _laid_out(line: str) -> list[str]:
    if len(line) <= WIDTH:
        return [line]
    indent = re.match(r" *", line)
    pad = "" if indent is None else indent.group()
    target, equals, _ = line.partition(" = ")
    if equals and "(" not in target and len(target) > WIDTH // 2 and ", " in target:
        names = [f"{pad}    {name}," for name in target.strip().split(", ")]
        return [f"{pad}(", *names, *_laid_out(f"{pad}){line[len(target) :]}")]
    keyword, _, values = line.strip().partition(" ")
    if keyword == "return" and len(_split(values, r",\s+")) > 1:
        names = [f"{pad}    {v}," for v in _split(values, r",\s+")]
        return [f"{pad}return (", *names, f"{pad})"]
    for start, stop in reversed(_brackets(line)):
        body, head, tail = line[start + 1 : stop], line[: start + 1], line[stop:]
        if body and len(head) <= WIDTH and len(pad) + len(tail) <= WIDTH:
            return [head, *_contents(body, f"{pad}    "), f"{pad}{tail}"]
    return [line]


def _contents(body: str, pad: str) -> list[str]:
    """What stands between two brackets: on one line, or one element or term on each."""
    if len(pad) + len(body) <= WIDTH:
        return [f"{pad}{body}"]
    elements = _split(body, r",\s+")
    if len(elements) > 1:
        return [part for e in elements for part in _laid_out(f"{pad}{e.rstrip(',')},")]
    for operators in ("and |or ", "[+-] ", "[*/] "):
        terms = _split(body, rf"\s+(?={operators})")
        if len(terms) > 1:
            break
    return [part for t in terms for part in _laid_out(f"{pad}{t}")]


def _split(text: str, separator: str) -> list[str]:
    """Split where the separator stands outside all brackets."""
    depth, start, parts = 0, 0, []
    cuts = {m.start(): m.end() for m in re.finditer(separator, text)}
    for position, char in enumerate(text):
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0 and position in cuts and position >= start:
            parts.append(text[start:position])
            start = cuts[position]
    return [*parts, text[start:]]


def _brackets(line: str) -> list[tuple[int, int]]:
    """(start, stop) of the outermost brackets, those inside strings left out."""
    found, depth, start, quote = [], 0, 0, ""
    for position, char in enumerate(line):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in _OPEN:
            start = position if depth == 0 else start
            depth += 1
        elif char in _CLOSE:
            depth -= 1
            if depth == 0:
                found.append((start, position))
    return found
