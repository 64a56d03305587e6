"""The name of a variant depends on content, all of the content and nothing but the content."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

import cl_compiler.cache.key as key_module
from cl_compiler.cache import cache_key, canonical_json, environment_fingerprint
from cl_compiler.errors import CacheError


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "loss.py.jinja").write_text("{{ body }}\n")
    return tmp_path


@pytest.fixture
def package(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that nobody edits while the test runs."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "search.py").write_text("BEST = 1\n")
    monkeypatch.setattr(key_module, "_PACKAGE_ROOT", folder)
    return folder


def test_canonical_json_of_a_request_is_this_text() -> None:
    request = {"b": (1, 2.0, 0.1), "a": {"z": None, "y": True}, "é": "é"}
    expected = r'{"a":{"y":true,"z":null},"b":[1,2,0.1],"\u00e9":"\u00e9"}'
    assert canonical_json(request) == expected


def test_order_of_keys_and_spelling_of_numbers_do_not_change_the_key(templates: Path) -> None:
    one = {"budget": 1 << 30, "rate": 75e9, "zero": -0.0}
    same = {"zero": 0, "rate": 75_000_000_000, "budget": float(1 << 30)}
    assert _digest(one, templates) == _digest(same, templates)
    assert _digest(one, templates) != _digest({**one, "budget": (1 << 30) + 1}, templates)


def test_true_one_and_the_string_one_are_three_requests(templates: Path) -> None:
    assert len({_digest({"value": value}, templates) for value in (True, 1, "1")}) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, {1: 2}, {1, 2}, b"x", Path("x")])
def test_what_json_cannot_say_is_an_error_that_names_the_field(value: object) -> None:
    with pytest.raises(CacheError, match=r"request\.problem\[0\]"):
        canonical_json({"problem": [value]})


def test_a_loss_named_like_a_path_stays_inside_its_group(templates: Path) -> None:
    key = cache_key({}, loss="../../<lambda> x", hardware="{}", templates=templates)
    assert key.loss == "_______lambda__x"
    assert key.variant == f"{key.loss}-{key.request_sha256[:12]}"


def test_hardware_names_the_group_and_is_part_of_the_fingerprint(templates: Path) -> None:
    desk = cache_key({}, loss="clip", hardware='{"name": "desk"}', templates=templates)
    h100 = cache_key({}, loss="clip", hardware='{"name": "h100x8"}', templates=templates)
    assert (desk.hardware, h100.hardware) == ("desk", "h100x8")
    assert desk.fingerprint != h100.fingerprint
    assert replace(desk, fingerprint="", hardware="") == replace(h100, fingerprint="", hardware="")


def test_an_edited_template_changes_the_fingerprint_and_an_edit_undone_restores_it(
    templates: Path, package: Path
) -> None:
    template = templates / "torch" / "loss.py.jinja"
    before = environment_fingerprint("{}", templates)
    template.write_text("{{ BODY }}\n")  # same length: only the time tells
    edited = environment_fingerprint("{}", templates)
    template.write_text("{{ body }}\n")
    assert edited != before
    assert environment_fingerprint("{}", templates) == before


def test_a_moved_or_touched_template_folder_keeps_the_fingerprint(
    templates: Path, package: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = environment_fingerprint("{}", templates)
    moved = tmp_path_factory.mktemp("elsewhere") / "templates"
    templates.rename(moved)
    (moved / "torch" / "loss.py.jinja").touch()
    (moved / "torch" / "notes.txt").write_text("not a source")
    assert environment_fingerprint("{}", moved) == before


def test_a_renamed_template_and_another_sympy_change_the_fingerprint(
    templates: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = environment_fingerprint("{}", templates)
    installed = key_module._installed_version
    with monkeypatch.context() as patched:
        patched.setattr(
            key_module,
            "_installed_version",
            lambda name: "0" if name == "sympy" else installed(name),
        )
        other_sympy = environment_fingerprint("{}", templates)
    (templates / "torch" / "loss.py.jinja").rename(templates / "torch" / "ring.py.jinja")
    renamed = environment_fingerprint("{}", templates)
    assert len({before, other_sympy, renamed}) == 3


def test_the_package_s_own_sources_are_in_the_fingerprint(templates: Path, package: Path) -> None:
    before = environment_fingerprint("{}", templates)
    (package / "search.py").write_text("BEST = 22\n")
    assert environment_fingerprint("{}", templates) != before


def test_a_second_fingerprint_takes_less_than_five_milliseconds(templates: Path) -> None:
    environment_fingerprint("{}", templates)
    assert min(_seconds(lambda: environment_fingerprint("{}", templates))) < 5e-3


def test_naming_a_variant_imports_no_heavy_library(templates: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from cl_compiler.cache import cache_key
cache_key({{}}, loss="clip", hardware="{{}}", templates=Path({str(templates)!r}))
print([name for name in ("torch", "triton", "sympy", "networkx") if name in sys.modules])
"""
    repository = Path(key_module.__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"


def test_hardware_without_a_name_is_still_cached() -> None:
    key = cache_key({}, loss="clip", hardware=json.dumps([1]), templates=Path("absent"))
    assert key.hardware == "unnamed"


def _digest(request: Mapping[str, object], templates: Path) -> str:
    return cache_key(request, loss="clip", hardware="{}", templates=templates).digest


def _seconds(call: object, repeats: int = 10) -> list[float]:
    assert callable(call)
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return durations
