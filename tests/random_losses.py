"""Random losses from the grammar, for comparing any implementation with the oracle.

``draw(seed)`` returns a ``Case`` without a formula: ``reference.evaluate`` says what it means.  A
loss is a few rounds, each of which grows a pair expression on one grid from similarities, vectors,
scalars and masks, and reduces it to a vector that later rounds may use; so statistics nest.

Values stay finite and gradients well conditioned: every expression carries a bound of its
magnitude, arguments of ``log`` and denominators are bounded away from zero, kinks are shifted by
constants so that no pair sits on one by construction (``sim - at_positive(sim)`` is zero at the
positive, up to rounding), and a reduction whose mask may leave nothing is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from cl_compiler import lang as cl
from cl_compiler.lang.resolve import Positives
from tests.zoo_case import Case

Grid = tuple[str, str]
PARAMETERS = {"logit_scale": (1.5, 5.0), "bias": (-1.0, 1.0), "weight": (0.2, 1.5)}


@dataclass(frozen=True)
class Bounded:
    """An expression with ``|value| <= bound``."""

    expr: cl.Expr
    bound: float


def draw(seed: int) -> Case:
    """The loss with this number; equal seeds give equal losses in every process."""
    rng = Random(seed)
    single = rng.random() < 0.3
    options: tuple[Positives, ...] = ("views", "ids") if single else ("diagonal", "ids")
    positives = options[rng.random() < 0.4]
    if positives == "diagonal" and seed % 2:
        positives = "paired"

    def random_loss(logit_scale, bias, weight):
        names = dict(zip(PARAMETERS, (logit_scale, bias, weight), strict=True))
        scalars = [Bounded(e, max(map(abs, PARAMETERS[n]))) for n, e in names.items()]
        return _Grower(rng, single, scalars).loss()

    loss = cl.define_loss(random_loss)
    values = {name: round(rng.uniform(*bounds), 3) for name, bounds in PARAMETERS.items()}
    ranges = dict.fromkeys(("row_in", "col_in"), (-1.0, 1.0))
    square = positives == "paired"
    return Case(f"random{seed}", loss, values, None, positives, square=square, ranges=ranges)


@dataclass
class _Grower:
    rng: Random
    single: bool
    scalars: list[Bounded]
    grids: dict[Grid, list[Bounded]] = field(default_factory=dict)
    vectors: dict[str, list[Bounded]] = field(default_factory=dict)

    def loss(self) -> cl.Expr:
        self.leaves()
        for _ in range(self.rng.randint(2, 5)):
            self.round()
        total = self.constant()
        ends = [(axis, v) for axis, vs in self.vectors.items() for v in vs]
        for axis, vector in ends[-4:]:
            part = self.tame(self.unary(vector)).expr
            total = total + self.constant() * self.mean(part, axis)
        if self.rng.random() < 0.3:
            rows = [v for v in self.vectors.get(cl.rows, []) if v.expr.expr.free_symbols]
            cl.output("statistic", self.rng.choice(rows).expr if rows else total)
        return total

    # ---- leaves --------------------------------------------------------------------------------

    def leaves(self) -> None:
        chance = self.rng.random
        if self.single:
            self.matrix(cl.z, cl.z)
        else:
            self.matrix(cl.x, cl.y)
            if chance() < 0.25:
                self.matrix(cl.x, cl.x)
            if chance() < 0.25:
                self.matrix(cl.y, cl.y)
            if chance() < 0.2:
                self.matrix(cl.x[:3], cl.y[:3])
            if chance() < 0.2:
                self.vector(cl.rows, cl.norm(cl.x[:3]))
            if chance() < 0.2:
                self.vector(cl.cols, cl.norm(cl.y[:2]))
            if chance() < 0.2:
                self.matrix(cl.x, cl.operand("queue", cl.bank, stop=chance() < 0.5))
            if chance() < 0.2:
                self.matrix(cl.x, cl.operand("hard", (cl.rows, cl.slots)))
        if chance() < 0.3:
            stop = chance() < 0.5
            guide_x = cl.operand("guide_x", cl.rows, stop=stop)
            self.matrix(guide_x, cl.operand("guide_y", cl.cols, stop=stop))
            if not self.single and chance() < 0.3:
                self.matrix(guide_x, guide_x)
        if chance() < 0.3:
            self.vector(cl.rows, cl.row_input("row_in"))
        if chance() < 0.3:
            self.vector(cl.cols, cl.col_input("col_in"))

    def matrix(self, left: cl.OperandRef, right: cl.OperandRef) -> None:
        grid = (cl.rows, cl.cols)
        if left.axes == right.axes and not self.single:
            grid = (cl.rows, cl.rows2) if left.axes == (cl.rows,) else (cl.cols, cl.cols2)
        elif right.axes in ((cl.bank,), (cl.rows, cl.slots)):
            grid = (cl.rows, right.axes[-1])
        self.grids.setdefault(grid, []).append(Bounded(cl.similarity(left, right), 1.0))

    def vector(self, axis: str, expr: cl.Expr) -> None:
        self.vectors.setdefault(axis, []).append(Bounded(expr, 1.0))

    # ---- one round: a pair expression, reduced to a vector -------------------------------------

    def round(self) -> None:
        grid = self.rng.choice(sorted(self.grids))
        has_positives = grid == (cl.rows, cl.cols)
        axis, over = self.rng.sample(grid, 2)
        value = self.varying(self.tame(self.pair(grid, self.rng.randint(1, 3))), grid)
        mask = self.mask(grid) if self.rng.random() < 0.6 else None
        kind = self.rng.choice(
            ["sum", "mean", "logsumexp", "logsumexp", "max", "softmean"]
            + ["at_positive"] * (2 * has_positives)
        )
        result = self.reduce(kind, value, grid, axis, over, mask)
        if self.rng.random() < 0.25 and has_positives:
            other = cl.cols if axis == cl.rows else cl.rows
            moved = Bounded(cl.at_positive(result.expr, on=other), result.bound)
            self.vectors.setdefault(other, []).append(moved)
        self.vectors.setdefault(axis, []).append(result)
        if self.rng.random() < 0.2:
            self.scalars.append(Bounded(self.mean(result.expr, axis), result.bound))

    def reduce(
        self, kind: str, value: Bounded, grid: Grid, axis: str, over: str, mask: cl.Expr | None
    ) -> Bounded:
        expr, bound = value.expr, value.bound
        match kind:
            case "sum":
                return Bounded(0.2 * cl.sum(expr, over=over, where=mask), 2 * bound)
            case "mean":
                return Bounded(cl.mean(expr, over=over, where=mask, empty=0), bound)
            case "logsumexp":
                lse = cl.logsumexp(expr, over=over, where=mask)
                return Bounded(
                    lse if mask is None else cl.logaddexp(lse, self.constant()), bound + 4
                )
            case "max":
                top = cl.max(expr, over=over, where=mask)
                if mask is not None:
                    some = cl.count(over=over, where=mask) > 0
                    top = cl.where(some, top, self.constant())
                return Bounded(top, bound + 1)
            case "softmean":
                logits = self.tame(self.pair(grid, 1))
                return Bounded(cl.softmean(expr, logits.expr, over=over, where=mask), bound)
            case _:
                return Bounded(cl.at_positive(expr, on=axis), bound)

    def mean(self, expr: cl.Expr, axis: str) -> cl.Expr:
        return cl.mean(expr, over=axis, empty=0)

    # ---- expressions ---------------------------------------------------------------------------

    def pair(self, grid: Grid, depth: int) -> Bounded:
        """An expression that varies over both axes of the grid."""
        if depth == 0:
            leaf = self.rng.choice(self.grids[grid])
            return self.scaled(leaf) if self.rng.random() < 0.6 else leaf
        value = self.pair(grid, depth - 1)
        match self.rng.choice(["unary", "unary", "mix", "mix", "where", "binary"]):
            case "unary":
                return self.unary(value)
            case "mix":
                other = self.term(grid)
                return self.mixed(value, other)
            case "where":
                mask, other = self.mask(grid), self.tame(self.term(grid))
                return Bounded(
                    cl.where(mask, value.expr, other.expr), max(value.bound, other.bound)
                )
            case _:
                return self.binary(self.tame(value), self.tame(self.pair(grid, depth - 1)))

    def varying(self, value: Bounded, grid: Grid) -> Bounded:
        """The same, or more where SymPy has cancelled an axis away."""
        leaves = self.grids[grid]
        if any(leaf.expr.expr in value.expr.expr.free_symbols for leaf in leaves):
            return value
        return Bounded(value.expr + self.constant() * leaves[0].expr, value.bound + 1)

    def term(self, grid: Grid) -> Bounded:
        """A scalar, a vector along one of the axes, or a matrix of the grid."""
        vectors = [v for axis in grid for v in self.vectors.get(axis, [])]
        return self.rng.choice([*self.scalars[-3:], *vectors[-4:] * 2, *self.grids[grid]])

    def scaled(self, value: Bounded) -> Bounded:
        scale = self.scalars[0]
        return Bounded(scale.expr * value.expr, scale.bound * value.bound)

    def mixed(self, a: Bounded, b: Bounded) -> Bounded:
        factor = self.constant()
        match self.rng.choice(["add", "subtract", "multiply", "divide"]):
            case "add":
                return Bounded(a.expr + factor * b.expr, a.bound + b.bound)
            case "subtract":
                return Bounded(a.expr - b.expr, a.bound + b.bound)
            case "multiply":
                a, b = self.tame(a, 3.0), self.tame(b, 3.0)
                return Bounded(a.expr * b.expr, a.bound * b.bound)
            case _:
                return Bounded(a.expr / (0.7 + cl.sigmoid(self.tame(b).expr)), a.bound * 1.5)

    def unary(self, value: Bounded) -> Bounded:
        value = self.tame(value)
        a, bound = value.expr, value.bound
        shift = self.constant()
        choices: list[Callable[[], Bounded]] = [
            lambda: Bounded(cl.sigmoid(a), 1.0),
            lambda: Bounded(cl.softplus(a), bound + 1),
            lambda: Bounded(cl.relu(a + shift), bound + 1),
            lambda: Bounded(abs(a - shift), bound + 1),
            lambda: Bounded(cl.clamp(a, -shift, 1 + shift), 2.0),
            lambda: Bounded(cl.log(0.3 + cl.softplus(a)), bound + 2),
            lambda: Bounded(cl.sqrt(0.2 + cl.softplus(a)), bound + 1),
            lambda: Bounded(cl.exp(self.tame(value, 2.0).expr), 8.0),
            lambda: Bounded(0.3 * a**2, 0.3 * bound**2),
            lambda: Bounded(a + shift * cl.stop_gradient(a), 2 * bound),
            # NaN where the branch is not taken
            lambda: Bounded(cl.where(a > shift, cl.log(a - shift + 0.2), -shift), bound + 2),
        ]
        return self.rng.choice(choices)()

    def binary(self, a: Bounded, b: Bounded) -> Bounded:
        bound = max(a.bound, b.bound)
        match self.rng.choice(["maximum", "logaddexp", "logsubexp"]):
            case "maximum":
                return Bounded(cl.maximum(a.expr, b.expr + self.constant()), bound + 1)
            case "logaddexp":
                return Bounded(cl.logaddexp(a.expr, b.expr), bound + 1)
            case _:
                floor = -self.constant()
                return Bounded(cl.logsubexp(a.expr, b.expr + self.constant(), floor), bound + 1)

    def mask(self, grid: Grid) -> cl.Expr:
        choices = [lambda: self.compared(grid), lambda: self.compared(grid)]
        if grid == (cl.rows, cl.cols):
            choices += [lambda: cl.is_positive, lambda: ~cl.is_positive]
        if grid in ((cl.rows, cl.rows2), (cl.cols, cl.cols2)) or self.single:
            choices += [lambda: ~cl.is_self]
        mask = self.rng.choice(choices)()
        match self.rng.choice(["plain", "plain", "and", "or", "not"]):
            case "and":
                return mask & self.rng.choice(choices)()
            case "or":
                return mask | self.rng.choice(choices)()
            case "not":
                return ~mask
            case _:
                return mask

    def compared(self, grid: Grid) -> cl.Expr:
        left, right = self.rng.choice(self.grids[grid]).expr, self.tame(self.term(grid), 1.0).expr
        shift = self.constant()
        return left > right - shift if self.rng.random() < 0.7 else left <= right + shift / 3

    def tame(self, value: Bounded, limit: float = 8.0) -> Bounded:
        """The same, squashed where it could be large."""
        if value.bound <= limit:
            return value
        return Bounded(2 * cl.sigmoid(value.expr * (limit / value.bound)), 2.0)

    def constant(self) -> float:
        """Between 0.1 and 0.9, and on no kink."""
        return round(self.rng.uniform(0.1, 0.9), 3) + 0.00017
