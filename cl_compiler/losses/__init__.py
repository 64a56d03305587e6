"""The shipped losses: one family per file, each a few lines of the language."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from cl_compiler.errors import LossDefinitionError

if TYPE_CHECKING:
    from cl_compiler.lang.ir import LossIR

SHIPPED = {
    "clip": "clip",
    "infonce": "clip",
    "siglip": "siglip",
    "nt_xent": "self_supervised",
    "supcon": "self_supervised",
}
"""Name → the module that defines it."""


def find(name: str) -> LossIR:
    """A shipped loss by its name.

    Raises:
        LossDefinitionError: no such loss; the message lists those that exist.
    """
    if name not in SHIPPED:
        from difflib import get_close_matches

        close = get_close_matches(name, SHIPPED)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise LossDefinitionError(
            f"there is no loss {name!r}.{hint} Shipped: {', '.join(SHIPPED)}; or pass what "
            "@cl.define_loss returned."
        )
    loss: LossIR = getattr(import_module(f"cl_compiler.losses.{SHIPPED[name]}"), name)
    return loss


def __getattr__(name: str) -> LossIR:
    if name in SHIPPED:
        return find(name)
    raise AttributeError(name)
