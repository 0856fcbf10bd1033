"""Graphs of a step worked by hand, and how they compare over steps."""

import json

import networkx as nx
import numpy as np
import pytest
import toy_circuit as toy
from tiny import tokenizer

from dhlens.graphs import LOGITS, Graph, align
from dhlens.heads import HeadSet
from dhlens.model import load
from dhlens.nodes import Wiring, parse_edge
from dhlens.opened import open_steps
from dhlens.paths import patch_edges

WIRING = Wiring(3, 4, 2)
CIRCUIT = {
    "embed->L0KV0.v@needle": -3.0,
    "L0H1->L1KV0.k@needle": -4.0,
    "L1H0->L2.mlp@step": 2.0,
    "L2.mlp->logits@step": -5.0,
}
LOOSE = {
    "embed->L0KV1.v@needle": 6.0,  # of the other group than L0H1
    "L0H2->L2H3.q@step": -7.0,  # L2H3 leads nowhere
    "L0.mlp->L1KV0.v@step": 1.0,  # leads on to L1H0, but nothing feeds L0.mlp at the step's row
}


def graph(*parts, step=0):
    return Graph.of({parse_edge(k): v for part in parts for k, v in part.items()}, WIRING, step=step)


def names(g):
    return {str(e) for e in g.edges}


def test_pruning_keeps_what_leads_to_the_logits():
    whole = graph(CIRCUIT, LOOSE)
    assert names(whole.prune()) == {*CIRCUIT, "L0.mlp->L1KV0.v@step"}
    assert names(whole.prune(rooted=True)) == set(CIRCUIT)
    assert names(whole.prune(threshold=1.5)) == set(CIRCUIT)
    assert [str(e) for e in whole.scores][:2] == ["L0H2->L2H3.q@step", "embed->L0KV1.v@needle"]
    assert names(whole.prune(5)) == {"L2.mlp->logits@step"}  # the fifth leads to a head that is cut off
    assert not whole.prune(2).edges and not whole.prune(0).edges
    assert whole.prune().heads == HeadSet(["L0H1", "L1H0"], (3, 4)) and "L2H3" in whole.heads


@pytest.mark.parametrize(
    ("key", "at", "sees"),
    [
        ("needle", "step", True),
        ("needle", "needle", True),
        ("step", "step", True),
        ("step", "needle", False),
        ("needle+2", "needle+2", True),
        ("needle+2", "needle+3", True),
        ("needle+2", "needle+1", False),
        ("needle+2", "step", True),
        ("step", "needle+2", False),
        ("needle", "needle+2", True),
    ],
)
def test_a_shared_key_is_read_by_its_group_in_its_row_and_behind_it(key, at, sees):
    net = graph({f"embed->L0KV0.k@{key}": 1.0, f"L0H1->L1H0.q@{at}": 1.0, f"L0H2->L1H0.q@{at}": 1.0}).to_networkx()
    assert net.has_edge(f"L0KV0.k@{key}", f"L0H1@{at}") == sees
    assert not net.has_edge(f"L0KV0.k@{key}", f"L0H2@{at}")


def test_networkx():
    net = graph(CIRCUIT).to_networkx()
    assert nx.shortest_path(net, "embed@needle", LOGITS) == [
        *("embed@needle", "L0KV0.v@needle", "L0H1@needle", "L1KV0.k@needle", "L1H0@step", "L2.mlp@step", LOGITS)
    ]
    assert net.edges["embed@needle", "L0KV0.v@needle"] == {"score": -3.0, "into": "v"}
    assert net.edges["L0KV0.v@needle", "L0H1@needle"] == {"into": "shared"}
    assert net.nodes["L1KV0.k@needle"] == {"kind": "k", "layer": 1, "index": 0, "at": "needle"}
    assert net.nodes["L0H1@needle"] == {"kind": "head", "layer": 0, "index": 1, "at": "needle"}
    assert nx.is_directed_acyclic_graph(net)
    query = graph({"L0H1->L1H2.q@step": 4.0}).to_networkx()
    assert query.edges["L0H1@step", "L1H2@step"] == {"score": 4.0, "into": "q"}
    assert query.nodes["L1H2@step"] == {"kind": "head", "layer": 1, "index": 2, "at": "step"}


def test_json_reads_back():
    whole = graph(CIRCUIT, LOOSE, step=7)
    back = Graph.from_json(json.loads(json.dumps(whole.to_json())))
    assert (back.step, back.wiring, list(back.scores.items())) == (7, WIRING, list(whole.scores.items()))


def test_alignment_worked_by_hand():
    a, b, c = ({k: 1.0} for k in ("L1H0->logits@step", "L2H0->logits@step", "L1H1->logits@step"))
    always = {"embed->logits@step": 2.0}
    found = align([graph(always, a, b, step=2), graph(always, a, step=1), graph(always, c, step=5)])
    assert [g.step for g in found.graphs] == [1, 2, 5]
    assert {str(e) for e in found.core} == set(always) and {str(e) for e in found.periphery} == {*a, *b, *c}
    want = np.array([[1, 2 / 3, 1 / 3], [2 / 3, 1, 1 / 4], [1 / 3, 1 / 4, 1]])
    np.testing.assert_allclose(found.edge_jaccard, want)
    np.testing.assert_allclose(found.node_jaccard, [[1, 1 / 2, 0], [1 / 2, 1, 0], [0, 0, 1]])
    table = found.table
    np.testing.assert_allclose(table["edge_jaccard_adjacent"], [np.nan, 2 / 3, 1 / 4])
    np.testing.assert_allclose(table["edge_jaccard_others"], [1 / 2, 11 / 24, 7 / 24])
    assert table["core_edges"].tolist() == [1, 1, 1] and table["edges"].tolist() == [2, 3, 2]
    wide = align(found.graphs, core=0.6)
    assert {str(e) for e in wide.core} == {*always, *a} and found.share.iloc[0] == 1
    empty = align([graph(step=0), graph(step=1)])
    assert empty.edge_jaccard.tolist() == [[1, 1], [1, 1]] and not empty.core


def test_bad_input():
    with pytest.raises(ValueError, match="after its sender"):
        graph({"L2H0->L1H0.q@step": 1.0})
    with pytest.raises(ValueError, match="NaN"):
        graph({"L0H0->L1H0.q@step": float("nan")})
    with pytest.raises(ValueError, match="at least 0 edges"):
        graph(CIRCUIT).prune(-1)
    other = Graph.of({}, Wiring(3, 4, 4), step=1)
    for graphs in ([], [graph(step=1), graph(step=1)], [graph(step=0), other]):
        with pytest.raises(ValueError, match="must be of one model and of different steps"):
            align(graphs)
    with pytest.raises(ValueError, match=r"within 0\.\.1"):
        align([graph(step=1)], core=0.0)


def test_the_planted_circuits_take_turns():
    """Steps of one pair share their graph, steps of different pairs share nothing but the embedding."""
    model = load(toy.build(), tokenizer=tokenizer())
    graphs = []
    for step in open_steps(model, *toy.episodes(), steps=[1, 2, 3]):
        candidates = {e for s in range(4) for e in toy.planted(s)}
        graphs.append(Graph.of(patch_edges(step, candidates).scores, step.wiring, step=step.step))
    pruned = [g.prune(threshold=1.0, rooted=True) for g in graphs]
    assert [g.edges for g in pruned] == [toy.planted(s) for s in (1, 2, 3)]
    found = align(pruned)
    np.testing.assert_allclose(found.edge_jaccard, [[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert not found.core and found.node_jaccard.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
