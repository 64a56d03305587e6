"""Tiles whose products oneDNN makes: formulas, strips, the setting that asks for it, who gets."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from types import ModuleType

import pytest
import torch

from cl_compiler import compile_loss
from cl_compiler.hardware import load_hardware
from cl_compiler.losses import find
from cl_compiler.plan.requests import request_to_json
from cl_compiler.plan.search import choose_plan
from cl_compiler.plan.types import Plan, Tile
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.runtime.loader import load_source
from cl_compiler.variants import build_variant
from tests import losses_zoo as zoo
from tests.plan.requests import request
from tests.random_losses import draw
from tests.tiles import emit, errors, load, run, schedules_of
from tests.zoo_case import Case, sample

ZEN4 = load_hardware("epyc-zen4-2c")
CASES = {case.name: case for case in zoo.cases()}
TILES = (Tile(3, 4), Tile(5, 2), Tile(4, 64))
STRIPS = (1, 3, 64)
"""Columns: one at a time, ragged strips, one strip of a whole tile."""


def assert_right(case: Case, seed: int) -> None:
    rng = Random(seed)
    for schedule in schedules_of(case):
        tile = rng.choice(TILES)
        text = emit(
            case,
            schedule,
            tile=tile,
            library="onednn",
            exponential="exp2",
            strip=rng.choice(STRIPS),
        )
        found = errors(run(text, sample(case, seed=seed)), sample(case, seed=seed))
        assert max(found.values()) < 1e-9, (schedule, found, text)


@pytest.mark.parametrize("name", CASES)
def test_zoo(name: str) -> None:
    assert_right(CASES[name], seed=3)


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_random_losses(first: int) -> None:
    for seed in range(first, first + 10):
        assert_right(draw(seed), seed)


@pytest.mark.full
@pytest.mark.parametrize("first", range(40, 200, 20))
def test_more_random_losses(first: int) -> None:
    for seed in range(first, first + 20):
        assert_right(draw(seed), seed)


@pytest.mark.parametrize("name", ["clip", "infonce", "nt_xent", "matryoshka"])
def test_what_is_not_finite_goes_where_it_goes_with_blas(name: str) -> None:
    """A row of NaN, an infinite one: the libraries pad differently."""
    case = CASES[name]
    for schedule in schedules_of(case):
        texts = [emit(case, schedule, dtype="float32", library=b) for b in ("blas", "onednn")]
        for bad in (torch.nan, torch.inf):
            found = []
            for text in texts:
                inputs = sample(case, seed=5)
                inputs = replace(
                    inputs, tensors={n: t.detach().float() for n, t in inputs.tensors.items()}
                )
                first = next(iter(inputs.tensors.values()))
                first[1, -1] = bad
                for tensor in inputs.tensors.values():
                    tensor.requires_grad_(tensor.dim() == 2)
                found.append(run(text, inputs))
            blas, onednn = found
            assert torch.equal(blas.value.isfinite(), onednn.value.isfinite())
            for n, gradient in blas.gradients.items():
                assert torch.equal(gradient.isfinite(), onednn.gradients[n].isfinite()), n


def planned(loss: str = "clip", **options: object) -> Plan:
    return choose_plan(request(find(loss), **{"hardware": ZEN4, **options}))  # type: ignore[arg-type]


def test_a_plan_takes_the_faster_library() -> None:
    assert planned().library == "onednn"
    assert planned(hardware="xeon-amx-2c").library == "blas"
    rates = dict(ZEN4.gemm_flops_per_s)
    slow = replace(ZEN4, gemm_flops_per_s=tuple({**rates, "onednn": rates["float32"]}.items()))
    assert planned(hardware=slow).library == "blas"


def test_what_onednn_cannot_do_is_left_to_blas() -> None:
    """Products in fp64, or of operands that are rounded."""
    assert planned(dtype="float64", budget="512MiB").library == "blas"
    assert planned(precision="bf16").library == "blas"


def test_bits_that_must_not_depend_on_earlier_batches_are_blass() -> None:
    """A process leaves it to BLAS to multiply batches of more than a few sizes."""
    asked = replace(request(find("clip"), hardware=ZEN4), deterministic=True)
    plan = choose_plan(asked)
    assert (plan.library, plan.strip) == ("blas", 0)
    assert request_to_json(asked) != request_to_json(replace(asked, deterministic=False))
    loss_fn = compile_loss(ZEN4, "64MiB", deterministic=True, problem="4096x4096x256")
    assert loss_fn.plan.library == "blas"


def test_small_batches_without_loops_are_multiplied_by_it_too() -> None:
    small = planned(rows=200, width=128)
    assert (small.schedule, small.library) == ("dense", "onednn")
    assert planned(rows=64, width=512).library == "blas"


def test_positives_that_are_subtracted_from_tiles_are_made_as_tiles_are() -> None:
    """They are BLAS's, so the tiles are, too."""
    case = CASES["debiased_rows"]
    plan = choose_plan(
        request(case.loss, ZEN4, rows=4096, width=64, positives=case.positives, needs=case.needs)
    )
    assert plan.library == "blas"


def loaded() -> ModuleType:
    """A file that has not asked yet how products are made."""
    module = load(emit(CASES["clip"], dtype="float32", library="onednn", width=64))
    module._exact_setting.cache_clear()
    module._process.sizes.clear()
    return module


def step(module: ModuleType) -> list[torch.Tensor]:
    """The value and the gradients of one batch."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(96, 64, generator=draw).requires_grad_() for _ in "xy")
    value = module.Loss.apply(x, y, torch.tensor(0.5))[0]
    return [value.detach(), *torch.autograd.grad(value, (x, y))]


@pytest.mark.parametrize("theirs", ["none", "ieee", "bf16"])
def test_the_setting_is_the_callers_again(theirs: str) -> None:
    settings, module = torch.backends.mkldnn.matmul, loaded()
    found = settings.fp32_precision
    settings.fp32_precision = theirs
    try:
        step(module)
        assert settings.fp32_precision == theirs
        with pytest.raises(RuntimeError, match="size"):
            module.Loss.apply(torch.randn(8, 64), torch.randn(8, 63), torch.tensor(0.5))
        assert settings.fp32_precision == theirs
    finally:
        settings.fp32_precision = found


@pytest.mark.parametrize("library", ["blas", "onednn"])
@pytest.mark.parametrize("theirs", ["tf32", "bf16"])
def test_a_setting_that_was_inherited_is_inherited_again(library: str, theirs: str) -> None:
    module = load(emit(CASES["clip"], dtype="float32", library=library, width=64))
    settings = torch.backends.mkldnn.matmul
    if library == "onednn":
        module._exact_setting.cache_clear()
    try:
        torch.backends.mkldnn.fp32_precision = theirs
        assert settings.fp32_precision == theirs
        step(module)
        torch.backends.mkldnn.fp32_precision = "ieee"
        assert settings.fp32_precision == "ieee"
    finally:
        torch.backends.mkldnn.fp32_precision = "none"
        settings.fp32_precision = "none"


def test_only_a_few_sizes_of_batches_are_onednns() -> None:
    """It keeps megabytes of code for each."""
    module, asked = loaded(), loaded()._exact_setting()
    batches = [[torch.randn(n, 64) for _ in "xy"] for n in range(90, 100)]
    sizes = [[t.shape for t in batch] for batch in batches]
    found = [module._setting_for(*size) for size in (*sizes, *sizes)]
    most = module.SIZES_BY_ONEDNN
    assert found == ([asked] * most + ["ieee"] * (10 - most)) * 2
    value = module.Loss.apply(*(t.requires_grad_() for t in batches[-1]), torch.tensor(0.5))[0]
    value.backward()
    assert len(module._process.sizes) == most
    other = load_source(emit(CASES["clip"], dtype="float32", library="onednn", width=32), "other")
    assert other._setting_for(*sizes[0]) == "ieee", "one list of a process"


def test_on_matrix_units_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the setting, as long as it is set, would round the products of other threads."""
    module = loaded()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch, "mm", None)
    assert module._exact_setting() == "ieee"
    module._exact_setting.cache_clear()


def test_where_onednn_would_round_products_are_blass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does on matrix units: the file multiplies numbers that bf16 does not have."""
    multiply = torch.mm

    def rounding(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        if torch.backends.mkldnn.matmul.fp32_precision == "bf16":
            a, b = (t.bfloat16().float() for t in (a, b))
        return multiply(a, b, out=out)

    exact, module = step(loaded()), loaded()
    monkeypatch.setattr(torch, "mm", rounding)
    found, asked = step(module), module._exact_setting()
    module._exact_setting.cache_clear()
    assert asked == "ieee"
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_whoever_asks_first_gets_the_same_products() -> None:
    """In a region of autocast, in inference, with other defaults."""
    asked = loaded()._exact_setting()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loaded()._exact_setting() == asked
    with torch.inference_mode():
        assert loaded()._exact_setting() == asked
    with torch.device("meta"):
        assert loaded()._exact_setting() == asked
    torch.set_default_dtype(torch.float64)
    try:
        assert loaded()._exact_setting() == asked
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("loss", "schedule", "dtype", "width", "wanted"),
    [
        ("clip", "spill", "float32", 96, "x y"),
        ("clip", "retain", "float32", 96, "x y"),
        ("clip", "retain", "float32", 96, "x"),
        ("clip", "retain", "float32", 640, "x"),
        ("clip", "retain", "float32", 640, "x y"),
        ("clip", "spill", "bfloat16", 96, "x y"),
        ("infonce", "retain", "float32", 96, "x y"),
        ("siglip", "panel", "float32", 96, "x y"),
        (
            "nt_xent",
            "spill",
            "float32",
            96,
            " ".join(op.name for op in CASES["nt_xent"].loss.operands),
        ),
    ],
)
def test_bytes_are_what_was_predicted(
    loss: str, schedule: str, dtype: str, width: int, wanted: str
) -> None:
    case, needs = CASES[loss], frozenset(wanted.split())
    rows, budget = (1300, "6MiB") if width < 100 else (800, "7MiB")
    asked = request(
        case.loss, ZEN4, rows=rows, width=width, dtype=dtype, budget=budget, schedule=schedule,
        positives=case.positives, needs=needs, precision="ieee",
    )  # fmt: skip
    plan = choose_plan(asked)
    assert plan.library == "onednn"
    module = load(build_variant(asked, request_to_json(asked), "test").source)
    peaks = []
    for scale in (14.3, 2000.0):  # a shared exponential; running maxima, which need other buffers
        inputs = sample(case, rows, rows, width, seed=1)
        given = {n: t.detach().to(getattr(torch, dtype)) for n, t in inputs.tensors.items()}
        given = {n: t.requires_grad_(n in needs) for n, t in given.items()} | inputs.ids
        values = {n: t.detach() for n, t in inputs.parameters.items()}
        values |= {"logit_scale": torch.tensor(scale)} if "logit_scale" in values else {}
        with LiveBytes() as live:
            module.Loss.apply(*({**given, **values}[n] for n in module.ARGUMENTS))[0].backward()
        peaks.append(live.peak_bytes)
        del live
    assert plan.peak_bytes == pytest.approx(max(peaks), rel=0.05)
