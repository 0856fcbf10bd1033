"""The graph of a step, drawn: layers from bottom to top, the needle's rows on the left, the step's row on the right.

    layered(graph, dynamic).savefig("step.png")
    places = layout([graph_of_step_5, graph_of_step_6])      # node to where it stands, the same in all of them

A node's text is its number within its layer: 5 for head 5, 2k and 2v for the keys and values of key/value head 2, M for
the MLP, E for the embedding. Only what is in a graph has a level, so that the picture is no taller than it must be.
`dhlens.render.lapse` puts many of them into one page.
"""

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from dhlens.graphs import Graph
from dhlens.heads import HeadSet
from dhlens.nodes import Wiring
from dhlens.render.draw import BLUE, GREY, INK, ORANGE

GAP = 0.09
"""Least distance of two nodes of a level, in lanes; closer where they are many."""
_SHAPES = {"head": "o", "mlp": "s", "k": "D", "v": "D", "embed": "s", "logits": "s"}
_LANE = 4.0
"""Inches."""


class Place(NamedTuple):
    """Where a node stands."""

    lane: int
    """0 at the needle's rows, 1 at the step's."""
    x: float
    """Within the lane, 0..1."""
    y: int
    """Level, from 0 at the bottom."""
    kind: str
    text: str
    """What is written into it."""
    level: str
    """What its level is called."""


def layout(graphs: Iterable[Graph]) -> dict[str, Place]:
    """Node name (as in `Graph.to_networkx`) to its place, the same for all graphs of one model."""
    nodes: dict[str, Any] = {}
    wiring: Wiring | None = None
    for graph in graphs:
        nodes |= dict(graph.to_networkx().nodes(data=True))
        wiring = graph.wiring
    if wiring is None:
        return {}
    levels = sorted({_level(node, wiring) for node in nodes.values()})
    rows: dict[tuple[int, int], list[str]] = {}
    for name, node in nodes.items():
        rows.setdefault((int(node["at"] == "step"), _level(node, wiring)), []).append(name)
    out = {}
    for (lane, level), names in rows.items():
        names.sort(key=lambda name: (_wanted(nodes[name], wiring), name))
        xs = _apart([_wanted(nodes[name], wiring) for name in names])
        for name, x in zip(names, xs, strict=True):
            node = nodes[name]
            out[name] = Place(lane, x, levels.index(level), node["kind"], _text(node), _called(node))
    return out


def layered(graph: Graph, dynamic: HeadSet | None = None, *, most: int = 60, title: str = "") -> Figure:
    """The strongest edges of a step's graph that lead to the logits.

    Lines are as wide as their scores are large: blue where the edge helps the clean answer, vermilion where it works
    against it. Grey dashes lead from keys and values to the heads that read them. Dynamic heads have a dark ring;
    the key says how many of them are not shown.

    Args:
        graph: of one step.
        dynamic: the heads that attention says are active there.
        most: about how many edges to show: so many are taken that those which lead on fill the picture.
        title: of the picture.

    Raises:
        ValueError: no edge leads to the logits.
    """
    shown = _leading(graph, most)
    if not shown.edges:
        raise ValueError(f"a picture needs an edge that leads to the logits, got none among {len(graph.edges)}")
    places, net = layout([shown]), shown.to_networkx()
    n_levels = 1 + max(p.y for p in places.values())
    figure = Figure(figsize=(2 * _LANE + 1.6, 1.5 + 0.33 * n_levels), layout="constrained")
    axes = figure.add_subplot()
    largest = max(abs(s) for s in shown.scores.values())
    for a, b, data in sorted(net.edges(data=True), key=lambda e: abs(e[2].get("score", 0))):
        score = data.get("score")
        if score is None:
            _line(axes, places[a], places[b], color=GREY, linewidth=0.7, linestyle=(0, (2, 2)), zorder=1)
        else:
            colour, width = (BLUE if score < 0 else ORANGE), 0.6 + 5.4 * abs(score) / largest
            _line(axes, places[a], places[b], color=colour, linewidth=width, alpha=0.75, zorder=2, gid=f"{a}|{b}")
    ringed = {f"{head}@step" for head in _names(dynamic)}
    for name, place in places.items():
        ring = name in ringed
        colour = "#FFF2B3" if ring else "#FFFFFF"
        style = {"facecolor": colour, "edgecolor": INK, "linewidth": 2.0 if ring else 0.7, "zorder": 4 if ring else 3}
        x = _x(place)
        axes.scatter(
            x, place.y, s=190 if place.kind not in "kv" else 170, marker=_SHAPES[place.kind], gid=name, **style
        )
        axes.text(x, place.y, place.text, ha="center", va="center_baseline", fontsize=7, color=INK, zorder=5)
    _frame(axes, places, n_levels, title or f"{len(shown.edges)} edges of step {graph.step}")
    _key(axes, n_levels, absent=len(ringed - places.keys()), dynamic=len(ringed))
    return figure


def _leading(graph: Graph, most: int) -> Graph:
    """What leads to the logits among the strongest edges; one more of them can connect many at once."""
    sizes = range(len(graph.edges) + 1)
    n = bisect_right(sizes, most, key=lambda n: len(graph.prune(n).edges)) - 1
    shown = graph.prune(n)
    return graph.prune(n + 1) if len(shown.edges) < most // 2 else shown


def bend(a: Place, b: Place) -> float:
    """How far the middle of an edge stands aside, in lanes: what passes levels goes around their nodes."""
    return 0.0 if abs(b.y - a.y) < 2 else min(0.06 + 0.022 * abs(b.y - a.y), 0.6) * (1 if a.x < 0.5 else -1)


def _line(axes: Axes, a: Place, b: Place, **style: Any) -> None:
    """A curve that leaves and enters its nodes between levels, so that it can be followed."""
    start, end = (_x(a), a.y), (_x(b), b.y)
    middle = ((start[0] + end[0]) / 2 + bend(a, b), (a.y + b.y) / 2)
    axes.add_patch(PathPatch(Path([start, middle, end], [1, 3, 3]), fill=False, capstyle="round", **style))


def _frame(axes: Axes, places: dict[str, Place], n_levels: int, title: str) -> None:
    called = {p.y: p.level for p in places.values()}
    axes.set_yticks(range(n_levels), [called[y] for y in range(n_levels)], fontsize=8)
    axes.set(xlim=(-0.08, 2.22), ylim=(-0.8, n_levels - 0.2))
    axes.hlines(range(n_levels), -0.08, 2.22, color="#E6E8EA", linewidth=0.6, zorder=0)
    axes.axvline(1.07, color="#C9CED3", linewidth=1, zorder=0)
    axes.set_xticks([0.5, 1.64], ["at the needle's rows", "at the step's row"], fontsize=9)
    axes.tick_params(axis="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)


def _key(axes: Axes, n_levels: int, *, absent: int, dynamic: int) -> None:
    lines = [Line2D([], [], color=c, linewidth=3) for c in (BLUE, ORANGE)]
    lines.append(Line2D([], [], color=GREY, linewidth=0.9, linestyle=(0, (2, 2))))
    missing = f" ({absent} of {dynamic} {'is' if absent == 1 else 'are'} not in this picture)" if absent else ""
    names = ["helps the answer", "works against it", "read by", f"dynamic head{missing}"]
    ring = Line2D([], [], marker="o", color="none", markerfacecolor="#FFF2B3", markeredgecolor=INK, markeredgewidth=2)
    shapes = {"head": "head", "k": "key or value group", "mlp": "MLP, embedding, logits"}
    marks = [
        Line2D([], [], marker=_SHAPES[kind], color="none", markerfacecolor="white", markeredgecolor=INK)
        for kind in shapes
    ]
    axes.legend(
        [*lines, ring, *marks], [*names, *shapes.values()], loc="upper left",
        bbox_to_anchor=(0, -0.5 / n_levels - 0.02), ncols=4, frameon=False, fontsize=8,
    )  # fmt: skip


def _x(place: Place) -> float:
    return place.x + 1.14 * place.lane


def _level(node: dict[str, Any], wiring: Wiring) -> int:
    if node["kind"] in ("embed", "logits"):
        return -1 if node["kind"] == "embed" else 2 * wiring.n_layers
    return 2 * node["layer"] + (node["kind"] == "mlp")


def _called(node: dict[str, Any]) -> str:
    if node["kind"] in ("embed", "logits"):
        return "embedding" if node["kind"] == "embed" else "logits"
    return f"L{node['layer']} mlp" if node["kind"] == "mlp" else f"L{node['layer']}"


def _text(node: dict[str, Any]) -> str:
    kind, row = node["kind"], str(node["at"]).partition("+")[2]
    text = {"embed": "E", "mlp": "M", "logits": "↑", "head": f"{node['index']}"}.get(kind, f"{node['index']}{kind}")
    return f"{text}+{row}" if row else text


def _wanted(node: dict[str, Any], wiring: Wiring) -> float:
    """Where a node would stand if it were alone: heads by their number, MLPs on the right in turns."""
    kind, index = node["kind"], node["index"]
    if kind in ("k", "v"):
        return 0.75 * (index + (0.3 if kind == "k" else 0.7)) / wiring.n_kv_heads
    if kind == "head":
        return 0.8 * (index + 0.5) / wiring.n_heads
    return 0.84 + 0.07 * (node["layer"] % 3) if kind == "mlp" else 0.4


def _apart(wanted: list[float]) -> list[float]:
    """Sorted places at least `GAP` apart: pushed right from the first on, then back from the right end."""
    gap = min(GAP, 1 / max(len(wanted) - 1, 1))
    xs = list(wanted)
    for i in range(1, len(xs)):
        xs[i] = max(xs[i], xs[i - 1] + gap)
    xs[-1] = min(xs[-1], 1.0)
    for i in reversed(range(len(xs) - 1)):
        xs[i] = min(xs[i], xs[i + 1] - gap)
    return [round(max(x, 0.0), 4) for x in xs]


def _names(heads: HeadSet | None) -> list[str]:
    return [] if heads is None else [f"L{layer}H{head}" for layer, head in heads]
