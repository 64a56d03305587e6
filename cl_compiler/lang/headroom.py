"""Whether shifted exponentials need room above them: what multiplies them before their sum divides.

A sum of shifted exponentials is as large as its type allows, so that little is lost below.  What a
tile does with one is safe where the sum's inverse is multiplied first.
"""

from __future__ import annotations

from cl_compiler.lang.lower import inverse_of
from cl_compiler.lang.program import Program
from cl_compiler.lang.tile_ir import (
    Compute,
    Diagonal,
    Ref,
    ScalarRef,
    TileProgram,
    TileRef,
    VectorRef,
)

_PASSED_ON = frozenset({"add", "neg", "where", "fill_where"})


def weighs_exponentials(program: Program) -> bool:
    """Whether a tile multiplies shifted exponentials by anything but inverses of their sums."""
    inverses = {inverse_of(red.name) for red in program.logsumexps}
    codes = [p.programs["bounded"] for p in program.passes if "bounded" in p.programs]
    return any(_weighs(code, inverses) for code in codes)


def _weighs(code: TileProgram, inverses: set[object]) -> bool:
    raw: set[int] = set()
    inverse: set[int] = set()

    def is_inverse(ref: Ref) -> bool:
        if isinstance(ref, VectorRef):
            expr = code.hoisted[ref.name][0].free_symbols if ref.name in code.hoisted else set()
            return bool(inverses & expr) or ref.name in {str(symbol) for symbol in inverses}
        return isinstance(ref, TileRef) and ref.value in inverse

    def is_raw(ref: Ref) -> bool:
        return isinstance(ref, TileRef) and ref.value in raw

    for i in code.instructions:
        if isinstance(i, Diagonal):
            raw |= {i.value} if i.base in raw else set()
            inverse |= {i.value} if i.base in inverse else set()
        if not isinstance(i, Compute) or i.is_mask:
            continue
        if i.op in ("exp", "exp2"):
            raw.add(i.value)
        elif i.op in ("mul", "div", "square") and any(map(is_raw, i.args)):
            others = [a for a in i.args if not is_raw(a)]
            if not others or not all(is_inverse(a) or _is_number(a) for a in others):
                return True
            if all(map(_is_number, others)):
                raw.add(i.value)
        elif i.op in _PASSED_ON and any(map(is_raw, i.args)):
            raw.add(i.value)
        elif i.op in (*_PASSED_ON, "mul") and any(map(is_inverse, i.args)):
            inverse.add(i.value)
    return False


def _is_number(ref: Ref) -> bool:
    return isinstance(ref, ScalarRef) and bool(ref.expr.is_number)


__all__ = ["weighs_exponentials"]
