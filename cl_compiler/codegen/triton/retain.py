"""The schedule ``retain``: the forward's exponentials, kept in bf16, spare the backward a product.

Both directions of a loss share one exponential, shifted by a bound of the logits.  The kernel that
sums it up also stores it; the backward turns the stored tile into dL/dS.  Rounding it is an error
of 2**-9 of each element, as rounding dL/dS itself is; elements at positives, where a gradient is a
small difference of large numbers, are kept in fp32 beside it.  Where the guard trips nothing that
was kept is read: the safe kernel makes its tiles again.
"""

from __future__ import annotations

from dataclasses import replace

from cl_compiler.codegen.symbols import LENGTH
from cl_compiler.codegen.triton.kernels import KernelPrinter
from cl_compiler.codegen.triton.text import KernelText
from cl_compiler.lang.program import Pass, Program, Stage
from cl_compiler.lang.schedules import build_program
from cl_compiler.lang.tile_ir import Compute, Diagonal, Gemm, Instruction, TileProgram
from cl_compiler.plan.types import DTYPE_BYTES, Problem

KEPT_STEP = 256
"""Rows and columns of the store are whole multiples of it: of every kernel's tile."""
KEPT_BYTES = 2


def obstacle_of_retain(problem: Problem, program: Program) -> str:
    """Why a program with the schedule ``retain`` has no kernels; "" where it has."""
    if DTYPE_BYTES[problem.dtype] != 2:
        return f"'retain' has kernels for 16-bit operands, not for {problem.dtype}: tiles are bf16"
    if program.modes != ("bounded", "running"):
        return "'retain' has kernels for logits that the operands' norms bound"
    if program.plan.positives not in ("diagonal", "paired"):
        return "'retain' has kernels for one positive a row, on the diagonal"
    code = written(program).programs["bounded"]
    if not any(isinstance(i, Compute) and i.op == "exp" for i in _origin(code)):
        return "'retain' has kernels for one exponential that all gradients are made of"
    if any(p.symmetric or (p.gradients and p.reductions) for p in program.passes):
        return "'retain' has kernels for backward sweeps without statistics"
    return ""


def retained(program: Program) -> Program:
    """The same, as kernels do it: safe ones keep nothing and make their tiles again."""
    spilled = build_program(program.plan, "spill").narrowed
    stages: dict[str, tuple[Stage, ...]] = {}
    for name in ("forward", "backward"):
        pairs = zip(getattr(program, name), getattr(spilled, name), strict=True)
        stages[name] = tuple(
            replace(a, passes=tuple(_merged(p, q) for p, q in zip(a.passes, b.passes, strict=True)))
            for a, b in pairs
        )
    return replace(program, forward=stages["forward"], backward=stages["backward"])


def _merged(kept: Pass, spilled: Pass) -> Pass:
    programs = {"bounded": kept.programs["bounded"], "running": spilled.programs["running"]}
    return replace(spilled, programs=programs)  # type: ignore[arg-type]


def written(program: Program) -> Pass:
    """The pass whose exponentials are kept."""
    return next(p for p in program.passes if p.programs["bounded"].kept is not None)


def reads_kept(code: TileProgram) -> bool:
    """Whether a tile is read instead of made."""
    return code.kept is not None and not code.gemms


def store_lengths(program: Program) -> tuple[str, str]:
    """What forward and backward call the numbers of rows and of columns of the store."""
    first, second = written(program).grid
    return LENGTH[first], LENGTH[second]


def keeps_positives(program: Program) -> bool:
    """Whether elements at positives are kept apart; they need not be where all are the same."""
    code = written(program).programs["bounded"]
    return not any(isinstance(i, Diagonal) and i.where == "positive" for i in _origin(code))


def _origin(code: TileProgram) -> list[Instruction]:
    """What makes the kept tile: the instruction, and those whose tile it changes."""
    made = {i.value: i for i in code.instructions if isinstance(i, (Compute, Diagonal, Gemm))}
    found: list[Instruction] = []
    value = code.kept
    while value in made:
        found.append(made[value])
        last = found[-1]
        value = last.base if isinstance(last, Diagonal) else None
    return found


class RetainPrinter(KernelPrinter):
    """Prints a kernel that stores its exponentials, or one that reads them."""

    def _ordered(self) -> list[Instruction]:
        kept = self.code.kept
        assert kept is not None
        self.expressions.kept.add(kept)
        if reads_kept(self.code):
            self.expressions.variables[kept] = "kept_tile"
        return super()._ordered()

    def _print(self, k: KernelText, instruction: Instruction) -> None:
        super()._print(k, instruction)
        if getattr(instruction, "value", None) != self.code.kept:
            return
        tile = self.expressions.variables[self.code.kept or 0]
        if keeps_positives(self.program):
            k.body += [
                "if _crosses(i, j, 0, BLOCK_M, BLOCK_N):",
                "    on_positive = offs_n[None, :] == offs_m[:, None]",
                "    here = (offs_m >= j) & (offs_m < min(j + BLOCK_N, col_stop))",
                f"    at_positive = tl.sum(tl.where(on_positive, {tile}, 0.0), 1)",
                "    here = here & (offs_m < row_stop)",
                "    tl.store(kept_positive + offs_m, at_positive, mask=here)",
            ]
        if self.descriptors:
            k.body.append(f"kept_tiles.store([i, j], {tile}.to(tl.bfloat16))")
        else:
            k.body.append(f"tl.store({self._address()}, {tile}.to(tl.bfloat16))")

    def _declare(self, k: KernelText) -> None:
        super()._declare(k)
        if self.descriptors:
            k.descriptors.append(("kept_tiles", "kept", "block_m"))
        else:
            k.kept += [("kept", "kept"), ("kept_width", "kept.stride(0)")]
        if keeps_positives(self.program):
            k.kept.append(("kept_positive", "kept_positive"))
        if reads_kept(self.code):
            load = f"tl.load({self._address()})"
            load = "kept_tiles.load([i, j])" if self.descriptors else load
            k.body[:0] = [f"kept_tile = {load}.to(tl.float32)", *self._positives()]

    def _positives(self) -> list[str]:
        if not keeps_positives(self.program):
            return []
        exact = "tl.load(kept_positive + offs_m, mask=offs_m < row_stop, other=0)"
        return [
            "if _crosses(i, j, 0, BLOCK_M, BLOCK_N):",
            "    on_positive = offs_n[None, :] == offs_m[:, None]",
            f"    at_positive = {exact}",
            "    kept_tile = tl.where(on_positive, at_positive[:, None], kept_tile)",
        ]

    @staticmethod
    def _address() -> str:
        return "kept + offs_m.to(tl.int64)[:, None] * kept_width + offs_n[None, :]"


__all__ = [
    "KEPT_BYTES",
    "KEPT_STEP",
    "RetainPrinter",
    "keeps_positives",
    "obstacle_of_retain",
    "reads_kept",
    "retained",
    "store_lengths",
    "written",
]
