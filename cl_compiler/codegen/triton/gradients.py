"""Gradient tiles leave a kernel for a workspace; what rounding takes off positives leaves, too."""

from __future__ import annotations

import sympy as sp

from cl_compiler.codegen.triton.blocks import BlockPrinter
from cl_compiler.codegen.triton.expressions import Expressions
from cl_compiler.codegen.triton.text import GradientText, KernelText, low_of, residual_of
from cl_compiler.lang.program import Pass
from cl_compiler.lang.tile_ir import Diagonal, TileProgram
from cl_compiler.plan.precision import SPLIT


class GradientPrinter(BlockPrinter):
    """Prints the end of a kernel that forms gradients, for a kernel printer."""

    code: TileProgram
    pass_: Pass
    expressions: Expressions

    @property
    def mirrors_residuals(self) -> bool:
        """Whether what a tile lost stands for its transpose's loss, too."""
        return self.pass_.symmetric

    def scalar(self, factors: list[sp.Expr], log2e: bool = False) -> str:
        """The kernel's variable for a product of scalars."""
        raise NotImplementedError

    def _offsets(self, k: KernelText, where: str) -> list[str]:
        """By how much a row's positive ("positive"), or itself, is ahead of it: as texts."""
        if where != "positive" or self.plan.positives != "views":
            return ["0"]
        k.halves = True
        return ["half", "-half"]

    def _gradient(self, k: KernelText, value: int, similarity: str, scale: sp.Expr) -> None:
        text = self.expressions.variables[value]
        workspace = f"g_{similarity}"
        if scale != 1:
            text = f"{text} * {self.scalar([scale])}"
        if self.precision == SPLIT:
            tile = f"g_tile_{similarity}" if len(self.code.gradients) > 1 else "g_tile"
            k.body.append(f"{tile} = {text}")
            k.body.append(f"{tile}_high = {tile}.to(tl.bfloat16)")
            self._store(k, similarity, workspace, f"{tile}_high")
            self._store(k, similarity, low_of(workspace), f"({tile} - {tile}_high.to(tl.float32))")
        else:
            if not self.precision and self._has_positives():
                text = self._residual(k, text, similarity)
            self._store(k, similarity, workspace, f"({text})" if " " in text else text)

    def _has_positives(self) -> bool:
        """Whether elements of the tile are known to be positives by their place, and are in it."""
        diagonals = [i for i in self.code.instructions if isinstance(i, Diagonal)]
        return any(d.where == "positive" and d.how != "take" for d in diagonals)

    def _residual(self, k: KernelText, text: str, similarity: str) -> str:
        """Store what rounding takes off the positives: most of a row's gradient is theirs."""
        name = residual_of(similarity)
        k.residuals.append(name)
        if " " in text:
            k.body.append(f"g_{similarity}_tile = {text}")
            text = f"g_{similarity}_tile"
        for offset in self._offsets(k, "positive"):
            where = f"offs_m + {offset}".replace("+ -", "- ")
            at = "offs_m" if offset == "0" else "partner"
            touched = f"if _crosses(i, j, {offset}, BLOCK_M, BLOCK_N):"
            if not _is_last_block(k.body, touched):
                on = "offs_m[:, None]" if offset == "0" else f"({where})[:, None]"
                k.body += [touched, f"    on_positive = offs_n[None, :] == {on}"]
            k.body += [f"    partner = {where}"] if at == "partner" else []
            value, late = _value_on_positive(k.body, text)
            k.body += [
                f"    lost = tl.sum(tl.where(on_positive, {value}, 0.0), 1)",
                *late,
                "    lost -= lost.to(tl.bfloat16).to(tl.float32)",
                f"    here = ({at} >= j) & ({at} < min(j + BLOCK_N, col_stop))",
                "    here = here & (offs_m < row_stop)",
                f"    tl.store({name} + offs_m, lost, mask=here)",
            ]
            if self.mirrors_residuals:  # the tile stands for its transpose, too
                k.body += [
                    "    if row_start != col_start:",
                    f"        tl.store({name} + {at}, lost, mask=here)",
                ]
        return text

    def _store(self, k: KernelText, similarity: str, workspace: str, text: str) -> None:
        k.gradients.append(GradientText(similarity, workspace))
        if self.descriptors:
            to = "[i - row_start, j - col_start]"
            k.body.append(f"{workspace}.store({to}, {text}.to({workspace}.dtype))")
        else:
            k.body.append(
                f"tl.store({workspace} + g_slot, {text}.to({workspace}.dtype.element_ty))"
            )


def _value_on_positive(body: list[str], variable: str) -> tuple[str, list[str]]:
    """What a tile has at positives, and the statement that puts it there, taken from the body: the
    tile's last change would otherwise be live twice."""
    start, end = f"    {variable} = tl.where(on_positive, ", f", {variable})"
    if body[-1].startswith(start) and body[-1].endswith(end):
        return body[-1][len(start) : -len(end)], [body.pop()]
    return variable, []


def _is_last_block(body: list[str], condition: str) -> bool:
    """Whether what comes next can go on with the body of a condition that was just tested."""
    last = [n for n, line in enumerate(body) if not line.startswith(" ")]
    return bool(last) and body[last[-1]] == condition


__all__ = ["GradientPrinter"]
