"""Where the templates lie: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from cl_compiler.errors import CompilerError

__all__ = ["template_root"]

_PACKAGE = Path(__file__).resolve().parents[1]


def template_root() -> Path:
    """The folder of ``*.jinja`` files, with one subfolder per backend.

    Raises:
        CompilerError: the installation lacks them.
    """
    # A wheel holds a copy as cl_compiler/_templates (pyproject.toml, force-include); a checkout,
    # also when it is installed as editable, has the folder that people edit.
    for folder in (_PACKAGE / "_templates", _PACKAGE.parent / "templates"):
        if folder.is_dir():
            return folder
    raise CompilerError(
        f"cannot render source: no templates inside or beside {_PACKAGE}; reinstall cl-compiler"
    )
