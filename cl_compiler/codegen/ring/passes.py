"""One pass over tiles of a shard at home and one that travels → pieces of text.

What belongs to the travelling side is called ``…_peer`` inside a sweep: the shard of the rank whose
turn it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import sympy as sp

from cl_compiler.codegen.names import RESERVED, Names
from cl_compiler.codegen.pass_text import PassText
from cl_compiler.codegen.passes import PassPrinter
from cl_compiler.codegen.strips import StripPassPrinter
from cl_compiler.codegen.symbols import LENGTH
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.ring import is_local, operand_along
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import Accumulate, Diagonal, Mode

_AXES = {"a": "row", "b": "col"}
_NUMBERED = {"a": "vectors of rows", "b": "vectors of columns", "s": "scalars", "v": "vectors"}
_FOLDS = {"sum": "SUM", "max": "MAXIMUM", "logsumexp": "LOGSUMEXP", "softmean": "SOFTMEAN"}


class RingNames(Names):
    """Lengths are those of all ranks together; a rank has ``rows`` and ``cols`` of its own."""

    reserved = RESERVED | {
        *("ring", "first", "past", "twice", "shard", "parts", "folds", "all_rows", "all_cols"),
        *("FAR", "CHUNK", "RESIDENT", "ROWS", "COLS"),
        *("home", "at_home", "begin", "h", "h1"),
        *("ahead", "tiles", "strips", "height", "width", "grid", "ragged", "block_m", "block_n"),
    }
    length = "all_{}"

    def __init__(self, plan: SweepPlan) -> None:
        self.before_sweeps: dict[sp.Expr, str] = {}
        self.nodes = [node.name for node in plan.nodes]
        self._unnamed: Counter[str] = Counter()
        super().__init__(plan)
        for name in ("n_slots", "n_bank"):
            if name in self.table:
                self.table[name] = name.removeprefix("n_")

    def evaluated(self, expr: sp.Expr, kind: str) -> str:
        """What is evaluated before a sweep, of rows ("a"), columns ("b"), … or a scalar ("s").

        Several sweeps that read the same call it the same: each of them evaluates it again, so that
        nobody holds it in between.
        """
        if expr not in self.before_sweeps:
            proposal = self._meaning(expr, kind)
            if not proposal:
                proposal = f"{kind}{self._unnamed[kind]}"
                self._unnamed[kind] += 1
            self.before_sweeps[expr] = self.fresh(proposal)
        return self.before_sweeps[expr]

    def _meaning(self, expr: sp.Expr, kind: str) -> str:
        """A name that says what it is, for what most sweeps read; "" for anything else."""
        inner = (-expr).args[0] if (-expr).func.__name__ == "present" else -expr
        if isinstance(inner, sp.Symbol) and inner.name in self.table:
            return f"minus_{self.table[inner.name]}"
        inverse = {f"inv_{node}" for node in self.nodes}
        axis = _AXES.get(kind, "")
        if axis and any(isinstance(f, sp.Symbol) and f.name in inverse for f in expr.args):
            return f"{axis}_weight" if isinstance(expr, sp.Mul) else ""
        return ""

    @property
    def meanings(self) -> list[str]:
        """Lines of a glossary about them."""
        named = list(self.before_sweeps.values())
        weights = [name for name in named if "_weight" in name]
        lines = []
        if any(name.startswith("minus_") for name in named):
            lines.append("minus_...: its negative")
        if weights:
            lines.append(f"{', '.join(sorted(weights))}: factors of its exponentials in gradients")
        numbered = {_NUMBERED[kind]: f"{kind}0" for kind in sorted(self._unnamed)}
        if numbered:
            what = ", ".join(numbered)
            lines.append(f"{', '.join(numbered.values())}, ...: {what} that a sweep reads")
        return lines

    def add(self, symbol: str, proposal: str) -> str:
        """As ``Names.add``; what ends in ``_peer`` is reserved for shards that travel."""
        taken = proposal.endswith("_peer")
        return super().add(symbol, f"{proposal}_given" if taken else proposal)


@dataclass
class RingPassText(PassText):
    """Also: what travels, as identifiers at home; each is called ``…_peer`` in the sweep."""

    axis: str = ""
    """"rows" or "cols": the axis whose shards travel."""
    sent: list[str] = field(default_factory=list)
    folds: list[tuple[str, list[str]]] = field(default_factory=list)
    """(how two parts are joined, accumulators) of what is reduced along the side at home."""
    marks_diagonal: bool = False
    extents: tuple[str, str] = ("", "")
    """Tensors whose lengths are the tile grid's."""
    home_axis: str = ""
    """"rows" or "cols": the axis that stays."""
    home_side: int = 0
    """0 where rows stay, 1 where columns do."""
    stays: list[str] = field(default_factory=list)
    """Operands at home, in their order."""
    gains: list[str] = field(default_factory=list)
    """Gradients that are made at home."""
    place: str = ""
    """The index of the tile at home that is needed in this rank's whole shard, too."""
    adds: bool = False
    """To gradients that an earlier pass began."""

    @property
    def shards(self) -> str:
        """What is sent, as a tuple."""
        return tuple_text(self.sent)

    @property
    def peers(self) -> str:
        """What another rank sent, as targets of an assignment."""
        return _targets(self.sent)

    @property
    def homes(self) -> str:
        """What is at home, as targets of an assignment."""
        return _unpacked([*self.stays, *self.gains])

    @property
    def at_home(self) -> str:
        """The axis that stays, with operands and gradients along it."""
        return f"({self.home_axis.upper()}, {tuple_text(self.stays)}, {tuple_text(self.gains)})"

    @property
    def fold_peers(self) -> str:
        """Another rank's accumulators, likewise."""
        return _targets([n for _, group in self.folds for n in group])


class RingPassPrinter(StripPassPrinter):
    """Prints one pass in one mode; columns travel, or rows if only columns get a gradient."""

    transposed = "twice"

    def __init__(
        self,
        program: Program,
        pass_: Pass,
        mode: Mode,
        names: Names,
        name: str,
        cast: bool,
    ) -> None:
        self.travels = 0 if pass_.sides == ("right",) else 1
        self.sent: dict[str, None] = {}
        self.lengths: dict[int, str] = {}
        """Side → something of its length: a grid of ids alone has no operands."""
        super().__init__(program, pass_, mode, names, name, cast)
        self.wide_sums = frozenset()  # they travel as wide as tiles

    # -- names -----------------------------------------------------------------------------------

    def hoisted_name(self, expr: sp.Expr, kind: str, number: int) -> str:
        assert isinstance(self.names, RingNames)
        return self.names.evaluated(expr, kind)

    def vector(self, name: str, dim: int) -> str:
        text = self.hoisted_names.get(name)
        if text is None:
            single = self.plan.ir.is_single_set
            text = (
                ("ids" if single else name) if name in ("row_ids", "col_ids") else self.names(name)
            )
        self.lengths.setdefault(dim, text)
        if dim == self.travels:
            self.sent.setdefault(text)
            text = f"{text}_peer"
        else:
            self.params.setdefault(text)
        c = self.col_index
        return f"{text}[{c}:{c}1]" if dim == 1 else f"{text}[i:i1, None]"

    def at_rows(self, vector: str) -> str:
        return f"{self._at(vector, 0)}[i:i1]"

    def at_cols(self, vector: str) -> str:
        return f"{self._at(vector, 1)}[{self.col_index}:{self.col_index}1]"

    def _at(self, name: str, dim: int) -> str:
        return f"{name}_peer" if dim == self.travels else name

    def _slice(self, operand: str, index: str) -> str:
        dim = 0 if index == "i" else 1
        part = f"{self._at(operand, dim)}[{index}:{index}1]"
        if not self.cast:
            return part
        side, length = (("row", "m"), ("col", "n"))[dim]
        return f"{operand}_{side}_tile[:{length}].copy_({part})"

    def extent(self) -> tuple[str, str]:
        """In positions of this rank's own shard; other shards lie far beyond it."""
        c = self.col_index
        if self.travels == 0:
            return "first + i, first + i1", f"{c}, {c}1"
        return "i, i1", f"first + {c}, first + {c}1"

    # -- text ------------------------------------------------------------------------------------

    def text(self) -> RingPassText:
        p = self.pass_
        self.params, self.sent = {}, {}
        sims = sorted({*p.similarities, *p.gradients})
        sides = [[], []]  # type: tuple[list[str], list[str]] | list[list[str]]
        for op in self.plan.ir.operands:
            for dim in (0, 1):
                if any(self.views(s)[dim].operand == op.name for s in sims):
                    sides[dim].append(op.name)
        at_home, travelling = list(sides[1 - self.travels]), list(sides[self.travels])
        body = self.body(self.code)
        products = [line for g in self.code.gradients for line in self.products.lines(g)]
        own, folds = self._folded()
        for dim, names in enumerate(sides):
            if not names and dim not in self.lengths:
                self.lengths[dim] = operand_along(self.plan, p.grid[dim])
                (travelling if dim == self.travels else at_home).append(self.lengths[dim])
        lengths = [names[0] if names else self.lengths[dim] for dim, names in enumerate(sides)]
        outputs = self._outputs()
        sent = [*travelling, *self.sent]
        marks = any(isinstance(i, Diagonal) for i in self.code.instructions)
        on_positive = any(
            isinstance(i, Diagonal) and i.where == "positive" for i in self.code.instructions
        )
        homely = [o for o in outputs[1 - self.travels] if o not in own]
        fixed = [*at_home, "shard", *(["parts"] if folds or outputs[self.travels] else [])]
        fixed += [*own, *homely]
        fixed += ["first"] if marks or p.symmetric else []
        fixed += ["past"] if p.symmetric else []
        fixed += ["half"] if on_positive and self.plan.positives == "views" else []
        folds += [("SUM", [o]) for o in outputs[self.travels]]
        buffers = sorted(set(self.code.buffers.values()))
        index = ("i", "j")
        slices = [
            [f"{o}_{index[d]} = {self._slice(o, index[d])}" for o in sides[d]] for d in (0, 1)
        ]
        casts = [
            (f"{o}_{('row', 'col')[d]}_tile", ("TILE_M", "TILE_N")[d], o)
            for d in (0, 1)
            for o in sides[d]
            if self.cast
        ]
        text = RingPassText(
            name=self.name,
            doc=self._doc(),
            params=list(dict.fromkeys([*fixed, *self.params])),
            accumulators=self._accumulators(),
            buffers=[(b, "torch.bool" if b.startswith("m") else "DTYPE") for b in buffers],
            row_length="rows",
            col_length="cols",
            row_operands=slices[0],
            col_operands=slices[1],
            casts=casts,
            body=body,
            products=products,
            remake=[],
            symmetric=p.symmetric,
            whole_rows=False,
            slots=False,
            keep="",
            block_width="",
            results=[],
            axis=LENGTH[p.grid[self.travels]],
            sent=sent,
            folds=folds,
            marks_diagonal=marks or p.symmetric,
            extents=(self._at(lengths[0], 0), self._at(lengths[1], 1)),
            home_axis=LENGTH[p.grid[1 - self.travels]],
            home_side=1 - self.travels,
            stays=at_home,
            gains=homely,
        )
        return self.stripped(text)

    def _folded(self) -> tuple[list[str], list[tuple[str, list[str]]]]:
        """Accumulators of the side at home, and of the travelling side with how they join."""
        own: list[str] = []
        folds: dict[tuple[str, ...], str] = {}
        for a in self.code.instructions:
            if isinstance(a, Accumulate):
                targets = [self.names(t) for t in a.targets]
                if 1 - a.dim == self.travels:
                    folds[tuple(targets)] = _FOLDS[a.kind]
                else:
                    own += [t for t in targets if t not in own]
        return own, [(how, list(names)) for names, how in folds.items()]

    def _outputs(self) -> tuple[list[str], list[str]]:
        """Gradients that products of this pass are added to: of rows, of columns."""
        result: tuple[list[str], list[str]] = ([], [])
        for tile in self.code.gradients:
            for dim, (side, view) in enumerate(
                zip(("left", "right"), self.views(tile.similarity), strict=True)
            ):
                needed = view.operand in self.plan.needs and not view.stop
                name = f"d_{view.operand}"
                if needed and side in self.pass_.sides and name not in result[dim]:
                    result[dim].append(name)
        return result

    def _doc(self) -> str:
        first, *rest = super()._doc().split("\n")
        home, other = ("columns", "rows") if self.travels == 0 else ("rows", "columns")
        axes = self.pass_.grid
        how = first.partition(f"{axes[1]} tiles")[2].strip("; ").rstrip(".")
        what = f"Sweep this rank's {home} and the {other} of a shard that is here."
        if self.pass_.symmetric:
            what = f"{what[:-1]}; two shards meet once."
        return "\n".join(
            [what, *([""] * bool(how)), *([f"    {how.capitalize()}."] * bool(how)), *rest]
        )


def _targets(names: list[str]) -> str:
    return _unpacked([f"{n}_peer" for n in names])


def _unpacked(names: list[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else ", ".join(names)


def tuple_text(elements: Iterable[str]) -> str:
    """A tuple of expressions."""
    parts = list(elements)
    return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"


def pass_printer(
    program: Program,
    pass_: Pass,
    mode: Mode,
    names: Names,
    name: str,
    cast: bool,
) -> PassPrinter:
    """The printer of a pass: without peers where a rank has both sides to itself."""
    kind = StripPassPrinter if is_local(pass_.grid) else RingPassPrinter
    return kind(program, pass_, mode, names, name, cast)


__all__ = ["RingNames", "RingPassPrinter", "RingPassText", "pass_printer"]
