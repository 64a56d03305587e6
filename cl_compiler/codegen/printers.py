"""SymPy → PyTorch text: vector expressions, and one line per tile instruction."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import sympy as sp
from sympy.printing.precedence import PRECEDENCE, precedence
from sympy.printing.str import StrPrinter

from cl_compiler.lang.resolve import ONE_TO_ONE
from cl_compiler.lang.tile_ir import (
    Accumulate,
    Compute,
    Diagonal,
    Gemm,
    Ref,
    ScalarRef,
    TileRef,
    VectorRef,
)

SOFTPLUS_THRESHOLD = 40.0
"""Above it softplus(a) equals a to the last bit of float64."""

_CALLS = {
    "exp": "torch.exp",
    "log": "torch.log",
    "sigmoid": "torch.sigmoid",
    "relu": "torch.relu",
    "absolute": "torch.abs",
    "expm1": "torch.expm1",
    "logsubexp": "_logsubexp",
    "one_minus_exp": "_one_minus_exp",
    "present": "_present",
    "remainder": "_remainder",
}


class VectorPrinter(StrPrinter):
    """Prints expressions of vectors [length] and scalars, no pair among them.

    ``names`` maps a symbol's name to text; ``is_vector`` tells whether an expression varies along
    an axis, ``is_python`` whether it is a Python number (other scalars are 0-d tensors),
    ``is_wide`` whether it is in fp64 though tiles are not;
    ``positives`` is the kind of positives, which decides how vectors change axes.
    """

    def __init__(
        self,
        names: Callable[[str], str],
        is_vector: Callable[[sp.Expr], bool],
        is_python: Callable[[sp.Expr], bool],
        positives: str,
        *,
        block: bool = False,
        is_wide: Callable[[sp.Expr], bool] = lambda expr: False,
    ) -> None:
        super().__init__({"order": None})
        self.is_wide = is_wide
        self.names, self.is_vector, self.is_python = names, is_vector, is_python
        self.positives, self.block = positives, block
        self.instead: Mapping[sp.Symbol, sp.Expr] = {}
        """What to print in place of some symbols."""

    def text(self, expr: sp.Expr) -> str:
        return spaced(str(self.doprint(expr.xreplace(dict(self.instead)))))

    def _as_ordered_terms(self, expr: sp.Expr, order: str | None = None) -> list[sp.Expr]:
        """Subtract rather than negate: one operator less."""
        terms = super()._as_ordered_terms(expr, order=order)
        return sorted(terms, key=lambda term: term.could_extract_minus_sign())

    def _print_Symbol(self, expr: sp.Symbol) -> str:
        return self.names(expr.name)

    def _print_Float(self, expr: sp.Float) -> str:
        return repr(float(expr))

    def _print_Infinity(self, expr: sp.Expr) -> str:
        return "math.inf"

    def _print_NegativeInfinity(self, expr: sp.Expr) -> str:
        return "-math.inf"

    def _print_Exp1(self, expr: sp.Expr) -> str:
        return "math.e"

    def _print_Pow(self, expr: sp.Pow, rational: bool = False) -> str:
        if expr.is_number and not expr.is_Rational:
            return repr(float(expr))
        base, exponent = expr.args
        inner = self.parenthesize(base, precedence(expr))
        if self.is_python(base) and not self.is_python(expr):
            inner = self.tensor(base)
            base = sp.Symbol("tensor")
        if exponent == -1:
            return f"1 / {inner}"
        if exponent == sp.Rational(1, 2):
            return f"torch.sqrt({self.tensor(expr.base)})"
        if exponent == 2 and self.is_vector(expr.base):
            return f"torch.square({self._print(base)})"
        power = self.parenthesize(exponent, precedence(expr))
        simple = all(re.fullmatch(r"\w[\w.]*", t) for t in (inner, power))
        return f"{inner}**{power}" if simple else f"{inner} ** {power}"

    def _print_Function(self, expr: sp.Function) -> str:
        if expr.is_number:
            return repr(float(expr))
        name = type(expr).__name__
        args = [self._argument(a) for a in expr.args]
        if name in _CALLS:
            return f"{_CALLS[name]}({', '.join(args)})"
        match name:
            case "softplus":
                return f"torch.nn.functional.softplus({args[0]}, threshold={SOFTPLUS_THRESHOLD})"
            case "softmax_weight" | "shared_exp":
                return f"torch.exp({args[0]} - {args[1]})"
            case "stop_gradient":
                return str(self.parenthesize(expr.args[0], PRECEDENCE["Pow"]))
            case "greater" | "greater_equal" | "equal":
                sign = {"greater": ">", "greater_equal": ">=", "equal": "=="}[name]
                return f"({args[0]} {sign} {args[1]})"
            case "mask_not":
                return f"torch.logical_not({args[0]})"
            case "mask_and" | "mask_or":
                return f"({args[0]} {'&' if name == 'mask_and' else '|'} {args[1]})"
            case "maximum":
                return self._extreme(expr, args)
            case "logaddexp":
                return f"torch.logaddexp({self.tensor(expr.args[0])}, {self.tensor(expr.args[1])})"
            case "select":
                return self._select(*expr.args)
            case "to_rows" | "to_cols":
                return self._move(name, expr.args[0])
        raise AssertionError(f"no text for {name}")

    _print_exp = _print_log = _print_Function

    def _extreme(self, expr: sp.Expr, args: list[str]) -> str:
        a, b = expr.args
        if b.is_number:
            return f"torch.clamp({args[0]}, min={args[1]})"
        if a.is_number:
            return f"torch.clamp({args[1]}, min={args[0]})"
        return f"torch.maximum({args[0]}, {args[1]})"

    def tensor(self, expr: sp.Expr, dtype: str = "torch.float64") -> str:
        """The text of something that must be a tensor."""
        text = str(self._print(expr))
        if expr.is_number or self.is_python(expr):
            return f"torch.tensor({text}, dtype={dtype})"
        return text

    def _argument(self, expr: sp.Expr) -> str:
        """Of a function: a tensor, or a literal."""
        return str(self._print(expr)) if expr.is_number else self.tensor(expr)

    def _select(self, mask: sp.Expr, a: sp.Expr, b: sp.Expr) -> str:
        on, off = self._print(a), self._print(b)
        numbers = [e.is_number or self.is_python(e) for e in (a, b)]
        if all(numbers):
            dtype = "DTYPE" if self.is_vector(mask) else "torch.float64"
            if (a, b) == (1, 0):
                return f"{self._print(mask)}.to({dtype})"
            on, off = self.tensor(a, dtype), self.tensor(b, dtype)
        text = f"torch.where({bare(self._print(mask))}, {on}, {off})"
        if self.is_vector(mask) and not (self.is_vector(a) or self.is_vector(b) or all(numbers)):
            text += ".to(DTYPE)"  # two scalars would make an fp64 vector
        return text

    def _move(self, name: str, vector: sp.Expr) -> str:
        text = self._print(vector)
        varies = self.is_vector(vector)
        if self.block:
            assert not varies, "a row block cannot read across rows"
            return f"torch.as_tensor({text}, dtype=DTYPE).expand(m)"
        if not varies and (name == "to_rows" or self.positives in ONE_TO_ONE):
            return f"torch.as_tensor({text}, dtype=DTYPE).expand(rows)"
        if self.positives == "views":
            return f"torch.roll({text}, half)"
        if self.positives == "paired":
            return f"{text}" if vector.is_Symbol else f"({text})"
        if name == "to_rows":
            return f"{text}[:rows]" if vector.is_Symbol else f"({text})[:rows]"
        wide = ", torch.float64" if self.is_wide(vector) else ""
        return f"_to_columns({text}, rows, cols{wide})"


def spaced(text: str) -> str:
    """SymPy's products and quotients with the spaces that formatters put around them."""
    return re.sub(r"(?<=[^\s*])([*/])(?=[^\s*])", r" \1 ", text)


def bare(text: str) -> str:
    """Without the brackets around a whole comparison, where commas delimit it anyway."""
    inside = text[1:-1]
    depth = 0
    for char in inside:
        depth += (char == "(") - (char == ")")
        if depth < 0:
            return text
    return inside if text.startswith("(") and text.endswith(")") else text


def number(expr: sp.Expr) -> str:
    """A literal."""
    if expr.is_Integer:
        return f"{int(expr)}.0"
    if expr == sp.oo or expr == -sp.oo:
        return "math.inf" if expr > 0 else "-math.inf"
    return repr(float(expr))


class TilePrinter:
    """Prints the instructions of a tile program.

    ``scalar`` and ``vector`` give the text of a name; ``tile`` that of a buffer.
    ``on_device``: scalars stay tensors, which the host would have to wait for.
    """

    def __init__(
        self,
        buffers: Mapping[int, str],
        scalar: Callable[[sp.Expr], str],
        vector: Callable[[str, int], str],
        is_python: Callable[[sp.Expr], bool],
        on_device: bool = False,
    ) -> None:
        self.buffers, self.scalar, self.vector, self.is_python = buffers, scalar, vector, is_python
        self.on_device = on_device

    def tile(self, value: int) -> str:
        return self.buffers[value]

    def number(self, expr: sp.Expr) -> str:
        """A scalar that multiplies a tile, or is added to it."""
        if expr.is_number:
            return number(expr)
        text = self.scalar(expr)
        return text if self.is_python(expr) else self._value(text)

    def _value(self, scalar: str) -> str:
        """A tensor [] as an operator's argument."""
        return scalar if self.on_device else f"{scalar}.item()"

    def _is_literal(self, ref: Ref) -> bool:
        """Whether a scalar's text is a Python number."""
        number = isinstance(ref, ScalarRef) and (ref.expr.is_number or self.is_python(ref.expr))
        return bool(number)

    def ref(self, ref: Ref) -> str:
        match ref:
            case TileRef(value=value):
                return self.tile(value)
            case VectorRef(name=name, dim=dim):
                return self.vector(name, dim)
            case ScalarRef(expr=expr):
                return number(expr) if expr.is_number else self.scalar(expr)

    def compute(self, c: Compute) -> str:
        """One elementwise operation, in place where a buffer is taken over."""
        out, args = self.tile(c.value), [self.ref(a) for a in c.args]
        first_is_tensor = bool(args) and not self._is_literal(c.args[0])
        match c.op:
            case "fill" | "mask_fill":
                if isinstance(c.args[0], ScalarRef):
                    value = args[0] if c.op == "fill" else str(bool(c.args[0].expr))
                    return f"{out}.fill_({value})"
                return f"{out}.copy_({args[0]})"
            case "from_mask" | "mask_copy":
                return f"{out}.copy_({args[0]})"
            case "fill_where":
                copy = "" if args[0] == out else f"{out}.copy_({args[0]})\n"
                return f"{copy}{out}.masked_fill_({args[1]}, {args[2]})"
            case "positive_tile":
                return (
                    f"torch.eq({self.vector('row_ids', 0)}, {self.vector('col_ids', 1)}, out={out})"
                )
            case "softplus":
                threshold = f"threshold={SOFTPLUS_THRESHOLD}"
                return f"torch.nn.functional.softplus({args[0]}, {threshold}, out={out})"
            case "relu":
                return f"torch.clamp({args[0]}, min=0.0, out={out})"
            case "not" | "and" | "or":
                return f"torch.logical_{c.op}({', '.join(args)}, out={out})"
            case "gt" | "ge" | "eq":
                flipped = {"gt": "lt", "ge": "le", "eq": "eq"}
                name = c.op if first_is_tensor else flipped[c.op]
                args = args if first_is_tensor else args[::-1]
                return f"torch.{name}({args[0]}, {args[1]}, out={out})"
            case "maximum":
                for a, b in (c.args, c.args[::-1]):
                    if self._is_literal(b):
                        return f"torch.clamp({self.ref(a)}, min={self.ref(b)}, out={out})"
                return f"torch.maximum({args[0]}, {args[1]}, out={out})"
            case "add" | "mul":
                if not first_is_tensor or args[1] == out:
                    args = args[::-1]
                if args[0] == out:
                    return f"{out}.{c.op}_({args[1]})"
                return f"torch.{c.op}({args[0]}, {args[1]}, out={out})"
            case "softmax" | "log_softmax":
                return f"torch.{c.op}({args[0]}, {int(float(args[1]))}, out={out})"
            case "div":
                if args[0] == out:
                    return f"{out}.div_({args[1]})"
                if args[0] == "1.0":
                    return f"torch.reciprocal({args[1]}, out={out})"
            case "exp" | "exp2" | "sigmoid" | "neg" | "square" | "log" | "sqrt" | "expm1" | "abs":
                if args[0] == out:
                    return f"{out}.{c.op}_()"
        tensors = [
            f"torch.tensor({t}, dtype=DTYPE)" if self._is_literal(a) else t
            for a, t in zip(c.args, args, strict=True)
        ]
        return f"torch.{c.op}({', '.join(tensors)}, out={out})"

    def alpha_beta(self, g: Gemm, scale: str | None) -> tuple[str, str]:
        """What a product is multiplied by, and what is added to it; "" for nothing."""
        factors = [] if scale is None or not g.scaled else [self._value(scale)]
        if g.alpha != 1:
            factors.append(self.number(g.alpha))
        beta = self.number(g.beta) if g.beta != 0 else ""
        if g.log2e:
            factors.append("LOG2E")
            beta = f"{beta} * LOG2E" if beta else ""
        return " * ".join(factors), beta

    def gemm(self, g: Gemm, left: str, right: str, scale: str | None, slots: bool) -> str:
        """The similarity tile, its scale and offset in the same call."""
        out = self.tile(g.value)
        alpha, beta = self.alpha_beta(g, scale)
        if slots:
            lines = [f"torch.bmm({right}, {left}.unsqueeze(2), out={out}.unsqueeze(2))"]
            lines += [f"{out}.mul_({alpha})"] if alpha else []
            lines += [f"{out}.add_({beta})"] if beta else []
            return "\n".join(lines)
        if beta or (scale is not None and g.scaled):
            return f"_product({left}, {right}, {alpha or '1.0'}, {beta or '0.0'}, out={out})"
        if alpha:
            return f"{out}.addmm_({left}, {right}.T, beta=0, alpha={alpha})"
        return f"torch.mm({left}, {right}.T, out={out})"

    def fold(self, a: Accumulate, target: str) -> str:
        """A sum or maximum of the only tile there is."""
        return f"{target} = {self.tile(a.args[0])}.{'sum' if a.kind == 'sum' else 'amax'}({a.dim})"

    def accumulate(self, a: Accumulate, targets: tuple[str, ...]) -> str:
        tiles = [self.tile(v) for v in a.args]
        match a.kind:
            case "sum":
                return f"{targets[0]}.add_({tiles[0]}.sum({a.dim}))"
            case "max":
                best = f"torch.maximum({targets[0]}, {tiles[0]}.amax({a.dim}))"
                return f"{targets[0]}.copy_({best})"
            case _:
                assert a.scratch is not None
                args = [*tiles, str(a.dim), *targets, self.tile(a.scratch)]
                return f"_add_{a.kind}({', '.join(args)})"

    def diagonal(self, d: Diagonal, text: str) -> list[str]:
        """(copy if the base lives on), and the statement inside the loop over crossings."""
        out, base = self.tile(d.value), self.tile(d.base)
        lines = [] if out == base else [f"{out}.copy_({base})"]
        match d.how:
            case "negate":
                statement = f"{out}.diagonal(k).neg_()"
            case "fill":
                value = str(bool(d.expr)) if d.is_mask else number(d.expr)
                statement = f"{out}.diagonal(k).fill_({value})"
            case "add":
                statement = f"{out}.diagonal(k).add_({text})"
            case _:
                statement = f"{out}.diagonal(k).copy_({text})"
        return [*lines, statement]


__all__ = ["SOFTPLUS_THRESHOLD", "TilePrinter", "VectorPrinter", "number"]
