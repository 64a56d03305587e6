"""The page has every argument with its default, every attribute and error; its code runs."""

import inspect
import re
from pathlib import Path

from cl_compiler import compile_loss, errors
from cl_compiler.runtime.function import CompiledLoss
from cl_compiler.runtime.group_loss import GroupLoss

PAGE = Path(__file__).parents[2] / "docs" / "compile_loss.md"
TEXT = PAGE.read_text(encoding="utf-8")
FOR_THE_PACKAGE = {"forward", "extra_repr", "specialise", "respecialised"}


def rows_of(head: str) -> list[list[str]]:
    """The cells of the table whose first column is called that."""
    table = TEXT.split(f"| {head} |", 1)[1].split("\n\n", 1)[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def test_every_argument_is_there_in_order_with_its_default():
    listed = {row[0].strip("| `"): row[1].strip("`") for row in rows_of("argument")}
    parameters = inspect.signature(compile_loss).parameters
    assert list(listed) == list(parameters)
    for name, parameter in parameters.items():
        default = "" if parameter.default is parameter.empty else repr(parameter.default)
        assert listed[name].replace('"', "'") == default, name


def test_every_public_attribute_is_there():
    listed = {n for row in rows_of("attribute") for n in re.findall(r"`(\w+)", row[0])}
    own = {n for kind in (CompiledLoss, GroupLoss) for n in vars(kind) if not n.startswith("_")}
    assert listed == own - FOR_THE_PACKAGE


def test_every_error_is_there():
    listed = {row[0].strip("| `") for row in rows_of("error")}
    classes = {
        n for n, v in vars(errors).items() if inspect.isclass(v) and issubclass(v, Exception)
    }
    assert listed == classes - {"CompilerError"}


def test_the_code_runs():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["x"].grad.abs().max() > 0
    assert names["loss_fn"].plan.problem.M == 512
