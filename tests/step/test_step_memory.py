"""The step's peak: all embeddings and their gradients, and the graph of one chunk."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from cl_compiler import GradientCache, compile_loss
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.runtime.measure import planted_pairs

SAMPLES, DIM, HIDDEN, LAYERS = 512, 16, 64, 6


def encoder(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(DIM, HIDDEN)]
    for _ in range(LAYERS):
        layers += [nn.Sigmoid(), nn.Linear(HIDDEN, HIDDEN)]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, DIM))


def peak_bytes(chunk: int) -> int:
    """Of a step with gradients in place, as in every step but the first."""
    a, b = encoder(0), encoder(1)
    for parameter in (*a.parameters(), *b.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    x, y = planted_pairs(SAMPLES, SAMPLES, DIM)
    step = GradientCache([a, b], compile_loss("auto", "256KiB"), chunk_sizes=chunk)
    step(x, y, logit_scale=5.0)  # the loss specialises
    with LiveBytes() as live:
        step(x, y, logit_scale=5.0)
    return live.peak_bytes


def graph_bytes(samples: int) -> int:
    """The peak of a plain forward and backward of one encoder."""
    a = encoder(0)
    for parameter in a.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x, _ = planted_pairs(samples, samples, DIM)
    gradient = torch.ones(samples, DIM)
    with LiveBytes() as live:
        a(x).backward(gradient)
    return live.peak_bytes


def test_the_peak_falls_with_the_chunk_as_a_chunks_graph_does():
    chunks = (SAMPLES, 256, 128)
    peaks = [peak_bytes(chunk) for chunk in chunks]
    graphs = [graph_bytes(chunk) for chunk in chunks]
    # Beside a chunk's graph live the cached gradients [2 · SAMPLES, DIM] and what is small:
    # a scalar and an index.
    cached = 2 * SAMPLES * DIM * 4
    for peak, graph in zip(peaks, graphs, strict=True):
        assert graph + cached <= peak <= graph + cached + 1024, (peaks, graphs)
    for (more, less), (more_graph, less_graph) in zip(
        pairwise(peaks), pairwise(graphs), strict=True
    ):
        assert abs((more - less) - (more_graph - less_graph)) <= 64, (peaks, graphs)


def test_small_chunks_reach_the_floor_of_embeddings_gradients_and_loss():
    """Then the loss's stage is the peak: embeddings, their gradients, and the loss's budget."""
    embeddings = 2 * SAMPLES * DIM * 4
    assert peak_bytes(4) <= embeddings + 256 * 1024 + 32 * 1024
