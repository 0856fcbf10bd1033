"""Pictures of an ablation: what becomes of answers and next tokens when heads are taken away.

Each takes one table of the ablate recipe and returns a matplotlib Figure: `figures.effect_dots(tables["summary"])`. A
policy and an edit keep their colour and marker in all of them, and the untouched model, the policy "none", comes first.
What was not measured leaves its place empty. The conditions of a k sweep may stand among the others: `k_sweep` and
`compensation` alone draw them. Grids and the causal map have modules of their own.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dhlens.render.causal import causal_raster
from dhlens.render.conditions import EDITS, POLICIES, compared_by, parts, plain, styles
from dhlens.render.draw import BLUE, GREY, INK, ORANGE, WIDTH, curve, need
from dhlens.render.grids import answer_grids, atlas

__all__ = [
    "answer_grids",
    "atlas",
    "causal_raster",
    "compensation",
    "contrast_forest",
    "effect_dots",
    "k_sweep",
]

_NAMES = {
    "accuracy": "right answers",
    "f1": "F1 of answers",
    "em": "exact matches",
    "kept": "argmax kept",
    "kl": "one-step KL (nats)",
    "rouge_l": "ROUGE-L",
}
_POINTS = ("accuracy", "em", "kept")


def effect_dots(summary: pd.DataFrame) -> Figure:
    """Answers, argmaxes kept and one-step KL by policy, with 95 % intervals; edits set apart by colour and shape.

    `summary` has one row per policy, edit and commit, and accuracy (or f1), kept and kl with their `_low` and `_high`.
    The two one-step measures do not depend on the commit and are drawn once.

    Raises:
        ValueError: a column is missing, or nothing was measured.
    """
    dots = [compared_by(summary), "kept", "kl"]
    need(summary, "policy", "edit", "commit", *(f"{m}{end}" for m in dots for end in ("", "_low", "_high")))
    table = plain(summary).dropna(subset=dots, how="all")
    if table.empty:
        raise ValueError("effects need a measured accuracy, kept or kl, got none")
    policies, looks = list(table["policy"].unique()), styles(table.loc[table["policy"] != "none", "edit"], EDITS)
    table, slots = _placed(table, policies, list(looks))
    size = (WIDTH, 1.3 + 0.2 * -(-len(looks) // 3) + len(policies) * max(0.27, 0.075 * slots))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(dots), sharey=True)
    for axes, measure in zip(panels, dots, strict=True):
        axes.set_xlabel(_NAMES[measure], fontsize=9)
        _dots(axes, table.dropna(subset=[measure]), measure, looks)
        for row in range(1, len(policies), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="#F1F2F4", zorder=0)
        axes.tick_params(axis="x", labelsize=8)
    panels[0].set_yticks(range(len(policies)), policies)
    panels[0].set_ylim(len(policies) - 0.5, -0.5)
    figure.legend(handles=_dot_legend(table, looks), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def contrast_forest(contrasts: pd.DataFrame) -> Figure:
    """Differences between policies with 95 % intervals and p; those that were fixed beforehand are set apart.

    `contrasts` has first, second, edit, commit, measure, primary, difference (first less second), low, high, p and
    p_holm. A panel per measure, edit and commit; panels of one measure have one scale. The p of a primary contrast is
    not adjusted where its p_holm is NaN.

    Raises:
        ValueError: a column is missing, or no difference is known.
    """
    need(contrasts, *"first second edit commit measure primary difference low high p p_holm".split())
    table = contrasts.dropna(subset=["difference"]).sort_values("primary", ascending=False, kind="stable")
    if table.empty:
        raise ValueError("a forest needs a known difference, got none")
    shown = parts(table, "measure", "edit", "commit")
    rows = [len(part) for _, part in shown]
    figure = Figure(figsize=(WIDTH, 0.5 + 0.2 * sum(rows) + 0.75 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[n + 1 for n in rows])[:, 0]
    for axes, ((measure, *under), part) in zip(panels, shown, strict=True):
        _forest(axes, part)
        axes.set_title(", ".join([_NAMES.get(measure, measure), *under]), fontsize=9, loc="left")
        _reach(axes, table.loc[table["measure"] == measure])
        if measure in _POINTS:
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=""))
    unit = "difference, first less second (shares: percentage points)"
    look = {"loc": "outside lower center", "ncols": 2, "frameon": False, "fontsize": 9, "title_fontsize": 9}
    figure.legend(handles=_forest_legend(table), title=unit, **look)
    return figure


def k_sweep(sweep: pd.DataFrame) -> Figure:
    """What is left against the number of heads taken away at every step, by policy, with 95 % bands.

    `sweep` has policy, k, and any of accuracy, rouge_l, f1, em and kl (a panel each), with `_low` and `_high` where
    known.
    Several edits or commits get a row each.

    Raises:
        ValueError: a column is missing, or nothing was measured.
    """
    drawn = [m for m in ("accuracy", "rouge_l", "f1", "em", "kl") if m in sweep] or ["accuracy"]
    figure, panels = _curves(sweep, {measure: _NAMES[measure] for measure in drawn})
    for axes, measure in zip(panels, drawn * (len(panels) // len(drawn)), strict=True):
        if measure == "kl":
            axes.set_ylim(bottom=0)
            continue
        axes.set_ylim(-0.03, 1.03)
        if measure in _POINTS:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def compensation(sweep: pd.DataFrame) -> Figure:
    """Static heads that become active only once k others are taken away, by policy, with 95 % bands.

    `sweep` has policy, k, comp_max (the most at a step, mean over episodes) and comp_mean (mean over steps), with
    `_low` and `_high` where known.

    Raises:
        ValueError: a column is missing, or nothing was measured.
    """
    figure, panels = _curves(sweep, {"comp_max": "most at a step", "comp_mean": "mean over steps"})
    for axes in panels:
        axes.set_ylim(bottom=0)
    figure.suptitle("static heads newly active", fontsize=10)
    return figure


def _placed(table: pd.DataFrame, policies: list[str], edits: list[str]) -> tuple[pd.DataFrame, int]:
    """The table with the height of each row: `y`, and `y_edit` for what commits share; and the slots of a policy."""
    slots = sorted(
        {(e, c) for p, e, c in table[["policy", "edit", "commit"]].itertuples(index=False) if p != "none"},
        key=lambda slot: (edits.index(slot[0]), slot[1] != "edited"),
    )
    reach = min(0.36, 0.13 * (len(slots) - 1))
    offset = dict(zip(slots, np.linspace(-reach, reach, len(slots)), strict=False))
    places = [
        policies.index(p) + (0.0 if p == "none" else offset[e, c])
        for p, e, c in table[["policy", "edit", "commit"]].itertuples(index=False)
    ]
    table = table.assign(y=places)
    return table.assign(y_edit=table.groupby(["policy", "edit"])["y"].transform("mean")), len(slots)


def _dots(axes: Axes, table: pd.DataFrame, measure: str, looks: dict[str, tuple[str, str]]) -> None:
    once = measure in ("kept", "kl")
    for row in (table.drop_duplicates(["policy", "edit"]) if once else table).to_dict("records"):
        colour, marker = (INK, "o") if row["policy"] == "none" else looks[row["edit"]]
        y, face = row["y_edit" if once else "y"], "white" if row["commit"] == "clean" and not once else colour
        axes.plot([row[f"{measure}_low"], row[f"{measure}_high"]], [y, y], color=colour, lw=1.2)
        axes.plot(row[measure], y, marker, color=colour, mfc=face, ms=4.5, mew=1)
    if measure == "kl":
        _kl_axis(axes, table["kl"].to_numpy(dtype=float))
    else:
        axes.set_xlim(-0.04, 1.04)
        axes.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    if table.empty:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color=GREY)


def _kl_axis(axes: Axes, values: np.ndarray) -> None:
    """Logarithmic down to the smallest effect, with a place for 0, where effects differ much."""
    positive = values[values > 0]
    if not len(positive) or positive.max() < 30 * positive.min():
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        return
    first, last = (int(np.floor(np.log10(x))) for x in (positive.min(), positive.max()))
    axes.set_xscale("symlog", linthresh=10.0**first, linscale=0.5)
    decades = [10.0**n for n in range(last, first, -max(1, -(-(last - first) // 2)))]
    # differences between strong effects are what is argued from: a tick within their decade
    ticks = [0.0, *reversed(decades), *(x for x in (3 * decades[0],) if x < 1.1 * positive.max())]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"{axes.get_xlabel()}, log scale")


def _dot_legend(table: pd.DataFrame, looks: dict[str, tuple[str, str]]) -> list[Line2D]:
    marks = [_mark(colour, marker, edit) for edit, (colour, marker) in looks.items()]
    if {"edited", "clean"} <= set(table["commit"]):
        marks += [_mark(GREY, "o", "commit: edited"), _mark(GREY, "o", "commit: clean", face="white")]
    return marks


def _mark(colour: str, marker: str, label: str, face: str | None = None) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, mfc=face or colour, ls="none", ms=5, label=label)


def _forest(axes: Axes, part: pd.DataFrame) -> None:
    for y, row in enumerate(part.to_dict("records")):
        colour, marker = (ORANGE, "D") if row["primary"] else (BLUE, "o")
        axes.plot([row["low"], row["high"]], [y, y], color=colour, lw=1.5)
        axes.plot(row["difference"], y, marker, color=colour, ms=5)
        p = row["p"] if row["primary"] and np.isnan(row["p_holm"]) else row["p_holm"]
        text = "" if np.isnan(p) else "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".")
        axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.axvline(0, color=GREY, lw=0.8, ls="--", zorder=0)
    names = [f"{a} − {b}" for a, b in zip(part["first"], part["second"], strict=True)]
    axes.set_yticks(range(len(part)), names, fontsize=9, parse_math=False)
    for label, bold in zip(axes.get_yticklabels(), part["primary"], strict=True):
        label.set_fontweight("bold" if bold else "normal")
    n_primary = int(part["primary"].to_numpy().sum())
    if 0 < n_primary < len(part):
        axes.axhline(n_primary - 0.5, color=GREY, lw=0.8)
    axes.set_ylim(len(part) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)


def _forest_legend(table: pd.DataFrame) -> list[Line2D]:
    kinds = table["primary"].tolist()
    adjusted = table["p_holm"].notna().to_numpy()[kinds].all()
    primary = _mark(ORANGE, "D", "primary" if adjusted else "primary (p as it is)")
    return [primary] * any(kinds) + [_mark(BLUE, "o", "p after Holm")] * (not all(kinds))


def _reach(axes: Axes, rows: pd.DataFrame) -> None:
    """One scale for all panels of a measure, with 0 inside."""
    ends = np.nan_to_num(rows[["low", "high", "difference"]].to_numpy(dtype=float))
    low, high = min(ends.min(), 0.0), max(ends.max(), 0.0)
    margin = 0.05 * (high - low) or 0.05
    axes.set_xlim(low - margin, high + margin)


def _curves(sweep: pd.DataFrame, measures: dict[str, str]) -> tuple[Figure, list[Axes]]:
    """A row of panels per edit and commit, a column per measure, with a curve and band for each policy."""
    need(sweep, "policy", "k", *measures)
    known = sweep.loc[sweep["k"].notna()].dropna(subset=list(measures), how="all")
    if known.empty:
        raise ValueError(f"a sweep needs a measured {' or '.join(measures)}, got none")
    conditions = parts(known, "edit", "commit") if "edit" in known else [([], known)]
    looks = styles(known["policy"], POLICIES)
    figure = Figure(figsize=(WIDTH, 0.6 + 2.6 * len(conditions)), layout="constrained")
    panels = figure.subplots(len(conditions), len(measures), sharex=True, squeeze=False)
    for row, (name, condition) in zip(panels, conditions, strict=True):
        for axes, (measure, label) in zip(row, measures.items(), strict=True):
            for policy, (colour, marker) in looks.items():
                part = condition.loc[condition["policy"] == policy].dropna(subset=[measure]).sort_values("k")
                bounds = (f"{measure}_low", f"{measure}_high")
                curve(axes, part, "k", measure, label=policy, color=colour, style=f"{marker}-", bounds=bounds)
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
            axes.set_title(", ".join(name) if len(conditions) > 1 else "", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("heads taken away (k)", fontsize=9 if len(measures) < 3 else 8)
    lines = panels[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure, list(panels.flat)
