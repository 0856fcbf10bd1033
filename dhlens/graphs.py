"""The graph of a step: its strongest edges as a circuit, and how circuits of successive steps compare.

    graph = Graph.of(attribute(step).top(500), step.wiring, step=step.step).prune(200)
    graph.heads, graph.to_networkx(), graph.to_json()
    found = align([graph_of_step_5, graph_of_step_6, ...])
    found.core, found.table

Scores come from `dhlens.attribution` or `dhlens.paths`; nothing here knows a model. Nodes are senders at rows
("L9H2@step"), key and value inputs of a key/value head ("L9KV0.k@needle"), which every query head of the group reads at
these rows and at those behind them, and the logits. Cost: next to nothing. What a graph is worth, by running it without
the rest, is another question.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Float64

from dhlens.heads import HeadSet
from dhlens.nodes import Edge, Receiver, Sender, Wiring, parse_edge

LOGITS = "logits@step"


@dataclass(frozen=True, eq=False)
class Graph:
    """Scored edges of one step."""

    step: int
    wiring: Wiring
    scores: Mapping[Edge, float]
    """Edge to score, the largest first, whatever the sign."""

    @classmethod
    def of(cls, scores: Mapping[Edge, float], wiring: Wiring, *, step: int) -> "Graph":
        """A graph of these edges.

        Raises:
            ValueError: an edge that the model cannot have, or a score that is NaN.
        """
        for edge, score in scores.items():
            wiring.check(edge)
            if np.isnan(score):
                raise ValueError(f"edge {edge} must have a number for a score, got NaN")
        order = sorted(scores, key=lambda e: (-abs(scores[e]), str(e)))
        return cls(step, wiring, {edge: float(scores[edge]) for edge in order})

    @property
    def edges(self) -> frozenset[Edge]:
        """All edges."""
        return frozenset(self.scores)

    @property
    def heads(self) -> HeadSet:
        """The heads that send or whose queries receive, at any row."""
        sent = {(e.sender.layer, e.sender.head) for e in self.scores if e.sender.kind == "head"}
        asked = {(e.receiver.layer, e.receiver.index) for e in self.scores if e.receiver.kind == "q"}
        return HeadSet(sent | asked, (self.wiring.n_layers, self.wiring.n_heads))

    def prune(self, n: int | None = None, *, threshold: float = 0.0, rooted: bool = False) -> "Graph":
        """The `n` strongest edges, those above `threshold`, and of these the ones that lead on to the logits.

        Args:
            n: how many edges to take before the rest is dropped; default all.
            threshold: the least score, whatever its sign.
            rooted: keep only what also comes from the embedding: nodes that nothing kept feeds are dropped.

        Raises:
            ValueError: `n` or `threshold` is below 0.
        """
        if (n is not None and n < 0) or threshold < 0:
            raise ValueError(f"a graph is pruned to at least 0 edges and scores, got {n} and {threshold}")
        kept = {e: s for e, s in itertools.islice(self.scores.items(), n) if abs(s) >= threshold}
        part = Graph(self.step, self.wiring, kept)
        net = part.to_networkx()
        alive = {LOGITS} | (nx.ancestors(net, LOGITS) if LOGITS in net else set())
        if rooted:
            roots = [name for name, kind in net.nodes(data="kind") if kind == "embed"]
            alive &= set(roots).union(*(nx.descendants(net, root) for root in roots))
        lead = {e: s for e, s in kept.items() if {_sent(e), _entered(e)} <= alive}
        return Graph(self.step, self.wiring, lead)

    def to_networkx(self) -> nx.DiGraph:
        """A DiGraph whose edges carry `score`; those from a shared key or value to its heads carry none.

        Nodes have `kind` ("embed", "head", "mlp", "k", "v", "logits"), `layer`, `index` and `at`.
        """
        net = nx.DiGraph(step=self.step)
        for edge, score in self.scores.items():
            for name, node in ((_sent(edge), edge.sender), (_entered(edge), _node(self.wiring, edge.receiver))):
                net.add_node(name, **_attributes(node), at=edge.at)
            net.add_edge(_sent(edge), _entered(edge), score=score, into=edge.receiver.kind)
        net.add_edges_from(list(self._shared(net)), into="shared")
        return net

    def to_json(self) -> dict[str, Any]:
        """JSON values: step, wiring, and edges with their scores."""
        edges = [{"edge": str(edge), "score": score} for edge, score in self.scores.items()]
        return {"step": self.step, "wiring": asdict(self.wiring), "edges": edges}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Graph":
        """What `to_json` gave.

        Raises:
            ValueError: an edge that is none, or that the model cannot have.
        """
        scores = {parse_edge(entry["edge"]): float(entry["score"]) for entry in values["edges"]}
        return cls.of(scores, Wiring(**values["wiring"]), step=int(values["step"]))

    def _shared(self, net: nx.DiGraph) -> Iterator[tuple[str, str]]:
        """From keys and values to the heads of their group that are in the graph, in their row or behind it."""
        heads = {(e.sender, e.at) for e in self.scores if e.sender.kind == "head"}
        heads |= {(_node(self.wiring, e.receiver), e.at) for e in self.scores if e.receiver.kind == "q"}
        for edge in self.scores:
            if edge.receiver.kind in ("k", "v"):
                group = self.wiring.feeds(edge.receiver)
                yield from ((_entered(edge), f"{h}@{at}") for h, at in heads if h in group and _sees(at, edge.at))


@dataclass(frozen=True, eq=False)
class Alignment:
    """Graphs of successive steps beside each other."""

    graphs: tuple[Graph, ...]
    """In the order of their steps."""
    share: pd.Series
    """Edge to the share of graphs that hold it, the most frequent first."""
    core: frozenset[Edge]
    """The edges that (nearly) every graph holds."""
    periphery: frozenset[Edge]
    """The others."""
    edge_jaccard: Float64[np.ndarray, "graph graph"]
    """Float[graph graph]: edges shared by two graphs over edges of either; 1 for two empty ones."""
    node_jaccard: Float64[np.ndarray, "graph graph"]
    """Float[graph graph]: the same of their heads."""

    @property
    def table(self) -> pd.DataFrame:
        """One row per graph: step, edges, heads, core edges in it, and its Jaccard with the one before and all others.

        Were the order of steps of no account, `_adjacent` would on average be what `_others` is.
        """
        table = pd.DataFrame(
            {
                "step": [g.step for g in self.graphs],
                "edges": [len(g.edges) for g in self.graphs],
                "heads": [len(g.heads) for g in self.graphs],
                "core_edges": [len(g.edges & self.core) for g in self.graphs],
            }
        )
        n = len(self.graphs)
        for name in ("edge_jaccard", "node_jaccard"):
            values = getattr(self, name)
            table[f"{name}_adjacent"] = [np.nan, *np.diag(values, 1)]
            table[f"{name}_others"] = (values.sum(0) - 1) / (n - 1) if n > 1 else np.nan
        return table


def align(graphs: Sequence[Graph], *, core: float = 1.0) -> Alignment:
    """What the graphs of an answer's steps have in common, and what comes and goes.

    Args:
        graphs: of one model, a graph for each step, in any order.
        core: the least share of graphs that hold an edge of the core.

    Raises:
        ValueError: no graph, graphs of several models or twice of a step, `core` outside 0..1.
    """
    ordered = tuple(sorted(graphs, key=lambda g: g.step))
    if not ordered or len({g.wiring for g in ordered}) > 1 or len({g.step for g in ordered}) < len(ordered):
        steps = [g.step for g in ordered]
        raise ValueError(
            f"graphs to align must be of one model and of different steps, at least one, got steps {steps}"
        )
    if not 0 < core <= 1:
        raise ValueError(f"core must lie within 0..1, above 0, got {core}")
    edges = sorted(set().union(*(g.edges for g in ordered)), key=str)
    held = np.array([[edge in g.edges for edge in edges] for g in ordered], dtype=bool).reshape(len(ordered), -1)
    share = pd.Series(held.mean(0), index=pd.Index(edges, dtype=object, tupleize_cols=False), dtype=float)
    stable = frozenset(edge for edge, part in zip(edges, held.mean(0), strict=True) if part >= core - 1e-9)
    heads = np.array([g.heads.mask().flatten().numpy() for g in ordered])
    share = share.sort_values(ascending=False, kind="stable")
    return Alignment(ordered, share, stable, frozenset(edges) - stable, _jaccard(held), _jaccard(heads))


def _jaccard(held: np.ndarray) -> Float64[np.ndarray, "graph graph"]:
    both = held.astype(float) @ held.T.astype(float)
    size = np.diag(both)
    union = size[:, None] + size - both
    return np.divide(both, union, out=np.ones_like(both), where=union > 0)


def _sent(edge: Edge) -> str:
    return f"{edge.sender}@{edge.at}"


def _entered(edge: Edge) -> str:
    """The node whose input an edge is: the head itself for a query, a node of its own for a shared key or value."""
    return f"{str(edge.receiver).removesuffix('.q')}@{edge.at}"


def _node(wiring: Wiring, receiver: Receiver) -> Sender | Receiver:
    return wiring.feeds(receiver)[0] if receiver.kind in ("q", "mlp") else receiver


def _attributes(node: Sender | Receiver) -> dict[str, Any]:
    index = node.head if isinstance(node, Sender) else node.index
    return {"kind": node.kind, "layer": node.layer, "index": index}


def _sees(row: str, key: str) -> bool:
    """Whether a head at one place reads keys and values of another: its own row, or a later one."""
    if row == key or "step" in (row, key):
        return key != "step" or row == key
    return "needle" in (row, key) or int(row.partition("+")[2]) > int(key.partition("+")[2])
