"""One device as a group of ranks."""

from __future__ import annotations

import pytest

from cl_compiler.errors import HardwareError
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.graph import hardware_graph, path
from cl_compiler.hardware.ranks import with_ranks


def test_ranks_of_one_node_share_the_fast_link() -> None:
    spec = with_ranks(load_hardware("h100x1"), 8, 8)
    preset = load_hardware("h100x8")
    assert (spec.world_size, spec.nodes, spec.device_level.count) == (8, 1, 8)
    ours, theirs = spec.link("device"), preset.link("device")
    assert ours is not None and theirs is not None
    assert (ours.kind, ours.bandwidth_bytes_per_s, ours.latency_s) == (
        theirs.kind,
        theirs.bandwidth_bytes_per_s,
        theirs.latency_s,
    )
    assert spec.levels[2:] == preset.levels[2:]


def test_ranks_of_many_nodes_have_a_link_at_both_levels() -> None:
    spec = with_ranks(load_hardware("a100x1"), 32, 8)
    assert path(hardware_graph(spec)) == ("cluster", "node", "device", "l2", "sm")
    assert (spec.world_size, spec.nodes) == (32, 4)
    node = spec.link("node")
    assert node is not None and node.bandwidth_bytes_per_s == 25e9
    alone = with_ranks(load_hardware("a100x1"), 3, 1)
    assert alone.nodes == 3 and alone.link("device") is None and alone.link("node") is not None


def test_uneven_nodes_are_planned_as_if_every_rank_were_alone() -> None:
    spec = with_ranks(load_hardware("h100x1"), 12, 8)
    assert (spec.world_size, spec.nodes, spec.device_level.count) == (12, 12, 1)


def test_cpu_ranks_talk_over_sockets() -> None:
    spec = with_ranks(load_hardware("xeon-amx-2c"), 4, 4)
    link = spec.link("device")
    assert spec.world_size == 4 and link is not None and link.kind == "tcp"
    assert spec.level("l2") == load_hardware("xeon-amx-2c").level("l2")


def test_consumer_cards_get_pcie_and_amd_its_own_link() -> None:
    pcie = with_ranks(load_hardware("rtx4090x1"), 2, 2).link("device")
    xgmi = with_ranks(load_hardware("mi300x1"), 8, 8).link("device")
    assert pcie is not None and pcie.kind == "pcie"
    assert xgmi is not None and xgmi.kind == "xgmi"


def test_a_spec_of_the_right_size_is_kept_and_another_refused() -> None:
    spec = load_hardware("h100x8")
    assert with_ranks(spec, 8, 4) is spec
    with pytest.raises(HardwareError, match=r"'h100x8' has 8 devices and the group 4 ranks; use"):
        with_ranks(spec, 4, 4)
    with pytest.raises(HardwareError, match="0 ranks"):
        with_ranks(load_hardware("h100x1"), 0, 1)
