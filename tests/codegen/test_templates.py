"""The templates are found in a checkout, in a wheel, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

import cl_compiler.codegen.templates as templates_module
from cl_compiler.codegen.templates import template_root
from cl_compiler.errors import CompilerError


def test_a_checkout_renders_from_the_folder_that_people_edit() -> None:
    repository = Path(templates_module.__file__).resolve().parents[2]
    assert template_root() == repository / "templates"


def test_an_installed_wheel_renders_from_its_own_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates_module, "_PACKAGE", tmp_path / "cl_compiler")
    (tmp_path / "templates").mkdir()  # a stranger's folder in site-packages
    (tmp_path / "cl_compiler" / "_templates").mkdir(parents=True)
    assert template_root() == tmp_path / "cl_compiler" / "_templates"


def test_an_installation_without_templates_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates_module, "_PACKAGE", tmp_path / "cl_compiler")
    with pytest.raises(CompilerError, match=r"no templates.*reinstall"):
        template_root()
