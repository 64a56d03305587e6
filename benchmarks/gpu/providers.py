"""The contestants: each turns a contest and its inputs into a step to be measured.

``ours`` is ``compile_loss``; ``ours:<schedule>`` asks for one, ``ours:fp8`` for that precision.
``open_clip`` and ``dense`` are formulas as training code writes them, under autocast to the
contest's dtype; ``chunked`` is ``chunked.py``.  A name with ``:compiled`` goes through
``torch.compile``.  Packages are in ``peers.py``.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.cases import Contest
from benchmarks.gpu.chunked import chunked_loss
from benchmarks.gpu.devices import Step
from benchmarks.gpu.mixed import under_autocast
from benchmarks.gpu.peers import PEERS, peer_loss
from benchmarks.gpu.steps import inputs_of_step, step_forward
from benchmarks.providers import OPEN_CLIP, open_clip
from cl_compiler import Problem, compile_loss
from cl_compiler.cli.dense import DENSE
from cl_compiler.plan.types import Plan
from cl_compiler.runtime.measure import planted_pairs

__all__ = ["DESCRIPTIONS", "Entrant", "inputs_of", "prepare"]

WORKSPACE_BYTES = 1 << 30
"""Of a compiled loss's budget, beyond its gradients."""
RETAINED_BYTES = 8 << 30
BIAS = -10.0

DESCRIPTIONS = {
    "ours": "compile_loss, schedule chosen by the planner or named; fp8: similarities in e4m3",
    "triton": "the Triton back end's spill schedule without the planner, panels of the named size",
    "chunked": "torch.mm over panels of rows; elementwise PyTorch, or torch.compile, between",
    "open_clip": f"{OPEN_CLIP}'s formula, one rank, autocast: the matrix exists",
    "dense": "the textbook formula, autocast: the matrix exists",
    **{name: peer.description for name, peer in PEERS.items()},
}


@dataclass(frozen=True)
class Entrant:
    """A provider ready to be measured; ``plan`` is a compiled loss's."""

    step: Step
    plan: Plan | None = None


def inputs_of(contest: Contest, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Unit-length features with planted positives, and parameters; all require gradients.

    Of a whole step: features, which require none, and the towers' weights.
    """
    if contest.section == "step":
        return inputs_of_step(contest, device, seed)
    dtype: torch.dtype = getattr(torch, contest.dtype)
    pair = partial(planted_pairs, width=contest.D, dtype=dtype, seed=seed, device=device,
                   cosine=_cosine(contest))  # fmt: skip
    if contest.loss == "nt_xent":
        operands = {"z": torch.cat(pair(contest.M // 2, contest.M // 2))}
    else:
        operands = dict(zip("xy", pair(contest.M, contest.N), strict=True))
    parameters = {"logit_scale": torch.tensor(contest.scale, device=device)}
    if contest.loss == "siglip":
        parameters["logit_bias"] = torch.tensor(BIAS, device=device)
    return {name: t.requires_grad_() for name, t in (operands | parameters).items()}


def _cosine(contest: Contest) -> float:
    """Of positive pairs: such that a softmax over a row gives the positive about one half.

    Elsewhere either nothing has been learned or nothing is left to learn, and a gradient that is
    zero but for rounding says nothing about who computes it well.  A row's other logits are normal
    with deviation s; their logsumexp is log N + s²/2, or their largest where s is large.
    """
    many = math.log(contest.N)
    deviation = contest.scale / math.sqrt(contest.D)
    most = math.sqrt(2 * many)
    level = many + deviation**2 / 2 if deviation < most else deviation * most
    return min(0.95, max(0.02, level / contest.scale))


def prepare(name: str, contest: Contest, leaves: Mapping[str, Tensor]) -> Entrant:
    """Make a provider ready.

    Args:
        name: as in ``DESCRIPTIONS``, with a schedule or a variant after a colon; "broken:raise",
            "broken:memory", "broken:exit" and "broken:hang" fail on purpose.
        contest: what is measured.
        leaves: inputs by name.

    Raises:
        Skipped: it does not apply here.
        Exception: whatever the provider raises.
    """
    family, _, variant = name.partition(":")
    everything = tuple(leaves.values())
    if contest.section == "step" and family != "broken":
        return Entrant(Step(step_forward(name, contest, dict(leaves)), everything))
    if family == "ours":
        return _ours(variant, contest, leaves)
    if family == "triton":
        from benchmarks.gpu.kernels import triton_loss

        return Entrant(Step(triton_loss(variant, contest, leaves), everything))
    if family in PEERS:
        return Entrant(Step(peer_loss(name, contest, leaves), everything))
    return Entrant(Step(_formula(family, variant, contest, leaves), everything))


def _ours(variant: str, contest: Contest, leaves: Mapping[str, Tensor]) -> Entrant:
    problem = Problem(contest.M, contest.N, contest.D, contest.dtype)  # type: ignore[arg-type]
    sides = contest.M + (0 if contest.loss == "nt_xent" else contest.N)
    budget = sides * contest.D * (4 + problem.input_bytes) + WORKSPACE_BYTES
    budget += RETAINED_BYTES if variant == "retain" else 0
    precision, schedule = ("fp8", "auto") if variant == "fp8" else ("auto", variant or "auto")
    loss_fn = compile_loss(
        "auto", budget, loss=contest.loss, problem=problem, precision=precision, schedule=schedule
    )

    def forward() -> Tensor:
        found = loss_fn(**leaves)
        value: Tensor = found[0] if isinstance(found, tuple) else found
        return value

    return Entrant(Step(forward, tuple(leaves.values())), loss_fn.plan)


def _formula(
    family: str, variant: str, contest: Contest, leaves: Mapping[str, Tensor]
) -> Callable[[], Tensor]:
    match family:
        case "chunked":
            x, y = (leaves[n] for n in ("zz" if "z" in leaves else "xy"))
            call: Callable[..., Tensor] = partial(chunked_loss, contest.loss, x, y)
            scale, bias = leaves["logit_scale"], leaves.get("logit_bias")
            return lambda: call(scale, bias, compiled=variant == "compiled")
        case "open_clip" | "dense":
            formula = DENSE[contest.loss]
            if family == "open_clip" and contest.loss == "clip":
                formula = open_clip
            call = under_autocast(formula, contest.dtype)
            if variant == "compiled":
                call = torch.compile(call, dynamic=False)
            return lambda: call(**leaves)
        case "broken":
            return partial(_break, variant)
    raise ValueError(f"no provider {family!r}")


def _break(how: str) -> Tensor:
    """Fail on purpose, to show what the benchmark makes of it."""
    match how:
        case "memory":
            raise torch.cuda.OutOfMemoryError("out of memory on purpose")
        case "exit":
            os._exit(7)
        case "hang":
            time.sleep(3600)
    raise ValueError("failed on purpose")
