"""The figures of a scan: which heads copy, how often, how alike steps are; and which of them go into its report."""

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from dhlens.dynamics import Dynamics
from dhlens.heads import HeadSet
from dhlens.render.draw import BLUE, GREEN, GREY, INK, ORANGE, WIDTH, curve, need, one, whole_ticks
from dhlens.render.grids import answer_grids
from dhlens.render.raster import raster
from dhlens.scores import Score


def scan_pictures(score: Score, dynamics: Dynamics | None, outcomes: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """Title to figure and caption; a picture that would have nothing to show is left out.

    Args:
        score: of the scan, with its trace.
        dynamics: None where nothing could be measured.
        outcomes: one row per episode, with length, depth and correct.
    """
    found: dict[str, tuple[Figure, str]] = {}
    if dynamics is not None and dynamics["activated"]:
        found |= _of_dynamics(score, dynamics)
    judged = outcomes.dropna(subset=["length", "depth", "correct"])
    if len(judged):
        found["Accuracy"] = (answer_grids(judged), "Share of answers that contain the whole answer.")
    return found


def _of_dynamics(score: Score, d: Dynamics) -> dict[str, tuple[Figure, str]]:
    assert score.trace is not None
    static = HeadSet(d.heads.loc[d.heads.in_static_20, ["layer", "head"]].to_numpy().tolist(), score.shape)
    right = [i for i, o in enumerate(score.trace.outcomes) if o.correct] or [0]
    example = right[len(right) // 2]
    return {
        "One episode": (
            raster(score, example, static=static),
            f"Heads that copy the next token, at each step of {score.trace.episodes[example].id}. Static: the top 20 "
            "by mean score over the windows that they were fitted on.",
        ),
        "How often each head fires": (head_map(d.heads), "Share of the steps at which a head is active."),
        "The long tail": (long_tail(d.heads), "Heads by activity; the static top 20 set apart."),
        "Similarity over time": (
            lag_curve(d.lags),
            "Mean Jaccard of the active heads of two steps; the null puts each episode's steps in random order.",
        ),
        "Against static sets": (
            static_curve(d.static),
            "Static heads are fitted on other haystack windows; the cap is what the sizes of the two sets allow.",
        ),
        "What more episodes would show": (
            accumulation(d.accumulation),
            "Heads ever active and entropy grow with the number of episodes drawn.",
        ),
    }


def head_map(heads: pd.DataFrame) -> Figure:
    """How often each head fires, layer by head, on a log scale; heads that never fire are grey.

    `heads` has layer, head and rate (0..1).

    Raises:
        ValueError: a column is missing, or there is no head.
    """
    need(heads, "layer", "head", "rate")
    if heads.empty:
        raise ValueError("a map needs the heads of a model, got none")
    layer, head = heads["layer"].to_numpy(dtype=int), heads["head"].to_numpy(dtype=int)
    n_layers, n_heads = int(layer.max()) + 1, int(head.max()) + 1
    grid = np.full((n_layers, n_heads), np.nan)
    grid[layer, head] = heads["rate"].where(heads["rate"] > 0)
    figure = Figure(figsize=(max(3.2, 1.5 + 0.14 * n_heads), max(3.0, 0.8 + 0.14 * n_layers)), layout="compressed")
    axes = figure.add_subplot()
    axes.set_facecolor("#E4E6E8")
    lowest = float(np.nanmin(grid)) if np.isfinite(grid).any() else 0.1
    norm = LogNorm(vmin=min(lowest, 0.5), vmax=1.0)
    image = axes.imshow(np.ma.masked_invalid(grid), cmap="cividis_r", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, format=FuncFormatter(_percent))
    bar.set_label("share of steps (grey: never)")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    whole_ticks(axes)
    return figure


def long_tail(heads: pd.DataFrame, *, static: HeadSet | None = None) -> Figure:
    """Heads ranked by how often they fire (log), and the share of all firings that the first ones carry.

    `heads` has layer, head and rate (0..1); the `static` heads, or those of its column `in_static_20`, are set apart by
    shape and colour.

    Raises:
        ValueError: a column is missing, or no head fires.
    """
    need(heads, "layer", "head", "rate")
    ranked = heads.loc[heads["rate"] > 0].sort_values(["rate", "layer", "head"], ascending=[False, True, True])
    if ranked.empty:
        raise ValueError("a ranking needs at least one head that fires, got none")
    rank = np.arange(1, len(ranked) + 1)
    rate = ranked["rate"].to_numpy(dtype=float)
    share = rate.cumsum() / rate.sum()
    marked, size = _static_marks(ranked, static), len(static) if static is not None else 20
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 2])
    top.semilogy(rank[~marked], rate[~marked], "o", ms=4, color=BLUE, mew=0, label="other heads")
    if marked.any():
        label = f"static top {size} ({marked.sum()} fire)"
        top.semilogy(rank[marked], rate[marked], "D", ms=5, color=ORANGE, mew=0, label=label)
        top.legend(frameon=False, fontsize=9)
    top.yaxis.set_major_formatter(FuncFormatter(_percent))
    top.set_ylabel("steps at which\nthe head fires")
    top.set_title(f"{len(ranked)} of {len(heads)} heads fire", fontsize=10)
    bottom.plot(rank, share, color=INK)
    for part in (0.5, 0.9):
        count = int(np.searchsorted(share, part - 1e-12)) + 1
        bottom.plot([0, count, count], [part, part, 0], ":", color=GREY, lw=1)
        text = f"{count} heads carry {part:.0%}"
        bottom.annotate(text, (count, part), (6, -12), textcoords="offset points", fontsize=9)
    bottom.set_ylim(0, 1.05)
    bottom.set_xlim(0, len(ranked) * 1.05 + 1)
    bottom.yaxis.set_major_formatter(PercentFormatter(1.0))
    bottom.set_ylabel("share of\nall firings")
    bottom.set_xlabel("rank of the head")
    return figure


def lag_curve(lags: pd.DataFrame) -> Figure:
    """How alike the head sets of two steps are, by their distance in steps, with the band of shuffled time.

    `lags` has lag, jaccard, low, high, null, null_low and null_high.

    Raises:
        ValueError: a column is missing.
    """
    need(lags, "lag", "jaccard", "null")
    figure, axes = one()
    curve(axes, lags, "lag", "null", label="shuffled time", color=GREY, style="--", bounds=("null_low", "null_high"))
    curve(axes, lags, "lag", "jaccard", label="observed", color=BLUE, style="o-", bounds=("low", "high"))
    axes.set_xlabel("time lag (generation steps)")
    axes.set_ylabel("Jaccard of the head sets")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    return figure


def static_curve(static: pd.DataFrame) -> Figure:
    """How well the k heads of highest mean score stand for the heads of a step, by k.

    `static` has k, jaccard_static, jaccard_max, jaccard_over_max and coverage. The dotted cap is the mean of the
    largest Jaccard that sets of these sizes allow: a fall along it says something about sizes, not about heads.

    Raises:
        ValueError: a column is missing, or there is no k.
    """
    need(static, "k", "jaccard_static", "jaccard_max", "jaccard_over_max", "coverage")
    if static.empty:
        raise ValueError("a curve over k needs at least one size, got none")
    figure, axes = one()
    dots = len(static) <= 20
    curve(axes, static, "k", "coverage", label="coverage", color=GREEN, style="s-" if dots else "-.")
    curve(axes, static, "k", "jaccard_over_max", label="Jaccard / cap", color=ORANGE, style="D-" if dots else "--")
    curve(axes, static, "k", "jaccard_static", label="Jaccard", color=BLUE, style="o-" if dots else "-")
    curve(axes, static, "k", "jaccard_max", label="cap: largest possible Jaccard", color=INK, style=":")
    axes.set_xscale("log")
    first, last = np.quantile(static["k"], [0, 1])
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if first <= k <= last]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_xlabel("size k of the static set (heads)")
    axes.set_ylabel("mean over steps")
    axes.set_ylim(0, 1.02)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def accumulation(accumulation: pd.DataFrame) -> Figure:
    """How the number of activated heads and the entropy grow with the number of episodes drawn.

    `accumulation` has episodes, activated and entropy, with `_low` and `_high` bounds where known.

    Raises:
        ValueError: a column is missing.
    """
    need(accumulation, "episodes", "activated", "entropy")
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    for axes, name, colour, style in ((top, "activated", BLUE, "o-"), (bottom, "entropy", GREEN, "s-")):
        bounds = (f"{name}_low", f"{name}_high")
        curve(axes, accumulation, "episodes", name, label=name, color=colour, style=style, bounds=bounds)
    top.set_ylabel("activated heads")
    top.set_ylim(bottom=0)
    bottom.set_ylabel("entropy (nats)")
    bottom.set_xlabel("episodes drawn")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _static_marks(ranked: pd.DataFrame, static: HeadSet | None) -> np.ndarray:
    """True at the rows of `ranked` that are static heads."""
    if static is None:
        return np.array(ranked["in_static_20"] if "in_static_20" in ranked else [False] * len(ranked), dtype=bool)
    return np.array(
        [(int(layer), int(head)) in static for layer, head in zip(ranked["layer"], ranked["head"], strict=True)]
    )


def _percent(share: float, _: int | None = None) -> str:
    """A share on a log axis: 100%, 10%, 1%, 0.1%."""
    return f"{100 * share:.3g}%"
