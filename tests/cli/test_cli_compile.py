"""``compile`` and ``inspect``: nothing is executed, nothing that was asked for is left out."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cl_compiler import Problem, api
from cl_compiler.cli.ranks import on_its_ranks
from cl_compiler.cli.requests import Question, request_of
from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.plan.types import MemoryBudget
from cl_compiler.variants import key_of
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


def test_several_devices_are_a_group(cli, cli_json, tmp_path):
    """What every rank of them runs is compiled ahead, where ``group=`` finds it; notes are said."""
    for found in ("compiled: ", "already compiled: "):
        text = cli("compile", *CLUSTER, "--out", tmp_path / "clip.py").stdout
        assert text.startswith(found) and "\nnote: Triton kernels for sm_90" in text
    assert "note: " not in cli("compile", *SMALL).stdout
    source = (tmp_path / "clip.py").read_text()
    assert "import torch.distributed" in source and "M, N of each rank" in source
    plan = cli_json("compile", *CLUSTER)["plan"]
    assert plan["problem"]["M"] == 1024 and plan["cluster"]["group_size"] == 8
    assert cli("inspect", *CLUSTER).stdout.strip() == source.strip()


def test_a_group_finds_what_was_compiled_ahead(monkeypatch):
    """Every rank of ``compile_loss("h100x8", "1GiB", group=…)`` asks for the same name."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    seen = api._seen_by_rank_0("h100x8", "1GiB", 8)
    budget = MemoryBudget(seen["device_bytes"], seen["host_bytes"])
    hardware = HardwareSpec.from_dict(seen["hardware"])
    on_rank = api.Specialiser(api.find_loss("clip"), hardware, budget, "auto", "auto", 8)
    call = on_rank.share_of(Problem.parse("8192x8192x512"))
    question = Question(hardware="h100x8", budget="1GiB", problem="8192x512")
    ahead = on_its_ranks(request_of(question))
    assert key_of(on_rank.request(call))[1] == key_of(ahead)[1]
    other = on_rank.request(on_rank.share_of(Problem.parse("8192x8192x256")))
    assert key_of(other)[1] != key_of(ahead)[1]


@pytest.mark.parametrize("schedule", ["ring_owner", "all_gather"])
def test_a_cluster_schedule_can_be_asked_for(cli, cli_json, schedule):
    asked = cli_json("plan", *CLUSTER, "--schedule", schedule)
    assert asked["cluster"]["schedule"] == schedule
    assert sum(seconds for _, seconds in asked["seconds_by_part"]) == pytest.approx(
        asked["seconds"]
    )
    other = cli("plan", *CLUSTER, "--schedule", "spill").stderr
    assert "on h100x8: use one of auto, ring_owner" in other


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
