"""One pass over tiles → the pieces of text that the template arranges into a loop nest."""

from __future__ import annotations

import re
from collections.abc import Iterable

import sympy as sp

from cl_compiler.codegen.layout import wrap
from cl_compiler.codegen.names import Names
from cl_compiler.codegen.pass_text import PassText
from cl_compiler.codegen.printers import TilePrinter, VectorPrinter, number
from cl_compiler.codegen.products import ProductPrinter
from cl_compiler.codegen.row_blocks import block_statistics
from cl_compiler.codegen.symbols import (
    LENGTH,
    PythonNumbers,
    prefixed,
    symbol_table,
)
from cl_compiler.lang.ir import Leaf, Let, View, axes_of
from cl_compiler.lang.lower import inverse_of
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.tile_ir import (
    Accumulate,
    Barrier,
    Compute,
    Diagonal,
    Gemm,
    Instruction,
    Mode,
    Ref,
    TileProgram,
    TileRef,
    VectorRef,
)


class PassPrinter:
    """Prints one pass in one mode."""

    transposed = "j != i"
    """Of a symmetric pass: when a tile stands for its transpose, which is not made."""
    on_device = False
    """Scalars stay tensors, which the host would have to wait for."""
    col_index = "j"
    """What counts columns where instructions are printed."""

    def __init__(
        self,
        program: Program,
        pass_: Pass,
        mode: Mode,
        names: Names,
        name: str,
        cast: bool,
    ) -> None:
        self.program, self.plan, self.pass_, self.mode = program, program.plan, pass_, mode
        self.names, self.name, self.cast = names, name, cast
        self.products = ProductPrinter(self)
        self.code: TileProgram = pass_.programs[mode]
        self.params: dict[str, None] = {}
        self.active = self.code
        self.hoisted_by_code: dict[int, dict[str, str]] = {}
        self.local: set[str] = set()
        self.leaves = dict(self.plan.leaves)
        self.wide_sums = program.wide
        """Of all sums over tiles, those that are added up in fp64."""
        known: dict[sp.Expr, str] = {}
        self.hoisted: list[tuple[str, sp.Expr, str]] = []
        """(identifier, expression, symbol) of what is evaluated before the sweep."""
        prefix = {"rows": "a", "cols": "b"}
        for code in self.codes:
            table = self.hoisted_by_code[id(code)] = {}
            for symbol, (expr, axes) in code.hoisted.items():
                bare = expr.xreplace(
                    {s: sp.Symbol(table[s.name]) for s in expr.free_symbols if s.name in table}
                )
                if bare not in known:
                    kind = prefix.get(axes[0][:4], "v") if axes else "s"
                    known[bare] = self.hoisted_name(bare, kind, len(known))
                    self.hoisted.append((known[bare], expr, symbol))
                table[symbol] = known[bare]
        self._find_local()

    # -- names -----------------------------------------------------------------------------------

    @property
    def codes(self) -> list[TileProgram]:
        """The pass's own program, and the one that remakes a tile that was not kept."""
        return [self.code, *([self.pass_.remake[self.mode]] if self.pass_.remake else [])]

    def hoisted_name(self, expr: sp.Expr, kind: str, number: int) -> str:
        """What is evaluated before this sweep, as the ``number``-th: of rows, columns, …."""
        return self.names.fresh(f"{kind}{number}")

    @property
    def hoisted_names(self) -> dict[str, str]:
        return self.hoisted_by_code[id(self.active)]

    def _find_local(self) -> None:
        """Names that only exist inside a row block: known after this pass's own reductions."""
        if not any(isinstance(i, Barrier) for i in self.code.instructions):
            return
        for red in self.pass_.reductions:
            self.local |= {red.name, inverse_of(red.name).name}
        for node in self.plan.nodes:
            if isinstance(node, Let) and self.plan.levels[node.name] >= self.pass_.level:
                self.local.add(node.name)
        for symbol, (expr, _) in self.code.hoisted.items():
            if any(s.name in self.local for s in expr.free_symbols):
                self.local.add(symbol)

    def symbol(self, name: str) -> str:
        text = self.hoisted_names.get(name) or self.names(name)
        if name in self.local:
            return f"{text}_i"
        self.params.setdefault(text)
        return text

    def scalar(self, expr: sp.Expr) -> str:
        assert isinstance(expr, sp.Symbol), expr
        return self.symbol(expr.name)

    def vector(self, name: str, dim: int) -> str:
        if name in ("row_ids", "col_ids"):
            single = self.plan.ir.is_single_set
            text = "ids" if single else name
            self.params.setdefault(text)
        else:
            text = self.symbol(name)
        if dim == 1:
            return self.at_cols(text)
        return f"{text}[:, None]" if name in self.local else f"{text}[i:i1, None]"

    def at_rows(self, vector: str) -> str:
        """The tile's part of a vector of rows, or of a matrix of them."""
        return f"{vector}[i:i1]"

    def at_cols(self, vector: str) -> str:
        """The tile's part of a vector of columns, or of a matrix of them."""
        p = self.pass_
        c = self.col_index
        return vector if p.whole_rows or p.is_slots else f"{vector}[{c}:{c}1]"

    def whole(self, value: int) -> str:
        """A value as products read it: all of its tile."""
        return self.code.buffers[value]

    def printer(self, names: object, *, block: bool = False) -> VectorPrinter:
        def is_vector(expr: sp.Expr) -> bool:
            return bool(axes_of(expr, self.all_leaves))

        return VectorPrinter(
            names,  # type: ignore[arg-type]
            is_vector,
            self.numbers,
            self.plan.positives,
            block=block,
        )

    @property
    def numbers(self) -> PythonNumbers:
        """Which scalars are Python numbers."""
        return PythonNumbers(self.plan, self.active.hoisted)

    @property
    def all_leaves(self) -> dict[str, Leaf]:
        table = symbol_table(self.plan)
        for symbol, (_, axes) in self.active.hoisted.items():
            table[symbol] = Leaf(symbol, "adjoint", axes)
        return table

    # -- operands --------------------------------------------------------------------------------

    def views(self, sim: str) -> tuple[View, View]:
        leaf = self.plan.leaves[sim]
        assert leaf.left is not None and leaf.right is not None
        return leaf.left, leaf.right

    def row(self, view: View) -> str:
        return prefixed(f"{view.operand}_i", view)

    def col(self, view: View) -> str:
        p = self.pass_
        if p.whole_rows and not p.is_slots and not self.cast:
            return prefixed(view.operand, view)
        return prefixed(f"{view.operand}_i" if p.is_slots else f"{view.operand}_j", view)

    # -- text ------------------------------------------------------------------------------------

    def text(self) -> PassText:
        p = self.pass_
        self.params = {}
        sims = sorted({*p.similarities, *p.gradients})
        lefts = {self.views(s)[0].operand for s in sims}
        rights = {self.views(s)[1].operand for s in sims}
        operands = [op.name for op in self.plan.ir.operands if op.name in lefts | rights]
        accumulators = self._accumulators()
        remake = self.body(p.remake[self.mode]) if p.keep == "read" else []
        body = self.body(self.code)
        widths = self.products.block_widths()
        products = [line for g in self.code.gradients for line in self.products.lines(g)]
        outputs = sorted({f"d_{o}" for g in p.gradients for o in self.grad_operands(g)})
        fixed = [*operands, *outputs, *(["store"] if p.keep else [])]
        lengths = [LENGTH[p.grid[0]], LENGTH[p.grid[1]]]
        if any(isinstance(i, Diagonal) and i.where == "positive" for i in self.code.instructions):
            lengths.append("half") if self.plan.positives == "views" else None
        extra = [n for n in self.params if n not in fixed]
        buffers = sorted({b for b in self.code.buffers.values() if b != "kept"})
        if p.keep == "read":
            buffers = sorted(
                {*buffers, *(b for b in p.remake[self.mode].buffers.values() if b != "kept")}
            )
        row_ops = [
            f"{o}_i = " + self._slice(o, "i")
            for o in operands
            if o in lefts or (p.is_slots and o in rights)
        ]
        col_ops = (
            []
            if p.is_slots
            else [
                f"{o}_j = " + self._slice(o, "j")
                for o in operands
                if o in rights and not (p.whole_rows and not self.cast)
            ]
        )
        casts = []
        if self.cast:
            casts = [(f"{o}_row_tile", "TILE_M", o) for o in operands if o in lefts or p.is_slots]
            if not p.is_slots:
                length = "cols" if p.whole_rows else "TILE_N"
                casts += [(f"{o}_col_tile", length, o) for o in operands if o in rights]
        return PassText(
            name=self.name,
            doc=self._doc(),
            params=[*fixed, *dict.fromkeys([*lengths, *extra])],
            accumulators=accumulators,
            buffers=[(b, "torch.bool" if b.startswith("m") else "DTYPE") for b in buffers],
            row_length=lengths[0],
            col_length=lengths[1],
            row_operands=row_ops,
            col_operands=col_ops,
            casts=casts,
            body=body,
            products=products,
            remake=remake,
            symmetric=p.symmetric,
            whole_rows=p.whole_rows,
            slots=p.is_slots,
            keep=p.keep,
            block_width=f"max({', '.join(widths)})" if len(widths) > 1 else "".join(widths),
            results=self._targets(),
        )

    def _doc(self) -> str:
        p = self.pass_
        what = []
        if p.reductions:
            what += [f"{self.names(r.name)}: {r.monoid} over {r.over}" for r in p.reductions]
        for g in p.gradients:
            outs = ", ".join(f"d_{o}" for o in self.grad_operands(g))
            what.append(f"{outs}: plus the products with the gradient tile of {g}")
        how = {
            "bounded": "; one exponential, shifted by a bound of the logits",
            "running": "; running maxima, safe for any logits",
            "plain": "",
        }[self.mode]
        half = "upper " if p.symmetric else ""
        first = f"Sweep the {half}{p.grid[0]} by {p.grid[1]} tiles{how}."
        lines = [line for w in what for line in wrap(w, 4).split("\n")]
        return "\n    ".join([first, "", *lines, ""]).replace("\n    \n", "\n\n")

    def _slice(self, operand: str, index: str) -> str:
        if not self.cast:
            return f"{operand}[{index}:{index}1]"
        side = "row" if index == "i" else "col"
        length = "m" if index == "i" else ("cols" if self.pass_.whole_rows else "n")
        stop = f"{operand}[{index}:{index}1]"
        if index == "j" and self.pass_.whole_rows:
            stop = operand
        return f"{operand}_{side}_tile[:{length}].copy_({stop})"

    def _accumulators(self) -> list[tuple[str, str, str, str]]:
        result, seen = [], set()
        for a in self.code.instructions:
            if not isinstance(a, Accumulate):
                continue
            for target in a.targets:
                if target in seen or a.mirrored:
                    continue
                seen.add(target)
                start = "-math.inf" if a.kind == "max" or target.startswith("max_") else "0.0"
                axis = LENGTH[self.pass_.grid[1 - a.dim]]
                dtype = "torch.float64" if target in self.wide_sums else "DTYPE"
                result.append((self.names(target), axis, start, dtype))
        return result

    def _targets(self) -> list[str]:
        found = {
            self.names(target): None
            for a in self.code.instructions
            if isinstance(a, Accumulate) and not a.mirrored
            for target in a.targets
        }
        return list(found)

    def tile_printer(self, code: TileProgram) -> TilePrinter:
        return TilePrinter(code.buffers, self.scalar, self.vector, self.numbers, self.on_device)

    def body(self, code: TileProgram) -> list[str]:
        return self.lines(code, code.instructions)

    def lines(self, code: TileProgram, instructions: Iterable[Instruction]) -> list[str]:
        """Some of the instructions of a program."""
        self.active = code
        printer = self.tile_printer(code)
        lines: list[str] = []
        for instruction in instructions:
            match instruction:
                case Gemm(similarity=sim):
                    left, right = self.views(sim)
                    scale = self.plan.leaves[sim].scale
                    text = None if scale is None else self.symbol(scale)
                    lines += printer.gemm(
                        instruction, self.row(left), self.col(right), text, self.pass_.is_slots
                    ).split("\n")
                case Compute():
                    lines += printer.compute(instruction).split("\n")
                case Diagonal():
                    lines += self._diagonal(printer, instruction)
                case Accumulate():
                    lines += self._accumulate(printer, instruction)
                case Barrier():
                    lines += block_statistics(self, code)
        return lines

    def _accumulate(self, printer: TilePrinter, a: Accumulate) -> list[str]:
        where = self.at_rows if a.dim == 1 else self.at_cols
        targets = tuple(where(self.names(t)) for t in a.targets)
        statement = printer.accumulate(a, targets)
        return [f"if {self.transposed}:", f"    {statement}"] if a.mirrored else [statement]

    def _diagonal(self, printer: TilePrinter, d: Diagonal) -> list[str]:
        if d.where == "self":
            offsets = "(0,)"
        else:
            offsets = "(half, -half)" if self.plan.positives == "views" else "(0,)"
        *copy, statement = printer.diagonal(d, self._diagonal_text(printer, d))
        block, span = self.extent()
        used = [
            n if re.search(rf"\b{n}\b", statement) else "_" for n in ("k", "r0", "r1", "q0", "q1")
        ]
        loop = f"for {', '.join(used)} in _crossings({block}, {span}, {offsets}):"
        return [*copy, loop, f"    {statement}"]

    def _diagonal_text(self, printer: TilePrinter, d: Diagonal) -> str:
        """What is added to, or put on, diagonal k of a tile: its rows r0:r1, its columns q0:q1."""
        if d.how == "add" and d.expr.is_number:
            text = number(d.expr)
        elif d.how == "add":
            assert isinstance(d.expr, sp.Symbol)
            name = d.expr.name
            if not axes_of(d.expr, self.all_leaves):
                text = self.symbol(name)
                text = text if self.numbers(d.expr) else f"{text}.to(DTYPE)"
            elif name in self.local:
                text = f"{self.symbol(name)}[r0 - i : r1 - i]"
            else:
                text = f"{self.symbol(name)}[r0:r1]"
        else:
            marks = {s.name: r for s, r in d.reads}
            vectors = self.printer(lambda n: self._on_diagonal(printer, marks, n))
            table = self.all_leaves | {m: Leaf(m, "adjoint", ("rows",)) for m in marks}
            vectors.is_vector = lambda e: bool(axes_of(e, table))
            text = vectors.text(d.expr)
            if not d.reads and d.how == "set":
                text = f"torch.as_tensor({text}, dtype=DTYPE)"
        return text

    def extent(self) -> tuple[str, str]:
        """The tile's first and last row, and its first and last column."""
        if self.pass_.whole_rows:
            return "i, i1", f"0, {LENGTH[self.pass_.grid[1]]}"
        return "i, i1", f"{self.col_index}, {self.col_index}1"

    def _on_diagonal(self, printer: TilePrinter, marks: dict[str, Ref], name: str) -> str:
        ref = marks.get(name)
        match ref:
            case TileRef(value=value):
                return f"{printer.tile(value)}.diagonal(k)"
            case VectorRef(name=vector, dim=dim):
                text = self.symbol(vector)
                if vector in self.local:
                    return f"{text}[r0 - i : r1 - i]"
                return f"{text}[r0:r1]" if dim == 0 else f"{text}[q0:q1]"
            case None:
                return self.symbol(name)
            case _:
                return printer.ref(ref)

    # -- gradients -------------------------------------------------------------------------------

    def grad_operands(self, sim: str) -> list[str]:
        left, right = self.views(sim)
        result = []
        for side, view in (("left", left), ("right", right)):
            needed = view.operand in self.plan.needs and not view.stop
            if side in self.pass_.sides and needed and view.operand not in result:
                result.append(view.operand)
        return result
