"""What only a GPU can show: emitted kernels on tensor cores, streams, graphs, memory.

Run with ``pytest -m gpu`` on a machine that has one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from cl_compiler import compile_loss
from cl_compiler.hardware import load_hardware
from cl_compiler.plan.types import Tile
from cl_compiler.runtime.measure import planted_pairs
from tests import losses_zoo as zoo
from tests.ring.shards import emit_ring, run_group, split
from tests.zoo_case import Sample, held_in_e4m3, sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

DEVICE = "cuda"
CASES = {case.name: case for case in zoo.cases()}
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
SPLIT = 2.0**-16
"""What three bf16 products leave out of one in fp32."""


def rounded(drawn: Sample, dtype: torch.dtype) -> Sample:
    """The sample with operands that the dtype holds exactly."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in drawn.tensors.items():
        value = tensor.detach()
        value = value.to(dtype).double() if value.dim() > 1 else value
        tensors[name] = value.requires_grad_(tensor.requires_grad)
    return dataclasses.replace(drawn, tensors=tensors)


def errors_on_device(drawn: Sample, dtype: torch.dtype, **options) -> dict[str, float]:
    """Relative errors of the value and of every gradient."""
    case = drawn.case
    arguments: dict[str, Tensor] = {}
    for name, tensor in drawn.tensors.items():
        kind = dtype if tensor.dim() > 1 else torch.float32
        moved = tensor.detach().to(DEVICE, kind)
        arguments[name] = moved.requires_grad_(tensor.requires_grad)
    for name, tensor in drawn.parameters.items():
        arguments[name] = tensor.detach().float().to(DEVICE).requires_grad_()
    ids = {n: i.to(DEVICE) for n, i in drawn.ids.items()}
    value = compile_loss("auto", "2GiB", loss=case.loss, **options)(**arguments, **ids)
    value = value[0] if isinstance(value, tuple) else value
    leaves = [n for n in sorted(case.needs) if arguments[n].requires_grad]
    found = dict(
        zip(leaves, torch.autograd.grad(value, [arguments[n] for n in leaves]), strict=True)
    )
    return errors_of(value, found, drawn)


def errors_of(value: Tensor, found: Mapping[str, Tensor], drawn: Sample) -> dict[str, float]:
    """Relative errors against the float64 reference."""
    wanted_value = drawn.reference()
    wanted = drawn.gradients(wanted_value)
    largest = max(float(g.norm()) for g in wanted.values())
    expected = float(wanted_value.detach())
    errors = {"value": abs(float(value.detach()) - expected) / max(1.0, abs(expected))}
    for name, gradient in found.items():
        share = 1.0 if wanted[name].dim() == 0 else 1e-2
        size = max(float(wanted[name].norm()), share * largest) or 1.0  # it may vanish
        errors[name] = float((gradient.double().cpu() - wanted[name]).norm()) / size
    return errors


def assert_close(errors: dict[str, float], bound: float, dtype: torch.dtype) -> None:
    """Logits up to ``bound``: eight roundings of fp32; for fp32 operands three products for one,
    beside 16-bit operands a gradient tile in bf16."""
    rounding = 8 * HALF_ULP[torch.float32] * (4 + bound)
    if dtype == torch.float32:
        value, gradient = rounding + SPLIT * bound, rounding + SPLIT * (4 + bound)
    else:
        value, gradient = rounding, rounding + 2.0**-8
    wrong = {n: e for n, e in errors.items() if not e <= (value if n == "value" else gradient)}
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_zoo(name: str, dtype: torch.dtype):
    """Ragged tiles, several of them, every loss that the zoo has."""
    drawn = rounded(sample(CASES[name], 300, 421, 72, seed=1), dtype)
    assert_close(errors_on_device(drawn, dtype), bound=12.0, dtype=dtype)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["clip", "nt_xent", "infonce"])
def test_logit_scales(name: str, dtype: torch.dtype, scale: float):
    case = dataclasses.replace(CASES[name], parameters={"logit_scale": scale})
    drawn = rounded(sample(case, 512, 640, 256, seed=2), dtype)
    assert_close(errors_on_device(drawn, dtype), bound=scale, dtype=dtype)


@pytest.mark.parametrize("schedule", ["spill", "recompute", "panel", "retain"])
@pytest.mark.parametrize("name", ["clip", "infonce", "siglip"])
def test_schedules(name: str, schedule: str):
    from cl_compiler.errors import ScheduleError

    drawn = rounded(sample(CASES[name], 333, 517, 128, seed=3), torch.bfloat16)
    try:
        errors = errors_on_device(drawn, torch.bfloat16, schedule=schedule)
    except ScheduleError:
        pytest.skip("the loss cannot use it")
    assert_close(errors, bound=12.0, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["clip", "siglip", "nt_xent", "infonce"])
def test_eight_bits(name: str):
    """Operands that e4m3 has.  Hopper adds their products with 14 bits (DeepSeek-V3, 2024)."""
    if torch.cuda.get_device_capability() not in ((9, 0), (10, 0)):
        pytest.skip("no fp8")
    drawn = sample(CASES[name], 333, 517, 128, seed=7)
    tensors = {
        n: (held_in_e4m3(t.detach()) if t.dim() > 1 else t.detach()).requires_grad_(t.requires_grad)
        for n, t in drawn.tensors.items()
    }
    drawn = dataclasses.replace(drawn, tensors=tensors)
    errors = errors_on_device(drawn, torch.bfloat16, precision="fp8")
    assert errors.pop("value") <= 2.0**-13 * 12
    assert max(errors.values()) <= 2.0**-8 + 2.0**-12 * 12


@pytest.mark.parametrize("schedule", ["ring_owner", "ring_travel", "all_gather"])
@pytest.mark.parametrize("name", ["clip", "nt_xent", "siglip", "supcon"])
def test_four_ranks_on_one_device(name: str, schedule: str):
    """Ranks are threads, their shards uneven; every one launches the kernels of a group."""
    drawn = rounded(sample(CASES[name], 333, 517, 128, seed=5), torch.bfloat16)
    cut = split(drawn.case, *drawn.is_positive.shape, (2, 1, 0, 3))
    source = emit_ring(
        drawn.case,
        schedule,
        dtype="bfloat16",
        chunk=64,
        tile=Tile(256, 256),
        width=128,
        precision="bf16",
        arch=load_hardware("auto").arch,
    )
    found = run_group(source, drawn, cut, dtype=torch.bfloat16, device=DEVICE, timeout_s=120.0)
    assert len(set(found.values)) == 1
    result = found.result
    wrong = errors_of(result.value, result.gradients, drawn)
    assert_close(wrong, bound=12.0, dtype=torch.bfloat16)


# ---- one size of training -----------------------------------------------------------------------


class Step:
    """CLIP at a size of training, bf16, on the device."""

    def __init__(self, rows: int = 8192, width: int = 512, budget: str = "1GiB") -> None:
        x, y = planted_pairs(rows, rows, width, torch.bfloat16, device=DEVICE)
        self.x, self.y = x.requires_grad_(), y.requires_grad_()
        self.scale = torch.tensor(1 / 0.07, device=DEVICE, requires_grad=True)
        self.loss_fn = compile_loss("auto", budget, loss="clip")

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.y, self.scale

    def __call__(self) -> tuple[Tensor, ...]:
        value = self.loss_fn(self.x, self.y, logit_scale=self.scale)
        return value.detach(), *torch.autograd.grad(value, self.leaves)


@pytest.fixture
def step() -> Step:
    return Step()


def test_triton_runs_and_is_right_at_a_size_of_training(step: Step):
    assert step.loss_fn is not None
    value, d_x, d_y, d_scale = step()
    assert step.loss_fn.plan.template == "triton"
    x, y, scale = (t.detach().double() for t in step.leaves)
    leaves = [t.requires_grad_() for t in (x, y, scale)]
    logits = scale * (x @ y.T)
    labels = torch.arange(len(x), device=DEVICE)
    loss = torch.nn.functional.cross_entropy
    want = (loss(logits, labels) + loss(logits.T, labels)) / 2
    wanted = torch.autograd.grad(want, leaves)
    assert abs(float(value) - float(want)) <= 3e-5 * max(1.0, float(want))
    for got, right in zip((d_x, d_y, d_scale), wanted, strict=True):
        assert float((got.double() - right).norm() / right.norm()) <= 2.5e-3


def test_two_runs_agree_to_the_last_bit(step: Step):
    first, second = step(), step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("rows", [4096, 16384])
@pytest.mark.parametrize("budget", ["256MiB", "1GiB"])
def test_the_peak_is_within_the_budget_and_near_its_prediction(rows: int, budget: str):
    step = Step(rows, 256, budget)
    step()  # compiles, and lets the library take its own workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    plan = step.loss_fn.plan
    assert peak <= plan.budget.device_bytes
    assert peak <= plan.peak_bytes + (2 << 20)


def test_on_a_stream_of_the_caller(step: Step):
    want = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_forward_and_a_backward_are_captured_in_a_graph(step: Step):
    """Nothing in them waits for the device."""
    want = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    with torch.no_grad():
        step.x.copy_(step.x.roll(1, 0))
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(got[0], want[0])
    with torch.no_grad():
        step.x.copy_(step.x.roll(-1, 0))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_host_never_waits(step: Step):
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["halves of one matrix", "from an odd element on"])
def test_operands_that_do_not_lie_row_behind_row(step: Step, layout: str):
    """They are copied, and the copies are in the plan."""
    want = step()
    x, y = step.x.detach(), step.y.detach()
    if layout.startswith("halves"):
        step.x, step.y = torch.cat([x, y], dim=1).requires_grad_().chunk(2, dim=1)
    else:
        flat = [torch.cat([t.new_zeros(1), t.flatten()]).requires_grad_() for t in (x, y)]
        step.x, step.y = (t[1:].view(x.shape) for t in flat)
    got = step()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert step.loss_fn.plan.template == "triton"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing_inside_the_loss(dtype: torch.dtype):
    x, y = planted_pairs(512, 512, 64, device=DEVICE)
    found = []
    for enabled in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        with torch.autocast("cuda", dtype=dtype, enabled=enabled):
            value = compile_loss("auto", "256MiB")(*leaves, logit_scale=14.3)
            value.backward()
        found.append([value.detach(), *(t.grad for t in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_inside_a_function_that_is_compiled(step: Step):
    def doubled(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return 2 * step.loss_fn(x * 1.0, y * 1.0, logit_scale=scale)

    want = doubled(*step.leaves)
    got = torch.compile(doubled)(*step.leaves)
    assert abs(float(got) - float(want)) <= 1e-5 * abs(float(want))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_on_a_device_that_is_not_the_current_one(step: Step):
    want = step()
    x, y, scale = (t.detach().to("cuda:1").requires_grad_() for t in step.leaves)
    value = step.loss_fn(x, y, logit_scale=scale)
    got = (value.detach(), *torch.autograd.grad(value, (x, y, scale)))
    assert all(torch.equal(a.to(DEVICE), b) for a, b in zip(got, want, strict=True))


def test_a_row_far_from_every_column_trips_the_guard_and_is_right():
    """At scale 100 its exponentials are below what fp32 holds."""
    case = dataclasses.replace(CASES["clip"], parameters={"logit_scale": 100.0})
    drawn = sample(case, 256, 256, 8, seed=4)
    with torch.no_grad():
        mean = drawn.tensors["y"].mean(0)
        drawn.tensors["x"][0] = -mean / mean.norm()
    errors = errors_on_device(rounded(drawn, torch.float32), torch.float32)
    assert_close(errors, bound=100.0, dtype=torch.float32)
