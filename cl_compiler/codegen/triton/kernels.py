"""One pass over tiles in one mode → the text of a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import sympy as sp

from cl_compiler.codegen.layout import wrap
from cl_compiler.codegen.names import Names
from cl_compiler.codegen.printers import VectorPrinter, bare
from cl_compiler.codegen.symbols import symbol_table
from cl_compiler.codegen.triton.core import Columns, CoreTile
from cl_compiler.codegen.triton.eight_bits import EightBitCopy
from cl_compiler.codegen.triton.expressions import (
    Affine,
    DiagonalPrinter,
    Expressions,
    number,
)
from cl_compiler.codegen.triton.expressions import Names as KernelNames
from cl_compiler.codegen.triton.gradients import GradientPrinter
from cl_compiler.codegen.triton.order import diagonals_together, goes_on
from cl_compiler.codegen.triton.orientation import Orientation
from cl_compiler.codegen.triton.text import KernelText, Partial
from cl_compiler.codegen.triton.vectors import DeviceNumbers
from cl_compiler.lang.ir import Leaf, View
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.tile_ir import (
    Accumulate,
    Compute,
    Diagonal,
    Gemm,
    Instruction,
    Mode,
    Ref,
    ScalarRef,
    TileProgram,
    TileRef,
    VectorRef,
)

IDENTITY = {"sum": "0.0", "max": 'float("-inf")', "logsumexp": 'float("-inf")'}
IDENTITY["softmean"] = IDENTITY["logsumexp"]
LOCALS = frozenset(
    {"i", "j", "k", "g", "tl", "tile", "first", "strip", "column", "offs_m", "offs_n", "offs_d"}
    | {"scalars", "unsafe", "row_start", "row_stop", "col_start", "col_stop", "strip_tiles"}
    | {
        "at_edge",
        "inside",
        "row_slot",
        "col_slot",
        "g_slot",
        "g_width",
        "products",
        "half",
        "ahead",
    }
    | {"BLOCK_M", "BLOCK_N", "BLOCK_D", "ROW_WARPS", "RAGGED", "LOG2E", "D"}
)
"""What kernels call their own things."""


class KernelPrinter(GradientPrinter):
    """Prints one pass in one mode."""

    orientation = Orientation()
    kind: type[KernelText] = KernelText
    copies: Mapping[str, EightBitCopy] = {}
    """Operand → the copy that similarities are made of, if not the operand itself."""

    def __init__(
        self,
        program: Program,
        pass_: Pass,
        mode: Mode,
        names: Names,
        name: str,
        tile: CoreTile,
        descriptors: bool,
        columns: Columns,
    ) -> None:
        self.program, self.plan, self.pass_, self.mode = program, program.plan, pass_, mode
        self.names, self.name, self.tile = names, name, tile
        self.columns = columns
        self.code: TileProgram = pass_.programs[mode]
        self.descriptors = descriptors and bool(self.code.gemms or self.code.kept is not None)
        """A kernel that reads neither operands nor kept tiles has no use of them."""
        self.hoisted: list[tuple[str, sp.Expr]] = []
        """(identifier, expression) of what is evaluated before the sweep."""
        self.table: dict[str, str] = {}
        self._name_hoisted()
        self.is_python = DeviceNumbers(self.plan, self.code.hoisted)
        self.scalars: dict[str, tuple[str, bool]] = {}
        """Variable → host text, and whether that is a Python number."""
        self.vectors: dict[tuple[str, int, bool], str] = {}
        self.dots: dict[int, str] = {}
        self.masked: set[tuple[str, str]] = set()
        """(variable, value) of tiles that hold that value beyond the edge already."""

    def _name_hoisted(self) -> None:
        known: dict[sp.Expr, str] = {}
        prefix = {"rows": "a", "cols": "b"}
        for symbol, (expr, axes) in self.code.hoisted.items():
            plain = expr.xreplace(
                {
                    s: sp.Symbol(self.table[s.name])
                    for s in expr.free_symbols
                    if s.name in self.table
                }
            )
            if plain not in known:
                kind = prefix.get(axes[0][:4], "v") if axes else "s"
                known[plain] = self.names.fresh(f"{kind}{len(known)}")
                self.hoisted.append((known[plain], expr))
            self.table[symbol] = known[plain]

    @property
    def leaves(self) -> dict[str, Leaf]:
        table = symbol_table(self.plan)
        for symbol, (_, axes) in self.code.hoisted.items():
            table[symbol] = Leaf(symbol, "adjoint", axes)
        return table

    def symbol(self, name: str) -> str:
        """What the host calls a symbol."""
        return self.table.get(name) or self.names(name)

    # -- what a tile reads -----------------------------------------------------------------------

    def scalar(self, factors: list[sp.Expr], log2e: bool = False) -> str:
        """The kernel's variable for a product of scalars."""
        printer = VectorPrinter(self.symbol, lambda _: False, self.is_python, self.plan.positives)
        texts = [printer.text(f) for f in factors]
        host = " * ".join(t if t.isidentifier() else f"({t})" for t in texts)
        host = f"{host} * LOG2_E" if log2e else host
        for variable, (known, _) in self.scalars.items():
            if known == host:
                return variable
        named = all(t.isidentifier() for t in texts)
        base = "_".join(texts) if named else f"factor{len(self.scalars)}"
        base = f"{base}_log2" if log2e else base
        variable = f"{base}_" if base in LOCALS else base
        self.scalars[variable] = host, all(self.is_python(f) for f in factors)
        return variable

    def vector(self, name: str, dim: int, log2e: bool) -> str:
        text = self._ids(dim) if name in ("row_ids", "col_ids") else self.symbol(name)
        variable = f"{text}_{'log2_' if log2e else ''}{'ij'[dim]}"
        self.vectors[text, dim, log2e] = variable
        return variable

    def _ids(self, dim: int) -> str:
        return "ids" if self.plan.ir.is_single_set else ("row_ids", "col_ids")[dim]

    def views(self, similarity: str) -> tuple[View, View]:
        left, right = super().views(similarity)
        return self._read(left), self._read(right)

    def _read(self, view: View) -> View:
        copy = self.copies.get(view.operand)
        return view if copy is None else replace(view, operand=copy.copy)

    def _units(self, similarity: str) -> list[sp.Expr]:
        """What products of copies are multiplied by to be those of the operands."""
        units = [self.copies[v.operand].unit for v in super().views(similarity) if self.copies]
        self.table.update({u: u for u in units})
        return [sp.Symbol(u, real=True) for u in units]

    def gemm(self, g: Gemm, log2e: bool) -> Affine:
        leaf = self.plan.leaves[g.similarity]
        factors = [] if leaf.scale is None else [sp.Symbol(leaf.scale, real=True)]
        factors += self._units(g.similarity)
        factors += [g.alpha] if g.alpha != 1 else []
        alpha = self.scalar(factors, log2e) if factors else ("LOG2E" if log2e else "")
        beta = self.scalar([g.beta], log2e) if g.beta != 0 else ""
        return Affine(self.dots[g.value], alpha, beta)

    # -- text ------------------------------------------------------------------------------------

    def text(self, widths: dict[str, int], precision: str) -> KernelText:
        """The kernel; ``widths``: columns of each operand; ``precision``: of fp32 products."""
        sims = [i.similarity for i in self.code.instructions if isinstance(i, Gemm)]
        views = [v for s in sims for v in self.views(s)]
        k = self.kind(
            self.name, self._doc(), self.mode, self.tile, _unique(v.operand for v in views)
        )
        for n, i in enumerate(i for i in self.code.instructions if isinstance(i, Gemm)):
            self.dots[i.value] = "products" if len(sims) == 1 else f"products_{n}"
        names = KernelNames(
            lambda e, log2e: self.scalar([e], log2e),
            self.vector,
            self.gemm,
            lambda: " == ".join(
                self.orientation.along(self.vector(ids, dim, False), dim)
                for dim, ids in enumerate(("row_ids", "col_ids"))
            ),
        )
        self.expressions = Expressions(self.code, names, self.orientation)
        self.widths, self.precision = widths, precision
        for instruction in self._ordered():
            self._print(k, instruction)
        for g in self.code.gradients:
            self._gradient(k, g.value, g.similarity, g.scale)
        self._declare(k)
        return k

    def _ordered(self) -> list[Instruction]:
        """The product first: what is made before it would hold registers through its loop."""
        code = list(self.code.instructions)
        gemms = [i for i in code if isinstance(i, Gemm)]
        if len(gemms) == 1:
            code = [*gemms, *(i for i in code if i is not gemms[0])]
        return diagonals_together(code)

    def _declare(self, k: KernelText) -> None:
        if not self.descriptors:
            k.pointers_to = k.operands
            k.widths = [(self._width(o), self.widths[o]) for o in k.operands]
            k.widths = list(dict.fromkeys(k.widths))
        k.scalars = [(name, host) for name, (host, python) in self.scalars.items() if not python]
        k.numbers = [(name, host) for name, (host, python) in self.scalars.items() if python]
        for (text, dim, log2e), variable in self.vectors.items():
            pointer = f"{text}_log2" if log2e else text
            host = f"({text} * LOG2_E)" if log2e else text
            (k.row_vectors, k.col_vectors)[dim].append((variable, pointer))
            if (pointer, host) not in k.pointers:
                k.pointers.append((pointer, host))

    def _doc(self) -> str:
        p = self.pass_
        how = {
            "bounded": "; one exponential, shifted by a bound of the logits",
            "running": "; maxima first, safe for any logits",
            "plain": "",
        }[self.mode]
        lines = [f"Tiles of {p.grid[0]} by {p.grid[1]}{how}.", ""]
        what = [f"{self.names(r.name)}: {r.monoid} over {r.over}" for r in p.reductions]
        what += self._doc_of_gradients()
        lines += [line for w in what for line in wrap(w, 4).split("\n")]
        return "\n    ".join([*lines, ""]).replace("\n    \n", "\n\n")

    def _doc_of_gradients(self) -> list[str]:
        gradients = self.pass_.gradients
        return [f"g_{g}: dL/d{g}, times what all of it is scaled by" for g in gradients]

    # -- statements ------------------------------------------------------------------------------

    def _print(self, k: KernelText, instruction: Instruction) -> None:
        e = self.expressions
        match instruction:
            case Gemm():
                k.body += self._products(k, instruction)
                if e.needs_variable(instruction):
                    text = self.gemm(instruction, False).text.text
                    variable = instruction.similarity
                    variable = f"{variable}_" if variable in LOCALS else variable
                    if text != self.dots[instruction.value]:
                        k.body.append(f"{variable} = {text}")
                        text = variable
                    e.variables[instruction.value] = text
            case Compute() if e.needs_variable(instruction):
                text = bare(e.compute(instruction).text)
                e.variables[instruction.value] = variable = self._variable(instruction)
                k.body.append(f"{variable} = {text}")
            case Diagonal():
                k.body += self._diagonal(k, instruction)
            case Accumulate():
                self._accumulate(k, instruction)

    def _variable(self, instruction: Compute | Diagonal) -> str:
        value = instruction.value
        for d in self.code.instructions:  # what becomes a gradient in place has its name at once
            if isinstance(d, Diagonal) and d.base == value and self.expressions.uses[value] == 1:
                value = d.value
        gradients = [g.value for g in self.code.gradients]
        if value in gradients and not instruction.is_mask:
            return f"g{gradients.index(value) or ''}"
        return f"{'m' if instruction.is_mask else 't'}{instruction.value}"

    def _diagonal(self, k: KernelText, d: Diagonal) -> list[str]:
        e = self.expressions
        base = e.variables[d.base]
        if e.uses[d.base] == 1 and base != "products":
            variable, lines = base, []
        else:
            variable = self._variable(d)
            lines = [f"{variable} = {base}"]
        e.variables[d.value] = variable
        offsets = self._offsets(k, d.where)
        touched = " | ".join(f"_crosses(i, j, {o}, BLOCK_M, BLOCK_N)" for o in offsets)
        at = f"{self.orientation.along('offs_n', 1)} == {self.orientation.along('offs_m', 0)}"
        on = " | ".join(f"({at}{'' if o == '0' else f' + {o}'})" for o in offsets)
        on = on.replace("+ -", "- ")
        name = f"on_{d.where}"
        match d.how:
            case "negate":
                new = f"tl.where({name}, -{variable}, {variable})"
            case "fill" if d.is_mask:
                new = f"{variable} | {name}" if d.expr else f"{variable} & ~{name}"
            case "fill":
                new = f"tl.where({name}, {number(d.expr)}, {variable})"
            case "add":
                if d.expr.is_number:
                    extra = number(d.expr)
                elif self.leaves[str(d.expr)].axes:
                    extra = self.orientation.along(self.vector(str(d.expr), 0, False), 0)
                else:
                    extra = self.scalar([d.expr])
                new = f"tl.where({name}, {variable} + {extra}, {variable})"
            case _:
                texts = {s.name: self._on_diagonal(r) for s, r in d.reads}
                printer = DiagonalPrinter(texts, lambda s, log2e: self.scalar([s], log2e))
                new = f"tl.where({name}, {printer.text(d.expr)}, {variable})"
        block = [f"if {touched}:", f"    {name} = {bare(on)}"]
        if not lines and goes_on(k.body, block):
            block = []
        return [*lines, *block, f"    {variable} = {new}"]

    def _on_diagonal(self, ref: Ref) -> str:
        match ref:
            case TileRef(value=value):
                return self.expressions.variables[value]
            case VectorRef(name=name, dim=dim):
                return self.orientation.along(self.vector(name, dim, False), dim)
            case ScalarRef(expr=expr):
                return number(expr) if expr.is_number else self.scalar([expr])

    def _accumulate(self, k: KernelText, a: Accumulate) -> None:
        e = self.expressions
        tiles = [e.variables[v] for v in a.args]
        inside = self._inside(k, a)
        tiles[0] = inside
        side = "tiles" if a.dim == 1 else "strips"
        pointers = tuple(f"{self.names(t)}_{side}" for t in a.targets)
        targets = tuple(self.names(t) for t in a.targets)
        k.partials.append(Partial(a.kind, pointers, targets, a.dim, a.mirrored))
        values = [f"{t}_part" for t in targets]
        match a.kind:
            case "sum":
                fold = f"tl.sum({tiles[0]}, 1)"
            case "max":
                fold = f"_largest({tiles[0]}, {a.dim})"
            case _:
                fold = f"_{a.kind}({', '.join(tiles)}, {a.dim})"
        if a.dim == 1:
            k.body.append(f"{', '.join(values)} = {fold}")
            k.body += [
                f"tl.store({p} + row_slot, {v}, mask=offs_m < row_stop)"
                for p, v in zip(pointers, values, strict=True)
            ]
            return
        running = [f"{t}_j" for t in targets]
        match a.kind:
            case "sum":
                shape, part = {
                    "fold": ("8 * ROW_WARPS, BLOCK_N", f"_fold({tiles[0]}, ROW_WARPS)"),
                    "whole": ("BLOCK_M, BLOCK_N", tiles[0]),
                    "reduce": ("BLOCK_N", f"tl.sum({tiles[0]}, 0)"),
                }[self.columns]
                k.start.append(f"{running[0]} = tl.zeros([{shape}], tl.float32)")
                k.body.append(f"{running[0]} += {part}")
                if self.columns != "reduce":
                    k.finish.append(f"{running[0]} = tl.sum({running[0]}, 0)")
            case "max":
                k.start.append(f'{running[0]} = tl.full([BLOCK_N], float("-inf"), tl.float32)')
                k.body.append(f"{running[0]} = _maximum({running[0]}, {fold})")
            case _:
                k.start.append(f'{running[0]} = tl.full([BLOCK_N], float("-inf"), tl.float32)')
                k.start += [f"{r} = tl.zeros([BLOCK_N], tl.float32)" for r in running[1:]]
                k.body.append(f"{', '.join(values)} = {fold}")
                k.body.append(
                    f"{', '.join(running)} = _merge_{a.kind}({', '.join([*running, *values])})"
                )
        k.finish += [
            f"tl.store({p} + col_slot, {r}, mask=offs_n < col_stop)"
            for p, r in zip(pointers, running, strict=True)
        ]

    def _inside(self, k: KernelText, a: Accumulate) -> str:
        """A variable that holds the statistic's identity beyond the edge."""
        value, identity = a.args[0], IDENTITY[a.kind]
        variable = self.expressions.variables[value]
        alike = [
            b
            for b in self.code.instructions
            if isinstance(b, Accumulate) and b.args[0] == value and IDENTITY[b.kind] == identity
        ]
        alone = variable != "products" and self.expressions.uses[value] == len(alike)
        inside = variable if alone else f"{variable}_inside"
        if (inside, identity) not in self.masked:
            self.masked.add((inside, identity))
            k.body += [] if alone else [f"{inside} = {variable}"]
            k.body.append("if RAGGED and at_edge:")
            k.body.append(f"    {inside} = tl.where(inside, {inside}, {identity})")
        return inside


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
