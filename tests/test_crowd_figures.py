"""The pictures of who works together: what they say, and that it can be read."""

import numpy as np
import pandas as pd
import pytest
import torch
import toy_crowds as toy
from test_figures import overlaps, ticks

from dhlens.coactivation import coactivation
from dhlens.crowds import clusters
from dhlens.render import figures


@pytest.fixture(scope="module")
def found():
    return clusters(coactivation(toy.crowds(0), draws=20, n_boot=2), draws=40)


def table(n_clusters=3):
    names = {"next": ["punctuation", "digit"], "place": ["after", "before", "first"], "depth": ["0.1", "0.9"]}
    rows = [
        (k, aspect, name, 2.0 if name == "digit" else 0.01, 0.005, 3.0, 1.0, 0.01 if name == "digit" else 0.5)
        for k in range(n_clusters)
        for aspect, classes in names.items()
        for name in classes
    ]
    return pd.DataFrame(rows, columns=["cluster", "aspect", "class", "enrichment", "low", "high", "null", "p"])


def test_the_matrix_stands_in_the_order_of_clusters(found):
    figure = figures.coactivation_matrix(found)
    axes = figure.axes[0]
    names = ticks(axes.yaxis)
    assert names == ticks(axes.xaxis) and len(names) == 12
    assert [set(names[a:b]) for a, b in ((0, 4), (4, 7), (7, 9))] == [
        {"L0H0", "L0H2", "L1H1", "L2H1"},
        {"L0H1", "L1H0", "L2H0"},
        {"L0H3", "L1H3"},
    ]
    frames = [(p.get_xy(), p.get_width(), p.get_height()) for p in axes.patches]
    assert frames == [((-0.5, -0.5), 4, 4), ((3.5, 3.5), 3, 3), ((6.5, 6.5), 2, 2)]
    assert axes.get_title(loc="left") == "3 clusters, 3 of 12 heads in none" and not overlaps(figure)
    shown = axes.images[0].get_array()
    heads = [f"L{layer}H{head}" for layer, head in found.crowd.heads]
    i, j = heads.index(names[0]), heads.index(names[5])
    assert shown[0, 5] == found.crowd.within[i, j] and shown.mask.diagonal().all() and shown.mask.sum() == 12
    assert axes.images[0].get_clim()[1] == -axes.images[0].get_clim()[0] == np.abs(shown).max()


def test_a_matrix_without_clusters_says_so():
    figure = figures.coactivation_matrix(clusters(coactivation(toy.clockwork(0), draws=5, n_boot=2), draws=20))
    assert figure.axes[0].get_title(loc="left") == "0 clusters, 12 of 12 heads in none" and not figure.axes[0].patches


def test_panels_show_each_cluster(found):
    figure = figures.cluster_panels(found, table())
    grid = np.array(figure.axes).reshape(3, 3)
    assert ticks(grid[0, 0].yaxis) == ["digit", "punctuation"]
    assert ticks(grid[2, 1].yaxis) == ["before", "first", "after"]
    assert grid[1, 0].get_title(loc="left") == "cluster 1: L0H1 L1H0 L2H0"
    null, dots = (grid[0, 0].collections[i] for i in (0, 2))
    assert np.asarray(dots.get_offsets()).tolist() == [[2, 0], [1 / 16, 1]]
    assert np.asarray(null.get_offsets()).tolist() == [[1, 0], [1, 1]]
    assert dots.get_facecolors()[0].tolist() != dots.get_facecolors()[1].tolist() == [1, 1, 1, 1]
    bars = [patch.get_height() for patch in grid[0, 2].patches]
    assert bars == [4, 4, 4, 2, 1, 1], "all heads of each layer, then those of the cluster"
    assert not overlaps(figure)


def test_panels_need_a_cluster_and_its_bindings(found):
    with pytest.raises(ValueError, match="lacks enrichment"):
        figures.cluster_panels(found, table().drop(columns="enrichment"))
    none = type(found)(**{**found.__dict__, "labels": np.full(12, -1)})
    with pytest.raises(ValueError, match="at least one cluster"):
        figures.cluster_panels(none, table())


def test_a_raster_of_direct_effects_marks_active_heads():
    effects = torch.zeros(4, 2, 3)
    effects[:, 1, 2], effects[1, 0, 1] = -2.0, 4.0
    active = torch.zeros(4, 2, 3, dtype=torch.bool)
    active[1, 0, 1] = active[3, 0, 0] = True
    figure = figures.direct_raster(effects, active, ["a", "$b", "\n", "d"], max_heads=2)
    axes = figure.axes[0]
    assert ticks(axes.yaxis) == ["L0H1", "L1H2"] and ticks(axes.xaxis) == ["a", "$b", "↵", "d"]
    assert np.asarray(axes.collections[0].get_offsets()).tolist() == [[1, 0]]
    assert axes.images[0].get_array().tolist() == [[0, 4, 0, 0], [-2] * 4] and axes.images[0].get_clim() == (-4, 4)
    assert axes.get_ylabel() == "head (2 of 6)" and not overlaps(figure)
    with pytest.raises(ValueError, match="a token per step"):
        figures.direct_raster(effects, active, ["a"])


def test_bars_rank_parts_by_mean_effect():
    parts = pd.DataFrame(
        {
            "part": ["L0H1", "L0.mlp", "embed", "bias"] * 2,
            "kind": ["head", "mlp", "embed", "bias"] * 2,
            "effect": [1.0, -5.0, 0.2, 0.0, 3.0, -1.0, 0.2, 0.0],
        }
    )
    figure = figures.direct_bars(parts, most=3)
    axes = figure.axes[0]
    assert ticks(axes.yaxis) == ["L0.mlp", "L0H1", "embed"] and axes.get_title(loc="left") == "3 of 4 parts"
    assert {c.get_label(): [b.get_width() for b in c] for c in axes.containers} == {
        "head": [2.0], "mlp": [-3.0], "embed": [0.2]
    }  # fmt: skip
    assert axes.collections[0].get_segments()[0][:, 0].tolist() == [-4.0, -2.0]
    with pytest.raises(ValueError, match="lacks kind"):
        figures.direct_bars(parts.drop(columns="kind"))
