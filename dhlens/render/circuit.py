"""Figures of circuits: what a graph is worth, what stays of it, how good its scores are, and who feeds whom.

Functions of the tables of `dhlens.recipes.circuit`. The graph of a step is drawn by `dhlens.render.layered`, clusters
by `dhlens.render.crowd`, and successive graphs by `dhlens.render.lapse`.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dhlens.crowds import Clusters
from dhlens.graphs import Graph
from dhlens.heads import HeadSet
from dhlens.nodes import parse_edge
from dhlens.render.conditions import styles
from dhlens.render.crowd import cluster_panels, coactivation_matrix
from dhlens.render.draw import BLUE, GREEN, GREY, INK, ORANGE, WIDTH, curve, need, one
from dhlens.render.layered import layered

_RANKINGS = ("attribution", "random", "attention only")
_MEASURES = {"faithful": "faithful\n(the circuit alone)", "complete": "left without it\n(all but the circuit)"}
_OF = {"edges": "edges", "heads": "heads in the graph", "dynamic": "dynamic heads"}


def faithfulness_curves(curves: pd.DataFrame) -> Figure:
    """What circuits of growing size do alone, and what is left without them: a column for each rest.

    `curves` has measure, ranking, rest, size, value, low and high. Values beyond -0.5..1.5 run out of the picture.

    Raises:
        ValueError: a column is missing.
    """
    need(curves, "measure", "ranking", "rest", "size", "value")
    rests = list(curves["rest"].unique())
    figure = Figure(figsize=(1.6 + 2.5 * len(rests), 5.0), layout="constrained")
    grid = figure.subplots(2, len(rests), squeeze=False, sharex=True, sharey=True)
    looks = styles(curves["ranking"], _RANKINGS)
    for row, (measure, label) in zip(grid, _MEASURES.items(), strict=True):
        for axes, rest in zip(row, rests, strict=True):
            part = curves.loc[(curves["measure"] == measure) & (curves["rest"] == rest)]
            for name, (color, marker) in looks.items():
                rows = part.loc[part["ranking"] == name].sort_values("size")
                curve(axes, rows, "size", "value", label=name, color=color, style=f"{marker}-", bounds=("low", "high"))
            axes.axhline(1 if measure == "faithful" else 0, color=GREY, linewidth=0.8, linestyle="--")
            axes.set_xscale("log")
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(label)
    low, high = curves["value"].min(), curves["value"].max()
    grid[0, 0].set_ylim(np.clip(low - 0.1, -0.5, -0.1), np.clip(high + 0.1, 1.1, 1.5))
    for axes, rest in zip(grid[0], rests, strict=True):
        axes.set_title(f"the rest: {rest}", fontsize=10)
    grid[1, len(rests) // 2].set_xlabel("edges of the circuit")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    return figure


def core_raster(edges: pd.DataFrame, frequent: pd.DataFrame, *, most: int = 45) -> Figure:
    """The most frequent edges at every step that was taken apart: blue where they help the answer, vermilion where not.

    Args:
        edges: episode, step, sender, receiver, at, score and control.
        frequent: edge and share, the most frequent first.
        most: rows.

    Raises:
        ValueError: a column is missing.
    """
    need(edges, "episode", "step", "sender", "receiver", "at", "score", "control")
    need(frequent, "edge", "share")
    held = edges.loc[~edges["control"]]
    held = held.assign(edge=held["sender"] + "->" + held["receiver"] + "@" + held["at"])
    columns = list(held[["episode", "step"]].drop_duplicates().itertuples(index=False, name=None))
    shown = frequent["edge"].tolist()[:most]
    signs = held.assign(sign=np.sign(held["score"])).pivot(index="edge", columns=["episode", "step"], values="sign")
    grid = signs.reindex(index=shown).loc[:, columns].fillna(0).to_numpy()
    figure = Figure(figsize=(max(WIDTH, 2.6 + 0.15 * len(columns)), 1.4 + 0.155 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(
        grid, cmap=ListedColormap([BLUE, "#F4F6F8", ORANGE]), vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
    )
    axes.set_yticks(range(len(shown)), [_arrow(e) for e in shown], fontsize=7)
    axes.set_xticks(range(len(columns)), [str(step) for _, step in columns], rotation=90, fontsize=7)
    episodes = [episode for episode, _ in columns]
    for i in range(1, len(columns)):
        if episodes[i] != episodes[i - 1]:
            axes.axvline(i - 0.5, color=INK, linewidth=1)
    axes.set_xlabel(f"step; a line parts the {len(set(episodes))} answers")
    axes.set_title(f"{len(shown)} of {len(frequent)} edges, the most frequent first", loc="left", fontsize=10)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(shown)), [f"{s:.0%}" for s in frequent["share"][: len(shown)]], fontsize=7)
    right.tick_params(length=0)
    return figure


def overlap_points(overlaps: pd.DataFrame) -> Figure:
    """How alike two steps are, with intervals: by what they share, and by how far apart they stand.

    `overlaps` has of, pair, value, low and high.

    Raises:
        ValueError: a column is missing.
    """
    need(overlaps, "of", "pair", "value", "low", "high")
    figure, axes = one()
    looks = styles(overlaps["pair"], ())
    for k, (pair, (color, marker)) in enumerate(looks.items()):
        rows = overlaps.loc[overlaps["pair"] == pair].set_index("of").reindex(list(_OF))
        x = np.arange(len(_OF)) + 0.2 * (k - (len(looks) - 1) / 2)
        axes.vlines(x, rows["low"], rows["high"], color=color, linewidth=1.6)
        axes.plot(x, rows["value"], marker, color=color, label=pair, ms=6)
    axes.set_xticks(range(len(_OF)), list(_OF.values()))
    axes.set(ylabel="Jaccard of two steps", ylim=(0, None), xlim=(-0.5, len(_OF) - 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def estimated_exact(edges: pd.DataFrame) -> Figure:
    """Each edge that was patched: its estimated score against its exact one, edges drawn at random in grey.

    Scales are linear around 0 and logarithmic further out.

    Raises:
        ValueError: a column is missing, or no edge was patched.
    """
    need(edges, "score", "exact", "control", "at")
    judged = edges.dropna(subset="exact")
    if judged.empty:
        raise ValueError("estimates need exact scores beside them, and no edge was patched")
    figure, axes = one()
    figure.set_figheight(4.4)
    sets = {"random edges": (judged["control"], GREY, "x")}
    for at, color, marker in (("needle", BLUE, "o"), ("step", ORANGE, "s")):
        here = judged["at"].str.partition("+")[0] == at
        sets[f"at the {'needle' if at == 'needle' else 'step'}"] = (~judged["control"] & here, color, marker)
    for name, (which, color, marker) in sets.items():
        part = judged.loc[which]
        axes.plot(
            part["score"],
            part["exact"],
            marker,
            color=color,
            ms=3.5,
            mew=0.8 if marker == "x" else 0,
            alpha=0.55,
            label=name,
        )
    most = float(judged[["score", "exact"]].abs().to_numpy().max()) or 1.0
    least = max(float(np.quantile(judged["score"].abs(), 0.25)), most * 1e-4)
    axes.plot([-most, most], [-most, most], color=INK, linewidth=0.8, linestyle="--")
    axes.set_xscale("symlog", linthresh=least)
    axes.set_yscale("symlog", linthresh=least)
    axes.set(xlabel="estimated score (attribution)", ylabel="exact change (path patching)")
    axes.tick_params(axis="x", labelsize=7, rotation=60)
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def feeder_bars(feeders: pd.DataFrame, n_steps: int) -> Figure:
    """What enters the dynamic heads, by input, place and kind of sender, beside the other heads of their layers (dots).

    `feeders` has side, at, kind, share and share_others; shares of a step add up to 1.

    Raises:
        ValueError: a column is missing.
    """
    need(feeders, "side", "at", "kind", "share", "share_others")
    table = pd.DataFrame(feeders.groupby(["side", "at", "kind"])[["share", "share_others"]].sum()) / n_steps
    table = table.loc[table.max(axis=1) > 0.01].sort_values("share", ascending=False)
    figure = Figure(figsize=(WIDTH, 1.2 + 0.2 * len(table)), layout="constrained")
    axes = figure.add_subplot()
    colors = {"dynamic": ORANGE, "head": BLUE, "mlp": GREEN, "embed": GREY}
    rows = np.arange(len(table))
    axes.barh(rows, table["share"], color=[colors[kind] for _, _, kind in table.index], height=0.7)
    axes.plot(table["share_others"], rows, "d", color=INK, ms=4)
    words = {"dynamic": "other dynamic heads", "head": "heads", "mlp": "MLPs", "embed": "embedding"}
    labels = [f"{words[kind]} → {side} at the {at}" for side, at, kind in table.index]
    axes.set_yticks(rows, labels, fontsize=8)
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of what enters dynamic heads\n(diamond: other heads of their layers)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def circuit_pictures(
    tables: Mapping[str, pd.DataFrame],
    graphs: Mapping[tuple[str, int], Graph],
    heads: Mapping[tuple[str, int], HeadSet],
    crowds: Clusters | None,
) -> dict[str, tuple[Figure, str]]:
    """Title to figure and caption; a picture that would have nothing to show is left out."""
    found: dict[str, tuple[Figure, str]] = {
        "What a circuit is worth": (
            faithfulness_curves(tables["curves"]),
            "Means over steps, 95 % intervals over haystack windows. 1: as the model itself; 0: as without any edge.",
        )
    }
    if example := _example(tables["steps"], graphs):
        name, said = example
        picture = layered(graphs[name], heads[name], title=said)
        found["The graph of one step"] = (picture, "The page lapse.html beside this one steps through all of them.")
    found["What stays and what comes"] = (
        core_raster(tables["edges"], tables["frequent"]),
        "On the right, in how many of all graphs an edge is.",
    )
    if "alignment" in tables:
        found["How alike steps are"] = (
            overlap_points(tables["overlaps"]),
            "Were a graph the model's alone, another answer would be as alike as the next step.",
        )
    if len(tables["edges"].dropna(subset="exact")):
        found["How good the estimates are"] = (
            estimated_exact(tables["edges"]),
            "The strongest edges of each step and some drawn at random. Negative: the edge helps the clean answer.",
        )
    found["Who feeds the dynamic heads"] = (
        feeder_bars(tables["feeders"], len(tables["steps"])),
        "By the size of attributed edges into their queries, keys and values.",
    )
    if crowds is not None:
        found["Who works together"] = (coactivation_matrix(crowds), "Beyond the clock of the answer, clusters framed.")
        if crowds.n_clusters:
            found["What clusters bind to"] = (cluster_panels(crowds, tables["bindings"]), "Filled: p up to .05.")
    return found


def _example(steps: pd.DataFrame, graphs: Mapping[tuple[str, int], Graph]) -> tuple[tuple[str, int], str] | None:
    """The step whose answer the twin changes most, of those whose graph leads to the logits."""
    for i in np.argsort(steps["metric_twin"] - steps["metric_clean"], kind="stable"):
        row = steps.iloc[i]
        name = (str(row["episode"]), int(row["step"]))
        if name in graphs and graphs[name].prune().edges:
            return name, f"{row['episode']}, step {row['step']}: strongest edges that lead to the logits"
    return None


def _arrow(edge: str) -> str:
    parsed = parse_edge(edge)
    return f"{parsed.sender} → {parsed.receiver} @{parsed.at}"
