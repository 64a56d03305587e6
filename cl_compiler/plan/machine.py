"""The hardware graph as the cost model reads it: one device's rates, the memories inside it, and
the links around it.

Everything here is found by walking the graph from its outermost to its innermost level, however
many there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from cl_compiler.errors import ArgumentError
from cl_compiler.hardware.graph import device_node, path, spec_of
from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.plan.sizes import STRIP_GRAIN
from cl_compiler.plan.types import Tile

SLICE = 64
"""Columns of the contracted dimension that a level holds of each operand of a product."""
GRAIN = 16
"""Sub-tiles of a level are multiples of this many rows and columns."""
RATED_TILE = Tile(512, 1024)
"""The tile with which calibration and presets measure GEMM rates."""
PASS_BYTES = 12
"""Bytes that an elementwise pass moves per element while its rate is measured."""
STRIP_BYTES = 8
"""Per element of a strip: two fp32 numbers, one of either buffer that a pass reads."""
ONEDNN = "onednn"
"""Of GEMM rates: fp32 products by oneDNN."""
WAYS = ("auto", "ieee", "bf16", "tf32", "bf16x3", "fp16", "fp8")
"""Of multiplying that the cost model knows; fewer can be compiled (see ``precision``)."""


@dataclass(frozen=True)
class Inner:
    """A level inside the device.

    ``memory_bytes``: of one instance; ``share``: instances in one instance of the level around it;
    ``total_bytes``, ``bytes_per_s``: of all instances in the device together.
    """

    name: str
    kind: str
    share: int
    memory_bytes: int
    total_bytes: int
    bytes_per_s: float


@dataclass(frozen=True)
class Outer:
    """A level around the device: ``instances`` of the next level in one of it.

    ``ranks_inside``: devices in one instance of the next level.  ``link_bytes_per_s``: what one
    device reaches in one direction; 0 where nothing is moved.  ``full_duplex``,
    ``point_to_point``: see ``Link``.
    """

    name: str
    kind: str
    instances: int
    ranks_inside: int
    link_kind: str
    link_bytes_per_s: float
    link_latency_s: float
    full_duplex: bool = True
    point_to_point: bool = False

    @property
    def is_linked(self) -> bool:
        return self.instances > 1 and self.link_bytes_per_s > 0

    @property
    def both_ways(self) -> bool:
        """Whether a ring that is used both ways at once is twice as fast over these links.

        Either neighbours have wires of their own, or what leaves an instance one way does so
        through another device than what leaves it the other way.
        """
        return self.full_duplex and (self.point_to_point or self.ranks_inside > 1)


@dataclass(frozen=True)
class Machine:
    """One device and what surrounds it."""

    spec: HardwareSpec
    device: str
    device_memory_bytes: int
    device_bytes_per_s: float
    outer: tuple[Outer, ...]
    inner: tuple[Inner, ...]
    exp_per_s: float
    pass_per_s: float
    op_overhead_s: float
    exp2_per_s: float

    @property
    def ranks(self) -> int:
        """Devices in the whole machine."""
        return self.outer[0].instances * self.outer[0].ranks_inside if self.outer else 1

    def gemm_rate(self, dtype: str, precision: str, inner: float) -> float:
        """FLOP/s of products with ``inner`` contracted columns."""
        name, cost = gemm_type(dtype, precision, self.spec)
        return self.spec.gemm_rate(name, max(1, round(inner))) / cost

    def onednn_rate(self, inner: float) -> float:
        """FLOP/s of fp32 products by oneDNN, 0 where there is no rate of them."""
        if ONEDNN not in dict(self.spec.gemm_flops_per_s):
            return 0.0
        return self.spec.gemm_rate(ONEDNN, max(1, round(inner)))

    def prefers_exp2(self, dtype: str) -> bool:
        """Whether exponentials of tiles are evaluated to base 2: rates are those of fp32."""
        return self.spec.kind == "cpu" and dtype != "float64" and self.exp2_per_s > self.exp_per_s

    @property
    def strip_elements(self) -> int:
        """Elements of a strip of a tile: half of what the caches nearest to the cores hold."""
        caches = [level.total_bytes for level in self.inner if level.kind == "cache"]
        return (caches or [self.device_memory_bytes])[-1] // STRIP_BYTES

    def strip_columns(self, tile: Tile) -> int:
        """Columns of such a strip of a tile."""
        grains = self.strip_elements // (STRIP_GRAIN * tile.rows)
        return min(STRIP_GRAIN * max(1, grains), tile.cols)

    def seconds_per_byte(self, held_bytes: float) -> float:
        """Of streaming data that lives in the innermost memory with room for it."""
        for level in reversed(self.inner):
            if level.total_bytes >= held_bytes:
                return 1 / level.bytes_per_s
        return 1 / self.device_bytes_per_s

    def extra_seconds_per_byte(self, held_bytes: float) -> float:
        """Of elementwise passes over such data, beyond what their rate includes.

        A pass at its rate moves three fp32 numbers per element, two in and one out; memory that
        is as fast as that costs nothing more.
        """
        return max(0.0, self.seconds_per_byte(held_bytes) - 1 / (PASS_BYTES * self.pass_per_s))

    def waiting_per_byte(self, held_bytes: float) -> float:
        """Seconds for which products wait for a byte of such data.

        Their rate was measured with operands in the caches, and includes moving them from there.
        """
        outermost = 1 / self.inner[0].bytes_per_s if self.inner else 0.0
        return max(0.0, self.seconds_per_byte(held_bytes) - outermost)

    def sub_tiles(self, tile: Tile, element_bytes: int) -> tuple[Tile, ...]:
        """The block that one instance of each inner level works on, from the outside in.

        The largest square that fits beside slices of its operands, and that leaves every instance
        a block; the levels above bound it.
        """
        result, around = [], tile
        for level in self.inner:
            around = _block(level, around, element_bytes)
            result.append(around)
        return tuple(result)


def _block(level: Inner, around: Tile, element_bytes: int) -> Tile:
    elements = level.memory_bytes // element_bytes
    if elements == 0:
        return around
    # side² + 2·side·SLICE = elements
    side = _grain((SLICE**2 + elements) ** 0.5 - SLICE)
    rows = min(side, around.rows)
    cols = min(_grain((elements - rows * SLICE) / (rows + SLICE)), around.cols)
    while -(-around.rows // rows) * -(-around.cols // cols) < level.share:
        if max(rows, cols) <= GRAIN:
            break
        if cols >= rows:
            cols = _grain(cols / 2)
        else:
            rows = _grain(rows / 2)
    return Tile(rows, cols)


def _grain(value: float) -> int:
    return max(GRAIN, int(value) // GRAIN * GRAIN)


def machine_of(graph: nx.DiGraph) -> Machine:
    """Walk a hardware graph.

    Raises:
        HardwareError: the graph has no device or carries no spec.
    """
    spec, device, names = spec_of(graph), device_node(graph), path(graph)
    at = names.index(device)
    node = graph.nodes[device]
    outer = []
    for name, inside in pairwise(names[: at + 1]):
        edge = graph.edges[name, inside]
        linked = edge["kind"] not in ("memory", "contains")
        outer.append(
            Outer(
                name,
                graph.nodes[name]["kind"],
                graph.nodes[inside]["count"],
                graph.nodes[device]["total"] // graph.nodes[inside]["total"],
                edge["kind"],
                edge["bandwidth_bytes_per_s"] if linked else 0.0,
                edge["latency_s"] if linked else 0.0,
                linked and edge["full_duplex"],
                linked and edge["point_to_point"],
            )
        )
    inner = []
    for name in names[at + 1 :]:
        level = graph.nodes[name]
        instances = level["total"] // node["total"]
        if level["memory_bytes"]:
            inner.append(
                Inner(
                    name,
                    level["kind"],
                    level["count"],
                    level["memory_bytes"],
                    level["memory_bytes"] * instances,
                    level["bandwidth_bytes_per_s"] * instances,
                )
            )
    return Machine(
        spec,
        device,
        node["memory_bytes"],
        node["bandwidth_bytes_per_s"],
        tuple(outer),
        tuple(inner),
        node["exp_per_s"],
        node["pass_per_s"],
        node["op_overhead_s"],
        node["exp2_per_s"],
    )


def gemm_type(dtype: str, precision: str, spec: HardwareSpec) -> tuple[str, int]:
    """(entry of the machine's GEMM rates, products that stand for one).

    Raises:
        ArgumentError: an unknown precision.
    """
    if precision not in WAYS:
        raise ArgumentError(f"precision {precision!r}: products are planned as {', '.join(WAYS)}.")
    if dtype == "float64":
        return "float64", 1
    rates = dict(spec.gemm_flops_per_s)
    match precision:
        case "tf32" if "tf32" in rates:
            return "tf32", 1
        case "bf16x3":
            return "bfloat16", 3
        case "bf16":
            return "bfloat16", 1
        case "fp16":
            return "float16", 1
        case "fp8":
            return "fp8", 1
        case "auto" if dtype == "float32" and spec.kind != "cpu":
            return "bfloat16", 3
        case "auto":
            return dtype, 1
        case _:  # 16-bit operands are widened and multiplied in fp32
            return "float32", 1


def rates_in_words(
    spec: HardwareSpec, dtype: str, precision: str, *, onednn: bool = False, exp2: bool = False
) -> str:
    """Which of the rates that a plan's seconds rest on a calibration measured."""
    product, _ = gemm_type(dtype, precision, spec)
    device = spec.device_level.name
    rates = {
        f"{product} products": f"gemm_flops_per_s.{product}",
        f"{device} memory": f"levels.{device}.bandwidth_bytes_per_s",
        "exponentials": "exp_per_s",
        "elementwise passes": "pass_per_s",
        "launches": "op_overhead_s",
    }
    if exp2:
        rates |= {"exponentials to base 2": "exp2_per_s"}
    if onednn:
        del rates[f"{product} products"]
        rates |= {"oneDNN's products": f"gemm_flops_per_s.{ONEDNN}"}
    measured = [what for what, field in rates.items() if field in spec.measured]
    nominal = [what for what in rates if what not in measured]
    if not measured or not nominal:
        return "measured" if measured else "nominal"
    return f"measured: {', '.join(measured)}; nominal: {', '.join(nominal)}"


__all__ = ["RATED_TILE", "Inner", "Machine", "Outer", "gemm_type", "machine_of", "rates_in_words"]
