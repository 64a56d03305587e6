"""The entry point: help is quick, errors are messages, exit codes are the usual ones."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from cl_compiler import __version__
from cl_compiler.cli.main import COMMANDS
from tests.cli.conftest import SMALL

HEAVY = ("torch", "sympy", "networkx", "jinja2", "matplotlib", "rich", "triton")


def test_help_is_quick_and_imports_nothing_heavy():
    script = (
        "import sys, time\n"
        "from cl_compiler.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    code = end.code\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "print(code, heavy, time.process_time(), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    code, heavy, seconds = done.stderr.split()
    assert (code, heavy) == ("0", "[]")
    assert float(seconds) < 0.5  # of this process, however busy the machine is
    for name, entry in COMMANDS.items():
        assert f"  {name}" in done.stdout and entry.summary in done.stdout


def test_planning_needs_no_pytorch():
    script = (
        "import sys\n"
        "from cl_compiler.cli.main import app\n"
        f"try:\n    app(['plan', *{SMALL!r}])\nexcept SystemExit:\n    pass\n"
        "assert 'cl_compiler.plan.search' in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("clip on xeon-amx-2c\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_helps(cli, name):
    module, _, function = COMMANDS[name].home.partition(":")
    assert callable(getattr(import_module(module), function))
    result = cli(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    assert "--help" in result.stdout


def test_without_arguments_it_says_what_it_can_do(cli):
    result = cli()
    assert result.exit_code == 2
    assert "Commands:" in result.output


def test_version(cli):
    result = cli("--version")
    assert (result.exit_code, result.stdout) == (0, f"cl-compiler {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plna"], "Did you mean 'plan'?"),
        (["plan", "--nonsense"], "--nonsense"),
        (["plan", "--problem", "many"], "write MxNxD"),
        (["plan", "--M", "0"], "sizes are at least 1"),
        (["plan", "--operand", "guide_x"], "guide_x=384"),
        (["inspect", "--diff", "color=red"], "option=value"),
        (["inspect", "--graph", "out.txt"], ".png, .svg, .pdf"),
        (["inspect", "clip-000000000000"], "no such variant"),
        (["plan", "--loss", "klip"], "did you mean 'clip'?"),
        (["plan", "--hardware", "h100x7"], "h100x7"),
        (["bench", "--hardware", "h100x7"], "h100x7"),
        (["plan", "--budget", "much"], "cannot read 'much'"),
        (["plan", "--dtype", "int8"], "--dtype 'int8'"),
        (["plan", "--schedule", "spil"], "--schedule 'spil'"),
        (["plan", "--slots", "4"], "--slots 4 would have no effect"),
        (["plan", "--bank", "-1"], "--bank -1"),
        (["inspect", "clip-000000000000", "--diff", "schedule=spill"], "leave out --diff"),
        (["inspect", "clip-000000000000", "--graph", "a.png", "--M", "3"], "out --M, --graph"),
        (["bench", "--compare", "a.json", "--threads", "1"], "leave out --threads"),
        (["bench", "--compare", "a.json", "--json"], "leave out --json"),
        (["calibrate", "--results", "a.json", "--thorough"], "leave out --thorough"),
        (["cache", "prune", "--max-bytes", "soon"], "--max-bytes: cannot read 'soon'"),
        (["cache", "prune", "--older-than", "soon"], "30d"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(cli, arguments, said):
    result = cli(*arguments)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "1KiB"], "Give at least --budget "),
        (["--schedule", "panel"], "clip cannot use schedule 'panel'"),
        (["--dtype", "float16", "--precision", "bf16"], "Use --precision auto, or cast"),
    ],
)
def test_what_the_compiler_refuses_is_exit_code_1_and_a_message(cli, arguments, said):
    result = cli("plan", *SMALL, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and said in result.stderr
    assert "Traceback" not in result.output and result.stdout == ""


def test_debug_shows_where_an_error_came_from(cli):
    result = cli("--debug", "plan", *SMALL, "--budget", "1KiB")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "BudgetError"


WITHOUT_TORCH = (
    "import sys\n"
    "sys.modules['torch'] = sys.modules['triton'] = None\n"
    "from cl_compiler.cli.main import app\n"
    "app(sys.argv[1:])\n"
)


@pytest.mark.parametrize("command", [["bench", "-w", "xeon-amx-2c"], ["calibrate"]])
def test_what_needs_pytorch_says_so_in_a_line(command):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: this command runs a loss, which needs PyTorch")
    assert "pip install torch" in done.stderr and done.stderr.count("\n") == 1


def test_compiling_needs_no_pytorch():
    for found in ("compiled: ", "already compiled: "):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, "compile", *SMALL], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(found)


def test_doctor_reports_that_pytorch_is_missing():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "doctor"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "cannot be imported" in done.stdout and "- PyTorch: `pip install torch`" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_pipe_gets_plain_text_and_nothing_on_stderr(shell):
    done = shell("plan", *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert any(len(line) > 40 for line in done.stdout.splitlines())  # not folded to the window


def test_errors_of_a_process_go_to_stderr(shell):
    done = shell("plan", *SMALL, "--schedule", "panel")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: clip cannot use schedule 'panel'")


def test_json_of_a_process_parses(shell):
    done = shell("plan", *SMALL, "--json")
    assert json.loads(done.stdout)["hardware_name"] == "xeon-amx-2c"


def test_a_terminal_gets_colours():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "cl_compiler.cli.main", "plan", *SMALL]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        text = b""
        while chunk := _read(ours):
            text += chunk
        assert process.wait() == 0
    os.close(ours)
    assert b"\x1b[1m" in text and b"planning" in text  # bold titles, and a progress bar


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that the other end was closed
        return b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("command", ["plan", "cache list"])
def test_a_full_disk_is_an_error_and_no_traceback(command):
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "cl_compiler.cli.main", *command.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert run.returncode == 1
    assert run.stderr.splitlines()[0].startswith("error: cannot write the output: ")
    assert "Traceback" not in run.stderr
