"""The entry point: which commands there are, and what their errors look like in a shell.

A command's module is imported when it runs, so ``--help`` needs neither PyTorch nor SymPy.
Exit codes: 0 done; 1 the compiler refused what was asked for (too small a budget, a schedule that
the loss cannot use, a loss's file that fails), a check failed or PyTorch is missing; 2 the command
line is wrong (an option's value cannot be read, or names nothing); 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from errno import EDQUOT, ENOSPC
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from cl_compiler import __version__
from cl_compiler.cli.output import in_options
from cl_compiler.errors import CompilerError

__all__ = ["app"]


class _Entry(NamedTuple):
    """Where a command lives, and its line in ``--help``."""

    home: str
    summary: str


COMMANDS = {
    "plan": _Entry("cl_compiler.cli.plan:plan", "Show how a loss would run, and why."),
    "compile": _Entry("cl_compiler.cli.compile:compile_", "Compile a loss into the cache."),
    "inspect": _Entry(
        "cl_compiler.cli.inspect:inspect", "Show generated source, compare plans, draw graphs."
    ),
    "demo": _Entry(
        "cl_compiler.cli.demo.command:demo", "Train with a compiled and with a dense loss."
    ),
    "bench": _Entry("cl_compiler.cli.bench:bench", "Measure side by side with dense losses."),
    "doctor": _Entry(
        "cl_compiler.cli.doctor:doctor", "Say what was found, what is missing, what would help."
    ),
    "simulate": _Entry(
        "cl_compiler.cli.simulate:simulate", "Run a loss on a cluster that need not exist."
    ),
    "tune": _Entry("cl_compiler.cli.tune:tune", "Measure a few plans here, keep the fastest."),
    "calibrate": _Entry("cl_compiler.cli.calibrate:calibrate", "Measure this machine's rates."),
    "cache": _Entry("cl_compiler.cli.cache:app", "List, verify, prune or clear generated code."),
}


class _Lazy(TyperCommand):
    """A command's name and summary; the command itself is imported to parse its arguments."""

    def __init__(self, name: str, entry: _Entry) -> None:
        super().__init__(name, short_help=entry.summary, help=entry.summary, rich_markup_mode=None)
        self.entry = entry

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Parse with the real command, which is then the context's."""
        command: Any = self.load()
        return command.make_context(info_name, args, parent, **extra)

    def load(self) -> Any:
        """Import the command."""
        module, _, name = self.entry.home.partition(":")
        found = getattr(import_module(module), name)
        if not isinstance(found, typer.Typer):
            function = found
            found = typer.Typer(add_completion=False, rich_markup_mode=None)
            found.command(self.name)(function)
        return typer.main.get_command(found)


class _Commands(TyperGroup):
    """All commands, each imported when it is used; errors of the compiler become messages."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, entry in COMMANDS.items():
            self.add_command(_Lazy(name, entry))

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except CompilerError as error:
                if ctx.params.get("debug"):
                    raise
                typer.echo(f"error: {in_options(str(error))}", err=True)
                raise typer.Exit(1) from None
            except ModuleNotFoundError as error:
                if ctx.params.get("debug") or error.name != "torch":
                    raise
                typer.echo(f"error: {_WITHOUT_PYTORCH}", err=True)
                raise typer.Exit(1) from None
            except OSError as error:
                if ctx.params.get("debug") or error.errno not in (ENOSPC, EDQUOT):
                    raise
                where = error.filename or "the output"
                typer.echo(f"error: cannot write {where}: {error.strerror}; make room", err=True)
                raise typer.Exit(1) from None


_WITHOUT_PYTORCH = (
    "this command runs a loss, which needs PyTorch, and PyTorch is not installed here: "
    "`pip install torch`. `cl-compiler plan`, `inspect` and `compile` do without it."
)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cl-compiler {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="cl-compiler",
    cls=_Commands,
    # Plain help: the same text in a terminal, in a pipe and in a log, and no import of rich.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """A compiler for contrastive losses whose similarity matrix never has to exist.

    Try `cl-compiler plan`, then `cl-compiler inspect`; `cl-compiler COMMAND --help` says more.
    """


if __name__ == "__main__":
    sys.exit(app())
