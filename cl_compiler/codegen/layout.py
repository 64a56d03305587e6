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
    if "math." in text:
        return text
    # With nothing before it, the blank line that parted it from the packages goes too.
    return text.replace('"""\n\nimport math\n\n', '"""\n\n').replace("import math\n", "")


def _without_unused_locals(function: str) -> str:
    changed = True
    while changed:
        changed = False
        lines = function.split("\n")
        for number, line in enumerate(lines):
            name, equals, value = line.strip().partition(" = ")
            pure = equals and not re.search(r"_(sweep|store)\w*\(", value)
            if not pure or not name.isidentifier() or line.count("(") != line.count(")"):
                continue
            writes = len(re.findall(rf"^ +{name} = ", function, re.M))
            if writes == len(re.findall(rf"\b{name}\b", function)):
                depth = len(line) - len(line.lstrip())
                around = [lines[n] for n in (number - 1, number + 1)]
                if any(len(x) - len(x.lstrip()) == depth and x.strip() for x in around):
                    function = "\n".join([*lines[:number], *lines[number + 1 :]])
                    changed = True
                    break
    for match in re.finditer(r"^ +(\w+(?:, \w+)+) = ", function, re.M):
        names = match.group(1).split(", ")
        code = re.sub(r'(?<!f)"[^"\n]*"', '""', function)  # words of a message are no names
        kept = [n if len(re.findall(rf"\b{n}\b", code)) > 1 else "_" for n in names]
        if set(kept) == {"_"} and ".shape[" in match.string[match.end() :].split("\n")[0]:
            function = re.sub(rf"\n{re.escape(match.group())}[^\n]*", "", function)
            continue
        function = function.replace(f" {match.group(1)} = ", f" {', '.join(kept)} = ")
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
    """A statement, or an element between brackets."""
    if len(line) <= WIDTH:
        return [line]
    pad = line[: len(line) - len(line.lstrip())]
    target, equals, value = line.strip().partition(" = ")
    if equals and "(" not in target and len(target) > WIDTH // 2 and ", " in target:
        names = [f"{pad}    {name}," for name in target.split(", ")]
        return [f"{pad}(", *names, *_laid_out(f"{pad}) = {value}")]
    keyword, _, values = line.strip().partition(" ")
    if keyword == "return" and len(_split(values, r",\s+")) > 1:
        names = [f"{pad}    {v}," for v in _split(values, r",\s+")]
        return [f"{pad}return (", *names, f"{pad})"]
    if equals and "(" not in target and len(_terms(value)) > 2:
        return [f"{pad}{target} = (", *_element(value, f"{pad}    "), f"{pad})"]
    return _opened(line, pad)


def _opened(line: str, pad: str) -> list[str]:
    """The last bracket's content on lines of its own."""
    for start, stop in reversed(_brackets(line)):
        body, head, tail = line[start + 1 : stop], line[: start + 1], line[stop:]
        if not body or len(head) > WIDTH or len(pad) + len(tail) > WIDTH:
            continue
        inner = f"{pad}    "
        elements = [e.rstrip(",") for e in _split(body, r",\s+")]
        is_tuple = head.endswith(" = (") and len(elements) > 1  # an element to a line, always
        if len(inner) + len(body) <= WIDTH and not is_tuple:
            return [head, f"{inner}{body}", f"{pad}{tail}"]
        if len(elements) == 1:
            return [head, *_element(body, inner), f"{pad}{tail}"]
        parts = [_element(e, inner) for e in elements]
        return [head, *(f"{x}," if x is p[-1] else x for p in parts for x in p), f"{pad}{tail}"]
    return [line]


def _element(text: str, pad: str) -> list[str]:
    """An expression between brackets: on one line, or one term on each."""
    if len(pad) + len(text) <= WIDTH - 1:
        return [f"{pad}{text}"]
    terms = _terms(text)
    if len(terms) == 1:
        return _opened(f"{pad}{text}", pad)
    return [line for term in terms for line in _element(term, pad)]


def _terms(text: str) -> list[str]:
    """The terms of the operators that bind least, each but the first with its operator."""
    for operators in ("(?:and|or) ", "[<>=]=? ", "[+-] ", "[*/] "):
        terms = _split(text, rf"\s+(?={operators})")
        if len(terms) > 1:
            return terms
    return [text]


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
        elif char in _CLOSE and depth:
            depth -= 1
            if depth == 0:
                found.append((start, position))
    return found
