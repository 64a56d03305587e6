"""A problem that one tile holds: no loops, no buffers to fill; the first value makes a tile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import sympy as sp

from cl_compiler.codegen.names import Names
from cl_compiler.codegen.pass_text import PassText
from cl_compiler.codegen.passes import PassPrinter
from cl_compiler.codegen.printers import TilePrinter, VectorPrinter
from cl_compiler.codegen.products import ProductPrinter
from cl_compiler.codegen.stages import StagePrinter
from cl_compiler.codegen.symbols import LENGTH, prefixed
from cl_compiler.lang.ir import Leaf, View
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.tile_ir import (
    Accumulate,
    AtPositives,
    Compute,
    Diagonal,
    Gemm,
    GradientTile,
    Mode,
    TileProgram,
    VectorRef,
)
from cl_compiler.lang.whole import inner_of, likelihoods, nll_of, scale_gradients


class WholeStagePrinter(StagePrinter):
    """Prints everything in one function: a pass is a piece of it."""

    def __init__(self, program: Program, names: Names, cast: bool) -> None:
        super().__init__(program, names, cast)
        self.overwritten = _made_by_products(program)
        self.sums = likelihoods(program.plan)
        for lse in self.sums:
            nll = nll_of(lse.name).name
            names.add(nll, names(lse.name).replace("lse", "nll"))
            self.leaves[nll] = Leaf(nll, "adjoint", self.leaves[lse.name].axes)
        read = _read_by_tiles(program)
        self.pass_printer = partial(  # type: ignore[assignment]
            WholePrinter,
            made=set(),
            overwritten=self.overwritten,
            sums={s.name: self.vectors().text(s) for s in self.sums if s.name in read},
        )

    def vectors(self, lookup: Callable[[str], str] | None = None) -> VectorPrinter:
        printer = super().vectors(lookup)
        printer.instead = self.sums
        return printer

    def scale_gradient(self, scale: str) -> list[str]:
        tiles = {
            g.similarity: g for p in self.program.passes for g in p.programs["whole"].gradients
        }
        scales = scale_gradients(self.plan)
        if scale not in scales.values():
            return super().scale_gradient(scale)
        terms = []
        for similarity, tile in tiles.items():
            if scales.get(similarity) == scale:
                inner = self.names(inner_of(similarity))
                factor = self.vectors().text(tile.scale)
                terms.append(inner if tile.scale == 1 else f"{factor} * {inner}")
        return terms


def _read_by_tiles(program: Program) -> frozenset[str]:
    """Vectors that tiles are computed with."""
    return frozenset(
        arg.name
        for pass_ in program.passes
        for i in pass_.programs["whole"].instructions
        if isinstance(i, (Compute, Diagonal))
        for arg in (i.args if isinstance(i, Compute) else [ref for _, ref in i.reads])
        if isinstance(arg, VectorRef)
    )


def _made_by_products(program: Program) -> frozenset[str]:
    """Operands whose gradient's first value is all of one product."""
    first: dict[str, bool] = {}
    for pass_ in program.passes:
        for tile in pass_.programs["whole"].gradients:
            leaf = program.plan.leaves[tile.similarity]
            for side, view in (("left", leaf.left), ("right", leaf.right)):
                if view is not None and side in pass_.sides:
                    first.setdefault(view.operand, not pass_.is_slots and view.prefix is None)
    return frozenset(name for name, complete in first.items() if complete)


class WholePrinter(PassPrinter):
    """Prints one pass.

    ``made``: tiles and gradients that statements so far have made; ``overwritten``: operands whose
    gradient is made by its first product; ``sums``: logsumexps that tiles are computed with, of
    those that are made from a positive's negative log-likelihood: → their text.
    """

    def __init__(
        self,
        program: Program,
        pass_: Pass,
        mode: Mode,
        names: Names,
        name: str,
        cast: bool,
        made: set[str],
        overwritten: frozenset[str],
        sums: Mapping[str, str],
    ) -> None:
        super().__init__(program, pass_, mode, names, name, cast)
        self.sums = sums
        self.products = _WholeProducts(self, made, overwritten)
        self.made = made

    def text(self) -> PassText:
        return PassText(self.name, "", self.body(self.code))

    # -- names -----------------------------------------------------------------------------------

    def vector(self, name: str, dim: int) -> str:
        ids = ("row_ids", "col_ids")
        text = "ids" if name in ids and self.plan.ir.is_single_set else name
        text = text if name in ids else self.symbol(name)
        return text if dim == 1 else f"{text}.unsqueeze(1)"

    def at_rows(self, vector: str) -> str:
        return vector

    at_cols = at_rows

    def row(self, view: View) -> str:
        return prefixed(f"{view.operand}_tile" if self.cast else view.operand, view)

    col = row

    # -- statements ------------------------------------------------------------------------------

    def body(self, code: TileProgram) -> list[str]:
        shape = ", ".join(LENGTH[axis] for axis in self.pass_.grid)
        printer = _WholeTilePrinter(
            code.buffers, self.scalar, self.vector, self.numbers, self.made, shape
        )
        lines: list[str] = []
        for instruction in code.instructions:
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
                    lines += self._fold(printer, instruction)
                case AtPositives(target=target, value=value):
                    taken = self._taken(printer.tile(value), target in self.program.wide)
                    lines.append(f"{self.names(target)} = {taken}")
                case GradientTile():
                    lines += self.products.lines(instruction)
        return lines

    def _fold(self, printer: _WholeTilePrinter, fold: Accumulate) -> list[str]:
        (name,) = fold.targets
        if fold.kind != "log_softmax":
            return [printer.fold(fold, self.names(name), name in self.program.wide)]
        line = f"{self.names(nll_of(name).name)} = {printer.tile(fold.args[0])}.diagonal().neg()"
        return [line, f"{self.names(name)} = {self.sums[name]}"] if name in self.sums else [line]

    def _taken(self, tile: str, wide: bool) -> str:
        """The values at the positives; a copy where the tile will be written over."""
        if self.plan.positives == "views":
            both = f"torch.cat(({tile}.diagonal(half), {tile}.diagonal(-half)))"
            return f"{both}.double()" if wide else both
        if wide:
            return f"{tile}.diagonal().double()"
        again = list(self.code.buffers.values()).count(tile) > 1
        return f"{tile}.diagonal(){'.clone()' if again else ''}"

    def _diagonal(self, printer: TilePrinter, d: Diagonal) -> list[str]:
        *copy, statement = printer.diagonal(d, self._diagonal_text(printer, d))
        if d.where == "positive" and self.plan.positives == "views":
            parts = [
                {"k": "half", "r0:r1": ":half", "q0:q1": "half:"},
                {"k": "-half", "r0:r1": "half:", "q0:q1": ":half"},
            ]
        else:
            parts = [{"k": "", "r0:r1": "", "q0:q1": ":rows" if self._is_wide(d) else ""}]
        return [*copy, *(_placed(statement, part) for part in parts)]

    def _is_wide(self, d: Diagonal) -> bool:
        """Whether there may be more columns than elements on the diagonal."""
        return d.where == "positive" and self.plan.positives == "diagonal"


def _placed(statement: str, part: Mapping[str, str]) -> str:
    """A statement about a diagonal that crosses the tile from one end to the other."""
    statement = statement.replace(".diagonal(k)", f".diagonal({part['k']})")
    for name in ("r0:r1", "q0:q1"):
        statement = statement.replace(f"[{name}]", f"[{part[name]}]" if part[name] else "")
    return statement


class _WholeTilePrinter(TilePrinter):
    """Prints the instructions of a program; the first value of a tile makes it."""

    def __init__(
        self,
        buffers: Mapping[int, str],
        scalar: Callable[[sp.Expr], str],
        vector: Callable[[str, int], str],
        is_python: Callable[[sp.Expr], bool],
        made: set[str],
        shape: str,
    ) -> None:
        super().__init__(buffers, scalar, vector, is_python)
        self.made, self.shape = made, shape

    def compute(self, c: Compute) -> str:
        return self._making(self.tile(c.value), super().compute(c))

    def gemm(self, g: Gemm, left: str, right: str, scale: str | None, slots: bool) -> str:
        out = self.tile(g.value)
        if slots or g.beta == 0:
            return self._making(out, super().gemm(g, left, right, scale, slots))
        product = self.gemm(replace(g, beta=sp.S.Zero), left, right, scale, slots)
        return f"{product}\n{out}.add_({self.number(g.beta)})"

    def diagonal(self, d: Diagonal, text: str) -> list[str]:
        *copy, statement = super().diagonal(d, text)
        out = self.tile(d.value)
        return [*(self._making(out, line) for line in copy), statement]

    def fold(self, a: Accumulate, target: str, wide: bool = False) -> str:
        if a.kind == "softmax":
            logits, weights = (self.tile(value) for value in a.args)
            dtype = ", torch.float64" if wide else ""
            return f"{target} = _lse_of_softmax({logits}, {weights}, {a.dim}{dtype})"
        if a.kind == "sum" and wide:
            return f"{target} = _sum({self.tile(a.args[0])}, {a.dim})"
        if a.kind == "total":
            return f"{target} = {self.tile(a.args[0])}.sum()"
        return super().fold(a, target)

    def _making(self, out: str, text: str) -> str:
        """A statement that writes a tile, as one that makes it where there is none yet."""
        if out in self.made:
            return text
        self.made.add(out)
        first, *rest = text.split("\n")
        dtype = "torch.bool" if out.startswith("m") else "DTYPE"
        if first.endswith(f", out={out})") and first.startswith("torch."):
            first = f"{out} = {first.removesuffix(f', out={out})')})"
        elif first.startswith(f"{out}."):
            first = f"{out} = torch.empty({self.shape}, dtype={dtype}){first.removeprefix(out)}"
        else:
            rest = [first, *rest]
            first = f"{out} = torch.empty({self.shape}, dtype={dtype})"
        return "\n".join([first, *rest])


class _WholeProducts(ProductPrinter):
    """Prints the products of a gradient tile; the first one makes a gradient."""

    def __init__(self, printer: PassPrinter, made: set[str], overwritten: frozenset[str]) -> None:
        super().__init__(printer)
        self.made, self.overwritten = made, overwritten

    def product(self, target: str, view: View, tile: str, operand: str, extra: str) -> str:
        whole = f"d_{view.operand}"
        if view.operand not in self.overwritten or whole in self.made:
            return super().product(target, view, tile, operand, extra)
        self.made.add(whole)
        if not extra:
            return f"{target} = torch.mm({tile}, {operand})"
        unread = self.p.row(view)  # with beta=0 of its first argument only the shape counts
        return f"{target} = torch.addmm({unread}, {tile}, {operand}, beta=0{extra})"


__all__ = ["WholePrinter", "WholeStagePrinter"]
