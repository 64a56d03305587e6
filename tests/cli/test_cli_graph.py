"""``inspect --graph``: boxes do not overlap, edges avoid them, labels say what they should."""

from __future__ import annotations

from itertools import combinations, pairwise

import networkx as nx
import pytest

from cl_compiler.cli.draw import _label, _layers, _near_edges, _size
from cl_compiler.cli.layout import GAP, _apart, _crossings, _order, layered
from cl_compiler.lang.graph import loss_graph
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.types import Problem
from cl_compiler.units import format_bytes
from tests.cli.conftest import SMALL

CASES = [("clip", "diagonal"), ("clip", "ids"), ("siglip", "diagonal"), ("supcon", "ids")]


def graph_of(name: str, positives: str) -> nx.DiGraph:
    ir = find(name)
    needs = frozenset({op.name for op in ir.operands} | set(ir.parameters))
    return loss_graph(plan_sweeps(ir, positives, needs))


def layout_of(graph: nx.DiGraph):
    layers = _layers(graph)
    near, stubs = _near_edges(graph, layers)
    sizes = {n: _size(_label(graph.nodes[n], Problem(2048, 2048, 64))) for n in graph}
    return layered(near, layers, sizes), stubs


@pytest.mark.parametrize(("name", "positives"), CASES)
def test_boxes_do_not_overlap_and_stay_inside(name, positives):
    layout, _ = layout_of(graph_of(name, positives))
    for box in layout.boxes.values():
        assert box.x - box.width / 2 >= -1e-9 and box.x + box.width / 2 <= layout.width + 1e-9
        assert box.y - box.height / 2 >= -1e-9 and box.y + box.height / 2 <= layout.height + 1e-9
    for a, b in combinations(layout.boxes.values(), 2):
        apart_x = abs(a.x - b.x) - (a.width + b.width) / 2
        apart_y = abs(a.y - b.y) - (a.height + b.height) / 2
        assert max(apart_x, apart_y) > GAP / 2


@pytest.mark.parametrize(("name", "positives"), CASES)
def test_edges_run_downwards_and_through_no_box(name, positives):
    layout, _ = layout_of(graph_of(name, positives))
    for (tail, head), points in layout.routes.items():
        others = [box for node, box in layout.boxes.items() if node not in (tail, head)]
        for step, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
            assert y1 >= y0 - 1e-9
            if step % 2 == 0:  # straight through a row; bends lie between rows
                assert x0 == x1
                for box in others:
                    inside = abs(x0 - box.x) < box.width / 2 and min(y1, box.y + box.height / 2) > (
                        max(y0, box.y - box.height / 2)
                    )
                    assert not inside


@pytest.mark.parametrize(("name", "positives"), CASES)
def test_every_edge_is_drawn_or_named_in_a_stub(name, positives):
    graph = graph_of(name, positives)
    layout, stubs = layout_of(graph)
    named = {(tail, head) for head, tails in stubs.items() for tail in tails}
    assert set(graph.edges) == set(layout.routes) | named
    assert all(graph.nodes[t]["kind"] in ("operand", "parameter", "input") for t, _ in named)


def test_the_backward_is_below_the_forward():
    graph = graph_of("clip", "diagonal")
    layers = _layers(graph)
    phase = nx.get_node_attributes(graph, "phase")
    last = max(layers[n] for n in graph if phase[n] == "forward")
    assert last < min(layers[n] for n in graph if phase[n] == "backward")
    assert layers["value"] == layers["saved:r0"] == last


def test_an_order_without_crossings_is_found():
    graph = nx.DiGraph([("a", "z"), ("b", "y"), ("c", "x")])
    rows = [["a", "b", "c"], ["x", "y", "z"]]
    assert _crossings(graph, rows) == 3
    _order(graph, rows)
    assert _crossings(graph, rows) == 0


def test_colliding_boxes_share_the_deviation():
    widths = [1.0, 1.0]
    assert _apart([0.0, 10.0], widths) == [0.0, 10.0]
    left, right = _apart([5.0, 5.0], widths)
    assert right - left == pytest.approx(1.0 + GAP)
    assert (left + right) / 2 == pytest.approx(5.0)


def test_svg_of_both_graphs(cli, tmp_path):
    out = tmp_path / "clip.svg"
    result = cli("inspect", *SMALL, "-s", "spill", "--graph", str(out))
    assert result.exit_code == 0, result.output
    hardware = tmp_path / "clip-hardware.svg"
    assert result.stdout == f"loss graph: {out}\nhardware graph: {hardware}\n"
    text = out.read_text()
    for label in (
        "clip, positives: paired",
        "logits = logit_scale * &lt;x, y&gt;",
        "[M, N]  16.0 MiB, never stored  1 unit",
        "saved: r0",
        "[M]  8.0 KiB",
        "dL/dx",
        "4 units of 2·M·N·D FLOP: 1 forward, 3 backward",
    ):
        assert label in text
    assert "schedule spill" in hardware.read_text()


def test_png_of_a_cluster_names_links_and_the_plans_tiles(cli, cli_json, tmp_path):
    machine = ["-w", "h100-128x8", "-p", "131072x131072x512", "-b", "8GiB"]
    out = tmp_path / "big.png"
    assert cli("inspect", *machine, "--graph", str(out)).exit_code == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert cli("inspect", *machine, "--graph", str(out.with_suffix(".svg"))).exit_code == 0
    text = (tmp_path / "big-hardware.svg").read_text()
    for label in ("infiniband", "50.0 GB/s each", "nvlink", "sm x 132   135,168 in all", "host"):
        assert label in text
    for level in cli_json("plan", *machine)["levels"]:
        assert f"tile {level['tile'][0]}x{level['tile'][1]}" in text
    cluster = cli_json("plan", *machine)["cluster"]
    assert f"schedule {cluster['schedule']}, " in text
    assert len(cluster["links"]) == 2
    for link in cluster["links"]:
        assert f"sends {format_bytes(link['forward_bytes'] + link['backward_bytes'])}<" in text
