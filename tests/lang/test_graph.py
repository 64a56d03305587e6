"""The loss graph is a DAG of plain data whose work adds up."""

import networkx as nx
import pytest
import sympy as sp

from cl_compiler.lang.graph import graph_from_json, graph_to_json, loss_graph
from cl_compiler.lang.sweeps import plan_sweeps
from tests.losses_zoo import cases
from tests.random_losses import draw

CASES = {case.name: case for case in cases()}
M, N, D, K, B = sp.symbols("M N D K B", positive=True)
SYMBOLS = {str(s): s for s in (M, N, D, K, B)} | {"e": sp.Symbol("e", positive=True)}


def graph_of(case):
    return loss_graph(plan_sweeps(case.loss, case.positives, case.needs))


def kinds(graph) -> dict[str, int]:
    result: dict[str, int] = {}
    for _, kind in graph.nodes(data="kind"):
        result[kind] = result.get(kind, 0) + 1
    return result


@pytest.mark.parametrize("case", [*cases(), *(draw(s) for s in range(40))], ids=lambda c: c.name)
def test_a_dag_of_plain_data_that_survives_json(case):
    graph = graph_of(case)
    assert nx.is_directed_acyclic_graph(graph)
    text = graph_to_json(graph)
    again = graph_from_json(text)
    assert graph_to_json(again) == text
    assert dict(again.nodes(data=True)) == dict(graph.nodes(data=True))
    assert set(again.edges) == set(graph.edges) and again.graph == graph.graph
    for read, node in graph.edges:  # nothing is read before it is known
        assert graph.nodes[read]["level"] <= graph.nodes[node]["level"]
        assert (graph.nodes[read]["phase"], graph.nodes[node]["phase"]) != ("backward", "forward")


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_the_value_and_every_gradient_are_reached_from_the_operands(case):
    graph = graph_of(case)
    for end in ("value", *(f"d {name}" for name in case.needs)):
        is_zero = graph.nodes[end]["text"].endswith(" = 0")  # a margin that only masks read
        assert is_zero == (case.name.startswith(("qwen3", "gist")) and end == "d margin")
        assert is_zero or {"x", "z"} & nx.ancestors(graph, end), end


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("clip", 4),  # S, S again, dX, dY
        ("infonce", 4),
        ("siglip", 3),  # S, dX, dY
        ("squared_hinge", 3),
        ("nt_xent", 2),  # half of S, half of S again, dZ
        ("supcon", 2),
        ("batch_hard", 5),
        ("sinkhorn", 6),
        ("hard_negatives", 4 + 4 * K / N),
        ("queue", 4 + 3 * B / N),  # the queue has no gradient
        ("mnrl_joint", 4 + 2 * M / N + 2 * N / M),
        ("matryoshka", 4 * (4 + 3 + 2) / D),
    ],
)
def test_units_of_work(name, units):
    graph = graph_of(CASES[name])
    total = sum(sp.parse_expr(u, SYMBOLS) for _, u in graph.nodes(data="units"))
    assert sp.simplify(total - units) == 0
    assert sp.simplify(sp.parse_expr(graph.graph["units"], SYMBOLS) - units) == 0


def test_the_nodes_of_clip():
    graph = graph_of(CASES["clip"])
    found = kinds(graph)
    assert (found["operand"], found["similarity"], found["reduction"], found["saved"]) == (
        2,
        2,
        2,
        2,
    )
    assert (found["gradient_map"], found["product"], found["gradient"], found["value"]) == (
        1,
        2,
        3,
        1,
    )
    saved = [n for n, kind in graph.nodes(data="kind") if kind == "saved"]
    assert [graph.nodes[n]["shape"] for n in saved] == ["[M]", "[N]"]
    assert [graph.nodes[n]["bytes"] for n in saved] == ["4*M", "4*N"]
    (gradient,) = (n for n, kind in graph.nodes(data="kind") if kind == "gradient_map")
    assert set(saved) < set(graph.pred[gradient])
    assert not graph.nodes[gradient]["stored"] and graph.nodes[gradient]["shape"] == "[M, N]"
    assert graph.nodes["d x"]["bytes"] == "D*M*e" and graph.nodes["d x"]["shape"] == "[M, D]"
    assert graph.nodes["d logit_scale"]["text"] == "dL/dlogit_scale = <x, d x> / logit_scale"


def test_a_fused_loss_has_no_backward():
    graph = graph_of(CASES["siglip"])
    assert {phase for _, phase in graph.nodes(data="phase")} == {"forward"}
    assert "saved" not in kinds(graph)


def test_no_gradient_no_backward():
    case = CASES["clip"]
    graph = loss_graph(plan_sweeps(case.loss, case.positives, frozenset()))
    assert graph.graph["units"] == "1"
    assert not {"gradient_map", "product", "gradient", "saved"} & set(kinds(graph))


@pytest.mark.parametrize("case", [*cases(), *(draw(s) for s in range(40))], ids=lambda c: c.name)
def test_what_is_saved_is_read_and_what_is_not_is_made_again(case):
    graph = graph_of(case)
    phase, kind = dict(graph.nodes(data="phase")), dict(graph.nodes(data="kind"))
    for name in graph:
        if kind[name] == "saved":
            readers = list(graph.successors(name))
            assert readers and {phase[r] for r in readers} == {"backward"}, name
    for read, reader in graph.edges:  # the backward has vectors of the forward from nowhere else
        if (phase[read], phase[reader]) == ("forward", "backward"):
            assert kind[read] in ("saved", "operand", "input", "parameter"), (read, reader)


@pytest.mark.parametrize("case", [*cases(), *(draw(s) for s in range(40))], ids=lambda c: c.name)
def test_equal_pairs_are_one_map(case):
    graph = graph_of(case)
    maps = [(n["text"], n["axes"], n["level"]) for _, n in graph.nodes(data=True)
            if n["kind"] == "map"]  # fmt: skip
    assert len(set(maps)) == len(maps)
