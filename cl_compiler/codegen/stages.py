"""The vectors between passes, the prologue and the epilogue, as statements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import sympy as sp

from cl_compiler.codegen.bounds import bound_text
from cl_compiler.codegen.names import Names
from cl_compiler.codegen.pass_text import PassText
from cl_compiler.codegen.passes import PassPrinter
from cl_compiler.codegen.printers import VectorPrinter, bare, spaced
from cl_compiler.codegen.symbols import (
    LENGTH,
    PythonNumbers,
    finalise,
    is_wide,
    narrowed,
    operand_scale,
    scaled_in_products,
    shift_owner,
    symbol_table,
)
from cl_compiler.lang.ir import Leaf, Let, Reduction, View, axes_of
from cl_compiler.lang.lower import inverse_of, shift_of
from cl_compiler.lang.lower_pass import bounded_logits
from cl_compiler.lang.program import Pass, Program, Stage
from cl_compiler.lang.tile_ir import Compute, Gemm, Mode, ScalarRef, VectorRef


@dataclass
class ModeText:
    """A pass in one mode: what is hoisted before it, the call, what is made of its results."""

    text: PassText
    hoisted: list[str]
    finish: list[str]


@dataclass
class PassCall:
    """A pass and, where there are two modes, how to choose between them."""

    modes: dict[Mode, ModeText]
    shifts: list[tuple[str, str]] = field(default_factory=list)
    """(shift, bound) to evaluate before it, as text."""
    largest: str = ""
    """On many ranks: the statement that evaluates what bounds are made of."""
    condition: str = ""
    """When the bounded mode may be tried; "" if there is one mode."""
    guards: dict[str, list[str]] = field(default_factory=dict)
    """shift → tests that its sums are in range."""
    reset: list[str] = field(default_factory=list)
    """Gradients to clear before a second attempt."""


@dataclass
class StageText:
    vectors: list[str]
    calls: list[PassCall]


class StagePrinter:
    """Prints the statements around the passes of a program."""

    pass_printer = PassPrinter

    def __init__(self, program: Program, names: Names, cast: bool) -> None:
        self.program, self.plan, self.names, self.cast = program, program.plan, names, cast
        self.leaves: dict[str, Leaf] = symbol_table(self.plan)
        self.numbers = PythonNumbers(self.plan)
        self.overwritten: frozenset[str] = frozenset()
        """Operands whose gradient need not be cleared: its first product makes it."""

    def vectors(self, lookup: Callable[[str], str] | None = None) -> VectorPrinter:
        return VectorPrinter(
            lookup or self.names,
            lambda e: bool(axes_of(e, self.leaves)),
            self.numbers,
            self.plan.positives,
            is_wide=partial(is_wide, self.program),
        )

    # -- vectors ---------------------------------------------------------------------------------

    def node(self, name: str) -> str:
        """The statement that evaluates one let, transport or vector reduction."""
        node = self.plan.by_name[name]
        printer = self.vectors()
        target = self.names(name)
        if isinstance(node, Let):
            return f"{target} = {self._as_read(name, node.expr, printer.text(node.expr))}"
        if node.monoid in ("to_rows", "to_cols"):
            move = sp.Function(node.monoid)
            text = bare(printer.text(_call(node.monoid, node.operand, move)))
            return f"{target} = {self._as_read(name, node.operand, text)}"
        return f"{target} = {self._reduced(node, printer)}"

    def _as_read(self, name: str, expr: sp.Expr, text: str) -> str:
        """The text of a vector's definition, in fp64 if the vector is to be."""
        wide = name in self.program.wide
        return text if wide else narrowed(self.program, expr, text, self.leaves)

    def _reduced(self, red: Reduction, printer: VectorPrinter) -> str:
        value = printer.text(red.operand)
        if self.numbers(red.operand) and red.operand != 1:
            value = spaced(printer.tensor(red.operand, "DTYPE"))
        varies = bool(axes_of(red.operand, self.leaves))
        mask = "" if red.where == 1 else printer.text(red.where)
        match red.monoid:
            case "sum":
                if red.operand == 1 and mask:
                    return f"{mask}.sum(dtype=torch.float64)"
                masked = f"torch.where({bare(mask)}, {value}, 0.0)" if mask else f"({value})"
                if value.isidentifier() and not mask:
                    masked = value
                return f"{masked}.sum(dtype=torch.float64)"
            case "max":
                masked = f"torch.where({bare(mask)}, {value}, -math.inf)" if mask else f"({value})"
                return f"{masked}.amax().double()"
            case "logsumexp":
                masked = f"torch.where({bare(mask)}, {value}, -math.inf)" if mask else f"({value})"
                return f"torch.logsumexp({masked}.double(), 0)"
            case _:
                assert red.logits is not None and varies
                logits = printer.text(red.logits)
                masked = (
                    f"torch.where({bare(mask)}, {logits}, -math.inf)" if mask else f"({logits})"
                )
                return f"(torch.softmax({masked}.double(), 0) * ({value})).sum()"

    # -- bounds ----------------------------------------------------------------------------------

    def bound(self, expr: sp.Expr) -> str:
        """An upper bound of |expr| over all pairs, from the operands' norms."""

        def largest(factor: sp.Expr) -> str:
            if axes_of(factor, self.leaves):
                return self.largest_element(self._method(factor))
            if self.numbers(factor):
                return f"abs({self.vectors().text(factor)})"
            return f"abs({self._method(factor)}.item())"

        return bound_text(expr, self.leaves, self.largest_norm, largest)

    def largest_norm(self, view: View) -> str:
        """The largest norm of an operand's rows, as a Python number."""
        part = "" if view.prefix is None else f"[:, :{view.prefix}]"
        return f"_largest_norm({view.operand}{part})"

    def largest_element(self, vector: str) -> str:
        """The largest absolute value in a vector, as a Python number."""
        return f"{vector}.abs().max().item()"

    def scale_gradient(self, scale: str) -> list[str]:
        """Terms of the gradient of a scale that similarities carry."""
        assert self.plan.gradient is not None
        return [
            f"{'' if weight == 1 else f'{float(weight)} * '}{self.inner(operand)}"
            for operand, weight in self.plan.gradient.dots.get(scale, ())
        ]

    def inner(self, operand: str) -> str:
        """<operand, its gradient>."""
        return f"_inner({operand}, d_{operand})"

    def _method(self, expr: sp.Expr) -> str:
        text = self.vectors().text(expr)
        return text if isinstance(expr, sp.Symbol) else f"({text})"

    # -- passes ----------------------------------------------------------------------------------

    def call(self, pass_: Pass, name: str, forward: bool) -> PassCall:
        modes: dict[Mode, ModeText] = {}
        for mode in self.program.modes:
            suffix = "" if len(self.program.modes) == 1 else f"_{mode}"
            printer = self.pass_printer(
                self.program, pass_, mode, self.names, f"_{name}{suffix}", self.cast
            )
            text = printer.text()
            hoisted = [
                self.hoisted(printer, *item)
                for item in printer.hoisted
                if item[2] not in printer.local
            ]
            modes[mode] = ModeText(text, hoisted, self._finish(pass_, mode))
        call = PassCall(modes)
        if len(modes) == 2:
            self._choose(call, pass_, forward)
        return call

    def hoisted(self, printer: PassPrinter, name: str, expr: sp.Expr, symbol: str) -> str:
        """The statement that evaluates what a pass reads, before it."""
        printer.active = next(c for c in printer.codes if c.hoisted.get(symbol, (0,))[0] == expr)
        vectors = self.vectors(lambda n: printer.hoisted_names.get(n) or self.names(n))
        vectors.is_vector = lambda e: bool(axes_of(e, printer.all_leaves))
        vectors.is_python = printer.numbers
        text = narrowed(self.program, expr, vectors.text(expr), printer.all_leaves)
        return f"{name} = {text}"

    def _finish(self, pass_: Pass, mode: Mode) -> list[str]:
        lines = []
        for red in pass_.reductions:
            parts = {t: self.names(f"{t}_{red.name}") for t in ("max", "sum", "weighted")}
            for symbol, text in finalise(self.program, red, mode, self.names, parts):
                if symbol == red.name or not pass_.has_barrier:
                    lines.append(f"{self.names(symbol)} = {text}")
        if mode == "running" and len(self.program.modes) == 2 and not pass_.has_barrier:
            lines += [
                f"{self.names(f'inv_{r.name}')} = None"
                for r in pass_.reductions
                if r.monoid == "logsumexp"
            ]
        return lines

    def _choose(self, call: PassCall, pass_: Pass, forward: bool) -> None:
        owners = bounded_logits(self.plan)
        names = [r for r in self.program.logsumexps if r.name in {x.name for x in pass_.reductions}]
        if forward:
            for expr, owner in owners.items():
                if owner in {r.name for r in names}:
                    terms = self._terms(owner, pass_)
                    shift = self.names(shift_of(owner).name)
                    call.shifts.append((shift, f"{self.bound(expr)}, {terms}"))
            for red in names:
                sums = self.names(f"sum_{red.name}")
                test = f"_in_range({self.shift(red)}, {sums}, {self._terms(red.name, pass_)})"
                call.guards.setdefault(self.shift(red), []).append(test)
            for red in pass_.softmeans:  # of values as large as the type allows
                test = f"{self.names(f'sum_{red.name}')}.isfinite().all().item()"
                call.guards.setdefault(self.shift(red), []).append(test)
        used = _shifts_read(self.program, pass_) if forward else set(owners.values())
        shifts = dict.fromkeys(self.names(shift_of(o).name) for o in sorted(used))
        call.condition = " and ".join(f"{s} is not None" for s in shifts)
        if pass_.gradients and forward:
            outs = sorted({o for s in pass_.gradients for o in self._operands(s)})
            call.reset = [f"d_{o}.zero_()" for o in outs]

    def shift(self, red: Reduction) -> str:
        return self.names(shift_of(shift_owner(self.program, red)).name)

    def _operands(self, sim: str) -> list[str]:
        leaf = self.leaves[sim]
        views = [v for v in (leaf.left, leaf.right) if v is not None]
        return [v.operand for v in views if v.operand in self.plan.needs and not v.stop]

    def _terms(self, name: str, pass_: Pass) -> str:
        node = self.plan.by_name[name]
        assert isinstance(node, Reduction)
        return LENGTH[node.over]

    def stage(self, stage: Stage, name: str, forward: bool) -> StageText:
        calls = []
        for index, pass_ in enumerate(stage.passes):
            number = "" if self._is_only_pass(pass_, forward) else f"_{stage.level}"
            more = f"_{'abcdefgh'[index]}" if len(stage.passes) > 1 else ""
            calls.append(self.call(pass_, f"{name}_sweep{number}{more}", forward))
        return StageText([self.node(v) for v in stage.vectors], calls)

    def _is_only_pass(self, pass_: Pass, forward: bool) -> bool:
        stages = self.program.forward if forward else self.program.backward
        return sum(bool(s.passes) for s in stages) == 1

    # -- the end of the backward -----------------------------------------------------------------

    def final_scale(self, operand: str) -> str:
        if scaled_in_products(self.program, operand):
            return ""
        scale = operand_scale(self.plan, operand)
        return scale and self.names(scale)


def _shifts_read(program: Program, pass_: Pass) -> set[str]:
    """Owners of the shifts that a pass depends on in bounded mode."""
    names: set[str] = set()
    for code in (pass_.programs["bounded"], *([pass_.remake["bounded"]] if pass_.remake else [])):
        for expr, _ in code.hoisted.values():
            names |= {s.name for s in expr.free_symbols}
        for i in code.instructions:
            if isinstance(i, Compute):
                names |= {a.name for a in i.args if isinstance(a, VectorRef)}
                names |= {str(a.expr) for a in i.args if isinstance(a, ScalarRef)}
            if isinstance(i, Gemm):
                names |= {str(i.alpha), str(i.beta)}
    found = set()
    for red in program.logsumexps:
        owner = shift_owner(program, red)
        here = red.name in {r.name for r in pass_.reductions}
        if here or {inverse_of(red.name).name, shift_of(owner).name} & names:
            found.add(owner)
    return found


def _call(monoid: str, operand: sp.Expr, _: object) -> sp.Expr:
    from cl_compiler.lang import functions as fn

    return fn.to_rows(operand) if monoid == "to_rows" else fn.to_cols(operand)
