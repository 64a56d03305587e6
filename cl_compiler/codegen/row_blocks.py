"""Panels of whole rows: what is known of a block of rows once its columns are through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy as sp

from cl_compiler.codegen.symbols import finalise, narrowed, shift_owner
from cl_compiler.lang.ir import Let
from cl_compiler.lang.lower import shift_of
from cl_compiler.lang.tile_ir import Compute, Diagonal, TileProgram, VectorRef

if TYPE_CHECKING:
    from cl_compiler.codegen.passes import PassPrinter


def block_statistics(p: PassPrinter, code: TileProgram) -> list[str]:
    """Statistics of this block of rows, now complete, and what follows from them."""

    def in_block(name: str) -> str:
        text = p.symbol(name)
        axes = p.all_leaves[name].axes
        return text if name in p.local or not axes else f"{text}[i:i1]"

    wanted: set[str] = set()
    for i in code.instructions:
        if isinstance(i, Compute):
            wanted |= {a.name for a in i.args if isinstance(a, VectorRef)}
        if isinstance(i, Diagonal):
            wanted |= {s.name for s in i.expr.free_symbols}
            wanted |= {r.name for _, r in i.reads if isinstance(r, VectorRef)}
    wanted |= {g.row_scale for g in code.gradients if g.row_scale}
    stack = [n for n in wanted if n in p.local]
    needed: set[str] = set()
    while stack:
        name = stack.pop()
        if name in needed or name not in p.local:
            continue
        needed.add(name)
        node = p.plan.by_name.get(name)
        expr = (
            code.hoisted[name][0]
            if name in code.hoisted
            else (node.expr if isinstance(node, Let) else None)
        )
        if expr is not None:
            stack.extend(s.name for s in expr.free_symbols)
    lines = []
    for red in p.pass_.reductions:
        block = {t: f"{p.names(f'{t}_{red.name}')}[i:i1]" for t in ("max", "sum", "weighted")}
        for symbol, text in finalise(p.program, red, p.mode, p.names, block):
            if symbol in needed:
                lines.append(f"{p.symbol(symbol)} = {text}")
                if red.monoid == "logsumexp" and p.mode == "bounded" and symbol == red.name:
                    p.params.setdefault(p.names(shift_of(shift_owner(p.program, red)).name))
        if red.monoid in ("sum", "max") and red.name in needed:
            lines.append(f"{p.symbol(red.name)} = {p.names(red.name)}[i:i1]")
    printer = p.printer(in_block, block=True)

    def as_read(expr: sp.Expr) -> str:
        return narrowed(p.program, expr, printer.text(expr), p.all_leaves)

    for node in p.plan.nodes:
        if isinstance(node, Let) and node.name in needed:
            wide = node.name in p.program.wide
            text = printer.text(node.expr) if wide else as_read(node.expr)
            lines.append(f"{p.symbol(node.name)} = {text}")
    for symbol, (expr, _) in code.hoisted.items():
        if symbol in needed:
            lines.append(f"{p.symbol(symbol)} = {as_read(expr)}")
    return lines


__all__ = ["block_statistics"]
