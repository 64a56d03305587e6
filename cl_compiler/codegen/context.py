"""(Plan, Program) → template variables: the only bridge between planning and text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy as sp

from cl_compiler.codegen.heading import glossary, header
from cl_compiler.codegen.layout import wrap
from cl_compiler.codegen.names import Names
from cl_compiler.codegen.stages import StagePrinter, StageText
from cl_compiler.codegen.strips import StripStagePrinter
from cl_compiler.codegen.symbols import narrowed, scaled_in_products, view_text
from cl_compiler.codegen.whole import WholeStagePrinter
from cl_compiler.lang.differences import POSITIVES_AT_ONCE, SUMMED_AT_ONCE
from cl_compiler.lang.headroom import weighs_exponentials
from cl_compiler.lang.ir import SLOTS, Reduction, View, axes_of
from cl_compiler.lang.program import Program
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.whole import taken_at_positives
from cl_compiler.plan.types import Plan


@dataclass
class PositiveText:
    """A similarity at the positives: ``name = scale · <left_i, right_positive(i)>``.

    ``wide``: it is in fp64 whatever tiles are in.
    """

    name: str
    left: str
    right: str
    scale: str
    wide: bool


@dataclass
class LateText:
    """A gradient at the positives that is only known after the sweep over its matrix."""

    coefficient: str
    left: str
    right: str
    d_left: str
    d_right: str


@dataclass
class OperandText:
    name: str
    is_slots: bool
    needed: bool
    overwritten: bool
    """Its gradient need not be cleared."""
    final_scale: str
    norms: list[tuple[str, str, str]]
    """(coefficient, norm, prefix slice) of gradients through norms."""


def build_context(
    plan: Plan, program: Program, printer: StagePrinter | None = None
) -> dict[str, Any]:
    """Everything that the template reads; nothing is computed in Jinja.

    ``printer``: prints the passes and what is around them (None: for one process).
    """
    if plan.problem.dtype == "float64":  # so is everything
        program = program.narrowed
    sweep_plan = program.plan
    ir, gradient = sweep_plan.ir, sweep_plan.gradient
    cast = is_cast(plan)
    if printer is None:
        tiled = StripStagePrinter if plan.strip else StagePrinter
        chosen = WholeStagePrinter if program.is_whole else tiled
        printer = chosen(program, Names(sweep_plan), cast)
    names = printer.names
    forward = [printer.stage(s, "forward", True) for s in program.forward]
    backward = [printer.stage(s, "backward", False) for s in program.backward]
    vectors = printer.vectors()

    def text(expr: sp.Expr) -> str:
        return vectors.text(expr)

    inputs = [names(n) for n, leaf in ir.leaves.items() if leaf.kind == "input"]
    parameters = [names(n) for n in ir.parameters]
    used_kinds = {leaf.kind for leaf in sweep_plan.leaves.values()}
    by_ids = sweep_plan.positives == "ids" and ("is_positive" in sweep_plan.ir.leaves)
    ids = (["ids"] if ir.is_single_set else ["row_ids", "col_ids"]) if by_ids else []
    operands = [_operand(printer, op.name, SLOTS in op.axes) for op in ir.operands]
    grads: dict[str, str] = {}
    if gradient is not None:
        for n, expr in gradient.vectors.items():
            if sweep_plan.leaves[n].kind == "input":
                grads[names(n)] = text(expr)
        for n in ir.parameters:
            if n in sweep_plan.needs:
                explicit = gradient.parameters.get(n, sp.Integer(0))
                grads[names(n)] = text(explicit)
    dots = {names(p): pairs for p, pairs in (gradient.dots if gradient else {}).items()}
    parameter_of = {names(p): p for p in ir.parameters} if gradient else {}
    for name, value in grads.items():
        terms = printer.scale_gradient(parameter_of.get(name, ""))
        if value != "0" or not terms:
            kind = "DTYPE" if name in inputs else "torch.float64"
            terms.insert(0, f"torch.as_tensor({value}, dtype={kind})")
        grads[name] = " + ".join(terms)
    arguments = [op.name for op in operands] + inputs + parameters + ids
    given = {names(n): n for n, leaf in ir.leaves.items() if leaf.kind in ("input", "parameter")}
    given |= {names(n): n for n in ir.parameters}
    gradient_names = [op.name for op in operands if op.needed] + [given[g] for g in grads]
    saved = _saved(program, printer)
    taken = taken_at_positives(sweep_plan) if program.is_whole else {}
    values = [text(e) for e in (ir.value, *(e for _, e in ir.outputs))]
    statements = _statements([*forward, *backward], printer, [*values, *grads.values()])
    helpers = _helpers(statements)
    return {
        "plan": plan,
        "loss_name": plan.loss_name,
        "arguments": arguments,
        "given": given,
        "argument_names": _tuple(f'"{given.get(a, a)}"' for a in arguments),
        "output_names": _tuple(f'"{n}"' for n, _ in ir.outputs),
        "output_values": _tuple(
            f"torch.as_tensor({text(e)}, dtype=torch.float64)"
            if printer.numbers(e)
            else narrowed(program, e, text(e), printer.leaves)
            for _, e in ir.outputs
        ),
        "gradient_names": _tuple(f'"{g}"' for g in gradient_names),
        "differentiated": _tuple([*(op.name for op in operands if op.needed), *grads]),
        "gradient_targets": _targets([op.name for op in operands if op.needed] + list(grads)),
        "converted": [op.name for op in operands if op.needed and cast] + list(grads),
        "argument_gradients": ", ".join(
            f"d_{a}" if given.get(a, a) in gradient_names else "None" for a in arguments
        ),
        "gradient_values": _tuple(
            [f"d_{op.name}" for op in operands if op.needed]
            + [f"d_{name} * grad_output" for name in grads]
        ),
        "doc": ir.doc.splitlines(),
        "header": header(plan, program),
        "glossary": [wrap(f"{n}: {meaning}") for n, meaning in glossary(printer, statements)],
        "hoists": any(
            m.hoisted for s in [*forward, *backward] for c in s.calls for m in c.modes.values()
        ),
        "dtype": "torch.float64" if plan.problem.dtype == "float64" else "torch.float32",
        "cast": cast,
        "width": plan.problem.D,
        "tile": plan.tile,
        "kept_tiles": plan.kept_tiles,
        "strip": plan.strip,
        "multiplied": ", ".join(f"{op.name}.shape" for op in operands)
        if plan.library == "onednn"
        else "",
        "keeps": program.keeps_tiles,
        "whole": program.is_whole,
        "wide": bool(program.wide),
        "summed_at_once": SUMMED_AT_ONCE,
        "tiled_positives": POSITIVES_AT_ONCE if program.subtracts_positives else 0,
        "unshifted": program.is_unshifted,
        "weighs_exponentials": weighs_exponentials(program),
        "row_scaled": any(
            tile.row_scale
            for pass_ in program.passes
            for code in pass_.programs.values()
            for tile in code.gradients
        ),
        "fused": program.fused,
        "positives": sweep_plan.positives,
        "single_set": ir.is_single_set,
        "operands": operands,
        "inputs": inputs,
        "parameters": parameters,
        "ids": ids,
        "sizes": _sizes(program),
        "norms": [
            _norm(names, n, leaf.left)
            for n, leaf in sweep_plan.leaves.items()
            if leaf.kind == "norm" and leaf.left is not None
        ],
        "positive_sims": [
            _positive(names, n, leaf, n in program.wide)
            for n, leaf in sweep_plan.leaves.items()
            if leaf.kind == "similarity_at_positive" and n not in taken
        ],
        "forward": forward,
        "backward": backward,
        "sweeps": _sweep_texts([*forward, *backward]),
        "modes": program.modes,
        "shifts": [names(f"shift_{o}") for o in _owners(program)],
        "value": text(ir.value),
        "number": _as_number(printer, ir.value) if program.is_whole else "",
        "outputs": [(n, text(e)) for n, e in ir.outputs],
        "required": [(m, text(e)) for m, e in ir.required if not _is_certain(sweep_plan, e)],
        "saved": saved,
        "needs_gradient": gradient is not None,
        "gradients": grads,
        "dots": any("_inner(" in text for text in grads.values()) if program.is_whole else dots,
        "late": _late(printer),
        "halves": sweep_plan.positives == "views",
        "used_kinds": used_kinds,
        "helpers": helpers,
        "tile_helpers": helpers,
    }


def is_cast(plan: Plan) -> bool:
    """Whether inputs are 16-bit, and widened tile by tile."""
    return plan.problem.dtype in ("bfloat16", "float16")


def _tuple(elements: Iterable[str]) -> str:
    parts = list(elements)
    return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"


def _as_number(printer: StagePrinter, value: sp.Expr) -> str:
    """The value by Python's arithmetic, a tenth of what operators on scalars take; "" where Python
    could raise instead of giving an infinity or NaN."""
    scalars = {s for s in value.free_symbols if not printer.numbers(s)}
    known = value.xreplace({s: sp.Integer(1) for s in scalars})
    terms = [f for a in sp.Add.make_args(value) for f in sp.Mul.make_args(a)]
    if not (printer.numbers(known) and all(f in scalars or printer.numbers(f) for f in terms)):
        return ""
    vectors = printer.vectors(
        lambda n: f"{printer.names(n)}{'.item()' if n in {s.name for s in scalars} else ''}"
    )
    return vectors.text(value)


def _targets(names: list[str]) -> str:
    """The gradients of some arguments, as targets of an assignment."""
    text = ", ".join(f"d_{name}" for name in names)
    return f"({text}{',' * bool(names)})" if len(names) < 2 else text


def _is_certain(plan: SweepPlan, number: sp.Expr) -> bool:
    """Whether a number of elements is positive whatever the inputs: an axis has no zero length,
    and without ids some column has a positive."""
    leaf, node = plan.leaves.get(str(number)), plan.by_name.get(str(number))
    if leaf is not None and leaf.kind == "count":
        return True
    if plan.positives == "ids" or not isinstance(node, Reduction) or not node.operand.is_number:
        return False
    sources = [plan.by_name.get(s.name) for s in node.where.free_symbols]
    return bool(sources) and all(
        isinstance(s, Reduction) and s.monoid in ("to_rows", "to_cols") and s.operand.is_number
        for s in sources
    )


def _owners(program: Program) -> list[str]:
    from cl_compiler.lang.lower_pass import bounded_logits

    return list(bounded_logits(program.plan).values()) if "bounded" in program.modes else []


def _operand(printer: StagePrinter, name: str, is_slots: bool) -> OperandText:
    plan = printer.plan
    norms = []
    if plan.gradient is not None:
        for n, expr in plan.gradient.vectors.items():
            leaf = plan.leaves[n]
            if leaf.kind == "norm" and leaf.left is not None and leaf.left.operand == name:
                part = "" if leaf.left.prefix is None else f"[:, :{leaf.left.prefix}]"
                norms.append((printer.vectors().text(expr), printer.names(n), part))
    needed = name in plan.needs and plan.gradient is not None
    overwritten = name in printer.overwritten
    return OperandText(name, is_slots, needed, overwritten, printer.final_scale(name), norms)


def _norm(names: Names, name: str, view: View) -> tuple[str, str]:
    return names(name), view_text(view)


def _positive(names: Names, name: str, leaf: object, wide: bool) -> PositiveText:
    left, right, scale = leaf.left, leaf.right, leaf.scale  # type: ignore[attr-defined]
    owner = names(scale) if scale else ""
    return PositiveText(names(name), view_text(left), view_text(right), owner, wide)


def _late(printer: StagePrinter) -> list[LateText]:
    plan = printer.plan
    result = []
    for sim in plan.late_positives:
        leaf = plan.leaves[sim]
        assert plan.gradient is not None and leaf.left is not None and leaf.right is not None
        text = printer.vectors().text(plan.gradient.positives[sim])
        for side, view in (("left", leaf.left), ("right", leaf.right)):
            if view.operand not in plan.needs or view.stop:
                continue
            own = leaf.scale and scaled_in_products(printer.program, view.operand)
            scaled = f"({text}) * {printer.names(leaf.scale or '')}" if own else text
            target = f"d_{view_text(view)}"
            result.append(
                LateText(
                    scaled,
                    view_text(leaf.left),
                    view_text(leaf.right),
                    target if side == "left" else "",
                    target if side == "right" else "",
                )
            )
    return result


def _sizes(program: Program) -> list[tuple[str, str]]:
    """(name, expression) of the axis lengths that the file uses."""
    ir = program.plan.ir
    result = []
    by_axis: dict[str, str] = {}
    for op in ir.operands:
        for dim, axis in enumerate(op.axes):
            if ir.is_single_set and op.name == "z":
                by_axis.setdefault("rows", "z.shape[0]")
                by_axis.setdefault("cols", "z.shape[0]")
            else:
                by_axis.setdefault(axis, f"{op.name}.shape[{dim}]")
    for axis in ("rows", "cols", "slots", "bank"):
        if axis in by_axis:
            result.append((axis, by_axis[axis]))
    for n, leaf in ir.leaves.items():
        if leaf.kind == "input" and leaf.axes[0] not in by_axis:
            by_axis[leaf.axes[0]] = n
            result.append((leaf.axes[0], f"{n}.shape[0]"))
    return result


def _saved(program: Program, printer: StagePrinter) -> list[str]:
    """Vectors that the backward reads and only the forward can make, in both modes."""
    if program.fused or program.plan.gradient is None:
        return []
    names = printer.names
    result = [names(n) for n in program.plan.saved]
    if "bounded" in program.modes:
        result += [names(f"inv_{r.name}") for r in program.logsumexps]
    return result


def _sweep_texts(stages: list[StageText]) -> list[object]:
    return [m.text for s in stages for c in s.calls for m in c.modes.values()]


def _statements(stages: list[StageText], printer: StagePrinter, values: list[str]) -> str:
    """Everything that is printed of a loss, ``values`` of expressions included."""
    lines = [*values]
    for stage in stages:
        lines += stage.vectors
        for call in stage.calls:
            lines += [call.largest, *(b for _, b in call.shifts)]
            for mode in call.modes.values():
                lines += [*mode.hoisted, *mode.finish, *mode.text.lines]
    lines += [text.coefficient for text in _late(printer)]
    for op in printer.plan.ir.operands:
        lines += [c for c, _, _ in _operand(printer, op.name, False).norms]
    return "\n".join(lines)


def _helpers(statements: str) -> set[str]:
    """Which helper functions the file calls."""
    known = (
        "_product",
        "_crossings",
        "_largest_norm",
        "_inverse",
        "_present",
        "_remainder",
        "_ratio",
        "_finish_logsumexp",
        "_lse_of_softmax",
        "_sum",
        "_add_logsumexp",
        "_add_softmean",
        "_to_columns",
        "_logsubexp",
        "_one_minus_exp",
    )
    found = {k for k in known if f"{k}(" in statements}
    found |= {"TIE_TOLERANCE"} if "TIE_TOLERANCE" in statements else set()
    found |= {"LOG2E"} if "exp2" in statements else set()
    if "_logsubexp" in found:
        found.add("_one_minus_exp")
    return found


__all__ = ["axes_of", "build_context"]
