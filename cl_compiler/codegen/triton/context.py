"""(Plan, Program) → variables of the Triton templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy as sp

from cl_compiler.codegen.context import LateText, PositiveText, build_context
from cl_compiler.codegen.names import Names
from cl_compiler.codegen.symbols import operand_scale
from cl_compiler.codegen.triton.core import CoreTile, column_sums, reads_by_descriptors
from cl_compiler.codegen.triton.eight_bits import EightBitCopy, copies_of, read_as
from cl_compiler.codegen.triton.owner_tiles import tiles_of_pass
from cl_compiler.codegen.triton.retain import (
    KEPT_STEP,
    keeps_positives,
    retained,
    store_lengths,
)
from cl_compiler.codegen.triton.row_gradients import inner_of, leaving_operands
from cl_compiler.codegen.triton.slots import SLOT_ROWS, SlotSweepText
from cl_compiler.codegen.triton.sweep_text import PanelSweepText, StageText
from cl_compiler.codegen.triton.sweeps import SweepPrinter
from cl_compiler.codegen.triton.text import residual_of
from cl_compiler.lang.ir import SLOTS, View
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import Mode
from cl_compiler.plan.precision import FP8, SPLIT, rounded_operands
from cl_compiler.plan.types import DTYPE_BYTES, Plan

HELPERS = (
    "_exp",
    "_sigmoid",
    "_softplus",
    "_relu",
    "_maximum",
    "_largest",
    "_expm1",
    "_logaddexp",
    "_power",
    "_fold",
    "_crosses",
    "_base",
    "_logsumexp",
    "_softmean",
    "_merge_logsumexp",
    "_merge_softmean",
    "_log1p",
    "_finish_logsumexp",
    "_inverse",
    "_ratio",
    "_present",
    "_to_columns",
    "_logsubexp",
    "_one_minus_exp",
    "_largest_norm",
    "TIE_TOLERANCE",
)
NEEDED_BY = {
    "_softplus": ("_log1p",),
    "_logaddexp": ("_log1p",),
    "_largest": ("_maximum",),
    "_logsumexp": ("_base",),
    "_softmean": ("_base",),
    "_merge_logsumexp": ("_base",),
    "_merge_softmean": ("_base",),
    "_logsubexp": ("_one_minus_exp",),
}


def build_triton_context(
    plan: Plan, program: Program, arch: str, core: CoreTile | None = None
) -> dict[str, Any]:
    """Everything that the templates read; ``core``: a tile for all kernels, else one for each."""
    program = program.narrowed
    if program.fused and "bounded" in program.modes and program.schedule != "panel":
        # A guard is known when the gradients are formed already: the safe kernel alone, then.
        program = replace(program, modes=("running",))
    kept: dict[str, Any] = {}
    if program.schedule == "retain":
        program = retained(program)
        rows, cols = store_lengths(program)
        kept = {"rows": rows, "cols": cols, "step": KEPT_STEP}
        kept["positives"] = keeps_positives(program)
    common = build_context(plan, program)
    leaving = leaving_operands(program, plan.problem.dtype)
    rounded = rounded_operands(plan.problem.dtype, plan.precision)
    if rounded:
        plan = replace(plan, problem=replace(plan.problem, dtype=rounded))
    names = Names(program.plan)
    operands = {op.name: plan.problem.operands.get(op.name, plan.problem.D) for op in _ops(program)}

    def tiles_of(pass_: Pass, modes: Sequence[Mode]) -> Mapping[Mode, CoreTile]:
        if core is not None:
            return dict.fromkeys(modes, core)
        return tiles_of_pass(plan.problem, plan.precision, program, pass_, modes, arch)

    copies = copies_of(program, names) if plan.precision == FP8 else {}
    descriptors = reads_by_descriptors(plan.problem, plan.precision, arch)
    operands |= {c.copy: operands[op] for op, c in copies.items()}
    printer = SweepPrinter(
        program,
        names,
        tiles_of,
        operands,
        _dot_precision(plan),
        plan.problem.dtype,
        descriptors,
        column_sums(arch),
        leaving,
        copies,
    )
    forward = [printer.stage(s, "forward", True) for s in program.forward]
    backward = [printer.stage(s, "backward", False) for s in program.backward]
    own = _texts(program, printer)
    stages = [*forward, *backward]
    sweeps = [s for stage in stages for call in stage.calls for s in call.sweeps]
    lines = [line for s in stages for c in s.calls for line in c.lines]
    lines += [line for s in stages for line in s.vectors]
    kernels = [k for s in sweeps for k in s.kernels]
    lines += [t for k in kernels for t in (*k.body, *k.start, *k.finish)]
    lines += _strings(own)
    lines += [t for s in sweeps if isinstance(s, PanelSweepText) for t in s.statements]
    blocks = "\n".join(t for s in sweeps if isinstance(s, SlotSweepText) for t in s.statements)
    lines.append(blocks)
    unsure = {message for message, _ in common["required"]}
    tile = _panel(plan, [k.tile for k in kernels], any(s.symmetric for s in sweeps))
    return {
        **common,
        **own,
        "required": [r for r in own["required"] if r[0] in unsure],
        "arch": arch,
        "operand_dtype": f"torch.{rounded}" if rounded else "",
        "descriptors": descriptors,
        "forward": forward,
        "backward": backward,
        "sweeps": sweeps,
        "panel": tile,
        "guarded": len(program.modes) > 1,
        "inverses": _inverses(program, printer),
        "leaving": leaving,
        "slot_rows": SLOT_ROWS if any(isinstance(s, SlotSweepText) for s in sweeps) else 0,
        "tile_helpers": {h for h in ("_add_logsumexp", "_add_softmean") if f"{h}(" in blocks},
        "adds_at_positives": bool(own["late"])
        or any(r.residual for s in sweeps for r in s.leaving),
        "kept": kept,
        "copies": [(op, c.copy, c.unit) for op, c in copies.items()],
        "norms": [(n, *read_as(part, copies)) for n, part in common["norms"]],
        "positive_sims": [_read_positive(p, copies) for p in common["positive_sims"]],
        "saved": [names(n) for n in program.plan.saved]
        + ["kept"] * bool(kept)
        + ["kept_positive"] * bool(kept.get("positives")),
        "helpers": helpers_in("\n".join(lines)),
        "kinds": {p.kind for k in kernels for p in k.partials},
        "has_strips": any(k.in_strips for k in kernels),
        "has_products": any(k.gradients for k in kernels),
        "anchor": printer.host.anchor,
        "nvidia": arch.startswith("sm_"),
        "precision": _dot_precision(plan),
        "split": _dot_precision(plan) == SPLIT,
        "sixteen": DTYPE_BYTES[plan.problem.dtype] == 2,
        "needs_rows": "_largest_norm" in "".join(lines)
        or bool(common["dots"] or common["positive_sims"] or common["norms"]),
    }


def _read_positive(p: PositiveText, copies: Mapping[str, EightBitCopy]) -> PositiveText:
    """A similarity at positives, made of what the others are made of."""
    (left, unit), (right, other) = read_as(p.left, copies), read_as(p.right, copies)
    return replace(
        p, left=left, right=right, scale=" * ".join(filter(None, (unit, other, p.scale)))
    )


def _ops(program: Program) -> tuple[Any, ...]:
    return program.plan.ir.operands


def _dot_precision(plan: Plan) -> str:
    if DTYPE_BYTES[plan.problem.dtype] == 2:
        return ""
    return plan.precision


def _panel(plan: Plan, cores: Iterable[CoreTile], symmetric: bool) -> tuple[int, int]:
    """Rows and columns of one launch: what the plan says, in whole tiles.

    ``symmetric``: some pass visits half of its panels, so they are square.
    """
    cores = list(cores)
    rows = max((c.rows for c in cores), default=1)
    cols = max((c.cols for c in cores), default=1)
    step = max(rows, cols)  # tiles are powers of two, so that one divides the other
    whole = [-(-length // step) * step for length in (plan.tile.rows, plan.tile.cols)]
    return (max(whole), max(whole)) if symmetric else (whole[0], whole[1])


def _inverses(program: Program, printer: SweepPrinter) -> list[str]:
    if "bounded" not in program.modes or program.fused:
        return []
    return [printer.host.inverse(r) for r in program.logsumexps]


def _texts(program: Program, printer: SweepPrinter) -> dict[str, Any]:
    """What ``build_context`` prints for tensors on a CPU, for tensors on a device."""
    plan, names, vectors = program.plan, printer.names, printer.host.vectors()
    ir, gradient = plan.ir, plan.gradient
    grads: dict[str, str] = {}
    norms: dict[str, list[tuple[str, str, str]]] = {op.name: [] for op in ir.operands}
    if gradient is not None:
        explicit: dict[str, sp.Expr] = {}
        for n, expr in gradient.vectors.items():
            leaf = plan.leaves[n]
            if leaf.kind == "input":
                explicit[n] = expr
            elif leaf.kind == "norm" and leaf.left is not None:
                part = "" if leaf.left.prefix is None else f"[:, :{leaf.left.prefix}]"
                norms[leaf.left.operand].append((vectors.text(expr), names(n), part))
        for n in ir.parameters:
            if n in plan.needs:
                explicit[n] = gradient.parameters.get(n, sp.Integer(0))
        for n, expr in explicit.items():
            terms = [
                f"{'' if w == 1 else f'{float(w)} * '}{_inner(op, plan, printer)}"
                for op, w in gradient.dots.get(n, ())
            ]
            if expr != 0 or not terms:
                terms.insert(0, _as_tensor(vectors.text(expr), expr, n, plan, printer))
            grads[names(n)] = " + ".join(terms)
    return {
        "value": vectors.text(ir.value),
        "value_is_number": printer.host.numbers(ir.value),
        "output_texts": [_as_tensor(vectors.text(e), e, "", plan, printer) for _, e in ir.outputs],
        "required": [(m, vectors.text(e)) for m, e in ir.required],
        "gradients": grads,
        "late": _late(plan, printer),
        "norm_gradients": norms,
    }


def _inner(operand: str, plan: SweepPlan, printer: SweepPrinter) -> str:
    """<operand, its gradient>: what the sweep summed, or of the whole gradient."""
    if operand in printer.leaving:
        return inner_of(operand)
    is_slots = any(op.name == operand and SLOTS in op.axes for op in plan.ir.operands)
    as_rows = ".flatten(0, 1)" if is_slots else ""
    return f"_inner({operand}{as_rows}, d_{operand}{as_rows})"


def _as_tensor(text: str, expr: sp.Expr, name: str, plan: SweepPlan, printer: SweepPrinter) -> str:
    """Text that is a tensor also where the expression is a number."""
    if not (expr.is_number or printer.host.numbers(expr)):
        return text
    shape = "()"
    if name and plan.leaves[name].kind == "input":
        shape = f"{printer.names(name)}.shape"
    anchor = printer.host.anchor
    return f"torch.full({shape}, {text}, dtype=torch.float64, device={anchor}.device)"


def _late(plan: SweepPlan, printer: SweepPrinter) -> list[LateText]:
    """What is added at positives after the sweeps: gradients that were not known before, and what
    rounding took off the others."""
    known = (*plan.late_positives, *printer.positives, *printer.residuals)
    assert plan.gradient is not None or not known
    result = []
    for sim in (*plan.late_positives, *printer.positives):
        text = printer.host.vectors().text(plan.gradient.positives[sim])  # type: ignore[union-attr]
        if sim in printer.positives:
            text = f"{printer.positives[sim]} + {text}".replace("+ -", "- ")
        result += _late_of(plan, printer, sim, text, ("left", "right"))
    for sim, symmetric in printer.residuals.items():
        sides = ("left",) if symmetric else ("left", "right")
        result += _late_of(plan, printer, sim, residual_of(sim), sides)
    return result


def _late_of(
    plan: SweepPlan, printer: SweepPrinter, sim: str, text: str, sides: tuple[str, ...]
) -> list[LateText]:
    leaf = plan.leaves[sim]
    assert leaf.left is not None and leaf.right is not None
    texts: dict[str, list[str]] = {}
    for index, (side, view) in enumerate((("left", leaf.left), ("right", leaf.right))):
        if side not in sides or view.operand not in plan.needs or view.stop:
            continue
        if view.operand in printer.leaving:
            continue
        own = leaf.scale and operand_scale(plan, view.operand) == "mixed"
        scaled = f"({text}) * {printer.names(leaf.scale or '')}" if own else text
        texts.setdefault(scaled, ["None", "None"])[index] = f"d_{_whole(view)}"
    return [LateText(t, _whole(leaf.left), _whole(leaf.right), *to) for t, to in texts.items()]


def _whole(view: View) -> str:
    return view.operand if view.prefix is None else f"{view.operand}[:, :{view.prefix}]"


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _strings(v)]
    if isinstance(value, LateText):
        return [value.coefficient]
    return [t for v in value for t in _strings(v)] if isinstance(value, (list, tuple)) else []


def helpers_in(text: str) -> set[str]:
    """The helpers that a text calls, and those that they call."""
    found = {h for h in HELPERS if (f"{h}(" in text or (h == "TIE_TOLERANCE" and h in text))}
    for name in tuple(found):
        found.update(NEEDED_BY.get(name, ()))
    return found


__all__ = ["StageText", "build_triton_context", "helpers_in"]
