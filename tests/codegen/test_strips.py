"""Tiles that are worked on in strips: what spans a tile, how wide a strip is, what it costs."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from cl_compiler import lang as cl
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.lang.program import Schedule
from cl_compiler.lang.schedules import build_program
from cl_compiler.lang.strips import in_strips
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.cost import PARTS
from cl_compiler.plan.report import explain
from cl_compiler.plan.requests import request_to_json
from cl_compiler.plan.search import choose_plan
from cl_compiler.plan.space import space_of
from cl_compiler.plan.types import Plan, Tile
from cl_compiler.variants import build_variant
from tests import losses_zoo as zoo
from tests.dense_fp32 import WIDTH, features, in_fp32, limits, misses
from tests.plan.requests import request
from tests.tiles import emit, load, run
from tests.zoo_case import sample

ZEN4 = load_hardware("epyc-zen4-2c")
CASES = {case.name: case for case in zoo.cases()}


def planned(loss: str = "clip", hardware: HardwareSpec = ZEN4, **options: object) -> Plan:
    return choose_plan(request(find(loss), hardware=hardware, **options))  # type: ignore[arg-type]


def with_l2(factor: float) -> HardwareSpec:
    levels = [
        replace(v, memory_bytes=int(v.memory_bytes * factor)) if v.name == "l2" else v
        for v in ZEN4.levels
    ]
    return replace(ZEN4, levels=tuple(levels))


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_only_products_span_a_tile(loss: str) -> None:
    """One buffer that a product makes and another reads; what is beside it is a strip."""
    case = CASES[loss]
    program = in_strips(build_program(plan_sweeps(case.loss, case.positives, case.needs), "spill"))
    code = program.passes[-1].programs[program.modes[0]]
    assert code.float_buffers == 1
    assert len({b for b in code.strip_buffers if b.startswith("t")}) == 1


def test_tiles_that_span_their_rows_have_no_strips() -> None:
    case = CASES["infonce"]
    plan = plan_sweeps(case.loss, case.positives, case.needs)
    assert not any(p.in_strips for p in in_strips(build_program(plan, "panel")).passes)
    assert planned("infonce", schedule="panel").strip == 0


@pytest.mark.parametrize("factor", [0.25, 1, 4])
def test_two_strips_fill_the_caches_of_the_cores(factor: float) -> None:
    spec = with_l2(factor)
    caches = 2 * next(v.memory_bytes for v in spec.levels if v.name == "l2")
    plan = planned(hardware=spec, rows=16384, width=512, budget="128MiB")
    bytes_ = 2 * plan.tile.rows * plan.strip * 4
    assert bytes_ <= caches
    assert plan.strip == plan.tile.cols or 2 * bytes_ > caches


def test_the_file_and_the_explanation_have_the_plans_strips() -> None:
    asked = request(find("clip"), ZEN4, rows=16384, width=512, budget="128MiB")
    plan, text = choose_plan(asked), build_variant(asked, request_to_json(asked), "test").source
    assert f"\nSTRIP = {plan.strip}  #" in text
    assert f"strips of {plan.strip} columns" in explain(plan)


def test_buffers_of_a_strip_take_less_than_tiles() -> None:
    """The plan counts them, and a tile that no longer has a second buffer."""
    plan = planned(rows=16384, width=512, schedule="spill", budget="128MiB")
    memory = dict(plan.memory)
    assert memory["strips of a tile"] < memory["tile buffers"]
    assert memory["tile buffers"] == plan.tile.rows * plan.tile.cols * 4


def test_operators_are_launched_for_each_strip() -> None:
    """Those between products; what a tile has of them is what its strip has."""
    space = space_of(request(find("clip"), ZEN4, rows=16384, width=512), None, None)
    option = space.option("spill")
    (work,) = {p.work for p in option.facts.passes if p.phase == "forward"}
    assert 0 < work.between < work.operators
    launches = PARTS.index("operator launches")
    narrow, wide = (
        space.point("spill", Tile(2048, cols), 0).parts[launches] for cols in (1024, 2048)
    )
    strips = 2048 // space.machine.strip_columns(Tile(2048, 2048))
    assert strips > 8 and narrow < wide * (1 + 1 / strips)


def emitted(schedule: Schedule, kept: int = 2) -> str:
    return emit(
        CASES["clip"], schedule, dtype="float32", kept_tiles=kept, library="onednn", strip=2
    )


def test_tiles_between_products_are_never_copied() -> None:
    """A gradient tile is made where a product left its operand, or where the next one reads it."""
    for schedule in ("spill", "retain"):
        assert not re.search(r"\.copy_\((t\d|kept)", emitted(schedule))


@pytest.mark.parametrize("kept", [1, 2, 1000])
def test_kept_tiles_are_saved_for_the_backward(kept: int) -> None:
    """Autograd holds them, frees them and gives them to a second backward unchanged."""
    module, case = load(emitted("retain", kept)), sample(CASES["clip"], 10, 10, 6, seed=2)
    inputs = {n: t.detach().float().requires_grad_() for n, t in case.tensors.items()}
    values = {**inputs, **{n: p.detach() for n, p in case.parameters.items()}}
    shapes: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = module.Loss.apply(*(values[n] for n in module.ARGUMENTS))[0]
    tiles = [(min(3, 10 - i), min(4, 10 - j)) for i in range(0, 10, 3) for j in range(0, 10, 4)]
    assert [tuple(s) for s in shapes if len(s) == 2 and s[1] != 6] == tiles[:kept]
    first, second = (
        torch.autograd.grad(value, list(inputs.values()), retain_graph=again)
        for again in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, list(inputs.values()))


def test_running_maxima_replace_what_shared_exponentials_kept() -> None:
    """A sweep that lost digits is repeated, and the tiles of the first one are forgotten."""
    case = sample(CASES["clip"], 10, 10, 6, seed=2)
    kept, made = (emit(CASES["clip"], s, kept_tiles=3) for s in ("retain", "spill"))
    head = '    """Whether sums of ``terms`` shifted exponentials lost nothing that matters."""\n'
    assert kept.count(head) == 1
    again = run(kept.replace(head, f"{head}    return False\n"), case)
    for name, gradient in run(made, case).gradients.items():
        torch.testing.assert_close(again.gradients[name], gradient, rtol=1e-9, atol=1e-12)


@cl.define_loss
def squares(sim, margin):  # type: ignore[no-untyped-def]
    """The logarithm of a sum of squares: the gradient tile is the product itself."""
    return cl.log(margin + cl.sum(cl.sum(sim**2, over=cl.cols), over=cl.rows))


def test_what_is_affine_in_a_kept_similarity_is_made_of_it() -> None:
    """A tile that is kept spares the backward its product, a factor or not."""
    case = replace(CASES["clip"], loss=squares)
    for library in ("blas", "onednn"):
        text = emit(case, "retain", dtype="float32", library=library, needs=frozenset({"x", "y"}))
        backward = text.partition("def _backward_sweep(")[2].partition("\ndef ")[0]
        assert len(re.findall(r"torch\.mm\(", backward)) == 1, "to make one again"


@pytest.mark.parametrize("strip", [16, 70])
@pytest.mark.parametrize("schedule", ["spill", "retain"])
def test_many_narrow_strips_add_up(strip: int, schedule: Schedule) -> None:
    """Sums of rows are added once per strip, in fp32."""
    case, tile = CASES["clip"], Tile(96, 1100)
    text = emit(
        case, schedule, dtype="float32", width=WIDTH, tile=tile, library="onednn", strip=strip
    )
    for seed, scale in enumerate((1.0, 14.3, 100.0)):
        whole = features(case, scale, False, seed, (200, 1100))
        assert not misses(whole, run(text, in_fp32(whole)), limits(whole)), scale


def test_a_gradient_tile_that_is_a_product_needs_no_strips() -> None:
    """Nothing is done between the products of such a pass."""
    case = replace(CASES["clip"], loss=squares)
    inputs = sample(CASES["clip"], 10, 10, 6, seed=2)
    tensors = {n: t.detach().float().requires_grad_() for n, t in inputs.tensors.items()}
    for schedule in ("spill", "retain"):
        needs = frozenset({"x", "y"})
        text = emit(case, schedule, dtype="float32", library="onednn", strip=2, needs=needs)
        module = load(text)
        given = {**tensors, "margin": torch.tensor(1.0, dtype=torch.float64)}
        value = module.Loss.apply(*(given[n] for n in module.ARGUMENTS))[0]
        gradients = torch.autograd.grad(value, list(tensors.values()))
        exact = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
        dense = torch.log(1 + (exact["x"] @ exact["y"].T).square().sum())
        wanted = torch.autograd.grad(dense, list(exact.values()))
        for got, want in zip(gradients, wanted, strict=True):
            assert float((got.double() - want).norm() / want.norm()) < 2e-6
