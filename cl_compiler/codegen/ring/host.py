"""Passes over shards that lie in host memory: what stays at home is on the device block by block.

A sweep counts the rows of a block of its side at home; ``h`` is where they are in this rank's whole
shard, of which all vectors are on the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from cl_compiler.codegen.names import Names
from cl_compiler.codegen.passes import PassPrinter, PassText
from cl_compiler.codegen.ring.passes import RingPassPrinter, RingPassText
from cl_compiler.codegen.ring.stages import RingStagePrinter
from cl_compiler.codegen.stages import StageText
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.ring import is_local
from cl_compiler.lang.tile_ir import Mode

Text = TypeVar("Text", bound=RingPassText)


class HostPassPrinter(RingPassPrinter):
    """Prints one pass in one mode."""

    @property
    def _tile(self) -> str:
        """The tile's part of the side at home."""
        return "[j:j1]" if self.travels == 0 else "[i:i1]"

    def vector(self, name: str, dim: int) -> str:
        text = super().vector(name, dim)
        if dim == self.travels:
            return text
        return text.replace("[j:j1]", "[h:h1]").replace("[i:i1, None]", "[h:h1, None]")

    def at_rows(self, vector: str) -> str:
        return self._in_shard(vector, super().at_rows(vector), 0)

    def at_cols(self, vector: str) -> str:
        return self._in_shard(vector, super().at_cols(vector), 1)

    def _in_shard(self, name: str, text: str, dim: int) -> str:
        """A vector's part of the whole shard; a gradient's is the block's."""
        is_gradient = name.removeprefix("d_") in {op.name for op in self.plan.ir.operands}
        if dim == self.travels or (is_gradient and name.startswith("d_")):
            return text
        return text.replace(self._tile, "[h:h1]")

    def extent(self) -> tuple[str, str]:
        if self.travels == 0:
            return "first + i, first + i1", "h, h1"
        return "h, h1", "first + j, first + j1"

    def text(self) -> RingPassText:
        return in_blocks(super().text())


def in_blocks(text: Text) -> Text:
    """A sweep that is given what is at home as a tuple, and where the block begins."""
    reads_place = any("h1" in line for line in text.body)
    fixed = ["home"] * bool(text.stays or text.gains)  # a grid of ids alone has no operands
    fixed += ["shard", *(["parts"] if "parts" in text.params else [])]
    fixed += ["begin"] * reads_place
    params = [p for p in text.params if p not in (*fixed, *text.stays, *text.gains)]
    rows, cols = (
        e if e in text.stays or e.endswith("_peer") else f"{e}[begin : begin + RESIDENT]"
        for e in text.extents
    )
    extents = (rows, cols)
    if extents != text.extents and "begin" not in fixed:
        fixed.append("begin")
    return replace(
        text,
        params=[*fixed, *params],
        extents=extents,
        place="ij"[text.home_side] if reads_place else "",
    )


class HostStagePrinter(RingStagePrinter):
    """Prints the statements around the passes of a program whose shards are in host memory."""

    def __init__(self, program: Program, names: Names, cast: bool) -> None:
        super().__init__(program, names, cast)
        self.pass_printer = host_pass_printer


def host_pass_printer(
    program: Program, pass_: Pass, mode: Mode, names: Names, name: str, cast: bool
) -> PassPrinter:
    """The printer of a pass."""
    kind = PassPrinter if is_local(pass_.grid) else HostPassPrinter
    return kind(program, pass_, mode, names, name, cast)


def find_continued(stages: Iterable[StageText]) -> bool:
    """Mark passes that add to gradients of earlier ones; whether there are any."""
    made: set[str] = set()
    any_adds = False
    for stage in stages:
        for call in stage.calls:
            texts = [mode.text for mode in call.modes.values()]
            gains = {g for text in texts for g in _gains(text)}
            for text in texts:
                if isinstance(text, RingPassText):
                    text.adds = not made.isdisjoint(text.gains)
                    any_adds |= text.adds
            made |= gains
    return any_adds


def _gains(text: PassText) -> list[str]:
    if isinstance(text, RingPassText):
        return text.gains
    return [p for p in text.params if p.startswith("d_")]


__all__ = [
    "HostPassPrinter",
    "HostStagePrinter",
    "find_continued",
    "host_pass_printer",
    "in_blocks",
]
