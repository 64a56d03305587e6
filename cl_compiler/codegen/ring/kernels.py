"""Passes on many ranks as Triton kernels: one launcher for each, called shard by shard.

A launcher is given what a sweep over PyTorch's tiles is given (``passes.py``): what is at home by
name, and the shard that is here for now, whose tensors are called ``…_peer``.  Which mode runs is
known on the host, where the ranks agree about it, so a kernel has no guard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from cl_compiler.codegen.names import Names
from cl_compiler.codegen.pass_text import PassText
from cl_compiler.codegen.passes import PassPrinter
from cl_compiler.codegen.ring.passes import RingPassPrinter, RingPassText
from cl_compiler.codegen.ring.stages import RingStagePrinter
from cl_compiler.codegen.ring.target import Target
from cl_compiler.codegen.symbols import LENGTH, PythonNumbers, operand_scale
from cl_compiler.codegen.triton.context import helpers_in
from cl_compiler.codegen.triton.kernels import KernelPrinter
from cl_compiler.codegen.triton.products import ProductText, folds_of, part_of, products_of
from cl_compiler.codegen.triton.slots import SLOT_ROWS
from cl_compiler.codegen.triton.sweep_text import SweepText
from cl_compiler.codegen.triton.text import KernelText, identifiers, residual_of
from cl_compiler.lang.ir import COLS, ROWS, View
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.ring import is_local
from cl_compiler.lang.tile_ir import Mode
from cl_compiler.plan.precision import SPLIT
from cl_compiler.plan.types import DTYPE_BYTES, Plan, Tile


@dataclass
class LauncherText(SweepText):
    """The host function that launches one kernel on the panels of two shards."""

    text: str = ""
    anchor: str = ""
    """A tensor at home, on whose device it all happens."""

    @property
    def doc(self) -> str:
        return self.text


@dataclass
class KernelPassText(RingPassText):
    """Also: the launcher that stands for the sweep."""

    launcher: LauncherText = field(kw_only=True)


@dataclass
class LocalKernelText(PassText):
    """The same of a pass in which nothing travels."""

    launcher: LauncherText = field(kw_only=True)


class PeerKernelPrinter(KernelPrinter):
    """Prints the kernel of a pass in which one side's shards travel, or none.

    ``travels``: 0 where rows do, 1 where columns do; ``sent``: vectors that do; ``table``: what a
    sweep calls the symbols that are evaluated before it.
    """

    def __init__(
        self, *args: Any, travels: int | None, sent: Sequence[str], table: Mapping[str, str]
    ) -> None:
        self.travels, self.sent, self.hoisted_names = travels, sent, dict(table)
        super().__init__(*args)
        self.is_python = PythonNumbers(self.plan, self.code.hoisted)  # type: ignore[assignment]
        self.own_parts: dict[str, None] = {}
        """Vectors along the travelling side that are read at positives only, which are at home."""
        self.at_home: dict[str, int] = {}
        """Vectors along what does not travel, and its side: 0 for rows."""

    def _name_hoisted(self) -> None:
        self.table = dict(self.hoisted_names)

    def lies(self, tensor: str, dim: int) -> str:
        """What the launcher calls a tensor of rows (0) or of columns (1)."""
        return f"{tensor}_peer" if dim == self.travels else tensor

    def views(self, similarity: str) -> tuple[View, View]:
        left, right = super().views(similarity)
        return tuple(  # type: ignore[return-value]
            replace(view, operand=self.lies(view.operand, dim))
            for dim, view in enumerate((left, right))
        )

    def vector(self, name: str, dim: int, log2e: bool) -> str:
        text = self._ids(dim) if name in ("row_ids", "col_ids") else self.symbol(name)
        if dim == self.travels and text not in self.sent:
            self.own_parts.setdefault(text)
        if dim != self.travels:
            self.at_home.setdefault(text, dim)
        text = self.lies(text, dim)
        variable = f"{text}_{'log2_' if log2e else ''}{'ij'[dim]}"
        self.vectors[text, dim, log2e] = variable
        return variable

    @property
    def mirrors_residuals(self) -> bool:
        """What a panel lost is multiplied as soon as it is there."""
        return False

    def _offsets(self, k: KernelText, where: str) -> list[str]:
        if self.travels is None:
            return super()._offsets(k, where)
        k.ahead = True
        offsets = super()._offsets(k, where)
        return ["ahead" if o == "0" else f"({o} + ahead)" for o in offsets]

    def _declare(self, k: KernelText) -> None:
        """All scalars are Python numbers: they are on the host, where ranks agree about them."""
        super()._declare(k)
        k.numbers = [
            (name, host if python else f"float({host})")
            for name, (host, python) in self.scalars.items()
        ]
        k.scalars = []
        k.partials = [
            replace(p, targets=tuple(self.lies(t, 1 - p.dim) for t in p.targets))
            for p in k.partials
        ]


@dataclass(frozen=True)
class Printed:
    """A pass as a kernel, and what its launcher reads: its printer, its text, what its gradients
    are multiplied with, and the names of all of that."""

    printer: PeerKernelPrinter
    kernel: KernelText
    products: list[ProductText]
    read: list[str]


def printed(
    target: Target, sweep: PassPrinter, travels: int | None, sent: Sequence[str], anchor: str
) -> Printed:
    """The kernel that does what a sweep over PyTorch's tiles does; ``anchor``: on its device."""
    printer = PeerKernelPrinter(
        sweep.program,
        sweep.pass_,
        sweep.mode,
        sweep.names,
        sweep.name,
        target.tile(sweep.pass_, sweep.mode),
        target.descriptors,
        target.columns,
        travels=travels,
        sent=sent,
        table=sweep.hoisted_names,
    )
    widths = {printer.lies(o, d): w for o, w in target.widths.items() for d in (0, 1)}
    kernel = printer.text({**widths, **target.widths}, target.dot_precision)
    plan, names, precision = sweep.plan, sweep.names, target.dot_precision
    products = [
        product
        for g in sweep.code.gradients
        for product in products_of(plan, sweep.pass_, g, names, precision, printer.lies)
    ]
    hosts = [host for _, host in (*kernel.pointers, *kernel.numbers)]
    read = [n for text in (*hosts, *(p.scale for p in products)) for n in identifiers(text)]
    for product in products:
        product.scale = f"{product.scale}.to({anchor}.device)" * bool(product.scale)
    return Printed(printer, kernel, products, [*read, *printer.own_parts])


class LocalKernelPrinter(PassPrinter):
    """Prints one pass in one mode where a rank has both sides to itself: a queue."""

    def __init__(self, target: Target, *args: Any) -> None:
        super().__init__(*args)
        self.target = target

    def text(self) -> LocalKernelText:
        base, target = super().text(), self.target
        lengths = [base.row_length, base.col_length]
        fixed = [p for p in base.params if p in lengths or p not in self.params]
        anchor = fixed[0]
        found = printed(target, self, None, (), anchor)
        self.at_home = found.printer.at_home
        launcher = LauncherText(
            self.name,
            [found.kernel],
            list(dict.fromkeys([*fixed, *found.read])),
            [(name, axis, start) for name, axis, start, _ in base.accumulators],
            folds_of(found.kernel, found.products),
            base.row_length,
            base.col_length,
            False,
            may_be_empty=True,
            text=base.doc,
            anchor=anchor,
        )
        fields = {**vars(base), "params": launcher.params, "results": launcher.results}
        return LocalKernelText(**fields | {"body": [], "remake": []}, launcher=launcher)


class KernelPassPrinter(RingPassPrinter):
    """Prints one pass in one mode: names and what travels as for PyTorch's tiles."""

    def __init__(self, target: Target, *args: Any) -> None:
        super().__init__(*args)
        self.target = target

    def text(self) -> KernelPassText:
        base, target = super().text(), self.target
        fixed = [p for p in base.params if p not in self.params]
        anchor = base.extents[1 - self.travels]
        found = printed(target, self, self.travels, base.sent, anchor)
        launcher = self._launcher(base, fixed, found, anchor)
        fields = {**vars(base), "params": launcher.params, "body": [], "products": []}
        return KernelPassText(**fields, launcher=launcher)

    def _launcher(
        self, base: RingPassText, fixed: list[str], found: Printed, anchor: str
    ) -> LauncherText:
        printer, kernel = found.printer, found.kernel
        lost = [line for r in kernel.residuals for line in self._residuals(printer, r)]
        here = {f"{name}_peer" for name in (*base.sent, *printer.own_parts)} | {"ahead"}
        scales = [n for line in lost for n in self._scales_in(line)]
        read = [n for n in (*found.read, *scales) if n not in here]
        read += ["first"] if kernel.ahead or printer.own_parts else []
        read += ["half"] if kernel.halves else []
        return LauncherText(
            self.name,
            [kernel],
            list(dict.fromkeys([*fixed, *read])),
            [],
            [*folds_of(kernel, found.products, "twice"), *lost],
            "rows",
            "cols",
            False,
            before=self._before(base, printer, kernel, anchor),
            meets=self.pass_.symmetric,
            may_be_empty=True,
            text=base.doc,
            anchor=anchor,
        )

    def _before(
        self, base: RingPassText, printer: PeerKernelPrinter, kernel: KernelText, anchor: str
    ) -> list[str]:
        lines = [f"{base.peers} = shard"]
        if base.folds:
            lines.append(f"{base.fold_peers} = parts")
        lines.append(f"rows, cols = {base.extents[0]}.shape[0], {base.extents[1]}.shape[0]")
        length = ("rows", "cols")[self.travels]
        lines += [f"{name}_peer = _own_part({name}, first, {length})" for name in printer.own_parts]
        if kernel.ahead:
            lines.append(f"ahead = {'first' if self.travels == 0 else '-first'}")
        lines += [
            f"{name} = torch.empty(rows, dtype=torch.float32, device={anchor}.device)"
            for name in kernel.residuals
        ]
        return lines

    def _residuals(self, printer: PeerKernelPrinter, name: str) -> list[str]:
        """Multiply what rounding took off a panel's gradients at positives with their partners."""
        sim = next(g for g in self.pass_.gradients if residual_of(g) == name)
        leaf = self.plan.leaves[sim]
        views = {"i:i1": leaf.left, "j:j1": leaf.right}
        operands, targets = [], {}  # type: list[str], dict[str, list[str]]
        for dim, (rows, view) in enumerate(views.items()):
            assert view is not None
            operands.append(part_of(printer.lies(view.operand, dim), view, rows))
            wanted = ("left", "right")[dim] in self.pass_.sides
            if not wanted or view.operand not in self.plan.needs or view.stop:
                continue
            own = leaf.scale and operand_scale(self.plan, view.operand) == "mixed"
            scale = f" * float({self.names(leaf.scale)})" if own and leaf.scale else ""
            lost = f"{name}[i:i1]{scale}"
            target = part_of(printer.lies(f"d_{view.operand}", dim), view, rows)
            if dim and self.pass_.symmetric:
                target = f"{target} if twice else None"
            targets.setdefault(lost, ["None", "None"])[dim] = target
        ahead = ("ahead + half", "ahead - half") if self.plan.positives == "views" else ("ahead",)
        return [
            f"_add_lost({', '.join([lost, *operands, *into])}, {offset} + i - j)"
            for lost, into in targets.items()
            for offset in ahead
        ]

    def _scales_in(self, line: str) -> list[str]:
        return [n for n in map(self.names, self.plan.ir.parameters) if n in identifiers(line)]


def kernel_pass_printer(
    target: Target,
    program: Program,
    pass_: Pass,
    mode: Mode,
    names: Names,
    name: str,
    cast: bool,
) -> PassPrinter:
    """The printer of a pass whose tiles are a kernel's; slots, which share nothing between rows,
    are PyTorch's."""
    if pass_.is_slots:
        return PassPrinter(program, pass_, mode, names, name, cast)
    kind = LocalKernelPrinter if is_local(pass_.grid) else KernelPassPrinter
    return kind(target, program, pass_, mode, names, name, cast)


class KernelStagePrinter(RingStagePrinter):
    """Prints the statements around kernels; all ranks and both sides bound a sum alike."""

    def __init__(self, target: Target, *args: Any) -> None:
        super().__init__(*args)
        self.pass_printer = partial(kernel_pass_printer, target)

    def _terms(self, name: str, pass_: Pass) -> str:
        both = [LENGTH[axis] for axis in pass_.grid]
        lengths = dict.fromkeys(f"all_{n}" if n in (ROWS, COLS) else n for n in both)
        return f"max({', '.join(lengths)})" if len(lengths) > 1 else next(iter(lengths))


def launch_tile(plan: Plan, sweeps: Sequence[object]) -> Tile:
    """Rows and columns of one launch: what the plan says, in whole tiles of every kernel."""
    cores = [launcher.kernels[0].tile for launcher in _launchers(sweeps)]
    step = max((side for core in cores for side in (core.rows, core.cols)), default=1)
    return Tile(*(-(-side // step) * step for side in (plan.tile.rows, plan.tile.cols)))


def _launchers(sweeps: Sequence[object]) -> list[LauncherText]:
    return [s.launcher for s in sweeps if isinstance(s, (KernelPassText, LocalKernelText))]


def kernel_context(plan: Plan, arch: str, context: Mapping[str, Any]) -> dict[str, Any]:
    """What the templates read of kernels, from the context without them."""
    sweeps = context["sweeps"]
    found = _launchers(sweeps)
    kernels = [k for launcher in found for k in launcher.kernels]
    lines = [t for k in kernels for t in (*k.body, *k.start, *k.finish)]
    return {
        "nvidia": arch.startswith("sm_"),
        "descriptors": any(k.descriptors for k in kernels),
        "has_products": any(k.gradients for k in kernels),
        "has_strips": any(k.in_strips for k in kernels),
        "has_residuals": any(k.residuals for k in kernels),
        "has_own_parts": any("_own_part(" in t for launcher in found for t in launcher.before),
        "slot_rows": SLOT_ROWS if any(getattr(s, "slots", False) for s in sweeps) else 0,
        "needs_rows": bool(context["positive_sims"] or context["dots"]),
        "sixteen": DTYPE_BYTES[plan.problem.dtype] == 2,
        "split": plan.precision == SPLIT,
        "kinds": {p.kind for k in kernels for p in k.partials},
        "helpers": helpers_in("\n".join(lines)),
    }


__all__ = [
    "KernelPassPrinter",
    "KernelPassText",
    "KernelStagePrinter",
    "LauncherText",
    "LocalKernelPrinter",
    "LocalKernelText",
    "Printed",
    "kernel_context",
    "launch_tile",
]
