"""Pictures of circuits show what their tables say: every curve, mark, line and node is compared with its number."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import PathPatch

from dhlens.graphs import Graph
from dhlens.heads import HeadSet
from dhlens.nodes import Wiring, parse_edge
from dhlens.render import circuit as draw
from dhlens.render.draw import BLUE, ORANGE
from dhlens.render.layered import GAP, layered, layout

matplotlib.use("agg")
WIRING = Wiring(3, 4, 2)
EDGES = {
    "embed->L0KV0.v@needle": -3.0,
    "L0H1->L1KV0.k@needle": -4.0,
    "L1H0->L2.mlp@step": 2.0,
    "L2.mlp->logits@step": -5.0,
    "L1H1->logits@step": -1.0,
    "L0H2->L2H3.q@step": -7.0,  # leads nowhere
}


def graph(edges=EDGES, step=0):
    return Graph.of({parse_edge(k): v for k, v in edges.items()}, WIRING, step=step)


def drawn(figure):
    figure.canvas.draw()
    return figure.axes[0]


def key(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_graph_of_a_step_shows_each_edge_by_width_and_sign():
    axes = drawn(layered(graph(), HeadSet(["L1H0", "L0H3"], (3, 4)), title="$step_1"))
    lines = {p.get_gid(): p for p in axes.patches if isinstance(p, PathPatch)}
    scored = {k: p for k, p in lines.items() if k}
    assert set(scored) == {
        "embed@needle|L0KV0.v@needle", "L0H1@needle|L1KV0.k@needle", "L1H0@step|L2.mlp@step",
        "L2.mlp@step|logits@step", "L1H1@step|logits@step",
    }  # fmt: skip
    width = {k: p.get_linewidth() for k, p in scored.items()}
    assert sorted(width, key=lambda k: -width[k])[0] == "L2.mlp@step|logits@step"
    assert width["L1H1@step|logits@step"] == pytest.approx(0.6 + 5.4 / 5)
    for name, patch in scored.items():
        wanted = ORANGE if name == "L1H0@step|L2.mlp@step" else BLUE
        assert patch.get_edgecolor()[:3] == to_rgba(wanted)[:3]
    nodes = {c.get_gid(): c for c in axes.collections if isinstance(c, PathCollection)}
    ringed = {k for k, c in nodes.items() if c.get_linewidth()[0] > 1}
    assert set(nodes) == set(graph().prune().to_networkx()) and ringed == {"L1H0@step"}
    # the shared values of L0KV0 are read by L0H1, those of L1KV0 by L1H0 and L1H1
    assert len(axes.patches) - len(scored) == 3
    assert axes.get_title(loc="left") == "$step_1"
    assert key(axes)[4:] == ["head", "key or value group", "MLP, embedding, logits"]
    assert key(axes)[3] == "dynamic head (1 of 2 is not in this picture)"
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names == ["embedding", "L0", "L1", "L2 mlp", "logits"]
    with pytest.raises(ValueError, match="leads to the logits, got none"):
        layered(graph({"L0H2->L2H3.q@step": -7.0}))


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        (["L1H0", "L1H1"], "dynamic head"),
        (["L1H0", "L0H0", "L0H3"], "dynamic head (2 of 3 are not in this picture)"),
        # an edge of the graph that leads nowhere is not shown, nor is its sender
        (["L0H2"], "dynamic head (1 of 1 is not in this picture)"),
    ],
)
def test_the_key_counts_dynamic_heads_that_are_not_shown(heads, said):
    assert key(drawn(layered(graph(), HeadSet(heads, (3, 4)))))[3] == said
    assert key(drawn(layered(graph())))[3] == "dynamic head"


def test_nodes_stand_apart_on_their_levels_and_keep_their_places():
    crowded = {f"L0H{h}->logits@step": -1.0 for h in range(4)}
    crowded |= {f"embed->L0KV{i}.{k}@step": 1.0 for i in (0, 1) for k in "kv"}
    one, two = graph(crowded), graph({"L0H3->logits@step": -2.0}, step=1)
    places = layout([one, two])
    assert places == layout([two, one]) and layout([]) == {}
    rows = {}
    for place in places.values():
        rows.setdefault((place.lane, place.y), []).append(place.x)
        assert 0 <= place.x <= 1
    assert len(rows[1, 1]) == 8
    for xs in rows.values():
        assert all(b - a > 0.95 * GAP for a, b in zip(sorted(xs), sorted(xs)[1:], strict=False))
    needle = layout([graph({"L1H0->L2KV1.k@needle": 1.0})])
    assert {p.lane for p in needle.values()} == {0} and needle["L2KV1.k@needle"].text == "1k"
    many = Wiring(2, 40, 40)
    wide = Graph.of({parse_edge(f"L0H{h}->logits@step"): 1.0 for h in range(40)}, many, step=0)
    xs = sorted(p.x for p in layout([wide]).values() if p.kind == "head")
    assert xs[0] >= 0 and xs[-1] <= 1 and min(np.diff(xs)) > 0.9 / 39


def curves():
    rows = [
        (m, ranking, rest, size, size / 2, v, v - 0.1, v + 0.1)
        for m in ("faithful", "complete")
        for rest in ("counterfactual", "zero")
        for ranking, base in (("attribution", 0.5), ("random", 0.1), ("attention only", 0.3))
        for size, v in ((50, base), (5000, base + 0.4))
    ]
    return pd.DataFrame(rows, columns=["measure", "ranking", "rest", "size", "edges", "value", "low", "high"])


def test_curves_are_the_table():
    figure = draw.faithfulness_curves(curves())
    figure.canvas.draw()
    assert len(figure.axes) == 4 and figure.axes[0].get_xscale() == "log"
    panels = [(m, r) for m in ("faithful", "complete") for r in ("counterfactual", "zero")]
    for axes, panel in zip(figure.axes, panels, strict=True):
        for line in axes.get_lines():
            name = line.get_label()
            if name.startswith("_"):
                continue
            want = curves().set_index(["measure", "rest", "ranking"]).loc[(*panel, name), ["size", "value"]]
            np.testing.assert_allclose(line.get_xydata(), want)
        assert len(axes.collections) == 3
    box = figure.legends[0].get_window_extent()
    assert not any(box.overlaps(axes.xaxis.label.get_window_extent()) for axes in figure.axes if axes.get_xlabel())


def edges():
    rows = [
        ("e0", 3, "L0H0", "L1H1.q", "step", -2.0, -1.5, False),
        ("e0", 4, "L0H0", "L1H1.q", "step", 1.0, np.nan, False),
        ("e1", 3, "embed", "L0KV0.v", "needle", -4.0, -3.0, False),
        ("e1", 3, "embed", "L0H0.q", "needle", 0.01, 0.002, True),
    ]
    return pd.DataFrame(rows, columns=["episode", "step", "sender", "receiver", "at", "score", "exact", "control"])


def test_the_raster_of_edges_holds_signs_and_shares():
    frequent = pd.DataFrame({"edge": ["L0H0->L1H1.q@step", "embed->L0KV0.v@needle"], "share": [2 / 3, 1 / 3]})
    axes = drawn(draw.core_raster(edges(), frequent))
    np.testing.assert_array_equal(axes.images[0].get_array(), [[-1, 1, 0], [0, 0, -1]])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["L0H0 → L1H1.q @step", "embed → L0KV0.v @needle"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["3", "4", "3"]
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [1.5]
    assert [t.get_text() for t in axes.child_axes[0].get_yticklabels()] == ["67%", "33%"]


def test_estimates_stand_against_exact_scores():
    axes = drawn(draw.estimated_exact(edges()))
    named = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    points = {line.get_label(): line.get_xydata().tolist() for line in named}
    assert points == {"random edges": [[0.01, 0.002]], "at the needle": [[-4.0, -3.0]], "at the step": [[-2.0, -1.5]]}
    with pytest.raises(ValueError, match="no edge was patched"):
        draw.estimated_exact(edges().assign(exact=np.nan))


def test_overlaps_and_feeders_are_their_tables():
    pairs = {"next step": 0.6, "other answer": 0.3}
    rows = [(p, o, v, v - 0.1, v + 0.1) for p, v in pairs.items() for o in ("edges", "heads", "dynamic")]
    axes = drawn(draw.overlap_points(pd.DataFrame(rows, columns=["pair", "of", "value", "low", "high"])))
    assert {line.get_label(): set(line.get_ydata()) for line in axes.get_lines()} == {p: {v} for p, v in pairs.items()}
    feeders = pd.DataFrame(
        [("q", "step", "head", 0.5, 0.2), ("v", "needle", "embed", 1.5, 1.8), ("k", "needle", "mlp", 0.0, 0.0)],
        columns=["side", "at", "kind", "share", "share_others"],
    )
    axes = drawn(draw.feeder_bars(feeders, 2))
    assert [t.get_text() for t in axes.get_yticklabels()] == ["embedding → v at the needle", "heads → q at the step"]
    assert [p.get_width() for p in axes.patches] == [0.75, 0.25]
    assert axes.get_lines()[0].get_xdata().tolist() == [0.9, 0.1]


@pytest.mark.parametrize(
    "figure",
    [
        draw.faithfulness_curves,
        draw.overlap_points,
        draw.estimated_exact,
        lambda t: draw.core_raster(t, t),
        lambda t: draw.feeder_bars(t, 1),
    ],
)
def test_a_table_without_its_columns_is_refused(figure):
    with pytest.raises(ValueError, match="the table must have the columns"):
        figure(pd.DataFrame({"x": [1]}))
