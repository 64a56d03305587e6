"""Readable identifiers for the symbols of a plan, unique within one file."""

from __future__ import annotations

import keyword
import re

from cl_compiler.errors import LossDefinitionError
from cl_compiler.lang.ir import Let, Reduction
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.whole import inner_of

_AXIS = {
    "rows": "row",
    "cols": "col",
    "rows2": "row2",
    "cols2": "col2",
    "slots": "slot",
    "bank": "bank",
}
_MONOID = {"logsumexp": "lse", "sum": "sum", "max": "max", "softmean": "mean"}
RESERVED = frozenset(
    [
        "i",
        "i1",
        "j",
        "j1",
        "c",
        "c1",
        "k",
        "m",
        "n",
        "t",
        "r0",
        "r1",
        "q0",
        "q1",
        "rows",
        "cols",
        "slots",
        "bank",
        "half",
        "torch",
        "math",
        "kept",
        "is_kept",
        "block",
        "saved",
        "value",
        "store",
        "grad_output",
        "along",
        "offsets",
        "width",
        "step",
        "DTYPE",
        "D",
        "TILE_M",
        "TILE_N",
        "KEPT_TILES",
        "STRIP",
        "forward",
        "backward",
        "Loss",
        "TIE_TOLERANCE",
        "SUMMED_AT_ONCE",
        "x",
        "y",
        "z",
        "ids",
        "row_ids",
        "col_ids",
    ]
)


_LOCAL = re.compile(r"_|d_|[tm]\d|largest_\d|.*_(i|j|i1|j1|buffer|tile)$")
"""What emitted functions call their own locals and helpers."""


class Names:
    """Symbol name → identifier.  Numbered only where a name would repeat."""

    reserved = RESERVED
    length = "{}"
    """How the number of rows, of columns, … is called."""

    def __init__(self, plan: SweepPlan) -> None:
        self.table: dict[str, str] = {}
        self.table["TIE_TOLERANCE"] = "TIE_TOLERANCE"
        self.taken: set[str] = set(self.reserved)
        for op in plan.ir.operands:
            if _LOCAL.match(op.name) or op.name in self.reserved - {"x", "y", "z"}:
                raise LossDefinitionError(
                    f"{plan.ir.name}: operand {op.name!r} has a name that emitted code uses for "
                    "something else; choose another name."
                )
            self.taken.add(op.name)
        for name, leaf in plan.leaves.items():
            if leaf.kind in ("parameter", "input"):
                self.add(name, f"{name}_given" if _LOCAL.match(name) else name)
            if leaf.kind in ("similarity_at_positive", "norm"):
                self.add(name, name)
            if leaf.kind == "similarity":
                self.add(inner_of(name), f"{name}_inner")
            if leaf.kind == "count":
                self.table[name] = self.length.format(name.removeprefix("n_"))
        for node in plan.nodes:
            self.add(node.name, self._proposal(plan, node.name))
        for node in plan.nodes:
            if isinstance(node, Reduction) and node.monoid == "logsumexp":
                owner = self.table[node.name]
                self.add(f"shift_{node.name}", f"{owner}_shift")
                self.add(f"inv_{node.name}", f"{owner}_inverse")
            if isinstance(node, Reduction):
                for part in ("max", "sum", "weighted"):
                    self.add(f"{part}_{node.name}", f"{self.table[node.name]}_{part}")

    def _proposal(self, plan: SweepPlan, name: str) -> str:
        node = plan.by_name[name]
        if isinstance(node, Let):
            of = self.table.get(name.removeprefix("a_"))
            return f"d_{of}" if of else name
        axes = plan.leaves[name].axes
        if node.monoid in ("to_rows", "to_cols"):
            what = "has_positive" if node.operand.is_number else "positive"
            return f"{_AXIS[axes[0]]}_{what}"
        what = "partial" if name.startswith("t") else _MONOID[node.monoid]
        if node.monoid == "sum" and node.operand.is_number:
            what = "count"
        if axes:
            return f"{_AXIS[axes[0]]}_{what}"
        return f"{_AXIS[node.over]}_{'count' if what == 'count' else 'total'}"

    def add(self, symbol: str, proposal: str) -> str:
        base = f"{proposal}_" if keyword.iskeyword(proposal) else proposal
        text, number = base, 1
        while text in self.taken:
            number += 1
            text = f"{base}_{number}"
        self.taken.add(text)
        self.table[symbol] = text
        return text

    def fresh(self, proposal: str) -> str:
        """A new identifier without a symbol."""
        return self.add(f"!{proposal}!{len(self.table)}", proposal)

    def __call__(self, symbol: str) -> str:
        return self.table[symbol]
