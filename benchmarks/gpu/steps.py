"""The whole step: two towers, the loss of their outputs, and gradients in their parameters.

A tower is ``LAYERS`` residual blocks of width D with four times as many hidden units, in the
contest's dtype.  ``ours`` runs them in chunks through ``GradientCache``; ``ours:uncached`` and
``open_clip``, whose products autocast makes in that dtype too, keep the activations of the whole
batch: these two do the same work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.cases import Contest
from benchmarks.gpu.mixed import under_autocast
from benchmarks.providers import open_clip
from cl_compiler import GradientCache, Problem, compile_loss

__all__ = ["CHUNKS", "LAYERS", "inputs_of_step", "step_forward"]

LAYERS = 8
CHUNKS = 16
"""Of a batch, with ``GradientCache``."""
WORKSPACE_BYTES = 1 << 30
"""Of the loss's budget, beyond its gradients."""


class Tower(nn.Module):
    """Features [B, D] to unit embeddings [B, D]; ``weights``: two matrices for each block."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def forward(self, features: Tensor) -> Tensor:
        state = features
        for index in range(0, len(self.weights), 2):
            hidden = F.gelu(state @ self.weights[index])
            state = state + hidden @ self.weights[index + 1]
        return F.normalize(state.float(), dim=1).to(features.dtype)


def inputs_of_step(contest: Contest, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Features of two kinds that tell of the same things, both towers' weights, and the scale."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, contest.dtype)
    width = contest.D

    def drawn(*shape: int, deviation: float = 1.0) -> Tensor:
        value = torch.randn(*shape, generator=generator, device=device)
        return (value * deviation).to(dtype)

    shared = drawn(contest.M, width)
    found = {name: (shared + drawn(contest.M, width)) for name in ("images", "texts")}
    for tower in found.copy():
        for layer in range(LAYERS):
            for part, shape in (("in", (width, 4 * width)), ("out", (4 * width, width))):
                weight = drawn(*shape, deviation=(shape[0] * LAYERS) ** -0.5)
                found[f"{tower}.{layer}.{part}"] = nn.Parameter(weight)
    found["logit_scale"] = nn.Parameter(torch.tensor(contest.scale, device=device))
    return found


def step_forward(name: str, contest: Contest, leaves: dict[str, Tensor]) -> Callable[[], Tensor]:
    """What is called in place of a loss: after it and ``backward`` all gradients are there.

    Raises:
        ValueError: no such provider.
    """
    scale = leaves["logit_scale"]
    features = [leaves["images"], leaves["texts"]]
    towers = [
        Tower([p for n, p in leaves.items() if n.startswith(f"{kind}.")])  # type: ignore[misc]
        for kind in ("images", "texts")
    ]
    if name == "open_clip":
        formula = under_autocast(open_clip, contest.dtype)
        return lambda: formula(
            x=towers[0](features[0]), y=towers[1](features[1]), logit_scale=scale
        )
    problem = Problem(contest.M, contest.N, contest.D, contest.dtype)  # type: ignore[arg-type]
    budget = 2 * contest.M * contest.D * (4 + problem.input_bytes) + WORKSPACE_BYTES
    loss_fn = compile_loss("auto", budget, loss=contest.loss, problem=problem)
    if name == "ours:uncached":
        return lambda: loss_fn(
            *(t(f) for t, f in zip(towers, features, strict=True)), logit_scale=scale
        )
    if name != "ours":
        raise ValueError(f"no provider {name!r} of whole steps")
    cached = GradientCache(towers, loss_fn, chunk_sizes=-(-contest.M // CHUNKS))
    # its gradients are there already: what is called afterwards finds nothing left to do
    return lambda: cached(*features, logit_scale=scale).detach().requires_grad_()
