"""HardwareSpec: one machine or cluster as a value.

The planner never asks a device anything.  It reads this value, which a preset, a TOML file, a
detection or a calibration made, so plans can be computed for machines that are elsewhere.

Levels nest, outermost first: cluster > node > device > cache > core; how many there are is up to
the machine.  A CPU "device" is what one process uses of a machine, with its DRAM; a GPU "device"
is the GPU with its HBM, and the node's DRAM is then the ``Host`` beside it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from cl_compiler.errors import HardwareError
from cl_compiler.hardware.checks import (
    DTYPES,
    LEVEL_KINDS,
    LevelKind,
    check_arch,
    check_integer,
    check_levels,
    check_links,
    check_number,
    check_rates,
    check_text,
)
from cl_compiler.units import format_bytes, format_flops, format_rate, format_seconds

__all__ = ["DTYPES", "HardwareSpec", "Host", "Level", "Link"]


@dataclass(frozen=True)
class Level:
    """One level of the memory hierarchy.

    Attributes:
        name: unique in its spec: "cluster", "node", "device", "l3", "l2", "sm", "core", ….
        kind: "cluster", "node", "device", "cache" or "core".
        count: instances inside one instance of the enclosing level; 1 for the outermost.
        memory_bytes: bytes of one instance; 0 where the level has no memory of its own.
        bandwidth_bytes_per_s: read bandwidth of that memory, one instance, bytes/s.
        source: where the numbers come from.
    """

    name: str
    kind: LevelKind
    count: int
    memory_bytes: int
    bandwidth_bytes_per_s: float
    source: str

    def __post_init__(self) -> None:
        where = f"level {self.name!r}"
        if self.kind not in LEVEL_KINDS:
            raise HardwareError(
                f"{where} has kind {self.kind!r}; use one of {', '.join(LEVEL_KINDS)}"
            )
        check_integer(where, "count", self.count, least=1)
        check_integer(where, "memory_bytes", self.memory_bytes, least=0)
        check_number(where, "bandwidth_bytes_per_s", self.bandwidth_bytes_per_s, zero_allowed=True)
        if self.memory_bytes > 0 and self.bandwidth_bytes_per_s == 0:
            raise HardwareError(
                f"{where} has {format_bytes(self.memory_bytes)} but no bandwidth_bytes_per_s; "
                "give the read bandwidth of one instance in bytes/s"
            )
        check_text(where, "source", self.source)


@dataclass(frozen=True)
class Link:
    """What joins the instances of one level.

    Attributes:
        level: name of the level whose instances it joins, e.g. "device" or "node".
        kind: "nvlink", "xgmi", "pcie", "infiniband", "upi", "tcp", ….
        bandwidth_bytes_per_s: what a ring's neighbour sees, per device and direction, bytes/s.
        latency_s: of one hop, seconds.
        full_duplex: whether both directions reach the bandwidth at once.
        source: where the numbers come from.
        point_to_point: whether every two neighbours have wires of their own, so that an instance
            sends to two of them at once as fast as to one; false behind a switch.
    """

    level: str
    kind: str
    bandwidth_bytes_per_s: float
    latency_s: float
    full_duplex: bool
    source: str
    point_to_point: bool = False

    def __post_init__(self) -> None:
        where = f"the link between {self.level!r} instances"
        check_text(where, "kind", self.kind)
        check_number(where, "bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)
        check_number(where, "latency_s", self.latency_s, zero_allowed=True)
        for name in ("full_duplex", "point_to_point"):
            if not isinstance(getattr(self, name), bool):
                raise HardwareError(
                    f"{where} has {name} = {getattr(self, name)!r}; write true or false"
                )
        check_text(where, "source", self.source)


@dataclass(frozen=True)
class Host:
    """DRAM beside the devices of one node.

    Attributes:
        memory_bytes: of one node, shared by its devices.
        bandwidth_bytes_per_s: of that memory, bytes/s.
        link_bandwidth_bytes_per_s: host to device, per device and direction, bytes/s.
        source: where the numbers come from.
    """

    memory_bytes: int
    bandwidth_bytes_per_s: float
    link_bandwidth_bytes_per_s: float
    source: str

    def __post_init__(self) -> None:
        check_integer("the host", "memory_bytes", self.memory_bytes, least=1)
        check_number("the host", "bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)
        check_number("the host", "link_bandwidth_bytes_per_s", self.link_bandwidth_bytes_per_s)
        check_text("the host", "source", self.source)


@dataclass(frozen=True)
class HardwareSpec:
    """A machine or cluster: its memory hierarchy, its links and the rates of one device.

    Attributes:
        name: what reports call it.
        kind: "cpu", "cuda" or "hip".
        arch: what code is generated for: "x86-avx2", "x86-amx", "sm_90", "gfx942", ….
        levels: outermost first; exactly one has kind "device".
        links: at most one per level.
        host: DRAM beside the devices; None where the device's own memory is the DRAM.
        gemm_flops_per_s: (dtype, FLOP/s of one device), sorted by dtype; "float32" is IEEE,
            by BLAS on a CPU, where "onednn" is the same by oneDNN.
        exp_per_s: elementwise exponentials per second of one device.
        exp2_per_s: the same to base 2, 0 where unknown; a CPU whose tiles are fp32 evaluates
            exponentials that way where it is the faster one.
        pass_per_s: elements per second of one simple elementwise pass (add, multiply) over a
            tile that is in cache (CPU) or in registers (GPU), one device.
        op_overhead_s: fixed cost of launching one operator, seconds.
        gemm_efficiency: (inner dimension D, fraction of ``gemm_flops_per_s``), sorted by D;
            empty means that the rates hold for every D.
        sources: (field, where it comes from), sorted; one entry of a table is "table.entry".
        measured: fields that a calibration of this very machine measured, sorted.

    Raises:
        HardwareError: a number is negative or missing, or the levels do not nest.
    """

    name: str
    kind: str
    arch: str
    levels: tuple[Level, ...]
    links: tuple[Link, ...]
    host: Host | None
    gemm_flops_per_s: tuple[tuple[str, float], ...]
    exp_per_s: float
    pass_per_s: float
    op_overhead_s: float
    exp2_per_s: float = 0.0
    gemm_efficiency: tuple[tuple[int, float], ...] = ()
    sources: tuple[tuple[str, str], ...] = ()
    measured: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"hardware {self.name!r}"
        check_text("a hardware spec", "name", self.name)
        check_text(where, "arch", self.arch)
        check_arch(where, self.kind, self.arch)
        # One order for what has none, so that equal machines compare and hash equal.
        for field in ("gemm_flops_per_s", "gemm_efficiency", "sources"):
            object.__setattr__(self, field, tuple(sorted(map(tuple, getattr(self, field)))))
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "links", tuple(self.links))
        object.__setattr__(self, "measured", tuple(sorted(set(self.measured))))
        check_levels(where, self.levels)
        check_links(where, self.levels, self.links)
        check_rates(where, self)

    # ---- what planning asks -----------------------------------------------------------------

    @property
    def device_level(self) -> Level:
        """The level of kind "device"."""
        return next(level for level in self.levels if level.kind == "device")

    @property
    def world_size(self) -> int:
        """Number of devices, which is the number of ranks."""
        outer = self.levels[: self.levels.index(self.device_level) + 1]
        return math.prod(level.count for level in outer)

    @property
    def nodes(self) -> int:
        """Number of nodes; 1 where the spec has no node level."""
        return self.world_size // self.device_level.count

    @property
    def cores(self) -> int:
        """Instances of the innermost level in one device: CPU cores or SMs."""
        inner = self.levels[self.levels.index(self.device_level) + 1 :]
        return math.prod(level.count for level in inner)

    @property
    def device_memory_bytes(self) -> int:
        """Memory of one device, bytes: HBM of a GPU, DRAM of a CPU."""
        return self.device_level.memory_bytes

    def level(self, name: str) -> Level:
        """The level called ``name``.

        Raises:
            HardwareError: there is none.
        """
        for level in self.levels:
            if level.name == name:
                return level
        names = ", ".join(level.name for level in self.levels)
        raise HardwareError(f"hardware {self.name!r} has no level {name!r}; it has {names}")

    def link(self, level: str) -> Link | None:
        """What joins the instances of ``level``, or None where nothing does."""
        return next((link for link in self.links if link.level == level), None)

    def gemm_rate(self, dtype: str, inner: int | None = None) -> float:
        """Rate of one device's matrix multiplication.

        Args:
            dtype: how it multiplies: "float64", "float32", "onednn" (float32 by oneDNN), "tf32",
                "bfloat16", "float16", "fp8".
            inner: the contracted dimension; None asks for the rate of the table alone.

        Returns:
            FLOP/s of one device; with ``inner``, times the efficiency at that dimension, which
            is interpolated linearly in log2 and constant beyond both ends of its table.

        Raises:
            HardwareError: the machine has no rate for ``dtype``.
        """
        rates = dict(self.gemm_flops_per_s)
        if dtype not in rates:
            raise HardwareError(
                f"hardware {self.name!r} has no GEMM rate for {dtype!r}; it has "
                f"{', '.join(rates)}; choose another precision or add it to gemm_flops_per_s"
            )
        return rates[dtype] * (1.0 if inner is None else self._efficiency_at(inner))

    def _efficiency_at(self, inner: int) -> float:
        table = self.gemm_efficiency
        if not table:
            return 1.0
        if inner <= table[0][0]:
            return table[0][1]
        for (low, low_value), (high, high_value) in pairwise(table):
            if inner <= high:
                share = math.log2(inner / low) / math.log2(high / low)
                return low_value + share * (high_value - low_value)
        return table[-1][1]

    # ---- what reports print -----------------------------------------------------------------

    def source_of(self, field: str) -> str | None:
        """Where ``field`` comes from; "gemm_flops_per_s.float32" falls back to its table."""
        sources = dict(self.sources)
        return sources.get(field, sources.get(field.partition(".")[0]))

    def summary(self) -> str:
        """One line: how many of what, memory, the fastest rates, links."""
        device = self.device_level
        rates = dict(self.gemm_flops_per_s)
        shown = [dtype for dtype in ("float32", "bfloat16") if dtype in rates]
        gemm = " / ".join(f"{dtype} {format_flops(rates[dtype])}" for dtype in shown)
        parts = [
            f"{self.world_size} x {self.kind} {self.arch}, {self.cores} cores",
            f"{format_bytes(device.memory_bytes)} at {format_rate(device.bandwidth_bytes_per_s)}",
            gemm,
            *(f"{link.kind} {format_rate(link.bandwidth_bytes_per_s)}" for link in self.links),
            "calibrated" if self.measured else "",
        ]
        return f"{self.name}: " + "; ".join(part for part in parts if part)

    def describe(self) -> tuple[tuple[str, str, str], ...]:
        """Rows for a table: (what, value with unit, where it comes from)."""
        rows = [("kind", f"{self.kind} {self.arch}", ""), ("devices", str(self.world_size), "")]
        for level in self.levels:
            text = f"x {level.count}"
            if level.memory_bytes:
                text += f", {format_bytes(level.memory_bytes)}"
            if level.bandwidth_bytes_per_s:
                text += f" at {format_rate(level.bandwidth_bytes_per_s)}"
            rows.append((level.name, text, level.source))
        if self.host is not None:
            text = (
                f"{format_bytes(self.host.memory_bytes)} at "
                f"{format_rate(self.host.bandwidth_bytes_per_s)}, "
                f"{format_rate(self.host.link_bandwidth_bytes_per_s)} to each device"
            )
            rows.append(("host", text, self.host.source))
        for link in self.links:
            text = (
                f"{link.kind} {format_rate(link.bandwidth_bytes_per_s)}, "
                f"{format_seconds(link.latency_s)} per hop"
            )
            rows.append((f"link {link.level}", text, link.source))
        for dtype, rate in self.gemm_flops_per_s:
            source = self.source_of(f"gemm_flops_per_s.{dtype}") or ""
            rows.append((f"gemm {dtype}", format_flops(rate), source))
        if self.gemm_efficiency:
            text = ", ".join(f"{inner}: {value:.2f}" for inner, value in self.gemm_efficiency)
            rows.append(("gemm efficiency at D", text, self.source_of("gemm_efficiency") or ""))
        for field, what in (
            ("exp_per_s", "exponentials"),
            ("exp2_per_s", "exponentials, base 2"),
            ("pass_per_s", "elementwise pass"),
        ):
            if getattr(self, field):
                value = f"{getattr(self, field) / 1e9:.2f} G/s"
                rows.append((what, value, self.source_of(field) or ""))
        overhead = format_seconds(self.op_overhead_s)
        rows.append(("operator overhead", overhead, self.source_of("op_overhead_s") or ""))
        return tuple(rows)

    # ---- text forms -------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON values, in field order; ``from_dict`` reads it back."""
        return {
            "name": self.name,
            "kind": self.kind,
            "arch": self.arch,
            "levels": [_as_dict(level) for level in self.levels],
            "links": [_as_dict(link) for link in self.links],
            "host": None if self.host is None else _as_dict(self.host),
            "gemm_flops_per_s": {dtype: float(rate) for dtype, rate in self.gemm_flops_per_s},
            "exp_per_s": float(self.exp_per_s),
            "pass_per_s": float(self.pass_per_s),
            "op_overhead_s": float(self.op_overhead_s),
            "exp2_per_s": float(self.exp2_per_s),
            "gemm_efficiency": {str(inner): float(value) for inner, value in self.gemm_efficiency},
            "sources": dict(self.sources),
            "measured": list(self.measured),
        }

    def canonical_json(self) -> str:
        """Text that is the same for equal specs and differs for different ones."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def to_toml(self) -> str:
        """The spec as a TOML document that ``from_toml`` reads back to an equal value."""
        from cl_compiler.hardware.toml import write_toml

        return write_toml(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> HardwareSpec:
        """Read what ``to_dict`` or a TOML file holds.

        Raises:
            HardwareError: a field is missing, unknown, of the wrong type or out of range.
        """
        from cl_compiler.hardware.toml import spec_from_dict

        return spec_from_dict(content)

    @classmethod
    def from_toml(cls, path: str | Path) -> HardwareSpec:
        """Read a TOML file; ``extends = "h100x1"`` in it starts from that preset or file.

        Raises:
            HardwareError: the file cannot be read, is not TOML or describes no machine.
        """
        from cl_compiler.hardware.toml import read_toml

        return read_toml(Path(path))


def _as_dict(value: Level | Link | Host) -> dict[str, Any]:
    """Fields by name; what is declared float becomes float, so that 1 and 1.0 print alike."""
    return {
        field.name: float(getattr(value, field.name))
        if field.type == "float"
        else getattr(value, field.name)
        for field in fields(value)
    }
