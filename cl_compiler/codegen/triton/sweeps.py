"""Passes as kernels with a launcher each, and the statements around their calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cl_compiler.codegen.names import Names
from cl_compiler.codegen.symbols import LENGTH, shift_owner
from cl_compiler.codegen.triton.core import Columns, CoreTile
from cl_compiler.codegen.triton.eight_bits import EightBitCopy
from cl_compiler.codegen.triton.kernels import KernelPrinter
from cl_compiler.codegen.triton.owner import (
    OwnerPrinter,
    OwnerText,
    adding_passes,
    own_dim,
    owned_operands,
)
from cl_compiler.codegen.triton.panel_sweeps import panel_sweep
from cl_compiler.codegen.triton.products import (
    ProductText,
    folds_of,
    operands_of,
    products_of,
)
from cl_compiler.codegen.triton.retain import RetainPrinter
from cl_compiler.codegen.triton.row_gradients import RowGradientText, inner_of
from cl_compiler.codegen.triton.row_panels import lse_of
from cl_compiler.codegen.triton.slots import SlotSweepText, slot_pass
from cl_compiler.codegen.triton.sweep_text import (
    OwnerSweepText,
    StageText,
    SweepCall,
    SweepText,
)
from cl_compiler.codegen.triton.text import KernelText, identifiers, residual_of
from cl_compiler.codegen.triton.vectors import DeviceStages
from cl_compiler.lang.lower import shift_of
from cl_compiler.lang.lower_pass import bounded_logits
from cl_compiler.lang.program import Pass, Program, Stage
from cl_compiler.lang.tile_ir import GradientTile, Mode

TilesOf = Callable[[Pass, Sequence[Mode]], Mapping[Mode, CoreTile]]


class SweepPrinter:
    """Prints the passes of a program and everything around them."""

    def __init__(
        self,
        program: Program,
        names: Names,
        tiles_of: TilesOf,
        widths: dict[str, int],
        precision: str,
        dtype: str,
        descriptors: bool,
        columns: Columns,
        leaving: Sequence[str] = (),
        copies: Mapping[str, EightBitCopy] | None = None,
    ) -> None:
        self.dtype, self.leaving = dtype, leaving
        self.positives: dict[str, str] = {}
        """Similarity → vector of what a sweep found of its gradient at positives."""
        self.program, self.plan, self.names = program, program.plan, names
        self.tiles_of, self.widths, self.precision = tiles_of, widths, precision
        self.descriptors, self.columns = descriptors, columns
        self.host = DeviceStages(program, names, copies)
        self.residuals: dict[str, bool] = {}
        """Similarities whose gradients leave residuals → whether their tiles are symmetric."""

    def stage(self, stage: Stage, name: str, forward: bool) -> StageText:
        stages = self.program.forward if forward else self.program.backward
        alone = sum(bool(s.passes) for s in stages) == 1
        calls = []
        for index, pass_ in enumerate(stage.passes):
            number = "" if alone else f"_{stage.level}"
            letter = f"_{'abcdefgh'[index]}" if len(stage.passes) > 1 else ""
            calls.append(self.call(pass_, f"_{name}_sweep{number}{letter}"))
        return StageText(calls, [self.host.node(v) for v in stage.vectors])

    # -- one pass --------------------------------------------------------------------------------

    def call(self, pass_: Pass, name: str) -> SweepCall:
        if pass_.is_slots:
            return self._slots(pass_, name)
        if pass_.has_barrier:
            return self._panels(pass_, name)
        modes = self.program.modes
        apart = [(m,) for m in modes] if not pass_.gradients else [modes]  # launchers of their own
        tiles = {m: t for group in apart for m, t in self.tiles_of(pass_, group).items()}
        printers = [self._printer(pass_, mode, name, tiles[mode]) for mode in modes]
        for printer in printers:
            printer.copies = self.host.copies
        kernels = [p.text(self.widths, self.precision) for p in printers]
        for kernel in kernels:
            kernel.guarded = len(modes) > 1
        call = SweepCall()
        if len(modes) == 1:
            call.lines += self._hoisted(printers[0])
            self._launch(call, pass_, name, kernels, "")
            call.lines += self._finish(pass_, "", "")
        elif pass_.gradients:
            for printer in printers:
                call.lines += self._hoisted(printer)
            self._launch(call, pass_, name, kernels, "")
        else:
            self._guarded(call, pass_, printers, kernels)
        return call

    def _printer(self, pass_: Pass, mode: Mode, name: str, tile: CoreTile) -> KernelPrinter:
        if len(self.program.modes) > 1:
            name = f"{name}_{mode}"
        common = (
            self.program,
            pass_,
            mode,
            self.names,
            name,
            tile,
            self.descriptors,
            self.columns,
        )
        own = own_dim(self.program, pass_)
        if self.program.schedule == "retain" and pass_.programs[mode].kept is not None:
            return RetainPrinter(*common)
        if own is None:
            return KernelPrinter(*common)
        adds = id(pass_) in adding_passes(self.program)
        return OwnerPrinter(*common, own=own, dtype=self.dtype, adds=adds)

    def _slots(self, pass_: Pass, name: str) -> SweepCall:
        """A row's own candidates, beside the kernels."""
        printer = slot_pass(self.program, pass_, self.names, name, self.dtype != "float32")
        block = printer.text()
        sweep = SlotSweepText(name, [], block.params, [], [], "rows", "slots", False, block=block)
        lines = [
            self.host.hoisted(printer, *item)
            for item in printer.hoisted
            if item[2] not in printer.local
        ]
        results = f"{', '.join(block.results)} = " if block.results else ""
        lines.append(f"with {self.host.anchor}.device:")
        lines.append(f"    {results}{name}({', '.join(block.params)})")
        for red in pass_.reductions:
            text = self.host.finish(red, printer.mode)
            if text != self.names(red.name):
                lines.append(f"{self.names(red.name)} = {text}")
        return SweepCall(lines, [sweep])

    def _panels(self, pass_: Pass, name: str) -> SweepCall:
        """Panels of whole rows, in one launcher with the products that use them."""
        owner = lse_of(pass_).name
        shift, terms = self.names(shift_of(owner).name), self._terms(pass_)
        bound = next(e for e, o in bounded_logits(self.plan).items() if o == owner)
        sweep, hoisted = panel_sweep(
            self.program,
            pass_,
            self.host,
            name,
            self.tiles_of(pass_, self.program.modes),
            self.widths,
            self.precision,
            self.descriptors,
            terms,
        )
        if sweep.positive:
            self.positives[pass_.gradients[0]] = sweep.positive
        lines = [f"{shift} = _shift({self.host.bound(bound)}, {terms})"]
        for printer in hoisted:
            lines += self._hoisted(printer)
        lines.append(f"{', '.join(sweep.results)} = {name}({', '.join(sweep.params)})")
        return SweepCall(lines, [sweep])

    @staticmethod
    def _terms(pass_: Pass) -> str:
        first, second = pass_.grid
        return f"max({LENGTH[first]}, {LENGTH[second]})"

    def _guarded(
        self, call: SweepCall, pass_: Pass, printers: list[KernelPrinter], kernels: list[KernelText]
    ) -> None:
        """The bounded sweep, its guard, and the sweep that runs where the guard tripped."""
        owners = bounded_logits(self.plan)
        here = [r for r in self.program.logsumexps if r in pass_.reductions]
        terms = self._terms(pass_)
        for expr, owner in owners.items():
            if owner in {r.name for r in here}:
                shift = self.names(shift_of(owner).name)
                call.lines.append(f"{shift} = _shift({self.host.bound(expr)}, {terms})")
        call.lines += self._hoisted(printers[0])
        self._launch(call, pass_, kernels[0].name, kernels[:1], "")
        for red in here:
            shift = self.names(shift_of(shift_owner(self.program, red)).name)
            sums = self.names(f"sum_{red.name}")
            call.lines.append(f"unsafe = unsafe | _out_of_range({shift}, {sums}, {terms})")
        for red in pass_.softmeans:  # of values as large as the type allows
            sums = self.names(f"sum_{red.name}")
            call.lines.append(f"unsafe = unsafe | ~torch.isfinite({sums}).all()")
        call.lines += self._hoisted(printers[1])
        self._launch(call, pass_, kernels[1].name, kernels[1:], "_safe")
        call.lines += self._finish(pass_, "", "_safe")

    def _hoisted(self, printer: KernelPrinter) -> list[str]:
        vectors = self.host.vectors_of(printer.leaves, printer.is_python, printer.symbol)
        return [f"{name} = {vectors.text(expr)}" for name, expr in printer.hoisted]

    def _finish(self, pass_: Pass, suffix: str, safe: str) -> list[str]:
        """Statistics from accumulators; of two modes, whichever ran."""
        lines = []
        for red in pass_.reductions:
            if safe:
                fast = self.host.finish(red, "bounded")
                text = f"torch.where(unsafe, {self.host.finish(red, 'running', safe)}, {fast})"
            else:
                text = self.host.finish(red, self.program.modes[0], suffix)
            target = self.names(red.name)
            if text != target:
                lines.append(f"{target} = {text}")
        if safe:
            here = [r for r in self.program.logsumexps if r in pass_.reductions]
            lines += [self.host.inverse(r) for r in here]
        return lines

    def _launch(
        self, call: SweepCall, pass_: Pass, name: str, kernels: list[KernelText], suffix: str
    ) -> None:
        sweep = self._sweep(pass_, name, kernels)
        call.sweeps.append(sweep)
        results = ", ".join(f"{r}{suffix}" for r in sweep.results)
        call.lines.append(f"{results}{' = ' if results else ''}{name}({', '.join(sweep.params)})")

    def _sweep(self, pass_: Pass, name: str, kernels: list[KernelText]) -> SweepText:
        own = own_dim(self.program, pass_)
        gradients = _code(pass_).gradients if own is None else ()
        products = [p for g in gradients for p in self._products(pass_, g)]
        leaving = [t for g in gradients for t in self._leaving(g, kernels[0])]
        blocks = {f"{t.total}[i:i1]": t.rows for t in leaving}
        products = [replace(p, total=blocks.get(p.total, p.total)) for p in products]
        owned = [] if own is None else owned_operands(self.plan, pass_, own)
        params: dict[str, None] = {}
        for g in gradients if self.host.copies else ():
            params.update(dict.fromkeys(operands_of(self.plan, g)))
        for k in kernels:
            params.update(dict.fromkeys(k.operands))
        for g in gradients:  # the kernel of one that is linear in its similarity reads none
            params.update(dict.fromkeys(operands_of(self.plan, g)))
        params = params or {self.host.anchor: None}  # a count of ids makes no products
        totals = {p.total.partition("[")[0] for p in products} | {f"d_{o}" for o in owned}
        totals = totals - {t.rows for t in leaving} | {t.total for t in leaving}
        params.update(dict.fromkeys(sorted(totals)))
        params.update(dict.fromkeys([LENGTH[pass_.grid[0]], LENGTH[pass_.grid[1]]]))
        params.update(dict.fromkeys(["half"] if any(k.halves for k in kernels) else []))
        for k in kernels:
            params.update(
                dict.fromkeys(matrix for _, matrix, _ in k.descriptors if matrix == "kept")
            )
            params.update(dict.fromkeys(n for _, host in k.kept for n in identifiers(host)))
            for _, host in [*k.scalars, *k.numbers, *k.pointers]:
                params.update(dict.fromkeys(identifiers(host)))
        params.update(dict.fromkeys(p.scale for p in products if p.scale))
        params.update(dict.fromkeys(n for t in leaving for n in identifiers(t.factor)))
        params.update({"unsafe": None} if kernels[0].guarded else {})
        common = (
            name,
            kernels,
            list(params),
            self._accumulators(pass_, kernels),
            folds_of(kernels[0], products),
            LENGTH[pass_.grid[0]],
            LENGTH[pass_.grid[1]],
            pass_.symmetric,
        )
        if own is None:
            return SweepText(*common, leaving)
        width = max(self.widths[o] for o in owned)
        return OwnerSweepText(
            *common,
            own_length=("m, block_m", "n, block_n")[own],
            width="D" if width == self.widths[self.host.anchor] else str(width),
            workspaces=_owner_workspaces(kernels[0], own, *common[-3:-1]),
            owned=sorted(f"d_{o}" for o in owned),
        )

    def _accumulators(self, pass_: Pass, kernels: list[KernelText]) -> list[tuple[str, str, str]]:
        result: dict[str, tuple[str, str, str]] = {}
        for partial in kernels[0].partials:
            for position, target in enumerate(partial.targets):
                if partial.mirrored:
                    continue
                largest = partial.kind == "max" or (partial.kind != "sum" and position == 0)
                axis = LENGTH[pass_.grid[1 - partial.dim]]
                result[target] = (target, axis, "-math.inf" if largest else "0.0")
        for name in kernels[0].residuals:
            result[name] = (name, LENGTH[pass_.grid[0]], "0.0")
        if kernels[0].residuals:
            self.residuals |= dict.fromkeys(pass_.gradients, pass_.symmetric)
        same = all(
            [(p.kind, p.targets) for p in k.partials] + k.residuals
            == [(p.kind, p.targets) for p in kernels[0].partials] + kernels[0].residuals
            for k in kernels
        )
        assert same, f"{self.plan.ir.name}: kernels of one launcher must have the same statistics"
        return list(result.values())

    # -- gradients -------------------------------------------------------------------------------

    def _products(self, pass_: Pass, g: GradientTile) -> list[ProductText]:
        return products_of(self.plan, pass_, g, self.names, self.precision)

    def _leaving(self, g: GradientTile, kernel: KernelText) -> list[RowGradientText]:
        """The left operand's gradient, where it leaves row block by row block."""
        leaf = self.plan.leaves[g.similarity]
        assert leaf.left is not None and leaf.right is not None and self.plan.gradient is not None
        operand, residual = leaf.left.operand, residual_of(g.similarity)
        if operand not in self.leaving:
            return []
        asked = any(op == operand for dots in self.plan.gradient.dots.values() for op, _ in dots)
        scale = self.host.final_scale(operand)
        return [
            RowGradientText(
                operand,
                residual if residual in kernel.residuals else "",
                leaf.right.operand,
                inner_of(operand) if asked else "",
                f"{scale} * grad_output" if scale else "grad_output",
            )
        ]


def _owner_workspaces(kernel: KernelText, own: int, rows: str, cols: str) -> list[tuple[str, str]]:
    """Partial statistics: of what programs own one value, of the other axis one for each owner."""
    owner, other = (("block_m", "TILE_M", rows), ("TILE_N", cols))
    if own == 1:
        owner, other = (("block_n", "TILE_N", cols), ("TILE_M", rows))
    block, tile, length = owner
    shared = f"triton.cdiv(min({tile}, {length}), {block}) * min({', '.join(other)})"
    panels = isinstance(kernel, OwnerText) and kernel.in_panels
    alone = f"min({tile}, {length})" if panels else length
    return [(n, shared if p.dim == own else alone) for p in kernel.partials for n in p.names]


def _code(pass_: Pass):  # type: ignore[no-untyped-def]
    return next(iter(pass_.programs.values()))
