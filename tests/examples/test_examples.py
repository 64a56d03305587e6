"""The examples train on real pairs, within the memory that they state, and draw their figure."""

from __future__ import annotations

import argparse
import inspect
import logging
import subprocess
import tarfile

import pytest
import torch

from cl_compiler.cli.demo.harvest import pairs_of_source
from examples import finetune_cached, two_towers
from examples.memory_limit import MemoryLimit, OverLimit

CASES = {
    "finetune_cached": (finetune_cached, ["--batch=96", "--mini-batch=8", "--limit=28MiB"]),
    "two_towers": (two_towers, ["--batch=96", "--budget=40MiB"]),
}


def test_the_limit_is_kept_by_force():
    with pytest.raises(OverLimit, match=r"live, limit 1\.0 KiB"), MemoryLimit(1024):
        torch.ones(100) + torch.ones(300)


def few_pairs(most=None):
    """Of some modules of the standard library: what ``real_pairs`` has, in a moment."""
    found = []
    for module in (argparse, inspect, logging, subprocess, tarfile):
        found += pairs_of_source(inspect.getsource(module), module.__name__)
    assert len(found) > 100
    return tuple(found[:-20]), tuple(found[-20:])


def check(name, options, tmp_path, capsys):
    example, sizes = CASES[name]
    figure = tmp_path / "figure.svg"
    found = example.main([*sizes, *options, "--steps=2", f"--out={figure}"])
    said = capsys.readouterr().out
    assert found["peak_bytes"] <= found["limit_bytes"]
    assert figure.read_text(encoding="utf-8").startswith("<?xml")
    assert "unseen pairs" in said
    if example is finetune_cached:
        assert "without caching the first batch is refused" in said
    assert 0 < found["last"] < 2 * found["first"]


@pytest.mark.parametrize("name", CASES)
def test_an_example_runs(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CASES[name][0], "real_pairs", few_pairs)
    check(name, [], tmp_path, capsys)


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_an_example_runs_on_all_packages(name, tmp_path, capsys):
    check(name, ["--max-files=12"], tmp_path, capsys)
