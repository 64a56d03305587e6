"""``compile`` and ``inspect``: nothing is executed, nothing that was asked for is left out."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.cli.conftest import SMALL

CLUSTER = ["--hardware", "h100x8", "--budget", "1GiB", "--problem", "8192x512"]
FLEET = (
    "import sys\n"
    "from cl_compiler.cli.main import app\n"
    "try:\n    app(sys.argv[1:])\n"
    "except SystemExit as end:\n    code = end.code\n"
    "executed = [name for name in sys.modules if name.startswith('cl_compiler_generated')]\n"
    "print(code, 'torch' in sys.modules, executed, file=sys.stderr)\n"
)


def test_compiling_imports_no_pytorch_and_executes_nothing():
    """Neither where the variant is made nor where it is found."""
    for found in ("compiled: ", "already compiled: "):
        command = [sys.executable, "-c", FLEET, "compile", *SMALL]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.startswith(found)
        assert done.stderr == "0 False []\n"


def test_what_the_file_does_not_say_is_said(cli, cli_json):
    """A plan for several devices is one rank's share; the notes say so, in the terminal too."""
    for _ in range(2):  # compiled, and found again
        text = cli("compile", *CLUSTER).stdout
        assert "\nnote: one rank's share of 8: 1024 rows x 8192 columns" in text
    assert "note: " not in cli("compile", *SMALL).stdout
    notes = cli_json("compile", *CLUSTER)["plan"]["notes"]
    assert any(note.startswith("one rank's share of 8") for note in notes)


def test_a_host_budget_is_said_to_have_no_effect(cli):
    budget = ["--budget", "device=64MiB,host=1"]
    text = cli("plan", *SMALL, *budget).stdout
    assert "- the host budget (1 B) has no effect" in text
    assert "\nnote: the host budget (1 B) has no effect" in cli("compile", *SMALL, *budget).stdout


def test_json_holds_everything_that_was_asked_for(cli, tmp_path):
    graph = tmp_path / "clip.svg"
    result = cli("inspect", *SMALL, "--graph", graph, "--json")
    both = {"loss_graph": str(graph), "hardware_graph": str(tmp_path / "clip-hardware.svg")}
    assert json.loads(result.stdout) == both and graph.exists()
    result = cli("inspect", *SMALL, "--graph", graph, "--diff", "schedule=recompute", "--json")
    found = json.loads(result.stdout)
    assert {name: found[name] for name in both} == both
    assert found["after"]["plan"]["schedule"] == "recompute" and found["source_diff"]
