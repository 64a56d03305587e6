"""The hardware graph: every level of every spec, whatever their number."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import pytest

from cl_compiler.errors import HardwareError
from cl_compiler.hardware import Level, load_hardware, preset_names
from cl_compiler.hardware.graph import device_node, hardware_graph, path, spec_of


@pytest.mark.parametrize("name", preset_names())
def test_the_path_is_the_levels_of_the_spec(name: str) -> None:
    spec = load_hardware(name)
    graph = hardware_graph(spec)
    assert path(graph) == tuple(level.name for level in spec.levels)
    assert nx.is_directed_acyclic_graph(graph)
    assert spec_of(graph) is spec
    for level in spec.levels:
        node = graph.nodes[level.name]
        assert node["kind"] == level.kind and node["memory_bytes"] == level.memory_bytes
    for outer, inner in zip(path(graph), path(graph)[1:], strict=False):
        assert graph.has_edge(outer, inner)


def test_a_cluster_has_its_links_on_the_edges_and_its_host_beside_the_devices() -> None:
    graph = hardware_graph(load_hardware("h100-128x8"))
    assert path(graph) == ("cluster", "node", "device", "l2", "sm")
    assert [graph.nodes[name]["total"] for name in path(graph)] == [1, 128, 1024, 1024, 135168]
    assert graph.edges["cluster", "node"] == {
        "kind": "infiniband",
        "bandwidth_bytes_per_s": 50e9,
        "latency_s": 14e-6,
        "full_duplex": True,
        "point_to_point": False,
    }
    assert graph.edges["node", "device"]["kind"] == "nvlink"
    assert graph.edges["device", "l2"] == {
        "kind": "memory",
        "bandwidth_bytes_per_s": 3.35e12,
        "latency_s": 0.0,
    }
    # One SM's share when all of them read at once.
    assert graph.edges["l2", "sm"]["bandwidth_bytes_per_s"] == pytest.approx(9.4e12 / 132)
    assert set(graph.predecessors("host")) == {"node"}
    assert set(graph.successors("host")) == {"device"}
    assert graph.nodes["host"]["total"] == 128
    assert graph.edges["host", "device"]["bandwidth_bytes_per_s"] == 50e9


def test_the_device_carries_its_rates() -> None:
    spec = load_hardware("a100x8")
    graph = hardware_graph(spec)
    node = graph.nodes[device_node(graph)]
    assert node["gemm_flops_per_s"]["bfloat16"] == 312e12
    assert (node["exp_per_s"], node["pass_per_s"]) == (spec.exp_per_s, spec.pass_per_s)


def test_a_cpu_has_no_host_beside_it() -> None:
    graph = hardware_graph(load_hardware("xeon-amx-2c"))
    assert path(graph) == ("device", "l3", "l2", "core") == tuple(graph.nodes)


def test_depth_is_never_assumed() -> None:
    spec = load_hardware("h100x1")
    device = spec.device_level
    shallow = hardware_graph(replace(spec, levels=(device,)))
    assert path(shallow) == ("device",) and set(shallow.nodes) == {"device", "host"}
    caches = tuple(
        Level(f"c{depth}", "cache", 2, 1 << (30 - depth), 1e12 * (depth + 4), "invented")
        for depth in range(12)
    )
    deep = hardware_graph(replace(spec, levels=(device, *caches)))
    assert len(path(deep)) == 13 and deep.nodes["c11"]["total"] == 2**12


def test_levels_may_have_any_name_that_is_unique() -> None:
    spec = load_hardware("h100x1")
    renamed = replace(spec, levels=tuple(replace(lv, name=f"x-{lv.name}") for lv in spec.levels))
    graph = hardware_graph(renamed)
    assert device_node(graph) == "x-device" and path(graph) == ("x-device", "x-l2", "x-sm")
    clash = replace(spec.levels[1], name="host")
    with pytest.raises(HardwareError, match=r"level named 'host'; describe it in \[host\]"):
        replace(spec, levels=(spec.levels[0], clash, spec.levels[2]))


def test_another_graph_is_refused() -> None:
    with pytest.raises(HardwareError, match="hardware_graph"):
        spec_of(nx.DiGraph())
    with pytest.raises(HardwareError, match="no node of kind 'device'"):
        device_node(nx.DiGraph([("a", "b")]))
