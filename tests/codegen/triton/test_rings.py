"""Ring schedules as Triton kernels: right, as large as planned, compiled without a GPU.

In the interpreter ranks are threads on ``LoopbackRing``; their shards of 21 by 37 samples travel in
chunks of 8 and meet in tiles of 16, so that there are whole, ragged and several of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from cl_compiler.codegen.ring.backend import plan_and_print_ring, plan_group
from cl_compiler.hardware import load_hardware
from cl_compiler.lang.ring import ring_schedules
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.types import MemoryBudget, Problem, Request
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.runtime.loader import load_source
from tests import losses_zoo as zoo
from tests.codegen.triton.launches import Launch, watch
from tests.codegen.triton.test_interpreter import (
    KINDS,
    assert_right,
    tolerance,
)
from tests.ring.shards import emit_ring
from tests.ring.test_plan import Mirror

Ask = Callable[..., dict[str, Any]]

SHARES = ([1, 1, 1, 1], [3, 1, 2], [2, 0, 3, 1], [1, 1])
"""Four ranks; uneven; one of them empty; two."""


def served() -> list[tuple[str, str]]:
    """(case, schedule) of all that kernels serve."""
    found = []
    for case in zoo.cases():
        sweeps = plan_sweeps(case.loss, case.positives, case.needs)
        usable = [s for s, reason in ring_schedules(sweeps).items() if not reason]
        found += [(case.name, schedule) for schedule in usable]
    return found


SERVED = served()
QUICK = {
    ("clip", "ring_owner"),
    ("clip", "ring_travel"),
    ("clip_ids", "ring_travel"),
    ("nt_xent", "ring_owner"),
    ("dcl_views", "ring_travel"),
    ("siglip", "ring_owner"),
    ("clip", "host"),
    ("batch_hard", "all_gather"),
    ("entropy", "two_level"),
    ("moco", "ring_owner"),
    ("nt_xent", "half_ring"),
    ("supcon", "half_ring"),
    ("hard_negatives", "ring_travel"),
}


MISSES = {
    ("debiased_clamped", "ring_travel"): "d logit_scale in fp32: 9.5e-6, one device 1.4e-5",
    ("debiased_clamped_paired", "two_level"): "d tau_plus in fp32: 1.0e-5, one device 1.5e-5",
}
"""Known to miss the bound of 7.6e-6, on the one input that each is tried with."""


def marked(name: str, schedule: str):
    """A case, with what is to be known of it."""
    marks = [] if (name, schedule) in QUICK else [pytest.mark.full]
    if (name, schedule) in MISSES:
        marks.append(pytest.mark.xfail(reason=MISSES[name, schedule], strict=False))
    return pytest.param(name, schedule, marks=marks)


@pytest.mark.parametrize(("name", "schedule"), [marked(*pair) for pair in SERVED])
def test_zoo_on_ranks(interpret: Ask, name: str, schedule: str):
    """Ways to cut, dtypes and architectures take turns; what rounding costs one device it may cost
    a group."""
    turn = SERVED.index((name, schedule))
    dtype = list(KINDS)[turn % 3]
    shares = SHARES[turn % 4]
    request = {"case": name, "dtype": dtype, "arch": KINDS[dtype], "seed": turn}
    found = interpret(
        **request, ring=schedule, shares=shares, node=2 if len(shares) % 2 == 0 else len(shares)
    )
    over = {n: e for n, e in found["errors"].items() if e > tolerance(12.0, dtype, n)}
    if over and dtype != "float32":
        alone = interpret(**request)["errors"]
        over = {n: e for n, e in over.items() if e > 1.01 * alone[n]}
    assert not over, over


@pytest.mark.parametrize("schedule", ["ring_owner", "ring_travel"])
@pytest.mark.parametrize("name", ["clip", "nt_xent"])
def test_where_the_guard_trips(interpret: Ask, name: str, schedule: str):
    """The kernels of running maxima alone."""
    found = interpret(
        case=name, ring=schedule, shares=[1, 2, 1], dtype="float32", arch="gfx942", force=True
    )
    assert found["tripped"]
    assert_right(found, bound=12.0, dtype="float32")


@pytest.mark.parametrize(("layout", "arch"), [("apart", "sm_80"), ("shifted", "sm_90")])
@pytest.mark.parametrize("schedule", ["ring_owner", "ring_travel"])
def test_shards_that_do_not_lie_row_behind_row(
    interpret: Ask, schedule: str, layout: str, arch: str
):
    found = interpret(
        case="clip", ring=schedule, shares=[1, 2, 1], dtype="float32", arch=arch, layout=layout
    )
    assert_right(found, bound=12.0, dtype="float32")


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("schedule", ["ring_owner", "ring_travel"])
def test_gradients_of_bf16_shards(interpret: Ask, schedule: str, scale: float):
    """As exact as on one device: what rounding takes off positives is multiplied apart."""
    found = interpret(
        case="clip",
        ring=schedule,
        shares=[1, 1, 1, 1],
        chunk=16,
        dtype="bfloat16",
        parameters={"logit_scale": scale},
        m=64,
        n=64,
        d=64,
        seed=10,
    )
    assert found["errors"].pop("value") <= 3e-5
    assert max(found["errors"].values()) <= 2.5e-3


def test_shards_in_bf16x3(interpret: Ask):
    found = interpret(
        case="clip", ring="ring_travel", shares=[1, 1], dtype="float32", precision="bf16x3", d=64
    )
    assert max(found["errors"].values()) <= tolerance(12.0, "float32", "") + 2.0**-13


# -- plans -----------------------------------------------------------------------------------------


def request_of(
    name: str = "clip", rows: int = 2048, width: int = 512, dtype: str = "bfloat16", **other: Any
) -> Request:
    """One rank's part of a batch on eight GPUs of a node."""
    ir = find(name)
    asked = Request(
        ir,
        load_hardware("h100x8"),
        MemoryBudget.parse("2GiB"),
        Problem(rows, rows, width, dtype),  # type: ignore[arg-type]
        "views" if ir.is_single_set else "paired",
        frozenset({op.name for op in ir.operands} | set(ir.parameters)),
        "bf16" if dtype == "bfloat16" else "ieee",
        "auto",
        0,
        8,
    )
    return replace(asked, **other)


def sweeps_of(asked: Request) -> Any:
    return plan_sweeps(asked.loss, asked.positives, asked.needs)


def test_groups_of_gpus_run_kernels_where_they_can():
    asked = request_of()
    plan, text = plan_and_print_ring(asked, sweeps_of(asked), "test")
    assert plan.template == "triton"
    assert "@triton.jit" in text
    canonical = replace(asked, schedule="canonical", problem=Problem(2048, 2048, 512))
    for other in (canonical, request_of(dtype="float64")):
        plan, text = plan_and_print_ring(other, sweeps_of(other), "test")
        assert plan.template == "torch"
        assert plan.notes[0].startswith("PyTorch's tiles are emitted: ")
        assert "triton" not in text


def test_a_group_of_cpus_runs_pytorch():
    asked = request_of(hardware=load_hardware("xeon-amx-2c"), group_size=2)
    assert plan_group(asked, sweeps_of(asked))[0].template == "torch"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("loss", "schedule"),
    [
        *(("clip", s) for s in ("ring_owner", "ring_travel", "all_gather", "both_ways")),
        *(("nt_xent", s) for s in ("ring_owner", "half_ring", "all_gather")),
    ],
)
def test_a_rank_holds_what_the_plan_says(loss: str, schedule: str, dtype: str):
    """Live bytes of everything but what kernels do, which is nothing to memory."""
    precision = "bf16" if dtype == "bfloat16" else "tf32"
    asked = request_of(loss, 2048, 512, dtype, schedule=schedule, precision=precision)
    assert_holds_what_is_planned(asked, dict.fromkeys(asked.loss.parameters, 10.0))


@pytest.mark.parametrize("name", ["queue_paired", "hard_negatives_paired"])
def test_a_rank_holds_what_the_plan_says_of_queues_and_slots(name: str):
    case = next(c for c in zoo.cases() if c.name == name)
    problem = Problem(2048, 2048, 512, "bfloat16", slots=8, bank=4096)
    asked = request_of(problem=problem, loss=case.loss, needs=case.needs)
    assert_holds_what_is_planned(asked, case.parameters)


def assert_holds_what_is_planned(asked: Request, parameters: Mapping[str, float]) -> None:
    """Of one rank's forward and backward, within 5 % or 1 MiB."""
    plan, text = plan_and_print_ring(asked, sweeps_of(asked), "test")
    assert plan.template == "triton"
    module, p = load_source(text, "test"), asked.problem
    launches_of(module)
    length = {"rows": p.M, "cols": p.N, "bank": p.bank}
    ring = Mirror(asked.group_size, {a: (length[a],) * asked.group_size for a in ("rows", "cols")})
    given: dict[str, torch.Tensor] = {}
    for op in asked.loss.operands:
        shape = (length[op.axes[0]], *[p.slots] * ("slots" in op.axes), p.D)
        operand = torch.randn(shape).to(getattr(torch, p.dtype))
        given[op.name] = operand.requires_grad_(op.name in asked.needs)
    for name, value in parameters.items():
        given[name] = torch.tensor(value, requires_grad=True)
    with LiveBytes() as live:
        module.Loss.apply(ring, *(given[name] for name in module.ARGUMENTS))[0].backward()
    off = plan.peak_bytes - live.peak_bytes
    assert abs(off) <= max(0.05 * live.peak_bytes, 1 << 20), (plan.peak_bytes, live.peak_bytes)


# -- machine code ----------------------------------------------------------------------------------


OTHERS = ("sm_80", "sm_100", "gfx942")
ARCHS = ["sm_90", *(pytest.param(arch, marks=pytest.mark.full) for arch in OTHERS)]


def launches_of(module: ModuleType) -> list[Launch]:
    """What a file launches from now on, of tensors that lie on the host; nothing is multiplied."""
    if hasattr(module, "_add_product"):
        module._add_product = lambda *_: None  # type: ignore[attr-defined]
    return watch(module, "cpu")


@pytest.fixture
def own_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's cache would hide what this compiler makes of the code."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("schedule", ["ring_owner", "ring_travel"])
def test_nothing_spills(own_cache: None, schedule: str, arch: str):
    """Whichever way a shard lies in the group's order, and in both modes."""
    from tests.codegen.triton import offline

    if not offline.has_disassembler():
        pytest.skip("this build of Triton has no disassembler")
    case = next(c for c in zoo.cases() if c.name == "clip_paired")
    source = emit_ring(case, schedule, dtype="bfloat16", width=512, chunk=256, arch=arch)
    found: dict[str, Launch] = {}
    for in_range in (True, False):
        module = load_source(source, "test")
        launches = launches_of(module)
        module._in_range = lambda *_, answer=in_range: answer  # type: ignore[attr-defined]
        ring = Mirror(2, {"rows": (512, 512), "cols": (512, 512)})
        x, y = (torch.randn(512, 512, dtype=torch.bfloat16, requires_grad=True) for _ in "xy")
        module.Loss.apply(ring, x, y, torch.tensor(10.0, requires_grad=True))[0].backward()
        found |= {launch.kernel: launch for launch in launches if "sweep" in launch.kernel}
    assert len(found) == (6 if schedule == "ring_owner" else 4)
    for launch in found.values():
        binary = offline.build(module, launch, arch)
        assert binary.stack_bytes == 0, f"{binary.kernel} spills {binary.stack_bytes} bytes"
        assert binary.matrix_instructions > 0
