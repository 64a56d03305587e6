"""Which templates a request is printed with, and that the PyTorch ones follow their operands."""

import re
from dataclasses import replace

import pytest
import torch

from cl_compiler import compile_loss
from cl_compiler import lang as cl
from cl_compiler.codegen.backend import least_bytes, plan_of
from cl_compiler.codegen.render import render
from cl_compiler.errors import ArgumentError, BudgetError
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.ranks import with_ranks
from cl_compiler.lang.schedules import build_program
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan import MemoryBudget, Problem, Request
from cl_compiler.plan.report import plan_from_json
from cl_compiler.plan.requests import request_to_json
from cl_compiler.plan.search import choose_plan
from cl_compiler.variants import build_variant
from tests import losses_zoo as zoo
from tests.tiles import errors, run
from tests.zoo_case import sample

H100, A100 = load_hardware("h100x1"), load_hardware("a100x1")


def request(loss, dtype="bfloat16", schedule="auto", hardware=H100) -> Request:
    operands = {op.name for op in loss.operands if not op.stop}
    return Request(
        loss,
        hardware,
        MemoryBudget.parse("1GiB"),
        Problem(4096, 4096, 512, dtype, slots=4 * any("slots" in op.axes for op in loss.operands)),
        "views" if loss.is_single_set else "paired",
        frozenset(operands | set(loss.parameters)),
        "ieee",
        schedule,
    )


def built(asked: Request):
    variant = build_variant(asked, request_to_json(asked), "test")
    return plan_from_json(variant.plan), variant.source


@pytest.mark.parametrize(
    ("loss", "schedule"),
    [
        ("clip", "retain"),
        ("siglip", "spill"),
        ("infonce", "panel"),
        ("nt_xent", "spill"),
        ("supcon", "spill"),
    ],
)
def test_one_gpu_gets_triton(loss, schedule):
    plan, source = built(request(find(loss)))
    assert (plan.template, plan.schedule) == ("triton", schedule)
    assert "import triton" in source and "@triton.jit" in source
    assert any("sm_90" in note for note in plan.notes)


@cl.define_loss
def slots_of_their_own_scale(sim, logit_scale):
    own = cl.similarity(cl.x, cl.operand("hard", (cl.rows, cl.slots)))
    s = logit_scale * sim
    z = cl.logaddexp(cl.logsumexp(s, over=cl.cols), cl.logsumexp(own, over=cl.slots))
    return cl.mean(z - cl.at_positive(s, on=cl.rows), over=cl.rows)


def test_slots_are_visited_beside_the_kernels():
    plan, source = built(request(find("hard_negatives")))
    assert plan.template == "triton" and "@triton.jit" in source
    assert "torch.bmm(" in source and ".item()" not in source


def test_what_triton_does_not_serve_is_printed_in_pytorch():
    for asked in (request(slots_of_their_own_scale), request(find("clip"), dtype="float64")):
        plan, source = built(asked)
        assert plan.template == "torch" and "triton" not in source
        assert any("tiles are emitted" in note for note in plan.notes)
        assert re.search(r"with \w+\.device, _MatmulPrecision\(\)", source)
        assert "torch.backends.cuda.matmul" in source and "mkldnn" not in source


@pytest.mark.parametrize(("arch", "first"), [("sm_75", "sm_80"), ("gfx906", "gfx908")])
@pytest.mark.parametrize("group_size", [0, 2])
def test_a_gpu_before_triton_gets_pytorch(group_size, arch, first):
    old = replace(with_ranks(load_hardware("a100x1"), 2, 2) if group_size else A100, arch=arch)
    asked = replace(request(find("clip"), "float16", hardware=old), group_size=group_size)
    plan, source = built(asked)
    assert plan.template == "torch" and "triton" not in source
    assert any(f"begin with {first}, and this GPU is {arch}" in note for note in plan.notes)


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_103", "sm_120", "gfx90a", "gfx950"])
def test_a_gpu_without_a_preset_gets_triton(arch):
    plan, source = built(request(find("clip"), hardware=replace(A100, arch=arch)))
    assert plan.template == "triton" and "@triton.jit" in source


def test_the_note_speaks_of_the_schedule_that_was_asked_for():
    plan, _ = built(request(find("clip"), schedule="dense"))
    assert (plan.template, plan.schedule) == ("torch", "dense")
    assert any("schedule 'dense' has no Triton template" in note for note in plan.notes)


def test_several_gpus_are_a_group():
    with pytest.raises(ArgumentError, match=r"h100x8 has 8 devices.*group_size=8"):
        built(request(find("clip"), hardware=load_hardware("h100x8")))


def test_the_least_bytes_of_a_group_are_those_of_a_budget_that_does():
    """Of rows on every rank: with as much there is a plan, with less there is none."""
    spec = with_ranks(load_hardware("xeon-amx-2c"), 4, 4)
    asked = replace(request(find("clip"), hardware=spec), precision="ieee", group_size=4)
    sweeps = plan_sweeps(asked.loss, asked.positives, asked.needs)
    least, rows = least_bytes(asked, sweeps), 3000
    asked = replace(asked, problem=replace(asked.problem, M=rows, N=rows))
    plan = plan_of(replace(asked, budget=MemoryBudget(least(rows))), sweeps)
    assert plan.peak_bytes <= least(rows)
    with pytest.raises(BudgetError):
        plan_of(replace(asked, budget=MemoryBudget(least(rows) - 1)), sweeps)


@pytest.mark.parametrize("name", ["clip", "siglip", "hard_negatives", "supcon"])
def test_pytorch_for_another_device_is_right(name):
    """The text for CUDA tensors runs on any device: what it allocates follows its operands."""
    case = next(c for c in zoo.cases() if c.name == name)
    asked = replace(request(case.loss, dtype="float64"), positives=case.positives, needs=case.needs)
    sweeps = plan_sweeps(case.loss, case.positives, case.needs)
    plan = choose_plan(asked, sweeps)
    source = render(plan, build_program(sweeps, plan.schedule), "test", device="cuda")
    inputs = sample(case, m=6, n=9, seed=8)
    found = errors(run(source, inputs), inputs)
    assert max(found.values()) < 1e-9, found


def test_tensors_must_lie_where_the_loss_runs():
    loss_fn = compile_loss("h100x1", "1GiB")
    x = torch.randn(4, 8)
    with pytest.raises(ArgumentError, match=r"x is on cpu, .* compiled for tensors on cuda"):
        loss_fn(x, x, logit_scale=1.0)
