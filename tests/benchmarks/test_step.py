"""The whole step's benchmark runs, and compares what it says it compares."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.step import QUICK, by_hand, made, main
from cl_compiler import GradientCache, compile_loss


@pytest.mark.full
def test_it_measures_a_cost_and_a_best_chunk(tmp_path, capsys):
    results = main(["--quick", "--only", "perceptron", "--out", str(tmp_path / "step.json")])
    (found,) = json.loads((tmp_path / "step.json").read_text())["cases"]
    assert found == json.loads(json.dumps(results[0]))
    assert found["bound"] > 1.05
    assert found["cached"] == found["medians"]["planned"] / found["medians"]["uncached"]
    assert found["planned_peak_bytes"] < found["uncached_peak_bytes"]
    assert "cost of caching" in capsys.readouterr().out


def test_the_loop_by_hand_is_the_same_step():
    encoders, inputs = made(QUICK[1])
    loss_fn = compile_loss("auto", "4MiB")
    found = []
    for run in (
        lambda: by_hand(encoders, inputs, loss_fn, [16, 24]),
        lambda: GradientCache(encoders, loss_fn, chunk_sizes=[16, 24])(*inputs, logit_scale=10.0),
    ):
        for parameter in (p for e in encoders for p in e.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        run()
        found.append([p.grad for e in encoders for p in e.parameters()])
    for one, other in zip(*found, strict=True):
        assert other.abs().max() > 0
        assert torch.equal(one, other)
