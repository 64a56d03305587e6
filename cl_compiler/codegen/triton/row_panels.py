"""The schedule ``panel``: whole rows of shared exponentials, multiplied out while they lie there.

A kernel writes exp(logits - shift) of a panel of rows and its row sums; with those the gradient is
the panel times one factor a row, which the library's products leave to their operands.  What fails
the guard is made again on the device by kernels that know the row maxima.  Elements at positives
go to a vector of their own, in fp32: there a gradient is a small difference of large numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy as sp

from cl_compiler.codegen.triton.kernels import KernelPrinter
from cl_compiler.codegen.triton.text import KernelText
from cl_compiler.lang.ir import Reduction
from cl_compiler.lang.lower_pass import lower_pass
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import (
    Accumulate,
    Barrier,
    Compute,
    Diagonal,
    Gemm,
    Instruction,
    ScalarRef,
    TileProgram,
    VectorRef,
)

AT_POSITIVE = "at_positive"
"""The pointer to elements at positives: [M] fp32."""


@dataclass
class PanelText(KernelText):
    """What the template needs of a kernel that takes elements at positives out of its tile."""

    takes: bool = False

    @property
    def in_strips(self) -> bool:
        return False

    @property
    def workspaces(self) -> list[str]:
        return [*super().workspaces, *[AT_POSITIVE] * self.takes]


class PanelKernelPrinter(KernelPrinter):
    """Prints a pass whose gradient tile has zeros for its positives."""

    kind = PanelText

    def _diagonal(self, k: KernelText, d: Diagonal) -> list[str]:
        if d.how != "take":
            return super()._diagonal(k, d)
        assert isinstance(k, PanelText)
        k.takes = True
        filled = super()._diagonal(k, replace(d, how="fill", expr=sp.Integer(0)))
        tile = filled[-1].split("=")[0].strip()
        copies = [line for line in filled if not line.startswith(("if ", " "))]
        return [
            *copies,  # of the tile, if it is read elsewhere
            "if _crosses(i, j, 0, BLOCK_M, BLOCK_N):",
            "    on_positive = offs_n[None, :] == offs_m[:, None]",
            "    is_here = (offs_m >= j) & (offs_m < min(j + BLOCK_N, col_stop))",
            f"    taken = tl.sum(tl.where(on_positive, {tile}, 0.0), 1)",
            f"    tl.store({AT_POSITIVE} + offs_m, taken, mask=is_here & (offs_m < row_stop))",
            f"    {tile} = tl.where(on_positive, 0.0, {tile})",
        ]

    def _has_positives(self) -> bool:
        """They are taken out before anything is rounded, or excluded."""
        return False


def obstacle_of_panels(program: Program) -> str:
    """Why a program with the schedule ``panel`` has no such kernels; "" where it has."""
    passes = [p for p in program.passes if p.gradients]
    if len(passes) != 1 or not passes[0].has_barrier or len(passes[0].gradients) != 1:
        return "'panel' has kernels for one matrix whose gradient waits for its row sums"
    (pass_,) = passes
    if program.plan.positives == "views":  # Triton 3.7's LLVM fails on it for sm_100, too
        return "'panel' has no kernels for two views of one set: 'spill' makes half of their matrix"
    if program.modes != ("bounded", "running"):
        return "'panel' has kernels for logits that the operands' norms bound"
    if any(r.monoid != "logsumexp" for r in pass_.reductions) or len(pass_.reductions) != 1:
        return "'panel' has kernels for one logsumexp a row, and for no other statistic"
    code = pass_.programs["bounded"]
    after = list(code.instructions)
    after = after[next(n for n, i in enumerate(after) if isinstance(i, Barrier)) + 1 :]
    if not code.gradients[0].row_scale or not all(_is_positive(i) for i in after):
        return "'panel' has kernels for gradients that are exponentials times one factor a row"
    return ""


def _is_positive(instruction: Instruction) -> bool:
    return (
        isinstance(instruction, Diagonal)
        and instruction.where == "positive"
        and instruction.how == "add"
    )


def panel_passes(plan: SweepPlan, pass_: Pass) -> tuple[Pass, Pass, Pass]:
    """One kernel each: bounded exponentials and their sums; maxima and sums; safe exponentials."""
    rows = lower_pass(plan, pass_.grid, "running", reductions=pass_.reductions)
    tiles = lower_pass(plan, pass_.grid, "running", gradients=pass_.gradients)
    return (
        replace(pass_, programs={"bounded": _taken(pass_.programs["bounded"])}),
        replace(pass_, programs={"running": rows}, gradients=()),
        replace(pass_, programs={"running": _taken(tiles)}, reductions=()),
    )


def _taken(code: TileProgram) -> TileProgram:
    """Positives out of the gradient tile, and scales left to the host."""
    instructions = tuple(
        replace(i, how="take", expr=sp.Integer(0)) if _is_positive(i) else i  # type: ignore[arg-type]
        for i in code.instructions
        if not isinstance(i, Barrier)
    )
    read = {name for i in instructions for name in _reads(i)}
    return replace(
        code,
        instructions=instructions,
        hoisted={name: value for name, value in code.hoisted.items() if name in read},
        gradients=tuple(replace(g, scale=sp.Integer(1), row_scale="") for g in code.gradients),
    )


def _reads(i: Instruction) -> set[str]:
    """Names of the vectors and scalars that an instruction reads."""
    exprs = []
    names = set()
    match i:
        case Gemm():
            exprs = [i.alpha, i.beta]
        case Compute():
            names = {a.name for a in i.args if isinstance(a, VectorRef)}
            exprs = [a.expr for a in i.args if isinstance(a, ScalarRef)]
        case Diagonal():
            names = {r.name for _, r in i.reads if isinstance(r, VectorRef)}
            exprs = [i.expr, *(r.expr for _, r in i.reads if isinstance(r, ScalarRef))]
        case Accumulate() | Barrier():
            pass
    return names | {s.name for e in exprs for s in sp.sympify(e).free_symbols}


def lse_of(pass_: Pass) -> Reduction:
    (red,) = pass_.reductions
    return red
