"""Heat maps of an ablation: length x depth for each policy, and policy x edit for each commit."""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, Formatter, PercentFormatter

from dhlens.render.conditions import compared_by, parts, plain
from dhlens.render.draw import WIDTH, binned, need

_VALUES = {"correct": "right answers", "rouge_l": "mean ROUGE-L", "f1": "mean F1", "mass": "mean reasoning mass"}
_ROOM = WIDTH - 0.9
"""Inches left for the cells beside the axis."""


def answer_grids(answers: pd.DataFrame, value: str = "correct", policies: Sequence[str] | None = None) -> Figure:
    """Mean by context length and needle depth, a panel per policy on one colour scale, with the episodes in each cell.

    `answers` has one row per episode and condition: policy, length (tokens), depth (0..1) and the `value`, "correct",
    "rouge_l", "f1" or "mass"; rows without it, and those of a k sweep, are left out. A policy under several edits
    or commits gets a panel for each; without a policy column there is one panel. Natural lengths and depths are binned
    where there are more than 12 of them.

    Args:
        answers: the table.
        value: what is averaged.
        policies: which panels, in this order; default all, the untouched model first.

    Raises:
        ValueError: another `value`, a column is missing, or a policy has no judged answer.
    """
    if value not in _VALUES:
        raise ValueError(f"value must be one of {', '.join(_VALUES)}, got {value!r}")
    need(answers, "length", "depth", value)
    cells = _cells(answers if "policy" in answers else answers.assign(policy="all episodes"), value, policies)
    lengths, depths = np.unique(cells["length"]), np.unique(cells["depth"])
    shown = parts(cells, "policy", "edit", "commit")
    means = [_short(part["value"].to_numpy().mean(), value) for _, part in shown]
    titles = [f"{', '.join(name)}\n{m}, n={len(part)}" for m, (name, part) in zip(means, shown, strict=True)]
    figure, panels, roomy = _panels(titles, lengths, depths)
    # masses are far below 1
    most = 1.0 if value != "mass" else float(cells["value"].to_numpy().max()) or 1.0
    for axes, (_, part) in zip(panels, shown, strict=True):
        mean, count = (
            part.pivot_table("value", "depth", "length", aggfunc=how).reindex(index=depths, columns=lengths).to_numpy()
            for how in ("mean", "count")
        )
        texts = [f"{_short(m, value)}\nn={n:.0f}" for m, n in zip(mean.flat, count.flat, strict=True)]
        _heat(axes, mean, texts if roomy else None, most=most)
    figure.supxlabel("context length (tokens)", fontsize=10)
    figure.supylabel("depth of needle or evidence", fontsize=10)
    _bar(figure, panels, _form(value), _VALUES[value])
    return figure


def atlas(summary: pd.DataFrame) -> Figure:
    """Share of right answers (or mean F1) by policy and edit, a panel per commit, with the mean number of edited heads.

    `summary` has one row per policy, edit and commit: accuracy (or f1) and heads. Combinations that were not run are
    hatched; what the untouched model reaches stands above each panel.

    Raises:
        ValueError: a column is missing, or no accuracy is known.
    """
    by = compared_by(summary)
    kind = "correct" if by == "accuracy" else by
    need(summary, "policy", "edit", "commit", by, "heads")
    known = plain(summary).dropna(subset=[by])
    untouched = known.loc[known["policy"] == "none", by]
    touched = known.loc[known["policy"] != "none"]
    if touched.empty:
        raise ValueError(f"an atlas needs the {by} of a policy that edits heads, got none")
    policies, edits, commits = (list(touched[name].unique()) for name in ("policy", "edit", "commit"))
    height, width = 0.36 * len(policies) + 0.45, max(3.4, 1.3 + 0.62 * len(edits))
    figure = Figure(figsize=(width, height * len(commits) + 1.2), layout="constrained")
    panels = figure.subplots(len(commits), 1, sharex=True, squeeze=False)[:, 0]
    for axes, commit in zip(panels, commits, strict=True):
        at = touched.loc[touched["commit"] == commit]
        accuracy, heads = (
            at.pivot(index="policy", columns="edit", values=x).reindex(index=policies, columns=edits).to_numpy(float)
            for x in (by, "heads")
        )
        texts = [f"{_short(a, kind)}\n{_count(n)}" for a, n in zip(accuracy.flat, heads.flat, strict=True)]
        _heat(axes, accuracy, texts)
        beside = f" (untouched: {_short(untouched.iloc[0], kind)})" if len(untouched) else ""
        axes.set_title(f"commit: {commit}{beside}", fontsize=9)
        axes.set_xticks(range(len(edits)), edits, fontsize=9, rotation=90 if max(map(len, edits)) > 9 else 0)
        axes.set_yticks(range(len(policies)), policies, fontsize=9)
    panels[-1].set_xlabel("edit (h: heads at a step)")
    _bar(figure, list(panels), _form(kind), _VALUES[kind])
    return figure


def _cells(answers: pd.DataFrame, value: str, policies: Sequence[str] | None) -> pd.DataFrame:
    """The judged answers of the wanted policies, in their order, with binned length and depth and their `value`."""
    judged = plain(answers).dropna(subset=[value, "length", "depth"])
    wanted = list(judged["policy"].unique() if policies is None else policies)
    missing = [p for p in wanted if p not in set(judged["policy"])]
    if missing or not wanted:
        raise ValueError(f"grids need judged answers, got none under {', '.join(missing) or 'any policy'}")
    judged = judged.loc[judged["policy"].isin(wanted)]
    length, depth = binned(judged["length"]), binned(judged["depth"])
    cells = judged.assign(length=length, depth=depth, value=judged[value].astype(float))
    return pd.concat([cells.loc[cells["policy"] == policy] for policy in wanted])


def _panels(titles: Sequence[str], lengths: np.ndarray, depths: np.ndarray) -> tuple[Figure, list[Axes], bool]:
    """Figure, titled panels in rows, and whether a cell has room for text; outer panels carry the tick labels."""
    n, n_lengths = len(titles), len(lengths)
    rows = -(-n // max(2, int(_ROOM / max(0.4 * n_lengths, 1.15))))
    columns = -(-n // rows)
    width = max(min(0.8, _ROOM / (columns * n_lengths)), 1.15 / n_lengths)
    roomy = width >= 0.37
    titles = [_wrapped(title, int(width * n_lengths / 0.078)) for title in titles]
    height = len(depths) * (0.36 if roomy else 0.2) + 0.2 + 0.14 * max(t.count("\n") + 1 for t in titles)
    figure = Figure(figsize=(0.9 + max(columns * n_lengths * width, 2.2), 1.2 + rows * height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[n:]:
        axes.remove()
    names = [f"{x:,.0f}" for x in lengths]
    turn = 90 if max(map(len, names)) * 0.075 > width else 0
    for i, (axes, title) in enumerate(zip(grid.flat, titles, strict=False)):
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.set_xticks(range(n_lengths), names if i + columns >= n else [], fontsize=8, rotation=turn)
        axes.set_yticks(range(len(depths)), [f"{x:.0%}" for x in depths] if i % columns == 0 else [], fontsize=8)
    return figure, list(grid.flat[:n]), roomy


def _wrapped(text: str, most: int) -> str:
    return "\n".join(fill(line, most) for line in text.split("\n"))


def _heat(axes: Axes, grid: np.ndarray, texts: Sequence[str] | None, *, most: float = 1.0) -> None:
    """Shares as colours from 0 to `most`, with texts in the order of cells; what is NaN is hatched."""
    axes.patch.set(facecolor="#E4E6E8", edgecolor="#C2C7CB", hatch="////", linewidth=0)
    axes.imshow(np.ma.masked_invalid(grid), cmap="cividis", vmin=0, vmax=most, aspect="auto")
    for i, (row, column) in enumerate(np.ndindex(grid.shape)):
        if texts is not None and np.isfinite(grid[row, column]):
            ink = "black" if grid[row, column] > 0.55 * most else "white"
            axes.text(column, row, texts[i], ha="center", va="center", color=ink, fontsize=8)


def _bar(figure: Figure, panels: list[Axes], form: Formatter, label: str) -> None:
    """One colour scale over all panels: on top, where it takes no width and a phone shows it first."""
    bar = figure.colorbar(
        panels[0].images[0], ax=panels, location="top", format=form, fraction=0.05, aspect=35, shrink=0.8
    )
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _form(kind: str) -> Formatter:
    return PercentFormatter(1.0) if kind == "correct" else FormatStrFormatter("%.2f" if kind == "mass" else "%.1f")


def _short(value: float, kind: str) -> str:
    return f"{value:.0%}" if kind == "correct" else f"{value:.2f}"


def _count(heads: float) -> str:
    return f"{heads:.1f} h" if heads < 99.5 else f"{heads:.0f} h"
