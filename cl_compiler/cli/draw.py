"""The loss graph as a picture: what is computed, what is kept, what never exists.

Forward above, backward below; edges from operands to nodes far away become a short stub with their
names, since lines across the whole picture tell nobody anything.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx

from cl_compiler.cli.layout import Box, Layout, layered

if TYPE_CHECKING:
    from cl_compiler.plan.types import Problem

__all__ = ["FONT_SIZE", "character_width", "draw_loss_graph", "new_figure", "save_figure"]

FONT_SIZE = 8.0
LINE = FONT_SIZE * 1.3 / 72
"""Height of a line, inches."""
_PAD, _MARGIN, _WRAP = 0.1, 0.35, 38
_FILL = {"forward": "#dbe9f6", "backward": "#fde3cf"}
_EDGE = {"forward": "#2f6ea5", "backward": "#c0622b"}
_SAVED_FILL, _SAVED_EDGE = "#fff2a8", "#a88600"
_GREY, _INK = "#8a8f98", "#1b1f24"
_LEAVES = ("operand", "parameter", "input")
_GRADIENTS = ("gradient_map", "product", "gradient")


def character_width(size: float = FONT_SIZE) -> float:
    """Width of a character of matplotlib's own monospaced font, inches."""
    return 0.602 * size / 72


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches whose axes are in inches, y downwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure; text stays text where the format allows, to be searched and copied."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cl_compiler"}):
        figure.savefig(path, dpi=150, facecolor="white")


def draw_loss_graph(graph: nx.DiGraph, problem: Problem, path: Path) -> None:
    """Draw a loss graph to a file whose suffix says how: .png, .svg or .pdf.

    Args:
        graph: of ``cl_compiler.lang.graph.loss_graph``.
        problem: sizes, for the bytes in the labels.
        path: the file to write.
    """
    layers = _layers(graph)
    near, stubs = _near_edges(graph, layers)
    labels = {name: _label(graph.nodes[name], problem) for name in graph}
    sizes = {name: _size(lines) for name, lines in labels.items()}
    layout = layered(near, layers, sizes)
    head = _MARGIN + 3.2 * LINE
    width = max(layout.width, 7.0) + 2 * _MARGIN
    figure, axes = new_figure(width, layout.height + head + _MARGIN + 2.5 * LINE)
    shift = ((width - layout.width) / 2, head)
    _title(axes, graph)
    for tail, nodes in near.adj.items():
        for node in nodes:
            _arrow(axes, layout, (tail, node), shift, _EDGE[_side(graph.nodes[node])])
    for name, box in layout.boxes.items():
        _box(axes, graph.nodes[name], _moved(box, shift), labels[name])
        if name in stubs:
            _stub(axes, _moved(box, shift), ", ".join(stubs[name]))
    _legend(axes, width, layout.height + head + _MARGIN + 0.5 * LINE)
    save_figure(figure, path)


# ---- what goes where ---------------------------------------------------------------------------


def _layers(graph: nx.DiGraph) -> dict[str, int]:
    """Longest path from the operands; the backward below the forward; then as late as possible."""
    order = list(nx.topological_sort(graph))
    nodes = graph.nodes
    layers: dict[str, int] = {}
    for phase in ("forward", "backward"):
        first = 1 + max(layers.values(), default=-1)
        for name in order:
            if nodes[name]["phase"] == phase:
                before = [layers[p] + 1 for p in graph.predecessors(name) if p in layers]
                layers[name] = max([first, *before])
    for name in reversed(order):
        readers = [r for r in graph.successors(name) if nodes[r]["phase"] == nodes[name]["phase"]]
        if readers and nodes[name]["kind"] not in _LEAVES:
            layers[name] = max(layers[name], min(layers[r] for r in readers) - 1)
    last = max((layers[n] for n in graph if nodes[n]["phase"] == "forward"), default=0)
    # What the forward ends with stands in its last row: the value, and what it hands on.
    for name in graph:
        if nodes[name]["kind"] in ("saved", "value", "output"):
            layers[name] = last
    return layers


def _near_edges(
    graph: nx.DiGraph, layers: Mapping[str, int]
) -> tuple[nx.DiGraph, dict[str, list[str]]]:
    """(the graph without long edges from operands, the names that each node lost)."""
    near = nx.DiGraph()
    near.add_nodes_from(graph)
    stubs: dict[str, list[str]] = {}
    for tail, head in graph.edges:
        if graph.nodes[tail]["kind"] in _LEAVES and layers[head] - layers[tail] > 1:
            stubs.setdefault(head, []).append(tail)
        else:
            near.add_edge(tail, head)
    return near, stubs


def _side(node: Mapping[str, Any]) -> str:
    """Which colour: gradients that a forward sweep forms look like those of a backward."""
    return "backward" if node["kind"] in _GRADIENTS else str(node["phase"])


def _label(node: Mapping[str, Any], problem: Problem) -> list[str]:
    """Maths, then shape and bytes."""
    before = {"saved": "saved: ", "value": "loss = ", "map": "pairs: "}.get(node["kind"], "")
    text = textwrap.wrap(before + node["text"], _WRAP)
    size = node["shape"]
    if node["shape"] != "[]":
        size += f"  {_bytes(node['bytes'], problem)}"
        size += "" if node["stored"] else ", never stored"
    units = "" if node["units"] == "0" else f"  {_units(node['units'])}"
    return [*text, size + units]


def _bytes(text: str, problem: Problem) -> str:
    import sympy as sp

    from cl_compiler.lang.graph import ELEMENT, B, D, K, M, N
    from cl_compiler.units import format_bytes

    symbols = {str(s): s for s in (B, D, ELEMENT, K, M, N)}
    values = {
        M: problem.M, N: problem.N, D: problem.D, K: problem.slots, B: problem.bank,
        ELEMENT: problem.input_bytes,
    }  # fmt: skip
    return format_bytes(int(sp.sympify(text, locals=symbols).subs(values)))


def _units(text: str) -> str:
    return "1 unit" if text == "1" else f"{text} units"


def _size(lines: list[str]) -> tuple[float, float]:
    widest = max(len(line) for line in lines)
    return widest * character_width() + 2 * _PAD, len(lines) * LINE + 2 * _PAD


# ---- strokes -----------------------------------------------------------------------------------


def _moved(box: Box, shift: tuple[float, float]) -> Box:
    return Box(box.x + shift[0], box.y + shift[1], box.width, box.height)


def _box(axes: Any, node: Mapping[str, Any], box: Box, lines: list[str]) -> None:
    from matplotlib.patches import FancyBboxPatch

    side, saved = _side(node), node["kind"] == "saved"
    axes.add_patch(
        FancyBboxPatch(
            (box.x - box.width / 2, box.y - box.height / 2),
            box.width,
            box.height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=_SAVED_FILL if saved else _FILL[side] if node["stored"] else "white",
            edgecolor=_SAVED_EDGE if saved else _EDGE[side],
            linewidth=2.0 if saved or node["kind"] in ("value", "gradient") else 1.0,
            linestyle="-" if node["stored"] else (0, (4, 2)),
            zorder=3,
        )
    )
    top = box.y - box.height / 2 + _PAD
    for index, line in enumerate(lines):
        last = index == len(lines) - 1
        axes.text(
            box.x, top + (index + 0.5) * LINE, line, ha="center", va="center", zorder=4,
            family="monospace", size=FONT_SIZE - (0.7 if last else 0),
            color=_GREY if last else _INK,
        )  # fmt: skip


def _arrow(
    axes: Any, layout: Layout, edge: tuple[str, str], shift: tuple[float, float], color: str
) -> None:
    """From a box's lower edge to the other's upper edge: straight in rows, bent between them."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    points = [(x + shift[0], y + shift[1]) for x, y in layout.routes[edge]]
    vertices, codes = [points[0]], [Curve.MOVETO]
    for step, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        if step % 2 == 0:
            if y1 > y0:  # a step of no length would leave the arrow without its head
                vertices.append((x1, y1))
                codes.append(Curve.LINETO)
            continue
        bend = (y1 - y0) / 2
        vertices += [(x0, y0 + bend), (x1, y1 - bend), (x1, y1)]
        codes += [Curve.CURVE4] * 3
    axes.add_patch(
        FancyArrowPatch(
            path=Curve(vertices, codes), arrowstyle="-|>", mutation_scale=8, color=color,
            linewidth=0.9, alpha=0.8, zorder=2,
        )
    )  # fmt: skip


def _stub(axes: Any, box: Box, names: str) -> None:
    x, top = box.x - box.width / 2 + 0.16, box.y - box.height / 2
    axes.annotate(
        "", (x, top), (x, top - 0.2), zorder=2,
        arrowprops={"arrowstyle": "-|>", "color": _GREY, "linewidth": 0.8, "mutation_scale": 6},
    )  # fmt: skip
    axes.text(
        x + 0.05, top - 0.12, names, size=FONT_SIZE - 1.5, family="monospace", color=_GREY,
        ha="left", va="center", zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )  # fmt: skip


def _title(axes: Any, graph: nx.DiGraph) -> None:
    about = graph.graph
    text = f"{about['loss']}, positives: {about['positives']}"
    work = f"{about['units']} units of 2·M·N·D FLOP: {about['units_forward']} forward"
    if about["needs"]:
        work += (
            ", gradients formed in the forward sweep"
            if about["fused"]
            else f", {about['units_backward']} backward"
        )
    axes.text(_MARGIN, _MARGIN, text, size=FONT_SIZE + 4, weight="bold", color=_INK, va="center")
    axes.text(_MARGIN, _MARGIN + 1.6 * LINE, work, size=FONT_SIZE, color=_GREY, va="center")


def _legend(axes: Any, width: float, y: float) -> None:
    from matplotlib.patches import Rectangle

    entries = (
        ("forward", _FILL["forward"], _EDGE["forward"], "-"),
        ("gradients, backward", _FILL["backward"], _EDGE["backward"], "-"),
        ("saved for the backward", _SAVED_FILL, _SAVED_EDGE, "-"),
        ("made in tiles, never stored whole", "white", _GREY, (0, (4, 2))),
    )
    x = _MARGIN
    for text, fill, edge, style in entries:
        axes.add_patch(
            Rectangle((x, y - 0.06), 0.2, 0.12, facecolor=fill, edgecolor=edge, linestyle=style)
        )
        axes.text(x + 0.27, y, text, size=FONT_SIZE - 1, color=_INK, va="center")
        x += 0.27 + 0.07 * len(text) + 0.2
