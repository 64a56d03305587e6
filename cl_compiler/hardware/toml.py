"""TOML and plain dictionaries to ``HardwareSpec`` and back.

A file may start from another one: ``extends = "h100x1"`` (a preset) or ``extends = "base.toml"``
(a path beside this file).  Tables are then merged key by key, levels by name, links by the level
that they join, and what the extension says about a source is added to what the base said.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from cl_compiler.errors import ArgumentError, HardwareError, instead_of
from cl_compiler.hardware.checks import LEVEL_KINDS
from cl_compiler.hardware.spec import HardwareSpec, Host, Level, Link
from cl_compiler.units import parse_bytes

__all__ = ["PRESETS", "preset_names", "read_preset", "read_toml", "spec_from_dict", "write_toml"]

Part = TypeVar("Part", Level, Link, Host)
PRESETS = Path(__file__).parent / "presets"
_TABLES = ("gemm_flops_per_s", "gemm_efficiency", "sources")
_OPTIONAL: dict[str, Any] = {
    "links": [],
    "host": None,
    "exp2_per_s": 0.0,
    "gemm_efficiency": {},
    "sources": {},
    "measured": [],
}


def preset_names() -> tuple[str, ...]:
    """Names that ``load_hardware`` knows, sorted."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.toml")))


def read_preset(name: str) -> HardwareSpec:
    """The preset called ``name``.

    Raises:
        HardwareError: there is none; the message suggests close names and lists all.
    """
    return _read(_preset_path(name))


def read_toml(path: Path) -> HardwareSpec:
    """Read one file and whatever it extends.

    Raises:
        HardwareError: the file cannot be read, is not TOML or describes no machine.
    """
    return _read(path)


def spec_from_dict(content: dict[str, Any]) -> HardwareSpec:
    """Build a spec from plain values; byte counts may be texts such as ``"80GiB"``.

    Raises:
        HardwareError: a field is missing, unknown, of the wrong type or out of range.
    """
    where = f"hardware {content.get('name', 'without a name')!r}"
    names = [field.name for field in fields(HardwareSpec)]
    _check_keys(where, content, names, required=[n for n in names if n not in _OPTIONAL])
    full = _OPTIONAL | content
    for table in _TABLES:
        if not isinstance(full[table], dict):
            raise HardwareError(f"{where}: {table} is {full[table]!r}; make it a table [{table}]")
    measured = full["measured"]
    if not isinstance(measured, (list, tuple)) or not all(isinstance(f, str) for f in measured):
        raise HardwareError(f"{where}: measured is {measured!r}; give a list of field names")
    host = full["host"]
    return HardwareSpec(
        name=full["name"],
        kind=full["kind"],
        arch=full["arch"],
        levels=tuple(_part(Level, where, "level", item) for item in _items(where, full, "levels")),
        links=tuple(_part(Link, where, "link", item) for item in _items(where, full, "links")),
        host=None if host is None else _part(Host, where, "host", host),
        gemm_flops_per_s=tuple(full["gemm_flops_per_s"].items()),
        exp_per_s=full["exp_per_s"],
        pass_per_s=full["pass_per_s"],
        op_overhead_s=full["op_overhead_s"],
        exp2_per_s=full["exp2_per_s"],
        gemm_efficiency=tuple(
            (_dimension(where, key), value) for key, value in full["gemm_efficiency"].items()
        ),
        sources=tuple(full["sources"].items()),
        measured=tuple(measured),
    )


def write_toml(spec: HardwareSpec) -> str:
    """Print a spec so that reading it back gives an equal value."""
    content = spec.to_dict()
    tables = {key: content.pop(key) for key in _TABLES}
    groups = {key: content.pop(key) for key in ("levels", "links")}
    host = content.pop("host")
    lines = [f"{key} = {_literal(value)}" for key, value in content.items()]
    for key, items in groups.items():
        for item in items:
            lines += ["", f"[[{key}]]", *_entries(item)]
    if host is not None:
        lines += ["", "[host]", *_entries(host)]
    for key, table in tables.items():
        if table:
            lines += ["", f"[{key}]", *_entries(table)]
    return "\n".join(lines) + "\n"


# ---- reading --------------------------------------------------------------------------------


def _preset_path(name: str) -> Path:
    names = preset_names()
    if name not in names:
        raise HardwareError(
            f"no hardware preset is called {name!r}; "
            f"{instead_of(name, ['auto', *names], 'known:', most=3)}; or give a .toml file's path"
        )
    return PRESETS / f"{name}.toml"


def _read(path: Path) -> HardwareSpec:
    content = _resolve(path, ())
    try:
        return spec_from_dict(content)
    except HardwareError as error:
        raise HardwareError(f"cannot use {_shown(path)}: {error}") from error


def _resolve(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The content of ``path`` with everything that it extends merged below it."""
    path = path.resolve()
    if path in seen:
        ring = " extends ".join(_shown(step) for step in (*seen[seen.index(path) :], path))
        raise HardwareError(f"cannot read {_shown(path)}: {ring}; remove one of these 'extends'")
    content = _load(path)
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise HardwareError(
            f"cannot read {_shown(path)}: extends is {base!r}; name one preset or .toml file"
        )
    target = path.parent / base if base.endswith(".toml") else _preset_path(base)
    try:
        return _merge(_resolve(target, (*seen, path)), content)
    except (TypeError, AttributeError) as error:
        raise HardwareError(
            f"cannot read {_shown(path)}: its tables do not have the shape of those in "
            f"{_shown(target)}; compare the two files"
        ) from error


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HardwareError(
            f"cannot read {_shown(path)}: there is no such file; "
            f"give an existing .toml file or a preset: {', '.join(preset_names())}"
        ) from None
    except OSError as error:
        raise HardwareError(f"cannot read {_shown(path)}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise HardwareError(f"cannot read {_shown(path)}: it is not UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise HardwareError(f"cannot read {_shown(path)} as TOML: {error}; correct it") from error


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = base | over
    for table in _TABLES:
        if table in base and table in over:
            merged[table] = base[table] | over[table]
    if base.get("host") and over.get("host"):
        merged["host"] = _merge_part(base["host"], over["host"])
    for group, key in (("levels", "name"), ("links", "level")):
        if group in base and group in over:
            merged[group] = _merge_group(base[group], over[group], key)
    # Sorting by kind puts a new node or cluster around the device; it is stable among caches.
    merged["levels"] = sorted(merged.get("levels", []), key=_kind_rank)
    return merged


def _merge_group(
    base: list[dict[str, Any]], over: list[dict[str, Any]], key: str
) -> list[dict[str, Any]]:
    by_name = {item.get(key): item for item in base}
    for item in over:
        name = item.get(key)
        by_name[name] = _merge_part(by_name[name], item) if name in by_name else item
    return list(by_name.values())


def _merge_part(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = base | over
    if "source" in base and "source" in over:
        merged["source"] = f"{base['source']}; {over['source']}"
    return merged


def _kind_rank(level: dict[str, Any]) -> int:
    kind = level.get("kind")
    return LEVEL_KINDS.index(kind) if kind in LEVEL_KINDS else len(LEVEL_KINDS)


def _shown(path: Path) -> str:
    return f"preset {path.stem!r}" if path.parent == PRESETS.resolve() else str(path)


# ---- plain values to parts ------------------------------------------------------------------


def _items(where: str, content: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(content[key], (list, tuple)):
        raise HardwareError(f"{where}: {key} is {content[key]!r}; write each as [[{key}]]")
    return list(content[key])


def _part(kind: type[Part], where: str, what: str, item: Any) -> Part:
    if not isinstance(item, dict):
        raise HardwareError(f"{where}: a {what} is {item!r}; write it as a table")
    name = item.get("name", item.get("level"))
    label = f"{where}: {what}" + (f" {name!r}" if name is not None else "")
    names = [field.name for field in fields(kind)]
    required = [field.name for field in fields(kind) if field.default is MISSING]
    _check_keys(label, item, names, required=required)
    values = dict(item)
    if isinstance(values.get("memory_bytes"), str):
        try:
            values["memory_bytes"] = parse_bytes(values["memory_bytes"])
        except ArgumentError as error:
            raise HardwareError(f"{label}: {error}") from error
    try:
        return kind(**values)
    except HardwareError as error:
        raise HardwareError(f"{where}: {error}") from error


def _check_keys(
    where: str, content: dict[str, Any], known: list[str], *, required: list[str]
) -> None:
    for key in content:
        if key not in known:
            raise HardwareError(
                f"{where} has an unknown field {key!r}; {instead_of(key, known, 'known:')}"
            )
    missing = [key for key in required if key not in content]
    if missing:
        raise HardwareError(f"{where} lacks {', '.join(missing)}; add what is missing")


def _dimension(where: str, key: object) -> int:
    try:
        return int(str(key))
    except ValueError:
        raise HardwareError(
            f"{where}: gemm_efficiency has the key {key!r}; use an inner dimension such as 512"
        ) from None


# ---- writing --------------------------------------------------------------------------------


def _entries(table: dict[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_literal(value)}" for key, value in table.items()]


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _literal(key)


def _literal(value: object) -> str:
    if isinstance(value, str):
        # JSON escapes are TOML's, except that TOML forbids a raw DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return repr(value)
