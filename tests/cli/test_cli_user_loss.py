"""``--loss path.py:name`` and ``--loss module:name``: losses of the user's own."""

from __future__ import annotations

import pytest
import typer

from cl_compiler.cli.user_loss import find_loss
from cl_compiler.errors import LossDefinitionError
from tests.cli.conftest import SMALL

MINE = '''
from cl_compiler import lang as cl

@cl.define_loss
def mine(sim, temperature):
    """A user's own."""
    s = sim / temperature
    return cl.mean(cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows), over=cl.rows)
'''
OTHER = MINE.replace("def mine", "def other").replace("A user's own", "Another")


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own_losses.py"
    path.write_text(MINE)
    return path


def test_a_file_and_a_name(file):
    assert find_loss(f"{file}:mine").parameters == ("temperature",)


def test_the_name_may_be_left_out_where_there_is_one_loss(file):
    assert find_loss(str(file)).name == "mine"
    file.write_text(MINE + OTHER)
    with pytest.raises(typer.BadParameter, match="it defines mine, other; say which"):
        find_loss(str(file))
    assert find_loss(f"{file}:other").name == "other"


def test_a_module_in_the_current_directory(file):
    assert find_loss("own_losses:mine").doc == "A user's own."
    assert find_loss("cl_compiler.losses.cross_entropy:infonce").name == "infonce"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("own_losses.py:theirs", "it defines mine"),
        ("missing.py:mine", "no such file"),
        ("missing_module:mine", "No module named 'missing_module'"),
        ("json:dumps", "it defines none"),
    ],
)
def test_what_is_not_there(file, text, said):
    with pytest.raises(typer.BadParameter, match=said):
        find_loss(text)


def test_a_file_that_fails_names_its_line(file):
    file.write_text("import cl_compiler\n\n1 / 0\n")
    with pytest.raises(LossDefinitionError, match=r"own_losses\.py, line 3: ZeroDivisionError"):
        find_loss(str(file))


def test_a_file_that_is_not_python_names_its_line(file):
    """The line of the file, not one of Python's own that compiled it."""
    file.write_text("import cl_compiler\n\n\ndef mine(:\n    pass\n")
    with pytest.raises(LossDefinitionError, match=r"own_losses\.py, line 4: SyntaxError: invalid"):
        find_loss(str(file))


def test_a_module_that_a_file_misses_is_the_files_error(file):
    file.write_text("import no_such_module\n")
    said = r"own_losses\.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"
    with pytest.raises(LossDefinitionError, match=said):
        find_loss(str(file))


def test_a_loss_outside_the_language_keeps_the_compilers_message(file):
    file.write_text(MINE.replace("over=cl.rows)\n", "over=cl.rows) + s\n"))
    with pytest.raises(LossDefinitionError, match="mine"):
        find_loss(str(file))


def test_a_users_loss_is_planned_and_generated(cli, cli_json, file):
    assert cli_json("plan", *SMALL, "--loss", f"{file}:mine")["needs"] == ["temperature", "x", "y"]
    source = cli("inspect", *SMALL, "--loss", f"{file}:mine").stdout
    assert "# loss      mine(temperature)" in source
    compile(source, "mine.py", "exec")
