"""The hardware graph as a picture: levels from the outside in, and what a plan puts there."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx

from cl_compiler.cli.draw import FONT_SIZE, character_width, new_figure, save_figure
from cl_compiler.hardware.graph import HOST, path
from cl_compiler.units import format_bytes, format_flops, format_rate, format_seconds

if TYPE_CHECKING:
    from cl_compiler.plan.types import ClusterPlan, Plan

__all__ = ["draw_hardware_graph"]

_LINE, _PAD, _MARGIN, _GAP = FONT_SIZE * 1.35 / 72, 0.13, 0.35, 0.62
_FILL = {
    "cluster": "#f1f1f4", "node": "#e6e8ef", "device": "#dcebdc", "cache": "#dbe9f6",
    "core": "#e9e2f5", "host": "#f6ecd2",
}  # fmt: skip
_INK, _GREY, _PLAN = "#1b1f24", "#6b717a", "#a04a12"
_SHADOW = 0.07
_DTYPES = ("float32", "onednn", "tf32", "bfloat16", "float16", "fp8")


def draw_hardware_graph(graph: nx.DiGraph, plan: Plan, path_out: Path) -> None:
    """Draw a machine to a file whose suffix says how: .png, .svg or .pdf.

    Args:
        graph: of ``cl_compiler.hardware.graph.hardware_graph``.
        plan: whose tile at each level is written beside that level.
        path_out: the file to write.
    """
    names = list(path(graph))
    tiles = {level.level: level for level in plan.levels}
    labels = {name: _label(name, graph.nodes[name]) for name in graph}
    sent = _sent(plan.cluster)
    placed = {
        name: [*_planned(tiles.get(name)), *sent.get(name, ())]
        for name in names
        if name in tiles or name in sent
    }
    width = max(_width(lines) for lines in labels.values())
    beside = max([_width(lines) for lines in placed.values()], default=0.0)
    heights = {name: len(labels[name]) * _LINE + 2 * _PAD for name in labels}
    has_host = HOST in graph
    left = _MARGIN + (width + 1.9 if has_host else 0.0)
    height = sum(heights[n] for n in names) + _GAP * (len(names) - 1) + 1.0 + _MARGIN
    figure, axes = new_figure(max(left + width + 0.45 + beside + _MARGIN, 6.0), height)
    axes.text(_MARGIN, _MARGIN, graph.graph["name"], size=FONT_SIZE + 4, weight="bold", color=_INK,
              va="center")  # fmt: skip
    axes.text(
        _MARGIN, _MARGIN + 0.22, f"devices: {graph.graph['world_size']:,}; in orange what each "
        f"level does for {plan.loss_name}, schedule {_schedule(plan)}",
        size=FONT_SIZE, color=_GREY, va="center",
    )  # fmt: skip
    y = 1.0
    tops = {}
    for name in names:
        tops[name] = y
        _box(axes, graph.nodes[name], (left, y, width, heights[name]), labels[name])
        for index, line in enumerate(placed.get(name, ())):
            axes.text(left + width + 0.4, y + _PAD + (index + 0.5) * _LINE, line, va="center",
                      family="monospace", size=FONT_SIZE, color=_PLAN)  # fmt: skip
        y += heights[name] + _GAP
    middle = left + width / 2
    for outer, inner in pairwise(names):
        bottom = tops[outer] + heights[outer] + _cards(graph.nodes[outer]) * _SHADOW
        _arrow(axes, (middle, bottom), (middle, tops[inner]), _edge(graph.edges[outer, inner]))
    if has_host:
        _host(axes, graph, (left, width), tops, heights, labels[HOST])
    save_figure(figure, path_out)


def _host(
    axes: Any,
    graph: nx.DiGraph,
    column: tuple[float, float],
    tops: Mapping[str, float],
    heights: Mapping[str, float],
    lines: list[str],
) -> None:
    left, width = column
    (device,) = graph.successors(HOST)
    y = tops[device] + heights[device] / 2 - heights[HOST] / 2
    _box(axes, graph.nodes[HOST], (_MARGIN, y, width, heights[HOST]), lines)
    y += heights[HOST] / 2
    _arrow(axes, (_MARGIN + width, y), (left, y), _edge(graph.edges[HOST, device]))


def _label(name: str, node: Mapping[str, Any]) -> list[str]:
    count = f" x {node['count']}" if node["count"] > 1 else ""
    total = f"   {node['total']:,} in all" if node["total"] != node["count"] else ""
    lines = [f"{name}{count}{total}"]
    if node["memory_bytes"]:
        rate = format_rate(node["bandwidth_bytes_per_s"])
        lines.append(f"{format_bytes(node['memory_bytes'])} at {rate}")
    rates = node.get("gemm_flops_per_s", {})
    lines += [f"{dtype:<9}{format_flops(rates[dtype]):>15}" for dtype in _DTYPES if dtype in rates]
    return lines


def _schedule(plan: Plan) -> str:
    """Of a rank, and how shards travel to it."""
    return plan.schedule if plan.cluster is None else f"{plan.cluster.schedule}, {plan.schedule}"


def _sent(cluster: ClusterPlan | None) -> dict[str, list[str]]:
    """Of each level between whose instances shards travel, bytes over the busiest link."""
    return {
        link.level: [f"sends {format_bytes(link.forward_bytes + link.backward_bytes)}"]
        for link in (() if cluster is None else cluster.links)
    }


def _planned(level: Any) -> list[str]:
    if level is None:
        return []
    lines = [f"tile {level.tile}", f"holds {format_bytes(level.resident_bytes)}"]
    if level.traffic_bytes:
        lines.append(f"moves {format_bytes(level.traffic_bytes)}")
    return [*lines, f"bound by {level.bound_by}"]


def _edge(edge: Mapping[str, Any]) -> str:
    if edge["kind"] == "contains":
        return ""
    kind = "" if edge["kind"] == "memory" else f"{edge['kind'].replace('_', ' ')}\n"
    latency = f"\n{format_seconds(edge['latency_s'])}" if edge["latency_s"] else ""
    return f"{kind}{format_rate(edge['bandwidth_bytes_per_s'])} each{latency}"


def _cards(node: Mapping[str, Any]) -> int:
    """How many cards show behind the front one."""
    return min(int(node["count"]) - 1, 2)


def _width(lines: list[str]) -> float:
    return max(len(line) for line in lines) * character_width() + 2 * _PAD


def _box(
    axes: Any, node: Mapping[str, Any], place: tuple[float, float, float, float], lines: list[str]
) -> None:
    """A box with its lines; several instances look like a stack of cards."""
    from matplotlib.patches import FancyBboxPatch

    x, y, width, height = place
    for depth in range(_cards(node), -1, -1):
        axes.add_patch(
            FancyBboxPatch(
                (x + depth * _SHADOW, y + depth * _SHADOW), width, height,
                boxstyle="round,pad=0,rounding_size=0.06", facecolor=_FILL[node["kind"]],
                edgecolor=_GREY, linewidth=1.0, zorder=3 - depth * 0.1,
            )
        )  # fmt: skip
    for index, line in enumerate(lines):
        axes.text(
            x + width / 2, y + _PAD + (index + 0.5) * _LINE, line, ha="center", va="center",
            family="monospace", size=FONT_SIZE, color=_INK, zorder=4,
            weight="bold" if index == 0 else "normal",
        )  # fmt: skip


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    axes.annotate(
        "", end, start, zorder=3.5,
        arrowprops={"arrowstyle": "-|>" if text else "-", "color": _GREY, "linewidth": 1.2,
                    "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip
    upright = start[0] == end[0]
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(
        x + (0.12 if upright else 0), y - (0 if upright else 0.06), text, size=FONT_SIZE - 0.5,
        family="monospace", color=_GREY, ha="left" if upright else "center",
        va="center" if upright else "bottom", zorder=4, linespacing=1.15,
    )  # fmt: skip
