"""Options become the request that ``compile_loss`` would make."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from inspect import isfunction, signature

import pytest
import typer
from typer.testing import CliRunner

from cl_compiler.api import Specialiser, find_loss
from cl_compiler.cli.main import COMMANDS, app
from cl_compiler.cli.output import in_options
from cl_compiler.cli.requests import (
    Question,
    budget_of,
    changed,
    gradients_of,
    problem_of,
    reading,
    request_of,
)
from cl_compiler.errors import ArgumentError
from cl_compiler.hardware import load_hardware
from cl_compiler.plan.precision import PRECISIONS
from cl_compiler.plan.types import BUDGET_SHARE, MemoryBudget, Problem

XEON = load_hardware("xeon-amx-2c")


@pytest.mark.parametrize("loss", ["clip", "siglip", "nt_xent"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_request_is_the_one_that_compile_loss_makes(loss, dtype):
    question = Question(
        hardware="xeon-amx-2c", budget="64MiB", loss=loss, problem="512x512x64", dtype=dtype
    )
    specialise = Specialiser(find_loss(loss), XEON, MemoryBudget(64 << 20), "auto", "auto")
    call = specialise.signature_of(Problem(512, 512, 64, dtype))
    assert request_of(question) == specialise.request(call)


def test_a_deterministic_request_is_multiplied_by_blas(cli):
    asked = ("plan", "--hardware", "epyc-zen5-2c", "--budget", "512MiB", "--json")
    plain = json.loads(cli(*asked).stdout)
    blas = json.loads(cli(*asked, "--deterministic").stdout)
    assert (plain["library"], blas["library"]) == ("onednn", "blas")
    question = changed(Question(hardware="epyc-zen5-2c"), ["deterministic=true"])
    assert request_of(question).deterministic
    with pytest.raises(typer.BadParameter, match="deterministic is true or false"):
        changed(question, ["deterministic=1"])


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("300x400x64", (300, 400, 64)),
        ("300x64", (300, 300, 64)),
        ("1_000 X 2000 x 64", (1000, 2000, 64)),
        ("300*400*64", (300, 400, 64)),
    ],
)
def test_sizes(text, sizes):
    problem = problem_of(Question(problem=text))
    assert sizes == (problem.M, problem.N, problem.D)


def test_single_sizes_replace_those_of_the_problem():
    problem = problem_of(Question(problem="300x400x64", N=500, D=128))
    assert (problem.M, problem.N, problem.D) == (300, 500, 128)
    square = problem_of(Question(problem="300x64", M=700))
    assert (square.M, square.N) == (700, 700)


@pytest.mark.parametrize("text", ["", "300", "300x", "1x2x3x4", "-3x5", "3.5x2"])
def test_what_is_no_size(text):
    with pytest.raises(typer.BadParameter, match="write MxNxD"):
        problem_of(Question(problem=text))


def test_budgets():
    both = budget_of("device=2GiB, host=64GiB", XEON, is_here=False)
    assert both == MemoryBudget(2 << 30, 64 << 30)
    assert budget_of("512MiB", XEON, is_here=True) == MemoryBudget(512 << 20)


def test_without_a_budget_a_share_of_the_right_memory_is_taken(monkeypatch):
    monkeypatch.setattr("cl_compiler.hardware.cpu.free_memory_bytes", lambda: 8 << 30)
    assert budget_of(None, XEON, is_here=True).device_bytes == 2 << 30
    h100 = load_hardware("h100x1")
    share = h100.device_memory_bytes * BUDGET_SHARE
    assert 0.8 * share < budget_of(None, h100, is_here=True).device_bytes <= share


def test_gradients_of_a_locked_tower():
    clip = find_loss("clip")
    assert gradients_of("x, logit_scale", clip) == {"x", "logit_scale"}
    assert gradients_of("none", clip) == frozenset()
    with pytest.raises(typer.BadParameter, match="clip has no w; it has logit_scale, x, y"):
        gradients_of("x,w", clip)


def test_positives():
    assert request_of(Question(hardware="h100x1", positives="ids")).positives == "ids"
    assert request_of(Question(hardware="h100x1", loss="supcon")).positives == "views"
    with pytest.raises(typer.BadParameter, match="takes paired or diagonal or ids"):
        request_of(Question(hardware="h100x1", positives="views"))


def test_changes_name_options():
    question = Question(problem="300x400x64", M=10)
    assert changed(question, ["schedule=spill", "--D=96"]) == replace(
        question, schedule="spill", D=96
    )
    # A new problem is not overruled by the old one's single sizes.
    assert problem_of(changed(question, ["problem=500x32"])).M == 500
    with pytest.raises(typer.BadParameter, match="whole number"):
        changed(question, ["M=many"])


def test_precisions_are_those_of_compile_loss():
    assert set(PRECISIONS) == {"auto", "ieee", "bf16", "fp16", "tf32", "bf16x3", "fp8"}
    with pytest.raises(typer.BadParameter, match=", ".join(PRECISIONS)):
        request_of(Question(hardware="h100x1", precision="int4"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"loss": "nt_xent", "problem": "64x128x8"}, "so M = N; got M=64 N=128"),
        ({"problem": "128x64x8"}, "N is at least M; got M=128 N=64"),
        ({"operands": {"guide_x": 8}}, "clip has no operand guide_x"),
        ({"slots": 4}, "clip has no slots, so --slots 4 would have no effect"),
        ({"bank": 4}, "clip has no bank, so --bank 4 would have no effect"),
    ],
)
def test_sizes_that_no_call_could_have(asked, said):
    with pytest.raises(typer.BadParameter, match=said):
        request_of(Question(hardware="h100x1", **asked))
    ids = Question(hardware="h100x1", problem="128x64x8", positives="ids")
    assert request_of(ids).problem.N == 64


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"dtype": "int8"}, "^--dtype 'int8': use one of float64"),
        ({"budget": "much"}, "^--budget: cannot read 'much' as an amount of memory"),
        ({"budget": "disk=1GiB"}, "^--budget: memory budget"),
        ({"hardware": "h100x7"}, "^--hardware: no hardware preset is called 'h100x7'"),
        (
            {"schedule": "spil"},
            r"^--schedule 'spil' on \S+: did you mean 'spill'\? use one of auto, recompute",
        ),
        (
            {"loss": "klip"},
            "^--loss: there is no loss 'klip'; did you mean 'clip'[?].*file.py:name",
        ),
        ({"loss": "matryoshka"}, "^--loss: 'matryoshka' is a factory.*file.py:name"),
    ],
)
def test_an_option_that_cannot_be_read_is_named(asked, said):
    with pytest.raises(typer.BadParameter, match=said):
        request_of(Question(**{"hardware": "h100x1", **asked}))


def test_messages_speak_of_options():
    told = in_options(
        "Give at least memory_budget=4096, or Problem(slots=…). Use precision='auto' or 'ieee', "
        "schedule=spill; my_schedule='x' is no argument."
    )
    assert told == (
        "Give at least --budget 4096, or --slots …. Use --precision auto or 'ieee', "
        "--schedule spill; my_schedule='x' is no argument."
    )
    with pytest.raises(typer.BadParameter, match="it is too much"), reading("--budget"):
        raise ArgumentError("it is too much")


def test_every_command_asks_for_the_same_dtype_if_nothing_is_said():
    """That of ``Problem``, which ``compile_loss(problem="MxNxD")`` makes; each says so."""
    commands = {name: import_module(entry.home.split(":")[0]) for name, entry in COMMANDS.items()}
    found = {}
    for name, module in commands.items():
        function = getattr(module, COMMANDS[name].home.partition(":")[2])
        parameters = signature(function).parameters if isfunction(function) else {}
        if "dtype" in parameters:
            found[name] = parameters["dtype"].default
            said = " ".join(CliRunner().invoke(app, [name, "--help"]).stdout.split())
            assert "The default is compile_loss's own, on CPUs and GPUs alike." in said
            assert "[default: float32]" in said
    assert {"plan", "compile", "inspect", "simulate", "bench", "tune"} <= set(found)
    assert set(found.values()) == {Problem(1, 1, 1).dtype} == {Question().dtype}
