"""The hardware graph: a spec as a networkx hierarchy that planner and simulator walk.

One node per level, edges from the enclosing level to the nested one, and the host's memory beside
the devices.  An edge's bandwidth is what one inner instance gets: over the link where a link joins
the instances, otherwise from the memory of the enclosing level.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import networkx as nx

from cl_compiler.errors import HardwareError
from cl_compiler.hardware.spec import HardwareSpec, Host

__all__ = ["device_node", "hardware_graph", "path", "spec_of"]

HOST = "host"


def hardware_graph(spec: HardwareSpec) -> nx.DiGraph:
    """Build the hierarchy of ``spec``.

    Returns:
        A directed acyclic graph.  Nodes are level names with ``kind``, ``count`` (inside one
        enclosing instance), ``total`` (in the whole machine), ``memory_bytes`` and
        ``bandwidth_bytes_per_s`` (one instance), ``depth`` (outermost 0) and ``source``.  The
        device's node also has ``gemm_flops_per_s`` (by dtype), ``exp_per_s``, ``exp2_per_s``,
        ``pass_per_s`` and ``op_overhead_s``.  The node "host", where the spec
        has one, has kind "host" and no depth.  Edges have ``kind``,
        ``bandwidth_bytes_per_s`` and ``latency_s``.
        ``graph.graph["spec"]`` is the spec itself.
    """
    graph = nx.DiGraph(spec=spec, name=spec.name, world_size=spec.world_size)
    total = 1
    for depth, level in enumerate(spec.levels):
        total *= level.count
        graph.add_node(
            level.name,
            kind=level.kind,
            count=level.count,
            total=total,
            memory_bytes=level.memory_bytes,
            bandwidth_bytes_per_s=float(level.bandwidth_bytes_per_s),
            depth=depth,
            source=level.source,
        )
    graph.nodes[spec.device_level.name].update(
        gemm_flops_per_s=dict(spec.gemm_flops_per_s),
        exp_per_s=spec.exp_per_s,
        exp2_per_s=spec.exp2_per_s,
        pass_per_s=spec.pass_per_s,
        op_overhead_s=spec.op_overhead_s,
    )
    for outer, inner in pairwise(spec.levels):
        link = spec.link(inner.name)
        if link is not None:
            kind, bandwidth, latency = link.kind, link.bandwidth_bytes_per_s, link.latency_s
        elif outer.memory_bytes > 0:
            # Inner instances that read at once share the enclosing level's bandwidth.
            kind, bandwidth, latency = "memory", outer.bandwidth_bytes_per_s / inner.count, 0.0
        else:
            # A node of one device: nothing is moved along this edge.
            kind, bandwidth, latency = "contains", 0.0, 0.0
        graph.add_edge(
            outer.name,
            inner.name,
            kind=kind,
            bandwidth_bytes_per_s=float(bandwidth),
            latency_s=latency,
        )
        if link is not None:
            ways = {"full_duplex": link.full_duplex, "point_to_point": link.point_to_point}
            graph.edges[outer.name, inner.name].update(ways)
    if spec.host is not None:
        _add_host(graph, spec, spec.host)
    return graph


def _add_host(graph: nx.DiGraph, spec: HardwareSpec, host: Host) -> None:
    device = spec.device_level.name
    graph.add_node(
        HOST,
        kind="host",
        count=1,
        total=spec.nodes,
        memory_bytes=host.memory_bytes,
        bandwidth_bytes_per_s=float(host.bandwidth_bytes_per_s),
        depth=None,
        source=host.source,
    )
    graph.add_edge(
        HOST,
        device,
        kind="host_link",
        bandwidth_bytes_per_s=float(host.link_bandwidth_bytes_per_s),
        # A copy is launched like an operator; PCIe itself adds about a microsecond.
        latency_s=spec.op_overhead_s,
    )
    around = spec.levels[: spec.levels.index(spec.device_level)]
    if around:
        graph.add_edge(
            around[-1].name, HOST, kind="contains", bandwidth_bytes_per_s=0.0, latency_s=0.0
        )


def path(graph: nx.DiGraph) -> tuple[str, ...]:
    """Level names from the outermost to the innermost, without the host."""
    levels = [name for name, depth in graph.nodes(data="depth") if depth is not None]
    return tuple(sorted(levels, key=lambda name: cast(int, graph.nodes[name]["depth"])))


def device_node(graph: nx.DiGraph) -> str:
    """Name of the level of kind "device".

    Raises:
        HardwareError: the graph has none, so it is not a hardware graph.
    """
    for name, kind in graph.nodes(data="kind"):
        if kind == "device":
            return str(name)
    raise HardwareError(
        "this graph has no node of kind 'device'; build it with hardware_graph(spec)"
    )


def spec_of(graph: nx.DiGraph) -> HardwareSpec:
    """The spec that ``graph`` was built from.

    Raises:
        HardwareError: the graph carries none.
    """
    spec = graph.graph.get("spec")
    if not isinstance(spec, HardwareSpec):
        raise HardwareError("this graph carries no spec; build it with hardware_graph(spec)")
    return spec
