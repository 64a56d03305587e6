"""What the templates arrange around kernels: launchers, their calls, stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cl_compiler.codegen.triton.owner import OwnerText
from cl_compiler.codegen.triton.row_gradients import RowGradientText
from cl_compiler.codegen.triton.text import KernelText, Partial


@dataclass
class SweepText:
    """The host function that launches the kernels of one pass, panel by panel."""

    name: str
    kernels: list[KernelText]
    params: list[str]
    accumulators: list[tuple[str, str, str]]
    """(identifier, axis length, initial value)."""
    folds: list[str]
    """Statements after a launch."""
    row_length: str
    col_length: str
    symmetric: bool
    leaving: list[RowGradientText] = field(default_factory=list)
    """Gradients of rows that are complete when a block of rows is."""
    before: list[str] = field(default_factory=list)
    """Statements before everything else."""
    meets: bool = False
    """Two shards of one set meet once: panels that nobody else makes stand for their transposes."""
    may_be_empty: bool = False
    """There may be no rows."""
    visits: ClassVar[str] = "panels"
    """What the launcher's template is for."""

    @property
    def doc(self) -> str:
        which = "a kernel, by ``unsafe``," if len(self.kernels) > 1 else "the kernel"
        half = "the upper panels" if self.symmetric else "panels"
        return f"Launch {which} on {half} of at most TILE_M by TILE_N."

    @property
    def tile_name(self) -> str:
        """The constant whose blocks all kernels of the launcher share."""
        return self.kernels[0].tile_name

    @property
    def in_strips(self) -> bool:
        return any(k.in_strips for k in self.kernels)

    @property
    def guarded(self) -> bool:
        return any(k.guarded for k in self.kernels)

    @property
    def pointers(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys(p for k in self.kernels for p in k.pointers))

    @property
    def descriptors(self) -> list[tuple[str, str, str]]:
        return list(dict.fromkeys(d for k in self.kernels for d in k.descriptors))

    def scalars_of(self, kernel: KernelText) -> str:
        """The name of a kernel's vector of scalars."""
        return "scalars" if len(self.kernels) == 1 else f"scalars_{kernel.mode}"

    @property
    def inner(self) -> list[str]:
        """Inner products of operands and their gradients."""
        return [r.inner for r in self.leaving if r.inner]

    @property
    def results(self) -> list[str]:
        return [*(a[0] for a in self.accumulators), *self.inner]

    @property
    def partials(self) -> list[Partial]:
        return self.kernels[0].partials

    @property
    def gradients(self) -> list[str]:
        return [g.workspace for g in self.kernels[0].gradients]


@dataclass
class OwnerSweepText(SweepText):
    """The same of a pass whose programs own blocks of gradients: one launch, where statistics of
    the axis that they share do not ask for panels."""

    visits: ClassVar[str] = "owners"
    own_length: str = ""
    """Rows or columns of a launch, and of a block."""
    width: str = ""
    """Of the widest gradient."""
    workspaces: list[tuple[str, str]] = field(default_factory=list)
    """(name, elements) of partial statistics."""
    owned: list[str] = field(default_factory=list)

    @property
    def doc(self) -> str:
        what = " and ".join(self.owned)
        which = "a kernel, by ``unsafe``," if len(self.kernels) > 1 else "the kernel"
        how = "panel by panel" if self.in_panels else "once"
        return f"Launch {which} {how}; each program owns a block of {what}."

    @property
    def first(self) -> OwnerText:
        kernel = self.kernels[0]
        assert isinstance(kernel, OwnerText)
        return kernel

    @property
    def in_panels(self) -> bool:
        return self.first.in_panels

    @property
    def part_descriptors(self) -> list[tuple[str, str, str]]:
        return list(dict.fromkeys(self.first.part_descriptors))


@dataclass
class PanelSweepText(SweepText):
    """The same where panels of whole rows are multiplied out in the launcher: kernels of bounded
    exponentials, of maxima, of safe exponentials."""

    visits: ClassVar[str] = "rows"
    lse: str = ""
    positive: str = ""
    """The vector of gradients at positives; "" where there are none."""
    finished: str = ""
    """The logsumexps of a panel, by ``unsafe``."""
    guard: str = ""
    safe_vectors: list[tuple[str, str]] = field(default_factory=list)
    """(pointer, text) of what the safe kernel reads of a panel's rows."""
    scale: str = ""
    """What multiplies the rows of a panel, by ``unsafe``."""
    products: list[str] = field(default_factory=list)

    @property
    def doc(self) -> str:
        return "Exponentials of TILE_M whole rows at a time, and their products with the operands."

    @property
    def results(self) -> list[str]:
        return [r for r in (self.lse, self.positive) if r]

    @property
    def pointers(self) -> list[tuple[str, str]]:
        late = {pointer for pointer, _ in self.safe_vectors}
        return [p for p in super().pointers if p[0] not in late]

    def scalars_of(self, kernel: KernelText) -> str:
        return f"scalars_{('bounded', 'maxima', 'safe')[self.kernels.index(kernel)]}"

    @property
    def statements(self) -> list[str]:
        """All that is printed here."""
        vectors = [text for _, text in self.safe_vectors]
        return [self.finished, self.guard, *vectors, self.scale, *self.products]

    @property
    def maxima(self) -> list[str]:
        """The workspaces of partial maxima and sums."""
        return list(self.kernels[1].partials[0].names)


@dataclass
class SweepCall:
    """Statements that run a pass: what comes before, the call or two, what comes after."""

    lines: list[str] = field(default_factory=list)
    sweeps: list[SweepText] = field(default_factory=list)


@dataclass
class StageText:
    calls: list[SweepCall]
    vectors: list[str]
