"""Who works together: co-activation ordered by cluster, what each cluster binds to, and direct effects.

figures.coactivation_matrix(crowds)                  # from dhlens.crowds
figures.cluster_panels(crowds, table)                # and dhlens.bindings
figures.direct_raster(found.heads, active, tokens)   # from dhlens.direct
figures.direct_bars(found.table)
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import Tensor

from dhlens.crowds import Clusters
from dhlens.heads import Head, head_name
from dhlens.render.draw import BLUE, GREEN, GREY, INK, ORANGE, WIDTH, need, tick

_ASPECTS = {
    "next": "copied token:\nactivity / mean activity",
    "place": "place in the needle:\nactivity / mean activity",
}
_KNOWN = (
    *("digit", "letter", "word start", "punctuation", "space", "other"),
    *("before", "first", "1st third", "2nd third", "3rd third", "after"),
)


def coactivation_matrix(found: Clusters) -> Figure:
    """How much each pair of heads goes together, heads in the order of their clusters, each cluster in a frame.

    Heads in no cluster stand last. The colours end at the largest value off the diagonal, both ways.
    """
    order = np.array([i for k in (*range(found.n_clusters), -1) for i in found.order if found.labels[i] == k])
    phi = getattr(found.crowd, found.on)[np.ix_(order, order)].copy()
    np.fill_diagonal(phi, np.nan)
    n = len(order)
    side = max(WIDTH, 1.5 + 0.145 * n)
    figure = Figure(figsize=(side, side + 0.1), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("#E4E6E8")
    most = float(np.nanmax(np.abs(phi)))
    image = axes.imshow(np.ma.masked_invalid(phi), cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=30, pad=0.02)
    what = "phi, the clock taken off" if found.on == "within" else "phi"
    bar.set_label(f"{what} (grey: the head itself)", fontsize=9)
    start = 0
    for k in range(found.n_clusters):
        size = int((found.labels == k).sum())
        frame = Rectangle((start - 0.5, start - 0.5), size, size, fill=False, edgecolor=INK, linewidth=1.6, zorder=3)
        axes.add_patch(frame)
        axes.annotate(str(k), (start + size - 0.5, start - 0.5), (3, -8), textcoords="offset points", fontsize=9)
        start += size
    names = [head_name(found.crowd.heads[i]) for i in order]
    axes.set_xticks(range(n), names, rotation=90, fontsize=8)
    axes.set_yticks(range(n), names, fontsize=8)
    some = f"{found.n_clusters} clusters" if found.n_clusters != 1 else "1 cluster"
    axes.set_title(f"{some}, {n - start} of {n} heads in none", loc="left", fontsize=10)
    return figure


def cluster_panels(found: Clusters, bindings: pd.DataFrame) -> Figure:
    """A row per cluster: where it works more than elsewhere, by copied token and by place, and in which layers it is.

    Dots are enrichments with 95 % intervals on a log scale, filled where p <= .05; ticks are what the null gives. Below
    1/16 they stand at the edge. `bindings` is that of `dhlens.bindings`.

    Raises:
        ValueError: a column is missing, or there is no cluster.
    """
    need(bindings, "cluster", "aspect", "class", "enrichment", "low", "high", "null", "p")
    if not found.n_clusters:
        raise ValueError("panels need at least one cluster, got none that holds against its null")
    figure = Figure(figsize=(1.4 * WIDTH, 0.7 + 1.75 * found.n_clusters), layout="constrained")
    grid = figure.subplots(found.n_clusters, 3, squeeze=False, width_ratios=[3, 3, 2], sharex="col")
    for k, row in enumerate(grid):
        own = bindings.loc[bindings["cluster"] == k]
        for axes, aspect in zip(row[:2], _ASPECTS, strict=True):
            _enrichments(axes, own.loc[own["aspect"] == aspect])
        _layers(row[2], found, k)
        names = tick(" ".join(head_name(h) for h in found.members[k]), 80)
        row[0].set_title(f"cluster {k}: {names}", loc="left", fontsize=9, weight="bold")
    for axes, title in zip(grid[-1], (*_ASPECTS.values(), "heads by layer\n(grey: all kept ones)"), strict=True):
        axes.set_xlabel(title, fontsize=9)
    return figure


def direct_raster(
    effects: Float[Tensor, "step layer head"],
    active: Bool[Tensor, "step layer head"],
    tokens: Sequence[str],
    *,
    max_heads: int = 30,
) -> Figure:
    """What each head adds to the token's logit at each step (colour), and where it is active by attention (dots).

    Args:
        effects: direct effects, logits.
        active: the dynamic heads.
        tokens: text of the token of each step.
        max_heads: most rows, those of the largest mean effect either way; in the order of layers.

    Raises:
        ValueError: arrays of different shapes, or tokens that do not name every step.
    """
    if effects.shape != active.shape or len(tokens) != len(effects):
        raise ValueError(
            f"effects and active must be of one shape with a token per step, got {tuple(effects.shape)}, "
            f"{tuple(active.shape)} and {len(tokens)} tokens"
        )
    values, fired = effects.detach().float().cpu().numpy(), active.cpu().numpy()
    mean = np.abs(values.mean(0))
    shown = sorted(np.argsort(-mean, axis=None, kind="stable")[:max_heads].tolist())
    heads: list[Head] = [divmod(i, mean.shape[1]) for i in shown]
    grid = values.reshape(len(values), -1)[:, shown].T
    size = (max(WIDTH, 1.3 + 0.16 * len(tokens)), 1.9 + 0.16 * max(len(shown), 4))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    most = float(np.abs(grid).max()) or 1.0
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, location="top", shrink=0.6, aspect=30, pad=0.01)
    bar.set_label("direct effect on the token's logit (dot: active by attention)", fontsize=9)
    row, step = fired.reshape(len(fired), -1)[:, shown].T.nonzero()
    axes.scatter(step, row, s=9, c=INK, linewidths=0)
    axes.set_xticks(range(len(tokens)), [tick(t) for t in tokens], rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(heads)), [head_name(h) for h in heads], fontsize=8)
    axes.set_xlabel("generation step (emitted token)")
    axes.set_ylabel(f"head ({len(heads)} of {mean.size})")
    return figure


def direct_bars(table: pd.DataFrame, *, most: int = 20) -> Figure:
    """The parts that add most to the token's logit: mean over steps, and the middle half of the steps as a line.

    `table` has part, kind ("head", "mlp", "embed", "bias") and effect; parts of largest mean either way are shown.

    Raises:
        ValueError: a column is missing.
    """
    need(table, "part", "kind", "effect")
    grouped = table.groupby(["part", "kind"], sort=False)["effect"]
    parts = pd.DataFrame({"mean": grouped.mean(), "low": grouped.quantile(0.25), "high": grouped.quantile(0.75)})
    shown = parts.sort_values("mean", key=np.abs, ascending=False, kind="stable").reset_index()[:most]
    figure = Figure(figsize=(WIDTH, 1.1 + 0.19 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    colours, means = {"head": BLUE, "mlp": ORANGE, "embed": GREEN, "bias": GREY}, np.asarray(shown["mean"], dtype=float)
    for kind, colour in colours.items():
        rows = np.flatnonzero(shown["kind"] == kind)
        if len(rows):
            axes.barh(rows, means[rows], color=colour, height=0.7, label=kind)
    axes.hlines(range(len(shown)), shown["low"], shown["high"], color=INK, linewidth=1)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(shown)), shown["part"].tolist(), fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("direct effect on the token's logit (mean; line: half of the steps)", fontsize=9)
    axes.set_title(f"{len(shown)} of {len(parts)} parts", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def _enrichments(axes: Axes, table: pd.DataFrame) -> None:
    place = {name: i for i, name in enumerate(_KNOWN)}
    table = table.sort_values("class", key=lambda c: c.map(lambda name: place.get(name, len(place))), kind="stable")
    rows, edge = np.arange(len(table)), 1 / 16
    value, low, high, null = (table[c].clip(lower=edge).to_numpy() for c in ("enrichment", "low", "high", "null"))
    sure = (table["p"] <= 0.05).to_numpy()
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.scatter(null, rows, marker="|", s=60, c=GREY, linewidths=1.5)
    axes.hlines(rows, low, high, color=BLUE, linewidth=1.2)
    axes.scatter(value, rows, s=22, c=np.where(sure, BLUE, "#FFFFFF"), edgecolors=BLUE, linewidths=1.2, zorder=3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    axes.set_yticks(rows, table["class"].tolist(), fontsize=8)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)


def _layers(axes: Axes, found: Clusters, cluster: int) -> None:
    n_layers = found.crowd.score.shape[0]
    layer = np.array([head[0] for head in found.crowd.heads])
    edges = [n - 0.5 for n in range(n_layers + 1)]
    axes.hist(layer, edges, color="#D5D9DC")
    axes.hist(layer[found.labels == cluster], edges, color=BLUE)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.tick_params(labelsize=8)
