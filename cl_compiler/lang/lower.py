"""Lower the pair expressions of a sweep to a straight-line program over tile buffers.

Maximal subexpressions that vary along one axis (or none) are hoisted out of the sweep; equal
subexpressions are computed once; a scalar factor and offset of a similarity ride in its GEMM; masks
that hold on known diagonals only become writes to a diagonal, so interior tiles never test them;
and where the logits are bounded, every ``exp(u - lse)`` is one exponential that all reductions of u
share, times a vector.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy as sp

from cl_compiler.lang import functions as fn
from cl_compiler.lang.ir import Leaf, Let, Reduction, axes_of, ordered
from cl_compiler.lang.lower_masks import MaskLowering
from cl_compiler.lang.resolve import ONE_TO_ONE
from cl_compiler.lang.rewrite import expand_function, remainder, shared_exp
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import (
    Compute,
    Gemm,
    Instruction,
    Mode,
    Ref,
    ScalarRef,
    TileRef,
    VectorRef,
)

_UNARY = {
    sp.exp: "exp",
    sp.log: "log",
    fn.sigmoid: "sigmoid",
    fn.softplus: "softplus",
    fn.relu: "relu",
    fn.absolute: "abs",
    fn.expm1: "expm1",
    fn.mask_not: "not",
}
_BINARY = {
    fn.maximum: "maximum",
    fn.logaddexp: "logaddexp",
    fn.greater: "gt",
    fn.greater_equal: "ge",
    fn.equal: "eq",
    fn.mask_and: "and",
    fn.mask_or: "or",
}
TIE_TOLERANCE = sp.Symbol("TIE_TOLERANCE", real=True)
"""Relative: elements this close to the maximum attain it.  A constant of the emitted file."""
_MASK_OPS = frozenset(
    {"gt", "ge", "eq", "and", "or", "not", "positive_tile", "mask_copy", "mask_fill"}
)


def shift_of(lse: str) -> sp.Symbol:
    """The scalar shift of a bounded logsumexp's shared exponential."""
    return sp.Symbol(f"shift_{lse}", real=True)


def inverse_of(lse: str) -> sp.Symbol:
    """exp(shift - lse): one over the sum of shifted exponentials (0 where nothing was summed)."""
    return sp.Symbol(f"inv_{lse}", real=True)


class Lowering:
    """One tile program in the making.

    ``exact``: a logsumexp is added to a tile in two parts, rounded, and what rounding took.
    """

    def __init__(
        self, plan: SweepPlan, grid: tuple[str, str], mode: Mode, exact: bool = False
    ) -> None:
        self.plan, self.grid, self.mode, self.exact = plan, grid, mode, exact
        self.leaves: dict[str, Leaf] = dict(plan.leaves)
        self.code: list[Instruction] = []
        self.memo: dict[sp.Expr, Ref] = {}
        self.hoisted: dict[str, tuple[sp.Expr, tuple[str, ...]]] = {}
        self.affine: dict[str, set[tuple[sp.Expr, sp.Expr]]] = {}
        self.masks: set[int] = set()
        self.values = 0
        self.diagonals = MaskLowering(self)

    def declare_shared(self) -> None:
        """Enter shifts and inverse sums of the logsumexps into the symbol table."""
        self.leaves[TIE_TOLERANCE.name] = Leaf(TIE_TOLERANCE.name, "count", ())
        for node in self.plan.nodes:
            if isinstance(node, Reduction) and node.monoid == "logsumexp":
                axes = self.plan.leaves[node.name].axes
                inverse, shift = inverse_of(node.name).name, shift_of(node.name).name
                self.leaves[inverse] = Leaf(inverse, "adjoint", axes)
                self.leaves[shift] = Leaf(shift, "adjoint", ())

    # -- helpers ---------------------------------------------------------------------------------

    def axes(self, expr: sp.Expr) -> frozenset[str]:
        return axes_of(expr, self.leaves)

    def is_pair(self, expr: sp.Expr) -> bool:
        return len(self.axes(expr)) > 1

    def is_count(self, expr: sp.Expr) -> bool:
        """A scalar made of numbers and axis lengths only: known before any data."""
        if self.axes(expr):
            return False
        for symbol in expr.free_symbols:
            node = self.plan.by_name.get(symbol.name)
            if isinstance(node, Let) and self.is_count(node.expr):
                continue
            if self.leaves[symbol.name].kind != "count":
                return False
        return True

    def count_ratio(self, a: sp.Expr, b: sp.Expr) -> sp.Expr | None:
        """``a / b`` if both are made of axis lengths and it is a number that is not zero."""
        if not (self.is_count(a) and self.is_count(b)):
            return None
        ratio = self._counted(a) / self._counted(b)
        return ratio if ratio.is_number and ratio.is_finite and ratio != 0 else None

    def _counted(self, expr: sp.Expr) -> sp.Expr:
        """In terms of axis lengths; rows and columns are as many where they are paired."""
        nodes = {s: self.plan.by_name.get(s.name) for s in expr.free_symbols}
        lets = {s: self._counted(n.expr) for s, n in nodes.items() if isinstance(n, Let)}
        expr = expr.xreplace(lets)
        if self.plan.positives in ONE_TO_ONE and "n_cols" in self.leaves:
            rows = sp.Symbol("n_rows", real=True, positive=True)
            expr = expr.xreplace({self.leaves["n_cols"].symbol: rows})
        return expr

    def new(self) -> int:
        self.values += 1
        return self.values - 1

    def hoist(self, expr: sp.Expr) -> sp.Symbol:
        """A name for a vector or scalar expression, evaluated before the sweep."""
        if isinstance(expr, sp.Symbol):
            return expr
        flipped = {t: self.leaves[t.name[:-1]].symbol for t in expr.free_symbols if "~" in t.name}
        if flipped:  # hoist the vector once, and read it along the other axis
            symbol = self.mirrored(self.hoist(expr.xreplace(flipped)))
            assert isinstance(symbol, sp.Symbol)
            return symbol
        for name, (known, _) in self.hoisted.items():
            if known == expr:
                return self.leaves[name].symbol
        name, axes = f"h{len(self.hoisted)}", ordered(self.axes(expr))
        self.hoisted[name] = (expr, axes)
        self.leaves[name] = Leaf(name, "adjoint", axes)
        return self.leaves[name].symbol

    def outer(self, expr: sp.Expr) -> Ref:
        """A reference to something that is not a tile."""
        if expr.is_number:
            return ScalarRef(expr)
        axes = self.axes(expr)
        symbol = self.hoist(expr)
        if not axes:
            return ScalarRef(symbol)
        (axis,) = axes
        return VectorRef(symbol.name.removesuffix("~"), self.grid.index(axis))

    def mirrored(self, expr: sp.Expr) -> sp.Expr:
        """The expression of the transposed tile of a symmetric grid."""
        axes = self.axes(expr)
        if not axes or (len(axes) > 1 and isinstance(expr, sp.Symbol)):
            return expr
        if len(axes) == 1:
            symbol = self.hoist(expr)
            (axis,) = axes
            name = symbol.name.removesuffix("~") if symbol.name.endswith("~") else f"{symbol.name}~"
            other = self.grid[1 - self.grid.index(axis)]
            self.leaves.setdefault(name, Leaf(name, "adjoint", (other,)))
            return self.leaves[name].symbol
        return expr.func(*(self.mirrored(a) for a in expr.args))

    def compute(self, op: str, *args: Ref) -> TileRef:
        value = self.new()
        self.code.append(Compute(value, op, args, op in _MASK_OPS))
        if op in _MASK_OPS:
            self.masks.add(value)
        return TileRef(value)

    # -- similarities ----------------------------------------------------------------------------

    def scan(self, exprs: Iterable[sp.Expr]) -> None:
        """Find in which affine forms each similarity is used."""
        stack = list(exprs)
        while stack:
            expr = stack.pop()
            form = self.affine_form(expr)
            if form is not None:
                name, alpha, beta = form
                self.affine.setdefault(name, set()).add((alpha, beta))
            elif isinstance(expr, shared_exp):
                stack.append(expr.args[0] - expr.args[1])
            elif isinstance(expr, fn.select):
                stack.extend(self.branches(*expr.args))
            else:
                stack.extend(expr.args)

    def branches(self, mask: sp.Expr, a: sp.Expr, b: sp.Expr) -> list[sp.Expr]:
        """What a selection really computes: a negated branch is made from the other."""
        if not (mask.free_symbols and mask.free_symbols <= self.diagonals.structural):
            return [mask, b] if a + b == 0 else [mask, a, b]
        inside = a if self.diagonals.interior(mask) == 1 else b
        chosen = [fn.select(mask, a, b).xreplace(dict(s.values)) for s in self.diagonals.specials]
        here = [inside.xreplace(dict(s.values)) for s in self.diagonals.specials]
        return [inside, *(c for c, h in zip(chosen, here, strict=True) if c not in (h, -h))]

    def affine_form(self, expr: sp.Expr) -> tuple[str, sp.Expr, sp.Expr] | None:
        """(similarity, alpha, beta) if ``expr`` is alpha · similarity + beta with scalars."""
        if not self.is_pair(expr) or not isinstance(expr, (sp.Symbol, sp.Mul, sp.Add)):
            return None
        sims = [s for s in expr.free_symbols if self.leaves[s.name].kind == "similarity"]
        if len(sims) != 1:
            return None
        alpha, beta = expr.coeff(sims[0], 1), expr.coeff(sims[0], 0)
        if (
            expr.has(fn.select)
            or self.axes(alpha)
            or self.axes(beta)
            or sims[0] in alpha.free_symbols | beta.free_symbols
            or alpha * sims[0] + beta != expr
        ):
            return None
        return sims[0].name, alpha, beta

    def gemm(self, name: str, alpha: sp.Expr, beta: sp.Expr, scaled: bool = True) -> TileRef:
        if self.exact and self.is_own_transpose(name) and scaled:
            return self.transposable(name, alpha, beta)
        value = self.new()
        scalars = [a if a.is_number else self.hoist(a) for a in (alpha, beta)]
        self.code.append(Gemm(value, name, scalars[0], scalars[1], scaled))
        return TileRef(value)

    def is_own_transpose(self, name: str) -> bool:
        """Whether a matrix is of an operand with itself, and its elements are compared."""
        return self.leaves[name].is_symmetric and self.mode == "running"

    def transposable(self, name: str, alpha: sp.Expr, beta: sp.Expr) -> TileRef:
        """A product whose elements [i, j] and [j, i] are the same to the bit.

        A scale inside the product would be rounded into one of the factors.
        """
        scale = self.leaves[name].scale
        factor = alpha if scale is None else alpha * self.leaves[scale].symbol
        tile = self.gemm(name, fn.ONE, fn.ZERO, scaled=False)
        if factor != 1:
            tile = self.compute("mul", tile, self.outer(factor))
        return tile if beta == 0 else self.compute("add", tile, self.outer(beta))

    def similarity(self, name: str, alpha: sp.Expr, beta: sp.Expr) -> Ref:
        forms = self.affine[name]
        symbol = self.leaves[name].symbol
        if len(forms) == 1:
            return self.gemm(name, alpha, beta)
        alphas = {a for a, _ in forms}
        shared = alphas.pop() if len(alphas) == 1 else fn.ONE
        base = self.memo.get(shared * symbol)
        if base is None:
            base = self.memo[shared * symbol] = self.gemm(name, shared, fn.ZERO)
        if alpha != shared:
            base = self.compute("mul", base, self.outer(alpha / shared))
        return base if beta == 0 else self.compute("add", base, self.outer(beta))

    # -- expressions -----------------------------------------------------------------------------

    def lower(self, expr: sp.Expr) -> Ref:
        """A reference to the value of ``expr``; emits what is missing."""
        if not self.is_pair(expr):
            return self.outer(expr)
        if expr not in self.memo:
            self.memo[expr] = self.emit(expr)
        return self.memo[expr]

    def tile(self, expr: sp.Expr) -> int:
        """The value of ``expr`` as a tile, even if it is a vector or a number."""
        ref = self.lower(expr)
        if not isinstance(ref, TileRef):
            ref = self.compute("fill", ref)
        elif ref.value in self.masks:
            ref = self.compute("from_mask", ref)
        return ref.value

    def emit(self, expr: sp.Expr) -> Ref:
        form = self.affine_form(expr)
        if form is not None:
            return self.similarity(*form)
        if isinstance(expr, sp.Symbol):
            return self.mask_leaf(expr)
        if isinstance(expr, shared_exp):
            return self.compute("exp", self.lower(expr.args[0] - expr.args[1]))
        if isinstance(expr, fn.stop_gradient):
            return self.lower(expr.args[0])
        if isinstance(expr, fn.MASK_FUNCTIONS) and self.diagonals.structural & expr.free_symbols:
            return self.diagonals.mixed_mask(expr)
        if isinstance(expr, fn.select):
            return self.diagonals.select(*expr.args)
        if isinstance(expr, sp.Add):
            return self.nary(expr, "add")
        if isinstance(expr, sp.Mul):
            return self.product(expr)
        if isinstance(expr, sp.Pow):
            return self.power(*expr.args)
        if type(expr) in _UNARY:
            return self.compute(_UNARY[type(expr)], self.lower(expr.args[0]))
        if type(expr) in _BINARY:
            return self.compute(_BINARY[type(expr)], *(self.lower(a) for a in expr.args))
        if (rewritten := expand_function(expr)) is not None:
            return self.lower(rewritten)
        raise AssertionError(f"no lowering for {type(expr).__name__}")

    def mask_leaf(self, symbol: sp.Symbol) -> Ref:
        if symbol in self.diagonals.structural:
            return self.diagonals.mixed_mask(symbol)
        assert symbol.name == "is_positive", symbol
        ref = self.compute("positive_tile")
        if self.plan.ir.is_single_set:
            return self.diagonals.diagonal(ref.value, "self", "fill", fn.ZERO, is_mask=True)
        return ref

    def groups(self, expr: sp.Expr) -> tuple[list[sp.Expr], list[sp.Expr]]:
        """Arguments that are tiles, and the others gathered by axis (scalars with the first).

        Where two parts are added, what is known earlier comes first, and on its own: logits that a
        logsumexp sums are rounded in its sweep as they are where it is subtracted from them.
        """
        tiles = [a for a in expr.args if self.is_pair(a)]
        by_axis: dict[tuple[int, str], list[sp.Expr]] = {}
        scalars = []
        for arg in expr.args:
            axes = self.axes(arg)
            if not axes:
                scalars.append(arg)
            elif len(axes) < 2:
                by_axis.setdefault((self.depth(arg), next(iter(axes))), []).append(arg)
        if scalars and by_axis:
            next(iter(by_axis.values())).extend(scalars)
        elif scalars:
            by_axis[0, ""] = scalars
        return tiles, [expr.func(*args) for _, args in sorted(by_axis.items())]

    def depth(self, expr: sp.Expr) -> int:
        """How many sweeps a vector waits for, where it matters when it is added."""
        if not self.exact:
            return 0
        names = {s.name for s in self.definition(expr).free_symbols}
        return max((self.plan.levels.get(n, 0) for n in names), default=0)

    def nary(self, expr: sp.Expr, op: str) -> Ref:
        tiles, rest = self.groups(expr)
        refs = [self.lower(t) for t in tiles]
        for vector in rest:
            refs.append(self.lower(vector) if op == "add" else self.outer(vector))
            if op == "add" and self.exact and self.is_rounded(vector):
                refs.append(self.outer(self.rest_of(vector)))
        # torch adds masks with "or" and multiplies them with numbers in fp32: start from a value
        refs.sort(key=self.is_mask_tile)
        total = refs[0]
        if self.is_mask_tile(total):
            total = self.compute("from_mask", total)
        for ref in refs[1:]:
            total = self.compute(op, total, ref)
        return total

    def definition(self, expr: sp.Expr) -> sp.Expr:
        """What a vector that is read along the other axis stands for; others as they are."""
        if isinstance(expr, sp.Symbol) and expr.name.endswith("~"):
            return self.hoisted.get(expr.name[:-1], (expr, ()))[0]
        return expr

    def rest_of(self, expr: sp.Expr) -> sp.Expr:
        """What rounding to a tile's dtype takes from a vector, read along the same axis."""
        known = self.definition(expr)
        return remainder(expr) if known == expr else self.mirrored(self.hoist(remainder(known)))

    def is_rounded(self, expr: sp.Expr) -> bool:
        """Whether a vector is made of logsumexps, and of fp64 ones until a tile reads it."""
        expr = self.definition(expr)
        names = {s.name.removesuffix("~") for s in expr.free_symbols}
        known = [self.plan.by_name[n] for n in names & set(self.plan.by_name)]
        made = any(isinstance(n, Reduction) and n.monoid == "logsumexp" for n in known)
        return made and not expr.is_Symbol and bool(self.axes(expr))

    def is_mask_tile(self, ref: Ref) -> bool:
        return isinstance(ref, TileRef) and ref.value in self.masks

    def product(self, expr: sp.Mul) -> Ref:
        below = [
            1 / a
            for a in expr.args
            if isinstance(a, sp.Pow) and self.is_pair(a) and a.exp.is_number and a.exp < 0
        ]
        above = [a for a in expr.args if 1 / a not in below]
        if not below:
            if -expr in self.memo and isinstance(expr.args[0], sp.Integer):
                return self.compute("neg", self.memo[-expr])
            return self.nary(expr, "mul")
        top = sp.Mul(*above)
        return self.compute("div", self.lower(top), self.lower(sp.Mul(*below)))

    def power(self, base: sp.Expr, exponent: sp.Expr) -> Ref:
        if exponent == 2:
            return self.compute("square", self.lower(base))
        if exponent == sp.Rational(1, 2):
            return self.compute("sqrt", self.lower(base))
        if exponent.is_number and exponent < 0:
            return self.compute("div", ScalarRef(fn.ONE), self.lower(base**-exponent))
        return self.compute("pow", self.lower(base), self.lower(exponent))
