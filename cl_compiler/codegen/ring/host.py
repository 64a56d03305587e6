"""Passes over shards that lie in host memory: what stays at home is on the device block by block.

A sweep counts the rows of a block of its side at home; ``h`` is where they are in this rank's whole
shard, of which all vectors are on the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from cl_compiler.codegen.names import Names
from cl_compiler.codegen.pass_text import PassText
from cl_compiler.codegen.passes import PassPrinter
from cl_compiler.codegen.ring.passes import RingPassPrinter, RingPassText, tuple_text
from cl_compiler.codegen.ring.stages import RingStagePrinter
from cl_compiler.codegen.stages import StageText
from cl_compiler.lang.ir import BANK
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.ring import is_local
from cl_compiler.lang.sweeps import SweepPlan
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
    reads_place = any("h1" in line for line in text.lines)
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


@dataclass
class LocalBlocks(PassText):
    """A pass in which nothing travels, called for a block of rows at a time.

    ``stays``, ``gains``: operands and gradients of rows; ``whole``: operands that have no rows.
    """

    stays: list[str] = field(default_factory=list)
    gains: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    """What the sweep is called with."""

    @property
    def of_rows(self) -> str:
        """Operands and gradients of rows, as arguments."""
        return f"{tuple_text(self.stays)}, {tuple_text(self.gains)}"

    @property
    def names_here(self) -> str:
        """The block's operands and gradients."""
        return ", ".join(f"{name}_here" for name in (*self.stays, *self.gains))

    @property
    def here(self) -> str:
        """The same, as targets of an assignment."""
        return tuple_text(self.names_here.split(", "))

    @property
    def results_here(self) -> str:
        """Where the block's statistics go; "" where there are none."""
        return ", ".join(f"{name}[here]" for name in self.results)


class HostLocalPrinter(PassPrinter):
    """Prints one pass in one mode where a rank has both sides to itself: slots, a queue."""

    def __init__(self, *args: Any) -> None:
        self.of_rows: dict[str, None] = {}
        super().__init__(*args)

    def vector(self, name: str, dim: int) -> str:
        if dim == 0:
            self.of_rows.setdefault(self.hoisted_names.get(name) or self.names(name))
        return super().vector(name, dim)

    def text(self) -> LocalBlocks:
        text = super().text()
        return LocalBlocks(**vars(text), **in_row_blocks(text, self.plan, self.of_rows))


def in_row_blocks(text: PassText, plan: SweepPlan, vectors: Iterable[str]) -> dict[str, Any]:
    """What ``LocalBlocks`` has; ``vectors``: of rows."""
    axes = {op.name: op.axes for op in plan.ir.operands if op.name in text.params}
    stays = [name for name, of in axes.items() if BANK not in of]
    whole = [name for name, of in axes.items() if BANK in of]
    gains = [f"d_{name}" for name in stays if f"d_{name}" in text.params]
    names = {name: f"{name}_here" for name in (*stays, *gains)}
    names |= {name: f"{name}_there" for name in whole}
    names |= {name: f"{name}[here]" for name in vectors}
    names["rows"] = f"len({stays[0]}_here)"
    arguments = [names.get(p, p) for p in text.params]
    return {"stays": stays, "gains": gains, "whole": whole, "arguments": arguments}


class HostRows(RingStagePrinter):
    """Prints what is made of single rows as copies of a few of them, on the device."""

    def row_norms(self, part: str) -> str:
        return f"_row_norms(ring, {part})"

    def inner(self, operand: str) -> str:
        return f"ring.total(_inner(ring, {operand}, d_{operand}))"


class HostStagePrinter(HostRows):
    """Prints the statements around the passes of a program whose shards are in host memory."""

    def __init__(self, program: Program, names: Names, cast: bool) -> None:
        super().__init__(program, names, cast)
        self.pass_printer = host_pass_printer


def host_pass_printer(
    program: Program, pass_: Pass, mode: Mode, names: Names, name: str, cast: bool
) -> PassPrinter:
    """The printer of a pass."""
    kind = HostLocalPrinter if is_local(pass_.grid) else HostPassPrinter
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
                else:
                    any_adds |= bool(_gains(text))
            made |= gains
    return any_adds


def _gains(text: PassText) -> list[str]:
    assert isinstance(text, (RingPassText, LocalBlocks))
    return text.gains


__all__ = [
    "HostLocalPrinter",
    "HostPassPrinter",
    "HostRows",
    "HostStagePrinter",
    "LocalBlocks",
    "find_continued",
    "host_pass_printer",
    "in_blocks",
    "in_row_blocks",
]
