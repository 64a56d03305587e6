"""The loss graph: a sweep plan as a networkx DAG, the first of the two graphs that a plan joins.

Operands feed similarities (tiles of one sweep), these feed maps (one expression per pair), maps
feed reductions, and reductions feed saved vectors; in the backward, gradient maps feed products
with the operands, and these the gradients.  Values that vary along two axes are never stored whole:
``stored`` is False and ``bytes`` says what storing them would take.

The graph is plain data (strings, integers, tuples), so it is JSON as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import networkx as nx
import sympy as sp

from cl_compiler.lang.functions import ZERO
from cl_compiler.lang.ir import (
    BANK,
    COLS,
    COLS2,
    ROWS,
    ROWS2,
    SLOTS,
    Leaf,
    Let,
    Reduction,
    View,
    ordered,
    reduction_axes,
)
from cl_compiler.lang.sweeps import Sweep, SweepPlan, is_full, level_of
from cl_compiler.lang.text import describe

__all__ = ["graph_from_json", "graph_to_json", "loss_graph"]

M, N, D, K, B, ELEMENT = sp.symbols("M N D K B e", positive=True)
"""Rows, columns, features, slots per row, length of the bank, bytes of one element."""
_STATISTIC_BYTES = 4


def loss_graph(plan: SweepPlan) -> nx.DiGraph:
    """Build the graph of a plan.

    Returns:
        A directed acyclic graph.  Every node has

        * ``kind``: operand, input, parameter, similarity, positives, map, reduction, vector, saved,
          value, output, gradient_map, product, gradient;
        * ``axes`` (a tuple) and ``shape``, e.g. ``"[M, N]"``;
        * ``bytes``: a SymPy expression in M, N, D, K (slots), B (bank) and e (bytes per element),
          as text; statistics are fp32;
        * ``stored``: whether those bytes ever exist at once;
        * ``units``: matrix products, as text, one unit being 2·M·N·D FLOP; O((M+N)·D) counts as 0;
        * ``phase`` ("forward" or "backward"), ``level`` (after how many sweeps it is known) and
          ``text`` (readable maths).

        ``graph.graph`` has ``loss``, ``positives``, ``needs``, ``forward_levels``,
        ``total_levels``, ``fused``, ``units_forward``, ``units_backward`` and ``units``.
    """
    work = _Builder(plan)
    work.build()
    return work.graph


def graph_to_json(graph: nx.DiGraph) -> str:
    """The graph as JSON text, the same in every process."""
    return json.dumps(
        {
            "graph": graph.graph,
            "nodes": [{"id": name, **graph.nodes[name]} for name in graph],
            "edges": sorted(graph.edges),
        },
        indent=1,
        sort_keys=True,
    )


def graph_from_json(text: str) -> nx.DiGraph:
    """The inverse of ``graph_to_json``."""
    data = json.loads(text)
    graph = nx.DiGraph(**data["graph"])
    for node in data["nodes"]:
        attributes = {**node, "axes": tuple(node["axes"])}
        graph.add_node(attributes.pop("id"), **attributes)
    graph.add_edges_from(data["edges"])
    return graph


class _Builder:
    """Adds nodes in dependency order; ``known`` maps a name of the plan to the node that has it."""

    def __init__(self, plan: SweepPlan) -> None:
        self.plan, self.leaves = plan, plan.leaves
        single = plan.ir.is_single_set
        length = {ROWS: M, COLS: M if single else N, SLOTS: K, BANK: B}
        self.length: Mapping[str, sp.Expr] = {**length, ROWS2: M, COLS2: length[COLS]}
        self.graph = nx.DiGraph(
            loss=plan.ir.name,
            positives=plan.positives,
            needs=sorted(plan.needs),
            forward_levels=plan.forward_levels,
            total_levels=plan.total_levels,
            fused=plan.is_fused,
        )
        self.known: dict[str, str] = {}
        self.units_of: dict[str, sp.Expr] = {}
        self.saved = set(plan.saved)
        self.maps: dict[tuple[object, ...], str] = {}
        self.last = "forward" if plan.is_fused else "backward"

    def build(self) -> None:
        for leaf in self.leaves.values():
            self.leaf(leaf)
        for op in self.plan.ir.operands:
            self.operand(op.name, axes=self.operand_axes(op.name))
        for leaf in self.leaves.values():
            self.positive_or_norm(leaf)
        self.nodes()
        self.value()
        if self.plan.gradient is not None:
            self.gradients()
        self.phases()

    # ---- adding ----------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        kind: str,
        axes: Iterable[str],
        reads: Iterable[str],
        *,
        text: str,
        level: int = 0,
        phase: str = "forward",
        units: sp.Expr = ZERO,
        stored: bool = True,
    ) -> None:
        along = ordered(axes)
        count = sp.Mul(*(self.length[a] for a in along))
        self.attributes(name, kind, along, str(_STATISTIC_BYTES * count), text)
        self.graph.nodes[name].update(level=level, phase=phase, units=str(units), stored=stored)
        self.units_of[name] = units
        for read in reads:
            self.graph.add_edge(read, name)

    def attributes(self, name: str, kind: str, axes: tuple[str, ...], size: str, text: str) -> None:
        shape = f"[{', '.join(str(self.length[a]) for a in axes)}]" if axes else "[]"
        self.graph.add_node(name, kind=kind, axes=axes, shape=shape, bytes=size, text=text)

    def operand(self, name: str, **more: Any) -> None:
        """A node shaped like an operand: itself, its gradient, or a product that is added to it."""
        self.add(name, **{"kind": "operand", "reads": (), "text": name, **more})
        node = self.graph.nodes[name]
        count = sp.Mul(*(self.length[a] for a in node["axes"]))
        node["shape"] = f"{node['shape'][:-1]}, D]"
        node["bytes"] = str(
            count * D * (_STATISTIC_BYTES if node["kind"] == "product" else ELEMENT)
        )

    def operand_axes(self, name: str) -> tuple[str, ...]:
        axes = next(op.axes for op in self.plan.ir.operands if op.name == name)
        return axes[:1] if axes == (ROWS, COLS) else axes

    # ---- leaves ----------------------------------------------------------------------------------

    def leaf(self, leaf: Leaf) -> None:
        if leaf.kind in ("input", "parameter"):
            self.add(leaf.name, leaf.kind, leaf.axes, (), text=leaf.name)
            self.known[leaf.name] = leaf.name

    def positive_or_norm(self, leaf: Leaf) -> None:
        if leaf.kind not in ("similarity_at_positive", "norm"):
            return
        views = [v for v in (leaf.left, leaf.right) if v is not None]
        reads = {v.operand for v in views} | ({leaf.scale} if leaf.scale else set())
        text = f"{leaf.name} = |{views[0]}|"
        if leaf.kind == "similarity_at_positive":
            scale = f"{leaf.scale} * " if leaf.scale else ""
            text = f"{leaf.name} = {scale}<{views[0]}, {views[1]}[positive of row]>"
        self.add(leaf.name, "positives", leaf.axes, sorted(reads), text=text)
        self.known[leaf.name] = leaf.name
        self.save(leaf.name)

    def similarity(self, name: str, sweep: Sweep) -> str:
        """The node of a similarity's tiles in one sweep."""
        node = f"{name}@{sweep.level}"
        if node in self.graph:
            return node
        leaf = self.leaves[name]
        left, right = _views(leaf)
        scale = f"{leaf.scale} * " if leaf.scale else ""
        units = self.units(leaf) / (2 if sweep.symmetric else 1)
        reads = sorted({left.operand, right.operand} | ({leaf.scale} if leaf.scale else set()))
        text = f"{name} = {scale}<{left}, {right}>"
        level, phase = sweep.level, self.phase(sweep.level)
        self.add(node, "similarity", leaf.axes, reads, text=text, level=level, phase=phase,
                 units=units, stored=False)  # fmt: skip
        return node

    def units(self, leaf: Leaf) -> sp.Expr:
        """One whole product of a similarity's shape, in units of 2·M·N·D FLOP."""
        left, _ = _views(leaf)
        columns = D if left.prefix is None else sp.Integer(left.prefix)
        base = M * self.length[COLS] * D
        return self.length[leaf.axes[0]] * self.length[leaf.axes[1]] * columns / base

    def phase(self, level: int) -> str:
        return "forward" if level <= self.plan.forward_levels else "backward"

    # ---- reductions and vectors ------------------------------------------------------------------

    def reads(
        self, exprs: Iterable[sp.Expr], sweep: Sweep | None = None, late: bool = False
    ) -> list[str]:
        """Nodes that hold what the expressions read; ``late``: from the saved copy where one is."""
        names = sorted({s.name for e in exprs for s in e.free_symbols})
        nodes = []
        for name in names:
            if self.leaves[name].kind == "similarity":
                assert sweep is not None
                nodes.append(self.similarity(name, sweep))
            elif late and f"saved:{name}" in self.graph:
                nodes.append(f"saved:{name}")
            elif name in self.known:
                nodes.append(self.known[name])
        return nodes

    def sweep_of(self, axes: frozenset[str], level: int) -> Sweep:
        grid = ordered(axes)
        return next(s for s in self.plan.sweeps if s.level == level and s.grid == grid)

    def nodes(self) -> None:
        traced = {r.name for r in self.plan.ir.reductions}
        for node in self.plan.nodes:
            level = self.plan.levels[node.name]
            phase = self.phase(level)
            late = phase == "backward"
            axes, text = self.leaves[node.name].axes, describe(node)
            if isinstance(node, Reduction) and is_full(node, self.leaves):
                pair = self.pair_map(node, level, phase)
                self.add(node.name, "reduction", axes, [pair], text=text, level=level, phase=phase)
            else:
                exprs = [node.expr] if isinstance(node, Let) else list(node.expressions)
                phase = "forward" if node.name in traced else ""  # as late as its readers
                reads = self.reads(exprs, late=late)
                self.add(node.name, "vector", axes, reads, text=text, level=level, phase=phase)
            self.known[node.name] = node.name
            self.save(node.name)

    def pair_map(self, red: Reduction, level: int, phase: str) -> str:
        """The node of what a reduction folds; reductions of the same pairs share it."""
        full = reduction_axes(red, self.leaves)
        key = (full, level, *red.expressions)
        if key not in self.maps:
            node = self.maps[key] = f"map:{red.name}"
            reads = self.reads(red.expressions, self.sweep_of(full, level), phase == "backward")
            text = describe(red.operand)
            text += "" if red.logits is None else f" weighted by softmax of {describe(red.logits)}"
            text += "" if red.where == 1 else f" where {describe(red.where)}"
            self.add(node, "map", full, reads, text=text, level=level, phase=phase, stored=False)
        return self.maps[key]

    def save(self, name: str) -> None:
        if name in self.saved:
            self.add(f"saved:{name}", "saved", self.leaves[name].axes, [name], text=name,
                     level=self.plan.levels.get(name, 0))  # fmt: skip

    def value(self) -> None:
        ir = self.plan.ir
        level = self.plan.forward_levels
        self.add("value", "value", (), self.reads([ir.value]), text=describe(ir.value), level=level)
        for name, expr in ir.outputs:
            axes = {a for s in expr.free_symbols for a in self.leaves[s.name].axes}
            text = f"{name} = {describe(expr)}"
            self.add(f"output:{name}", "output", axes, self.reads([expr]), text=text, level=level)

    # ---- gradients -------------------------------------------------------------------------------

    def gradients(self) -> None:
        gradient = self.plan.gradient
        assert gradient is not None
        into: dict[str, list[str]] = {}
        for name, expr in gradient.similarities.items():
            self.gradient_map(name, expr, into)
        for name, expr in gradient.positives.items():
            self.gradient_at_positive(name, expr, into)
        for name, expr in gradient.vectors.items():
            leaf = self.leaves[name]
            target = f"d {name}" if leaf.kind == "input" else f"d |{leaf.left}|"
            self.vector_gradient(target, leaf, expr)
            if leaf.left is not None:
                into.setdefault(leaf.left.operand, []).append(target)
        for op in self.plan.ir.operands:
            if op.name in self.plan.needs:
                self.operand(
                    f"d {op.name}",
                    kind="gradient",
                    axes=self.operand_axes(op.name),
                    reads=into.get(op.name, ()),
                    text=f"dL/d{op.name}",
                    level=self.plan.total_levels,
                    phase=self.last,
                )
        for name in self.plan.ir.parameters:
            if name in self.plan.needs:
                self.parameter_gradient(name)

    def parameter_gradient(self, name: str) -> None:
        """A scalar's gradient: what is summed over pairs, and what is read off the operands'."""
        gradient = self.plan.gradient
        assert gradient is not None
        self.vector_gradient(f"d {name}", self.leaves[name], gradient.parameters.get(name))
        node = self.graph.nodes[f"d {name}"]
        terms = [] if name not in gradient.parameters else [describe(gradient.parameters[name])]
        for operand, weight in gradient.dots.get(name, ()):
            factor = "" if weight == 1 else f"{weight} * "
            terms.append(f"{factor}<{operand}, d {operand}> / {name}")
            node["level"] = self.plan.total_levels
            self.graph.add_edges_from((o, f"d {name}") for o in (operand, f"d {operand}"))
        node["text"] = f"dL/d{name} = {' + '.join(terms) or '0'}"

    def gradient_map(self, name: str, expr: sp.Expr, into: dict[str, list[str]]) -> None:
        leaf = self.leaves[name]
        left, right = _views(leaf)
        sweep = next(s for s in self.plan.sweeps if name in s.gradients)
        level = sweep.level
        node = f"G:{name}"
        phase = self.phase(level)
        reads = self.reads([expr], sweep, late=phase == "backward")
        self.add(node, "gradient_map", leaf.axes, reads, text=f"dL/d{name} = {describe(expr)}",
                 level=level, phase=phase, stored=False)  # fmt: skip
        wanted = [(left, right, "G"), (right, left, "G.T")]
        if left.operand == right.operand:
            wanted = [(left, right, "(G + G.T)")]
        for view, other, matrix in wanted:
            if view.stop or view.operand not in self.plan.needs:
                continue
            product = f"{node} into {view.operand}"
            self.operand(
                product,
                kind="product",
                axes=self.operand_axes(view.operand),
                reads=[node, other.operand],
                text=f"{matrix} @ {other}",
                level=level,
                phase=phase,
                units=self.units(leaf),
                stored=False,
            )
            into.setdefault(view.operand, []).append(product)

    def gradient_at_positive(self, name: str, expr: sp.Expr, into: dict[str, list[str]]) -> None:
        left, right = _views(self.leaves[f"{name}_pos"])
        node = f"G:{name} at positives"
        level = level_of(expr, self.plan.levels)
        self.add(node, "vector", (ROWS,), self.reads([expr], late=self.last == "backward"),
                 text=describe(expr), level=level, phase=self.last)  # fmt: skip
        for view, other in ((left, right), (right, left)):
            if not view.stop and view.operand in self.plan.needs:
                self.graph.add_edge(other.operand, node)
                into.setdefault(view.operand, []).append(node)

    def vector_gradient(self, target: str, leaf: Leaf, expr: sp.Expr | None) -> None:
        value = ZERO if expr is None else expr
        level = level_of(value, self.plan.levels)
        reads = self.reads([value], late=self.last == "backward")
        text = f"dL/d{leaf.name} = {describe(value)}"
        self.add(target, "gradient", leaf.axes, reads, text=text, level=level, phase=self.last)

    # ---- totals ----------------------------------------------------------------------------------

    def phases(self) -> None:
        """A vector is made as late as its first reader; then add up the units of each phase."""
        nodes = self.graph.nodes
        for name in reversed(list(nx.topological_sort(self.graph))):
            if not nodes[name]["phase"]:
                readers = [nodes[r]["phase"] for r in self.graph.successors(name)]
                nodes[name]["phase"] = "forward" if "forward" in readers else "backward"
        self.late_reads()
        total = {"forward": ZERO, "backward": ZERO}
        for name, units in self.units_of.items():
            total[nodes[name]["phase"]] += units
        self.graph.graph["units_forward"] = str(total["forward"])
        self.graph.graph["units_backward"] = str(total["backward"])
        self.graph.graph["units"] = str(total["forward"] + total["backward"])

    def late_reads(self) -> None:
        """Have the backward read what was saved, and make again what was not."""
        nodes = self.graph.nodes
        for read, reader in list(self.graph.edges):
            early = nodes[read]["phase"] == "forward" and nodes[reader]["phase"] == "backward"
            if early and (late := self.late(read)) != read:
                self.graph.remove_edge(read, reader)
                self.graph.add_edge(late, reader)

    def late(self, name: str) -> str:
        """The node from which the backward has a value of the forward."""
        node = self.graph.nodes[name]
        if f"saved:{name}" in self.graph:
            return f"saved:{name}"
        if node["kind"] != "vector":
            return name
        again = f"again:{name}"
        if again not in self.graph:
            reads = [self.late(read) for read in self.graph.predecessors(name)]
            self.graph.add_node(again, **{**node, "phase": "backward"})
            self.graph.add_edges_from((read, again) for read in reads)
        return again


def _views(leaf: Leaf) -> tuple[View, View]:
    assert leaf.left is not None and leaf.right is not None
    return leaf.left, leaf.right
