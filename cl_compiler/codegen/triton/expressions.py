"""Tile instructions and SymPy expressions → Triton expressions on tiles in registers.

Values that are read once are written where they are read, so that a tile's mathematics stands in
one line; the compiler schedules it as it likes.  Exponentials are base 2 with log2(e) folded into
whatever scales or shifts their argument, which leaves one FMA and one EX2 for each logit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy as sp
from sympy.printing.str import StrPrinter

from cl_compiler.codegen.printers import spaced
from cl_compiler.codegen.triton.orientation import Orientation
from cl_compiler.lang.rewrite import expand_function
from cl_compiler.lang.tile_ir import (
    Accumulate,
    Compute,
    Diagonal,
    Gemm,
    Ref,
    ScalarRef,
    TileProgram,
    TileRef,
    VectorRef,
)

LOG2E = 1.4426950408889634
LONGEST = 64
"""Characters of an expression that is still written where it is read."""

_FUNCTIONS = {
    "exp": "_exp",
    "log": "tl.log",
    "sigmoid": "_sigmoid",
    "softplus": "_softplus",
    "relu": "_relu",
    "abs": "tl.abs",
    "absolute": "tl.abs",
    "expm1": "_expm1",
    "sqrt": "tl.sqrt",
    "maximum": "_maximum",
    "logaddexp": "_logaddexp",
    "pow": "_power",
}
_COMPARISONS = {"gt": ">", "ge": ">=", "eq": "=="}
_INFIX = {"add": ("+", 1), "mul": ("*", 2), "div": ("/", 2), "and": ("&", 2), "or": ("|", 1)}


@dataclass(frozen=True)
class Text:
    """An expression and how tightly its outermost operator binds (3: an atom or a call)."""

    text: str
    binds: int = 3

    def inside(self, binds: int) -> str:
        """As an operand of an operator that binds as tightly as ``binds``."""
        return self.text if self.binds > binds else f"({self.text})"


@dataclass(frozen=True)
class Affine:
    """``alpha · dots + beta``: a similarity as the factors of one FMA; "" where there is none."""

    dots: str
    alpha: str
    beta: str

    @property
    def text(self) -> Text:
        if self.beta:
            return Text(f"_fma({self.dots}, {self.alpha or '1.0'}, {self.beta})")
        return Text(f"{self.dots} * {self.alpha}", 2) if self.alpha else Text(self.dots)


@dataclass(frozen=True)
class Names:
    """What a kernel calls the things that a tile program reads.

    ``scalar(expr, log2e)`` and ``vector(name, dim, log2e)`` name a loaded value, the flag asking
    for it times log2(e); ``gemm(g, log2e)`` gives a product's factors.
    """

    scalar: Callable[[sp.Expr, bool], str]
    vector: Callable[[str, int, bool], str]
    gemm: Callable[[Gemm, bool], Affine]
    positives: Callable[[], str]


class Expressions:
    """The values of one tile program as Triton text."""

    def __init__(self, code: TileProgram, names: Names, orientation: Orientation) -> None:
        self.code, self.names, self.orientation = code, names, orientation
        self.made = {
            i.value: i for i in code.instructions if isinstance(i, (Gemm, Compute, Diagonal))
        }
        self.is_mask = {v for v, i in self.made.items() if not isinstance(i, Gemm) and i.is_mask}
        self.variables: dict[int, str] = {}
        self.uses: Counter[int] = Counter()
        self.kept: set[int] = set()
        """Values that need a variable: statements read them."""
        for i in code.instructions:
            read = (
                [a.value for a in i.args if isinstance(a, TileRef)]
                if isinstance(i, Compute)
                else []
            )
            if isinstance(i, Diagonal):
                self.kept |= {i.base, *(r.value for _, r in i.reads if isinstance(r, TileRef))}
                read = [i.base, *(r.value for _, r in i.reads if isinstance(r, TileRef))]
            if isinstance(i, Accumulate):
                self.kept.update(i.args)
                read = list(i.args)
            if isinstance(i, Compute) and i.op == "square":
                self.kept |= set(read)
            self.uses.update(read)
        self.kept |= {g.value for g in code.gradients}
        self.uses.update(g.value for g in code.gradients)

    # -- values ----------------------------------------------------------------------------------

    def value(self, value: int) -> Text:
        """A tile value: its variable, or its expression."""
        if value in self.variables:
            return Text(self.variables[value])
        instruction = self.made[value]
        if isinstance(instruction, Gemm):
            return self.names.gemm(instruction, False).text
        assert isinstance(instruction, Compute), instruction
        return self.compute(instruction)

    def needs_variable(self, instruction: Compute | Gemm) -> bool:
        """Whether a value is read by statements, more than once, or is too long to repeat."""
        value = instruction.value
        if isinstance(instruction, Gemm):
            return value in self.kept or self._natural_uses(value) > 1
        if value in self.kept:
            return True
        if self._folded_into_exponentials(value):
            return False
        return self.uses[value] > 1 or len(self.compute(instruction).text) > LONGEST

    def _natural_uses(self, value: int) -> int:
        """Reads of a similarity other than as the argument of an exponential."""
        count = 0
        for i in self.made.values():
            if isinstance(i, Compute) and TileRef(value) in i.args and i.op != "exp":
                count += not self._folded_into_exponentials(i.value)
        return count

    def _folded_into_exponentials(self, value: int) -> bool:
        """A similarity plus a vector or scalar that only exponentials read: a part of their FMA."""
        i = self.made[value]
        if not (isinstance(i, Compute) and i.op == "add") or value in self.kept:
            return False
        tiles = [a for a in i.args if isinstance(a, TileRef)]
        readers = [
            c for c in self.made.values() if isinstance(c, Compute) and TileRef(value) in c.args
        ]
        return len(tiles) == 1 and bool(readers) and all(c.op == "exp" for c in readers)

    def ref(self, ref: Ref) -> Text:
        match ref:
            case TileRef(value=value):
                return self.value(value)
            case VectorRef(name=name, dim=dim):
                return Text(self.orientation.along(self.names.vector(name, dim, False), dim))
            case ScalarRef(expr=expr):
                return Text(number(expr) if expr.is_number else self.names.scalar(expr, False))

    def mask(self, ref: Ref) -> Text:
        """A reference as a condition; vectors and numbers hold 0 and 1."""
        match ref:
            case TileRef(value=value) if value in self.is_mask:
                return self.value(value)
            case ScalarRef(expr=expr) if expr.is_number:
                return Text(f"tl.full({self.orientation.shape}, {bool(expr)}, tl.int1)")
            case VectorRef(name=name, dim=dim):
                vector = self.names.vector(name, dim, False)
                return Text(self.orientation.along(f"({vector} != 0.0)", dim))
            case _:
                return Text(f"{self.ref(ref).inside(0)} != 0.0", 0)

    # -- instructions ----------------------------------------------------------------------------

    def compute(self, c: Compute) -> Text:
        match c.op:
            case "exp":
                return self.exponential(c.args[0])
            case "add" if self._is_fma(c):
                tile, other = c.args if isinstance(c.args[0], TileRef) else c.args[::-1]
                return self._sum(tile, other)
            case "add" | "mul" | "div":
                sign, binds = _INFIX[c.op]
                left, right = (self.ref(a) for a in c.args)
                return Text(f"{left.inside(binds - 1)} {sign} {right.inside(binds)}", binds)
            case "neg":
                return Text(f"-{self.ref(c.args[0]).inside(2)}", 2)
            case "square":
                text = self.ref(c.args[0]).inside(2)
                return Text(f"{text} * {text}", 2)
            case "gt" | "ge" | "eq":
                operands = [self.ref(a).inside(0) for a in c.args]
                return Text(f" {_COMPARISONS[c.op]} ".join(operands), 0)
            case "and" | "or":
                sign, binds = _INFIX[c.op]
                operands = [self.mask(a).inside(binds) for a in c.args]
                return Text(f" {sign} ".join(operands), binds)
            case "not":
                return Text(f"~{self.mask(c.args[0]).inside(2)}", 2)
            case "from_mask":
                return Text(f"{self.mask(c.args[0]).inside(2)}.to(tl.float32)")
            case "mask_copy" | "mask_fill":
                return Text(self._filled(self.mask(c.args[0])))
            case "fill":
                return Text(self._filled(self.ref(c.args[0])))
            case "fill_where":
                base, mask, value = c.args
                return self._where(mask, self.ref(value), self.ref(base))
            case "where":
                mask, a, b = c.args
                return self._where(mask, self.ref(a), self.ref(b))
            case "positive_tile":
                return Text(self.names.positives(), 0)
            case _:
                args = ", ".join(self.ref(a).text for a in c.args)
                return Text(f"{_FUNCTIONS[c.op]}({args})")

    def _filled(self, text: Text) -> str:
        """A tile of one number, or of a vector repeated."""
        if text.text.startswith("tl.full("):
            return text.text
        zero = f"tl.zeros({self.orientation.shape}, tl.float32)"
        if "[:, None]" in text.text or "[None, :]" in text.text:
            return f"tl.broadcast_to({text.text}, {self.orientation.shape})"
        return zero if text.text == "0.0" else f"{zero} + {text.inside(1)}"

    def _where(self, mask: Ref, a: Text, b: Text) -> Text:
        if isinstance(mask, TileRef):
            made = self.made[mask.value]
            if isinstance(made, Compute) and made.op == "not" and mask.value not in self.variables:
                return self._where(made.args[0], b, a)
        return Text(f"tl.where({self.mask(mask).text}, {a.text}, {b.text})")

    def _is_fma(self, c: Compute) -> bool:
        tiles = [a for a in c.args if isinstance(a, TileRef)]
        return len(tiles) == 1 and isinstance(self.made[tiles[0].value], Gemm)

    def _sum(self, tile: Ref, other: Ref) -> Text:
        """A similarity plus something: one FMA where the similarity is not a variable."""
        assert isinstance(tile, TileRef)
        gemm = self.made[tile.value]
        assert isinstance(gemm, Gemm)
        factors = self.names.gemm(gemm, False)
        if tile.value in self.variables or factors.beta or not factors.alpha:
            return Text(f"{self.ref(tile).inside(0)} + {self.ref(other).inside(1)}", 1)
        return Text(f"_fma({factors.dots}, {factors.alpha}, {self.ref(other).text})")

    # -- exponentials ----------------------------------------------------------------------------

    def exponential(self, ref: Ref) -> Text:
        """``e ** ref`` as a power of two."""
        made = self.made.get(ref.value) if isinstance(ref, TileRef) else None
        assert isinstance(ref, TileRef)
        if isinstance(made, Gemm) and ref.value not in self.variables:
            return Text(f"_exp2({self.names.gemm(made, True).text.text})")
        if (
            made is not None
            and ref.value not in self.variables
            and self._folded_into_exponentials(ref.value)
        ):
            assert isinstance(made, Compute)
            tile, other = made.args if isinstance(made.args[0], TileRef) else made.args[::-1]
            assert isinstance(tile, TileRef)
            gemm = self.made[tile.value]
            offset = self._base_2(other)
            if isinstance(gemm, Gemm):
                factors = self.names.gemm(gemm, True)
                if not factors.beta:
                    return Text(f"_exp2(_fma({factors.dots}, {factors.alpha}, {offset}))")
            return Text(f"_exp2(_fma({self.ref(tile).text}, LOG2E, {offset}))")
        return Text(f"_exp2({self.ref(ref).inside(1)} * LOG2E)")

    def _base_2(self, ref: Ref) -> str:
        match ref:
            case VectorRef(name=name, dim=dim):
                return self.orientation.along(self.names.vector(name, dim, True), dim)
            case ScalarRef(expr=expr):
                if expr.is_number:
                    return repr(float(expr) * LOG2E)
                return self.names.scalar(expr, True)
            case _:
                raise AssertionError(ref)


def number(expr: sp.Expr) -> str:
    """A literal."""
    if expr.is_Integer:
        return f"{int(expr)}.0"
    if expr in (sp.oo, -sp.oo):
        return 'float("inf")' if expr > 0 else 'float("-inf")'
    return repr(float(expr))


class DiagonalPrinter(StrPrinter):
    """A SymPy expression of tiles and vectors, given as texts, for the elements of a diagonal."""

    def __init__(self, texts: Mapping[str, str], scalar: Callable[[sp.Expr, bool], str]) -> None:
        super().__init__({"order": None})
        self.texts, self.scalar = texts, scalar

    def text(self, expr: sp.Expr) -> str:
        return spaced(str(self.doprint(expr)))

    def _print_Symbol(self, expr: sp.Symbol) -> str:
        return self.texts[expr.name] if expr.name in self.texts else self.scalar(expr, False)

    def _print_Integer(self, expr: sp.Integer) -> str:
        return f"{int(expr)}.0"

    def _print_Rational(self, expr: sp.Rational) -> str:
        return repr(float(expr))

    _print_Float = _print_Rational

    def _print_Infinity(self, expr: sp.Expr) -> str:
        return 'float("inf")'

    def _print_NegativeInfinity(self, expr: sp.Expr) -> str:
        return 'float("-inf")'

    def _print_Pow(self, expr: sp.Pow, rational: bool = False) -> str:
        base, exponent = expr.args
        text = f"({self._print(base)})"
        if exponent == -1:
            return f"(1.0 / {text})"
        if exponent == 2:
            return f"({text} * {text})"
        if exponent == sp.Rational(1, 2):
            return f"tl.sqrt({self._print(base)})"
        return f"_power({self._print(base)}, {self._print(exponent)})"

    def _print_Function(self, expr: sp.Function) -> str:
        if expr.is_number:
            return repr(float(expr))
        if (rewritten := expand_function(expr)) is not None:
            return str(self._print(rewritten))
        name = type(expr).__name__
        args = [str(self._print(a)) for a in expr.args]
        match name:
            case "shared_exp" | "softmax_weight":
                return f"_exp({args[0]} - ({args[1]}))"
            case "stop_gradient":
                return f"({args[0]})"
            case "select":
                return f"tl.where({', '.join(args)})"
            case "greater" | "greater_equal" | "equal":
                sign = {"greater": ">", "greater_equal": ">=", "equal": "=="}[name]
                return f"(({args[0]}) {sign} ({args[1]}))"
            case "mask_not":
                return f"(~{args[0]})"
            case "mask_and" | "mask_or":
                return f"({args[0]} {'&' if name == 'mask_and' else '|'} {args[1]})"
            case _:
                return f"{_FUNCTIONS[name]}({', '.join(args)})"

    _print_exp = _print_log = _print_Function
