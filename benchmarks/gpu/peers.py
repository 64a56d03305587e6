"""Packages that compute the same losses: optional, pinned in pyproject.toml's extra ``peers``.

Each is called as its documentation says, given what it asks for, and freed of what would add work
that the others do not do.  All need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Contest
from benchmarks.providers import Skipped

__all__ = ["MISSING", "PEERS", "Peer", "is_importable", "peer_loss", "peer_versions"]

MISSING = "cannot be imported"


@dataclass(frozen=True)
class Peer:
    """A package.

    Attributes:
        package: its name on PyPI.
        module: what is imported.
        losses: that it computes.
        description: how it is called, and what to know about its figures.
    """

    package: str
    module: str
    losses: tuple[str, ...]
    description: str


PEERS = {
    "inf_cl": Peer(
        "inf-cl",
        "inf_cl",
        ("clip", "infonce"),
        "cal_inf_loss on fp32 copies; both directions for CLIP, tf32 products",
    ),
    "memeff": Peer(
        "memeff",
        "memeff",
        ("clip", "infonce"),
        "stable=False (true gradients), fixed temperature: no gradient of logit_scale",
    ),
    "siglip_kernel": Peer(
        "siglip-kernel",
        "siglip_kernel",
        ("siglip",),
        "fused_siglip_loss, its own choice of kernel; gradients sum in bf16, made in the forward",
    ),
    "liger": Peer(
        "liger-kernel",
        "liger_kernel.transformers.functional",
        ("infonce",),
        "fused linear cross-entropy of scale·x against y, accum_dtype=float32; gradients are made "
        "in the forward",
    ),
    "cce": Peer(
        "cut-cross-entropy",
        "cut_cross_entropy",
        ("infonce",),
        "linear cross-entropy of scale·x against y, filter_eps=None; cce:filtered drops small "
        "gradients, its default",
    ),
}


def peer_versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for peer in PEERS.values():
        try:
            found[peer.package] = version(peer.package)
        except PackageNotFoundError:
            continue
    return found


@cache
def is_importable(family: str) -> bool:
    """Whether a peer's package can be used here."""
    with suppress(ImportError):
        return bool(import_module(PEERS[family].module))
    return False


def peer_loss(name: str, contest: Contest, leaves: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """The call whose value is differentiated.

    Raises:
        Skipped: the package is not installed, or does not compute this.
    """
    family, _, variant = name.partition(":")
    peer = PEERS[family]
    if contest.loss not in peer.losses:
        raise Skipped(f"{peer.package} has no {contest.loss}")
    if leaves["logit_scale"].device.type != "cuda":
        raise Skipped(f"{peer.package} needs a GPU")
    try:
        module = import_module(peer.module)
    except ImportError as error:
        raise Skipped(f"{peer.package} {MISSING}: {error}") from error
    match family:
        case "inf_cl":
            return _inf_cl(module, contest, leaves)
        case "memeff":
            return _memeff(module, contest, leaves)
        case "siglip_kernel":
            return lambda: module.fused_siglip_loss(
                leaves["x"], leaves["y"], leaves["logit_scale"].log(), leaves["logit_bias"]
            )
        case "liger":
            return _liger(module, leaves)
        case "cce":
            return _cce(module, leaves, "auto" if variant == "filtered" else None)
    raise ValueError(f"no peer {family!r}")


def _labels(leaves: Mapping[str, Tensor]) -> Tensor:
    return torch.arange(len(leaves["x"]), device=leaves["x"].device)


def _inf_cl(module: Any, contest: Contest, leaves: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """``scale`` is multiplied outside: its own backward of it needs a process group."""
    if contest.M % 64 or contest.N % 64:
        raise Skipped("inf-cl reads out of bounds unless the batch is a multiple of 64")
    head = next((h for h in (256, 128, 64, 32, 16) if contest.D % h == 0), 0)
    if not head:
        raise Skipped(f"inf-cl needs a width that is a multiple of 16, not {contest.D}")
    labels, scale = _labels(leaves), leaves["logit_scale"]

    def one_way(rows: Tensor, cols: Tensor) -> Tensor:
        value: Tensor = module.cal_inf_loss(scale * rows, cols, labels=labels, head_dim=head)
        return value

    def forward() -> Tensor:
        x, y = leaves["x"].float(), leaves["y"].float()
        return (one_way(x, y) + one_way(y, x)) / 2 if contest.loss == "clip" else one_way(x, y)

    return forward


def _memeff(module: Any, contest: Contest, leaves: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """Margin 2 switches its mask of false negatives off."""
    settings: dict[str, Any] = {
        "temperature": 1 / contest.scale,
        "normalized_inputs": True,
        "stable": False,
    }
    if contest.loss == "clip":
        loss_fn = module.MemoryEfficientCLIPLoss(**settings)
    else:
        loss_fn = module.MemoryEfficientQwen3Loss(margin=2.0, **settings)
    return lambda: loss_fn(leaves["x"], leaves["y"])


def _liger(module: Any, leaves: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    labels = _labels(leaves)

    def forward() -> Tensor:
        rows = leaves["logit_scale"] * leaves["x"]
        found = module.liger_fused_linear_cross_entropy(
            rows, leaves["y"], labels, accum_dtype=torch.float32
        )
        value: Tensor = found[0] if isinstance(found, tuple) else found
        return value

    return forward


def _cce(module: Any, leaves: Mapping[str, Tensor], filter_eps: str | None) -> Callable[[], Tensor]:
    labels = _labels(leaves)

    def forward() -> Tensor:
        rows = leaves["logit_scale"] * leaves["x"]
        value: Tensor = module.linear_cross_entropy(
            rows, leaves["y"], labels, filter_eps=filter_eps
        )
        return value

    return forward
