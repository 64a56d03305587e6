"""The shipped losses: one family per file, each a few lines of the language."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cl_compiler.errors import LossDefinitionError, instead_of

if TYPE_CHECKING:
    from cl_compiler.lang.ir import LossIR

SHIPPED = {
    "clip": "cross_entropy",
    "infonce": "cross_entropy",
    "siglip": "sigmoid",
    "nt_xent": "self_supervised",
    "supcon": "self_supervised",
    "label_smoothing": "cross_entropy",
    "siglip_plus": "sigmoid",
    "dcl": "decoupled",
    "dcl_views": "decoupled",
    "dcl_views_weighted": "decoupled",
    "debiased": "corrected_negatives",
    "debiased_rows": "corrected_negatives",
    "hard_weighted": "corrected_negatives",
    "hard_negatives": "further_negatives",
    "queue": "further_negatives",
    "moco": "further_negatives",
    "infonce_pairs": "positive_pairs",
    "nt_xent_pairs": "positive_pairs",
    "distillation": "soft_targets",
}
"""Name → the module that defines it."""

FACTORIES = {
    "mnrl": "retrieval",
    "qwen3": "false_negatives",
    "gist": "false_negatives",
    "matryoshka": "prefixes",
    "recall_at_k": "recall",
}
"""Name of a function that returns a loss, as ``losses.matryoshka((64, 128))`` does → module."""


def find(name: str) -> LossIR:
    """A shipped loss by its name.

    Raises:
        LossDefinitionError: no such loss; the message lists those that exist.
    """
    if name in FACTORIES:
        raise LossDefinitionError(
            f"{name!r} is a factory, not one loss: its arguments decide what the loss looks like. "
            f"Pass what cl_compiler.losses.{name}(…) returns."
        )
    if name not in SHIPPED:
        raise LossDefinitionError(
            f"there is no loss {name!r}; {instead_of(name, SHIPPED, 'shipped:')}; or pass what "
            "@cl.define_loss returned."
        )
    loss: LossIR = getattr(import_module(f"cl_compiler.losses.{SHIPPED[name]}"), name)
    return loss


def __getattr__(name: str) -> Any:
    if name in SHIPPED:
        return find(name)
    if name in FACTORIES:
        return getattr(import_module(f"cl_compiler.losses.{FACTORIES[name]}"), name)
    raise AttributeError(name)
