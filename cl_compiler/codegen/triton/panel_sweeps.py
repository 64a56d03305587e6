"""The launcher of panels of whole rows: see ``row_panels``."""

from __future__ import annotations

from collections.abc import Mapping

import sympy as sp

from cl_compiler.codegen.printers import bare
from cl_compiler.codegen.symbols import LENGTH
from cl_compiler.codegen.triton.core import CoreTile
from cl_compiler.codegen.triton.row_panels import PanelKernelPrinter, lse_of, panel_passes
from cl_compiler.codegen.triton.sweep_text import PanelSweepText
from cl_compiler.codegen.triton.text import KernelText, identifiers, low_of
from cl_compiler.codegen.triton.vectors import DeviceStages
from cl_compiler.lang.ir import View
from cl_compiler.lang.lower import inverse_of, shift_of
from cl_compiler.lang.lower_pass import lower_pass
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.tile_ir import Mode
from cl_compiler.plan.precision import SPLIT


def panel_sweep(
    program: Program,
    pass_: Pass,
    host: DeviceStages,
    name: str,
    tiles: Mapping[Mode, CoreTile],
    widths: dict[str, int],
    precision: str,
    descriptors: bool,
    terms: str,
) -> tuple[PanelSweepText, list[PanelKernelPrinter]]:
    """The launcher, and the printers whose hoisted vectors are known before it."""
    names, plan = host.names, program.plan
    kinds: tuple[tuple[Mode, str], ...] = (
        ("bounded", "bounded"),
        ("running", "maxima"),
        ("running", "safe"),
    )
    bounded, maxima, safe = (
        PanelKernelPrinter(
            program, p, mode, names, f"{name}_{kind}", tiles[mode], descriptors, "reduce"
        )
        for p, (mode, kind) in zip(panel_passes(plan, pass_), kinds, strict=True)
    )
    kernels: list[KernelText] = []
    for printer in (bounded, maxima, safe):
        printer.copies = host.copies
        kernels.append(printer.text(widths, precision))
        kernels[-1].guarded = printer is not bounded
    red = lse_of(pass_)
    lse, shift = names(red.name), names(shift_of(red.name).name)
    known, late = _split(safe, red.name)
    safe.hoisted = known

    def on_panel(symbol: str) -> str:
        return f"{lse}[i:i1]" if symbol == red.name else safe.symbol(symbol)

    vectors = host.vectors_of(safe.leaves, safe.is_python, on_panel)
    texts = {identifier: vectors.text(expr) for identifier, expr in late}
    safe_vectors = [
        (pointer, bare(text.replace(i, f"({texts[i]})")))
        for pointer, text in kernels[2].pointers
        for i in identifiers(text)
        if i in texts
    ]
    code = pass_.programs["bounded"]
    factor = sp.simplify(code.hoisted[code.gradients[0].row_scale][0] / inverse_of(red.name))
    other = lower_pass(plan, pass_.grid, "running", gradients=pass_.gradients).gradients[0].scale
    text, safe_text = host.vectors().text(factor), host.vectors().text(other)
    sums = names(f"sum_{red.name}")
    sweep = PanelSweepText(
        name,
        kernels,
        [],
        [],
        [],
        LENGTH[pass_.grid[0]],
        LENGTH[pass_.grid[1]],
        False,
        lse=lse,
        positive=names.fresh("d_positive") if any(_takes(k) for k in kernels) else "",
        finished=(
            f"torch.where(unsafe != 0, _finish_logsumexp(maxima, sums), "
            f"torch.log({sums}) + {shift})"
        ),
        guard=f"_out_of_range({shift}, {sums}, {terms})",
        safe_vectors=safe_vectors,
        scale=f"torch.where(unsafe != 0, {safe_text}, {text} * _inverse({lse}[i:i1], {shift}))",
        products=_products(program, pass_, precision),
    )
    late_texts = [text, safe_text, shift]
    sweep.params = _params(sweep, pass_, program, [*texts], late_texts, bool(host.copies))
    return sweep, [bounded, maxima, safe]


def _takes(kernel: KernelText) -> bool:
    return bool(getattr(kernel, "takes", False))


def _split(
    printer: PanelKernelPrinter, lse: str
) -> tuple[list[tuple[str, sp.Expr]], list[tuple[str, sp.Expr]]]:
    """What is hoisted before the sweep, and what waits for a panel's logsumexps."""
    late = [h for h in printer.hoisted if lse in {s.name for s in h[1].free_symbols}]
    return [h for h in printer.hoisted if h not in late], late


def _products(program: Program, pass_: Pass, precision: str) -> list[str]:
    """Statements that multiply a panel, its rows times ``scale``, into the gradients."""
    (similarity,) = pass_.gradients
    leaf = program.plan.leaves[similarity]
    left, right = leaf.left, leaf.right
    assert left is not None and right is not None
    workspace = f"g_{similarity}"
    tiles = [f"{w}[:m, :n]" for w in (workspace, *([low_of(workspace)] * (precision == SPLIT)))]

    def panel(suffix: str) -> str:
        parts = [t + suffix for t in tiles]
        return parts[0] if len(parts) == 1 else f"({', '.join(parts)})"

    def needed(view: View) -> bool:
        return view.operand in program.plan.needs and not view.stop

    lines = []
    if needed(left):
        there, here = _part(right, ""), _part(left, "i:i1")
        lines += [
            f"product = torch.zeros_like(d_{here})",
            f"_add_product(product, {panel('')}, {there})",
            f"d_{here}.addcmul_(product, scale)",
        ]
    if needed(right):
        here = _part(left, "i:i1")
        lines.append(f"_add_product(d_{_part(right, '')}, {panel('.T')}, {here} * scale)")
    return lines


def _part(view: View, rows: str) -> str:
    if view.prefix is None:
        return f"{view.operand}[{rows}]" if rows else view.operand
    return f"{view.operand}[{rows or ':'}, :{view.prefix}]"


def _params(
    sweep: PanelSweepText,
    pass_: Pass,
    program: Program,
    late: list[str],
    texts: list[str],
    copies: bool,
) -> list[str]:
    leaf = program.plan.leaves[pass_.gradients[0]]
    params: dict[str, None] = {}
    views = [v for v in (leaf.left, leaf.right) if v is not None]
    params.update(dict.fromkeys(v.operand for v in views if copies))
    for k in sweep.kernels:
        params.update(dict.fromkeys(k.operands))
    totals = {f"d_{v.operand}" for v in views if v.operand in program.plan.needs and not v.stop}
    params.update(dict.fromkeys(sorted(totals)))
    params.update(dict.fromkeys([sweep.row_length, sweep.col_length]))
    params.update(dict.fromkeys(["half"] if any(k.halves for k in sweep.kernels) else []))
    for k in sweep.kernels:
        for _, text in [*k.scalars, *k.numbers, *k.pointers]:
            params.update(dict.fromkeys(i for i in identifiers(text) if i not in late))
    for text in texts:
        params.update(dict.fromkeys(identifiers(text)))
    return list(params)
