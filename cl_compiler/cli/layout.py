"""Where the boxes of a drawn graph go: layers from top to bottom, few crossings, no overlaps.

Sugiyama's method in its simplest form: edges that skip layers get invisible waypoints, layers are
ordered by the mean position of their neighbours, and positions relax towards these means.
Lengths are inches; y grows downwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

__all__ = ["Box", "Layout", "layered"]

GAP = 0.3
"""Between neighbours in a layer."""
LAYER_GAP = 0.5
_SWEEPS = 24


@dataclass(frozen=True)
class Box:
    """Centre and size of a node."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """Boxes by node, points (x, y) of every edge, and the whole extent.

    Odd steps of an edge run straight down through a row, even ones bend between two rows.
    """

    boxes: Mapping[str, Box]
    routes: Mapping[tuple[str, str], tuple[tuple[float, float], ...]]
    width: float
    height: float


def layered(
    graph: nx.DiGraph, layers: Mapping[str, int], sizes: Mapping[str, tuple[float, float]]
) -> Layout:
    """Place the nodes of a DAG.

    Args:
        graph: its edges lead to higher layers.
        layers: of every node, from 0.
        sizes: (width, height) of every node.
    """
    work = nx.DiGraph()
    work.add_nodes_from(graph)
    layer_of: dict[str, int] = dict(layers)
    chains: dict[tuple[str, str], list[str]] = {}
    for tail, head in graph.edges:
        chain = [f"{tail}→{head}@{k}" for k in range(layers[tail] + 1, layers[head])]
        layer_of |= {name: layers[tail] + 1 + k for k, name in enumerate(chain)}
        nx.add_path(work, [tail, *chain, head])
        chains[tail, head] = chain
    rows: list[list[str]] = [[] for _ in range(max(layer_of.values(), default=0) + 1)]
    for name in work:
        rows[layer_of[name]].append(name)
    widths = {name: sizes[name][0] if name in sizes else 0.0 for name in work}
    _order(work, rows)
    x = _positions(work, rows, widths)
    heights = [max((sizes[n][1] for n in row if n in sizes), default=0.0) for row in rows]
    tops = [sum(heights[:k]) + LAYER_GAP * k for k in range(len(rows))]
    left = min(x[n] - widths[n] / 2 for n in x)
    right = max(x[n] + widths[n] / 2 for n in x)
    boxes = {
        n: Box(x[n] - left, tops[k] + heights[k] / 2, *sizes[n])
        for n, k in layer_of.items()
        if n in sizes
    }

    def route(edge: tuple[str, str]) -> tuple[tuple[float, float], ...]:
        tail, head = (boxes[name] for name in edge)
        points = [(tail.x, tail.y + tail.height / 2)]
        for name in (edge[0], *chains[edge], edge[1]):
            top = tops[layer_of[name]]
            points += [(x[name] - left, top), (x[name] - left, top + heights[layer_of[name]])]
        return (points[0], *points[2:-1], (head.x, head.y - head.height / 2))

    return Layout(
        boxes,
        {edge: route(edge) for edge in chains},
        right - left,
        tops[-1] + heights[-1],
    )


def _order(graph: nx.DiGraph, rows: list[list[str]]) -> None:
    """Sort each row by its neighbours, downwards and upwards in turn, and keep the best."""
    best, fewest = [list(row) for row in rows], _crossings(graph, rows)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for k in range(len(rows)) if down else reversed(range(len(rows))):
            other = k - 1 if down else k + 1
            beside = rows[other] if 0 <= other < len(rows) else []
            rows[k] = _sorted(rows[k], beside, graph.predecessors if down else graph.successors)
        crossings = _crossings(graph, rows)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    rows[:] = best
    while _exchange(graph, rows):
        pass


def _exchange(graph: nx.DiGraph, rows: list[list[str]]) -> bool:
    """Swap neighbours where that removes crossings; whether it ever did."""
    improved = False
    for k, row in enumerate(rows):
        around = rows[max(0, k - 1) : k + 2]  # the same lists: a swap is seen here
        for i in range(len(row) - 1):
            before = _crossings(graph, around)
            row[i], row[i + 1] = row[i + 1], row[i]
            if _crossings(graph, around) < before:
                improved = True
            else:
                row[i], row[i + 1] = row[i + 1], row[i]
    return improved


def _sorted(
    row: Sequence[str], beside: Sequence[str], around: Callable[[str], Iterable[str]]
) -> list[str]:
    """A row by the mean place of each node's neighbours in the row beside it."""
    place = {name: i for i, name in enumerate(beside)}
    wanted = {
        name: _mean([place[other] for other in around(name) if other in place], own)
        for own, name in enumerate(row)
    }
    return sorted(row, key=wanted.__getitem__)


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _crossings(graph: nx.DiGraph, rows: list[list[str]]) -> int:
    count = 0
    for upper, lower in pairwise(rows):
        place = {name: i for i, name in enumerate(lower)}
        ends = [sorted(place[m] for m in graph.successors(n) if m in place) for n in upper]
        for i, first in enumerate(ends):
            for second in ends[i + 1 :]:
                count += sum(a > b for a in first for b in second)
    return count


def _positions(
    graph: nx.DiGraph, rows: list[list[str]], widths: Mapping[str, float]
) -> dict[str, float]:
    """Centres: each near the mean of its neighbours, none closer than the gap."""
    x: dict[str, float] = {}
    for row in rows:
        at = 0.0
        for name in row:
            x[name] = at + widths[name] / 2
            at += widths[name] + GAP
        for name in row:
            x[name] -= at / 2
    for sweep in range(_SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            around = graph.predecessors if sweep % 2 == 0 else graph.successors
            wanted = [_mean([x[m] for m in around(n)], x[n]) for n in row]
            x |= dict(zip(row, _apart(wanted, [widths[n] for n in row]), strict=True))
    return x


def _apart(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Positions in this order nearest to those wanted (least squares), a gap between any two.

    Runs of neighbours that collide move as one block whose offset is the mean of its members'.
    """
    offsets = [0.0]
    for a, b in pairwise(widths):
        offsets.append(offsets[-1] + (a + b) / 2 + GAP)
    blocks: list[tuple[float, int]] = []  # (mean start, members)
    for want, offset in zip(wanted, offsets, strict=False):
        start, members = want - offset, 1
        while blocks and blocks[-1][0] > start:
            before, more = blocks.pop()
            start = (start * members + before * more) / (members + more)
            members += more
        blocks.append((start, members))
    starts = [start for start, members in blocks for _ in range(members)]
    return [start + offset for start, offset in zip(starts, offsets, strict=False)]
