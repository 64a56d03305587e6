"""Whole steps of the GPU benchmark: equal gradients from every provider, ours in less memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.cases import Contest, items_of
from benchmarks.gpu.devices import Step, memory_of
from benchmarks.gpu.providers import inputs_of, prepare

CPU = torch.device("cpu")
PROVIDERS = ("ours", "ours:uncached", "open_clip")


def contest(rows: int, width: int = 16) -> Contest:
    return Contest("step", "clip", rows, rows, width, PROVIDERS, dtype="float32")


pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_provider_leaves_the_same_gradients():
    case = contest(37)
    leaves = inputs_of(case, CPU, seed=1)
    found = {}
    for name in PROVIDERS:
        value = prepare(name, case, leaves).step()
        found[name] = [value, *(t.grad.clone() for t in leaves.values() if t.requires_grad)]
    exact = inputs_of(case, CPU, seed=1)
    assert all(torch.equal(exact[n], t) for n, t in leaves.items())
    assert len(found["ours"]) == 1 + 2 * 16 + 1
    for name in PROVIDERS[1:]:
        for got, want in zip(found[name], found["ours"], strict=True):
            assert (got - want).norm() <= 1e-4 * want.norm()
            assert want.norm() > 0


def test_the_formula_beside_ours_multiplies_in_the_contest_s_dtype():
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if "mm" in func.overloadpacket.__name__:
                seen.append(found.dtype)
            return found

    case, seen = replace(contest(48, 32), dtype="bfloat16"), []
    step = prepare("open_clip", case, inputs_of(case, CPU, seed=4)).step
    with Products():
        step.forward()
    assert len(seen) > 2 * 16 and set(seen) == {torch.bfloat16}


def test_the_cached_step_keeps_no_activations():
    case = contest(512, 32)
    leaves = inputs_of(case, CPU, seed=2)
    usage = {}
    for name in PROVIDERS:
        step: Step = prepare(name, case, leaves).step
        step()
        usage[name] = memory_of(step, CPU).peak_bytes
    assert usage["ours"] < usage["ours:uncached"] / 2
    assert usage["ours:uncached"] < usage["open_clip"]


def test_whole_steps_come_last_and_have_no_least_work():
    items = items_of()
    steps = [i for i in items if i.section == "step"]
    assert items[-len(steps) :] == steps and len(steps) == 2
    assert all(i.flops == 0 and i.target is None for i in steps)


def test_what_is_no_provider_of_steps_is_said():
    case = contest(16)
    with pytest.raises(ValueError, match="no provider 'memeff' of whole steps"):
        prepare("memeff", case, inputs_of(case, CPU, seed=3))
