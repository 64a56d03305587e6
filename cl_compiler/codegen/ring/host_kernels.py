"""Passes as Triton kernels over shards in host memory: launchers of blocks on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cl_compiler.codegen.names import Names
from cl_compiler.codegen.passes import PassPrinter
from cl_compiler.codegen.ring.host import (
    HostLocalPrinter,
    HostRows,
    LocalBlocks,
    in_blocks,
    in_row_blocks,
)
from cl_compiler.codegen.ring.kernels import (
    KernelPassPrinter,
    KernelPassText,
    KernelStagePrinter,
    LauncherText,
    LocalKernelPrinter,
    LocalKernelText,
    Printed,
)
from cl_compiler.codegen.ring.passes import RingPassText
from cl_compiler.codegen.ring.target import Target
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.ring import is_local
from cl_compiler.lang.tile_ir import Mode


@dataclass
class LocalBlocksText(LocalBlocks, LocalKernelText):
    """The same for a block of rows of shards in host memory."""


class HostLocalKernelPrinter(LocalKernelPrinter):
    """Prints one pass in one mode likewise, for a block of rows at a time."""

    def text(self) -> LocalBlocksText:
        text = super().text()
        vectors = [name for name, dim in self.at_home.items() if dim == 0]
        return LocalBlocksText(**vars(text), **in_row_blocks(text, self.plan, vectors))


class HostKernelPassPrinter(KernelPassPrinter):
    """The same of shards in host memory: what is at home comes a block of rows at a time."""

    def text(self) -> KernelPassText:
        text = in_blocks(super().text())
        assert isinstance(text, KernelPassText)
        return replace(text, params=text.launcher.params)

    def _launcher(
        self, base: RingPassText, fixed: list[str], found: Printed, anchor: str
    ) -> LauncherText:
        base = in_blocks(base)
        launcher = super()._launcher(base, fixed, found, base.extents[base.home_side])
        block = f"[begin : begin + {('rows', 'cols')[base.home_side]}]"
        vectors = dict.fromkeys([*found.printer.at_home, *self._folded()[0]])
        before = [*launcher.before, *(f"{name} = {name}{block}" for name in vectors)]
        if base.stays or base.gains:
            before.insert(0, f"{base.homes} = home")
        ahead = {
            "ahead = first": "ahead = first - begin",
            "ahead = -first": "ahead = begin - first",
        }
        launcher.before = [ahead.get(line, line) for line in before]
        inside = {*base.stays, *base.gains}
        given = ["home"] * bool(inside) + [p for p in launcher.params if p not in inside]
        launcher.params = [*given, "begin"] if "begin" in " ".join(launcher.before) else given
        return launcher


def host_kernel_pass_printer(
    target: Target,
    program: Program,
    pass_: Pass,
    mode: Mode,
    names: Names,
    name: str,
    cast: bool,
) -> PassPrinter:
    """The printer of a pass; slots are PyTorch's."""
    if pass_.is_slots:
        return HostLocalPrinter(program, pass_, mode, names, name, cast)
    kind = HostLocalKernelPrinter if is_local(pass_.grid) else HostKernelPassPrinter
    return kind(target, program, pass_, mode, names, name, cast)


class HostKernelStagePrinter(HostRows, KernelStagePrinter):
    """Prints the statements around kernels."""

    def __init__(self, target: Target, *args: Any) -> None:
        super().__init__(target, *args)
        self.pass_printer = partial(host_kernel_pass_printer, target)


__all__ = ["HostKernelStagePrinter"]
