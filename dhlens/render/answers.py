"""Figures of the answers of dynamic retrieval: what they gain, policy by policy, beside what could be gained."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dhlens.arms import reference_visibility
from dhlens.render.conditions import styles
from dhlens.render.draw import BLUE, GREY, INK, need

CHOOSERS = (
    "predicted",
    "static",
    "oracle",
    "all heads",
    "dynamic random",
    "fixed random",
    "random windows",
    "first tokens",
    "by step",
)
"""Who chooses, in the order of their colours."""
REFERENCES = ("none", "full", "gold")
"""Arms in which no trigger moves: nothing of the context, all of it, the supporting facts."""


def answer_points(summary: pd.DataFrame) -> Figure:
    """F1 of each arm with its interval, a panel per trigger and visibility, policies in one order, references last.

    Several triggers stand side by side, a line for each visibility.

    `summary` is that of `dhlens.arms.answer_summary`.

    Raises:
        ValueError: a column is missing, or there is no arm beside the references.
    """
    need(summary, "trigger", "visibility", "policy", "f1", "f1_low", "f1_high", "visible")
    panels = summary.loc[summary["trigger"] != "never", ["trigger", "visibility"]].drop_duplicates()
    if panels.empty:
        raise ValueError("answers need an arm with a trigger, beside the references")
    steered: pd.Series = summary.loc[summary["trigger"] != "never"].groupby("policy")["f1"].mean()
    order = [*steered.sort_values(ascending=False).index, *REFERENCES]
    arms: list[tuple[str, str]] = list(panels.itertuples(index=False, name=None))
    shown = [_panel(summary, trigger, visibility, order) for trigger, visibility in arms]
    triggers = panels["trigger"].nunique()
    columns = triggers if triggers > 1 else min(len(shown), 3)
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(2.1 + 2.3 * columns, lines * (0.7 + 0.24 * max(map(len, shown)))), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    for i, (axes, rows) in enumerate(zip(grid.flat, shown, strict=False)):
        _dots(axes, rows, labelled=i % columns == 0)
        axes.set_title(", ".join(arms[i]), fontsize=9)
    figure.supxlabel("F1 of the answer (95 % over questions);\nbehind it the visible tokens at a lookup", fontsize=9)
    return figure


def answer_curves(summary: pd.DataFrame) -> Figure:
    """F1 against the number of visible tokens, with intervals, a panel per visibility under the first trigger.

    The references none, gold and full mark how F1 grows with what is visible; policies at one number of tokens are
    drawn side by side, up to a quarter to the left and right. `summary` is that of `dhlens.arms.answer_summary`.

    Raises:
        ValueError: a column is missing, or there is no arm beside the references.
    """
    need(summary, "trigger", "visibility", "policy", "f1", "f1_low", "f1_high", "visible")
    steered = summary.loc[summary["trigger"] != "never"]
    if steered.empty:
        raise ValueError("answers need an arm with a trigger, beside the references")
    trigger = steered["trigger"].iloc[0]
    panels = list(dict.fromkeys(steered["visibility"]))
    policies = list(dict.fromkeys(steered["policy"]))
    known = styles(policies, CHOOSERS)
    figure = Figure(figsize=(1.6 + 2.4 * len(panels), 3.2), layout="constrained")
    grid = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, visibility in zip(grid, panels, strict=True):
        rows = _panel(summary, trigger, visibility, [*REFERENCES, *policies]).dropna(subset=["visible", "f1"])
        fixed: pd.DataFrame = rows.loc[rows["policy"].isin(REFERENCES)].sort_values("visible")
        axes.plot(fixed["visible"], fixed["f1"], ":", color=GREY, zorder=1)
        for row in rows.to_dict("records"):
            at = policies.index(row["policy"]) - (len(policies) - 1) / 2 if row["policy"] in known else 0
            color, marker = known.get(row["policy"], (GREY, "."))
            x, low, high = row["visible"] * 1.08**at, row["f1_low"], row["f1_high"]
            axes.vlines(x, low, high, color=color, lw=1.2)
            axes.plot(x, row["f1"], marker, color=color, ms=5, label=row["policy"] if row["policy"] in known else None)
            if row["policy"] in REFERENCES:
                axes.annotate(row["policy"], (x, high), (0, 3), textcoords="offset points", ha="center", fontsize=7)
        axes.set_xscale("symlog", linthresh=32, base=2)
        axes.set_xticks([0, 64, 256, 1024], ["0", "64", "256", "1,024"], fontsize=8)
        axes.minorticks_off()
        axes.set_title(f"{trigger}, {visibility}", fontsize=9)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("F1 of the answer")
    grid[0].set_ylim(0, max(0.02, 1.1 * summary["f1_high"].max()))  # where every answer is wrong, too
    figure.supxlabel("visible tokens of the context at a lookup", fontsize=9)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
    return figure


def _panel(summary: pd.DataFrame, trigger: str, visibility: str, order: Sequence[str]) -> pd.DataFrame:
    """The rows of a panel, one a policy in this order; empty ones where an arm was not run."""
    here = (summary["trigger"] == trigger) & (summary["visibility"] == visibility)
    never = (summary["trigger"] == "never") & (summary["visibility"] == reference_visibility(visibility))
    return summary.loc[here | never].set_index("policy").reindex(order).reset_index()


def _dots(axes: Axes, rows: pd.DataFrame, *, labelled: bool) -> None:
    y = -np.arange(len(rows))
    f1, low, high = (rows[name].to_numpy(dtype=float) for name in ("f1", "f1_low", "f1_high"))
    colors = [GREY if policy in REFERENCES else BLUE for policy in rows["policy"]]
    axes.hlines(y, low, high, colors=colors, lw=1.5)
    axes.scatter(f1, y, c=colors, s=22, zorder=3)
    for value, at, tokens in zip(high, y, rows["visible"], strict=True):
        text = "" if np.isnan(tokens) else f"{tokens:,.0f}"
        axes.annotate(text, (value, at), (3, 0), textcoords="offset points", va="center", fontsize=7, color=INK)
    axes.set_yticks(y, rows["policy"] if labelled else [""] * len(rows), fontsize=8)
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)
