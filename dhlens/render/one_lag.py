"""Pictures of forecasts at one lag: precision and recall, calibration, heads by how often they are active.

Each takes one table of `dhlens.probe_report` and returns a Figure; the lag is the first of the table unless named. Use
them as `prediction.calibration` and so on.
"""

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dhlens.render.draw import GREY, INK, WIDTH, curve, need, one
from dhlens.render.forecasts import METRICS, PROBES, label, looks, probe_and_rival


def precision_recall_curves(curves: pd.DataFrame, lag: int | None = None, *, base_rate: float | None = None) -> Figure:
    """Precision against recall of probes and baselines at one lag, over lines of equal F1; each one's best F1 marked.

    `curves` has forecast, lag, precision and recall. Precision is held between points, as average precision counts it.
    `base_rate` is the share of active cells, which a blind guess has as its precision.

    Raises:
        ValueError: a column is missing, or there is no curve at this lag.
    """
    need(curves, "forecast", "lag", "precision", "recall")
    table = _at(curves, lag)
    figure, axes = one()
    figure.set_size_inches(WIDTH, 5.2)
    recall = np.linspace(0.01, 1, 200)
    for f1 in (0.2, 0.4, 0.6, 0.8):
        precision = f1 * recall / np.where(2 * recall > f1, 2 * recall - f1, np.nan)
        axes.plot(recall, np.where(precision <= 1, precision, np.nan), color="#D5D9DD", lw=0.8, zorder=0)
        axes.text(1.01, f1 / (2 - f1), f"F1 {f1:g}", fontsize=8, color=INK, alpha=0.7, va="center")
    for name, look in looks(table["forecast"]).items():
        part = table.loc[table["forecast"] == name].sort_values(["recall", "precision"], ascending=[True, False])
        p, r = (part[c].to_numpy(dtype=float) for c in ("precision", "recall"))
        best = int(np.argmax(p * r / np.maximum(p + r, 1e-12)))
        style = {"color": look.colour, "ls": look.line, "lw": 1.8 if name in PROBES else 1.1, "label": label(name)}
        at, height = np.append(0, r), np.append(p[0], p)
        axes.plot(at, height, marker=look.marker, markevery=[best + 1], ms=6, drawstyle="steps-pre", **style)
    if base_rate is not None:
        axes.axhline(base_rate, color=INK, lw=1, ls=":", label=f"active cells, {base_rate:.1%}")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("recall of active heads")
    axes.set_ylabel("precision")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def calibration(reliability: pd.DataFrame, lag: int | None = None) -> Figure:
    """How often heads are active where the probe says so with probability p, and how many cells each p has.

    `reliability` has forecast, lag, low, high (edges of a bin), predicted, observed (means in it) and cells. Axes are
    stretched towards 0 and 1 (log-odds), since most cells lie near 0; what is 0 or 1 lies at the edge.

    Raises:
        ValueError: a column is missing, or there is no probe at this lag.
    """
    need(reliability, *"forecast lag low high predicted observed cells".split())
    table = _at(reliability.loc[reliability["forecast"].isin(PROBES)], lag)
    table = table.sort_values("low")
    means = table[["predicted", "observed"]].to_numpy(dtype=float)
    inside = [*means[(means > 0) & (means < 1)], 0.01, 0.9]
    ends = np.array([0.5 * min(inside), 0.5 + 0.5 * max(inside)])
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    even = np.linspace(ends[0], ends[1], 1000)
    top.plot(even, even, color=GREY, lw=0.8, ls="--", label="as often as said")
    for name, look in looks(table["forecast"]).items():
        part = table.loc[table["forecast"] == name].set_index("low")
        points = part[["predicted", "observed"]].astype(float).clip(*ends)
        curve(top, points, "predicted", "observed", label=label(name), color=look.colour, style=f"{look.marker}-")
        edges = sorted({*table["low"], *table["high"]})
        counts = part["cells"].reindex(edges[:-1], fill_value=0).to_numpy(dtype=float)
        bottom.stairs(counts, np.clip(edges, *ends), baseline=0.5, color=look.colour, lw=1.5)
    for axis in (top.set_xscale, top.set_yscale):
        axis("logit")
    ticks = [t for t in (0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999) if ends[0] < t < ends[1]]
    top.set_xticks(ticks, [f"{t:g}" for t in ticks])
    top.set_yticks(ticks, [f"{t:g}" for t in ticks])
    top.set_xticks([], minor=True)
    top.set_yticks([], minor=True)
    top.set(xlim=ends, ylim=ends, ylabel="share that is active")
    bottom.set(yscale="log", ylim=(0.5, 3 * table["cells"].max()), ylabel="cells", xlabel="predicted probability")
    top.legend(frameon=False, fontsize=9)
    return figure


def f1_by_frequency(heads: pd.DataFrame, lag: int | None = None, value: str = "f1") -> Figure:
    """F1, or AUPRC, of each head by how often it is active (log): the best probe beside the best baseline.

    `heads` has forecast, lag, layer, head, rate and the `value`. Lines are means over heads of like rate; heads that
    are never active are left out.

    Raises:
        ValueError: a column is missing, no head is active at this lag, or there is no probe.
    """
    need(heads, "forecast", "lag", "layer", "head", "rate", value)
    table = _at(heads, lag)
    table = table.loc[table["rate"] > 0].dropna(subset=[value])
    pair = probe_and_rival(table, value)
    if pair[0] is None:
        raise ValueError("the picture needs a probe and a head that is active, got none")
    figure, axes = one()
    figure.set_size_inches(WIDTH, 4.4)
    shown = looks(name for name in pair if name)
    edges = 10 ** np.arange(np.floor(2 * np.log10(table["rate"].min())) / 2, 0.51, 0.5)
    for name, look in reversed(shown.items()):
        part = table.loc[table["forecast"] == name]
        axes.plot(part["rate"], part[value], look.marker, color=look.colour, ms=4, mfc="none", mew=0.8, alpha=0.7)
        means = part.groupby(pd.cut(part["rate"], edges, right=False), observed=True)[["rate", value]].mean()
        text = f"{label(name)}, mean {part[value].mean():.2f}"
        axes.plot(means["rate"], means[value], look.line, marker=look.marker, color=look.colour, ms=7, label=text)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g}%")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("share of steps at which the head is active")
    axes.set_ylabel(f"{METRICS.get(value, value)} of the head")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def joint_map(joint: pd.DataFrame, lag: int | None = None) -> Figure:
    """What was predicted against what came, cells (step, head) counted by colour (log): the probe beside the marginal.

    `joint` has forecast, lag, predicted, actual (middles of bins) and cells. The line: right to the point.

    Raises:
        ValueError: a column is missing, or there is nothing at this lag.
    """
    need(joint, "forecast", "lag", "predicted", "actual", "cells")
    table = _at(joint, lag)
    names = [n for n in looks(table["forecast"]) if n in (*PROBES, "marginal")] or list(looks(table["forecast"]))[:1]
    figure = Figure(figsize=(max(WIDTH, 0.8 + 2.4 * len(names)), 3.2), layout="constrained")
    panels = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    shown = table.loc[table["forecast"].isin(names)]
    low, high = (float(f(shown[["predicted", "actual"]].to_numpy())) for f in (np.min, np.max))
    norm = LogNorm(1, max(float(shown["cells"].to_numpy().max()), 2.0))
    for axes, name in zip(panels, names, strict=True):
        part = shown.loc[shown["forecast"] == name]
        axes.scatter(part["predicted"], part["actual"], c=part["cells"], marker="s", s=16, norm=norm)
        axes.plot([low, high], [low, high], color=GREY, lw=0.8, ls="--", zorder=0)
        axes.set_title(label(name), fontsize=9)
        axes.set_xlabel("predicted", fontsize=9)
    panels[0].set_ylabel("what came", fontsize=9)
    figure.colorbar(panels[0].collections[0], ax=panels.tolist(), label="cells (step, head)")
    return figure


def _at(table: pd.DataFrame, lag: int | None) -> pd.DataFrame:
    """The rows of one lag, by default the first."""
    found = table.loc[table["lag"] == (table["lag"].min() if lag is None else lag)]
    if found.empty:
        raise ValueError(f"lag must be one of {', '.join(map(str, sorted(set(table['lag'])))) or 'none'}, got {lag}")
    return found
