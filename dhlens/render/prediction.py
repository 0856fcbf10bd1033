"""Pictures of a prediction: what the state at step n says of the heads at step n + lag, beside what needs no state.

Each takes one table of the predict recipe and returns a matplotlib Figure: `prediction.lag_curves(tables["probes"])`. A
forecaster keeps its colour, marker and line in all of them. Where a picture shows one lag it is the first of the table
unless named. The raster of one episode and the monitor have modules of their own.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dhlens.render.conditions import parts
from dhlens.render.draw import BLUE, GREEN, GREY, INK, ORANGE, WIDTH, curve, need, one
from dhlens.render.forecasts import METRICS, OVER_MEAN, PROBES, Look, extent, interval_list, label, looks
from dhlens.render.monitor import monitor_curves
from dhlens.render.one_lag import calibration, f1_by_frequency, joint_map, precision_recall_curves
from dhlens.render.predicted import predicted_raster
from dhlens.render.sites import site_lag_map

__all__ = [
    "calibration",
    "f1_by_frequency",
    "joint_map",
    "lag_curves",
    "lagged_correlations",
    "lead_curves",
    "monitor_curves",
    "precision_recall_curves",
    "predicted_raster",
    "site_lag_map",
]

_PAIRINGS = {
    "real": ("held out", BLUE, "o-"),
    "controls_only": ("controls in place of the state", "#CC79A7", "^-."),
    "step_aligned": ("null: another episode, same step", ORANGE, "s--"),
    "circular_shift": ("null: same episode, shifted", GREEN, "D-."),
    "free_shuffle": ("null: steps shuffled", GREY, "x:"),
}


def lagged_correlations(cca: pd.DataFrame, top: int = 1) -> Figure:
    """Canonical correlations by lag: held out and in sample, with the held-out nulls; bands are 95 %.

    `cca` is what `dhlens.lagged_cca` returns; `top` one of its numbers of leading components.

    Raises:
        ValueError: a column is missing, or the table has no row of this `top`.
    """
    need(cca, *"lag reading pairing top value low high components".split())
    table = cca.loc[cca["top"] == top].sort_values("lag")
    if table.empty:
        raise ValueError(f"top must be one of {', '.join(map(str, sorted(set(cca['top']))))}, got {top}")
    figure, axes = one()
    figure.set_size_inches(WIDTH, 4.2)
    real = table["pairing"] == "real"
    fitted = table.loc[real & (table["reading"] == "in_sample")]
    if len(fitted):
        curve(axes, fitted, "lag", "value", label="in sample (as the paper)", color=BLUE, style="o--")
        axes.lines[-1].set_markerfacecolor("white")
    for pairing, (name, colour, style) in _PAIRINGS.items():
        part = table.loc[(table["pairing"] == pairing) & (table["reading"] == "held_out")]
        if len(part):
            curve(axes, part, "lag", "value", label=name, color=colour, style=style, bounds=("low", "high"))
    axes.axhline(0, color=INK, lw=0.6, zorder=0)
    axes.set_ylim(min(-0.03, table["low"].min() - 0.03), 1.02)
    axes.set_ylabel("largest canonical correlation" if top == 1 else f"mean of the {_first(table, top)}")
    _lag_axis(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def lag_curves(probes: pd.DataFrame, metric: str = "auprc") -> Figure:
    """A measure of probes and baselines by lag, with 95 % bands; a panel for each run that was forecast.

    `probes` has forecast, lag, metric, value, low, high, base_rate and, with several runs, `on` ("" is the run that the
    probes were fitted on). AUPRC and precision have the share of active cells as a dotted line, which is what a blind
    guess gets; skill and R2 have 0. With one lag, each forecaster gets a row instead.

    Raises:
        ValueError: a column is missing, or the table has no value of `metric`.
    """
    need(probes, *"forecast lag metric value low high base_rate".split())
    table = _of_metric(probes, metric)
    if metric in OVER_MEAN:
        return _panels(table.assign(zero=0.0), METRICS[metric], "zero")
    line = ("base_rate", "share of active cells") if metric in ("auprc", "precision") else ()
    return _panels(table, METRICS.get(metric, metric), *line)


def lead_curves(contrasts: pd.DataFrame, metric: str = "auprc", *, most: int = 4) -> Figure:
    """The first probe's lead over the baselines that come nearest to it, by lag, with paired 95 % bands.

    `contrasts` has forecast, against, lag, metric, value (probe less baseline), low, high and, with several runs, `on`;
    for a metric of which more is better. The `most` baselines of smallest mean lead on the run's own groups are drawn.

    Raises:
        ValueError: a column is missing, or the table has no value of `metric`.
    """
    need(contrasts, *"forecast against lag metric value low high".split())
    table = _of_metric(contrasts, metric)
    probe = next(iter(looks(table["forecast"])))
    table = table.loc[table["forecast"] == probe].assign(forecast=table["against"], zero=0.0)
    own = table.loc[table["on"] == ""] if "on" in table and (table["on"] == "").any() else table
    nearest = own.groupby("forecast")["value"].mean().nsmallest(most).index
    table = table.loc[table["forecast"].isin(nearest)]
    return _panels(table, f"{METRICS.get(metric, metric)}, {label(probe)} less …", "zero")


def _first(table: pd.DataFrame, top: int) -> str:
    found = list(table["components"])
    return (
        f"canonical correlations (all {extent(found)})" if min(found) < top else f"first {top} canonical correlations"
    )


def _lag_axis(axes: Axes) -> None:
    axes.set_xlabel("lag (generation steps ahead)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _of_metric(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    found = table.loc[table["metric"] == metric].dropna(subset=["value"]).sort_values("lag", kind="stable")
    if found.empty:
        raise ValueError(f"metric must be one of {', '.join(table['metric'].unique()) or 'none'}, got {metric!r}")
    return found


def _panels(table: pd.DataFrame, title: str, line: str = "", line_label: str | None = None) -> Figure:
    """A panel for each run, its own first: curves by lag, or rows where there is one lag; `line` is a column."""
    runs = parts(table, "on") if "on" in table else [([""], table)]
    runs.sort(key=lambda run: run[0] != [""])
    shown, flat = looks(table["forecast"]), len(set(table["lag"])) == 1
    columns = min(len(runs), 3)
    rows = -(-len(runs) // columns)
    height = 0.27 * len(shown) + 0.8 if flat else 3.4 if rows == 1 else 2.8
    width = max(WIDTH, 0.7 + 2.7 * columns)
    ncols = 1 + columns
    legend = 0.2 if flat else 0.3 + 0.19 * -(-len(shown) // ncols)
    figure = Figure(figsize=(width, height * rows + legend), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(runs) :]:
        axes.remove()
    for i, (axes, ((run,), part)) in enumerate(zip(grid.flat, runs, strict=False)):
        (_one_lag if flat else _by_lag)(axes, part, shown)
        if line:
            _chance(axes, part.drop_duplicates("lag"), line, line_label, upright=flat)
        axes.set_title(run or ("the run it was fitted on" if len(runs) > 1 else ""), fontsize=9, parse_math=False)
        if i + columns >= len(runs):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(f"{title} at lag {table['lag'].iloc[0]}" if flat else "lag (steps ahead)")
        if i % columns == 0 and not flat:
            axes.set_ylabel(title)
    lines = grid[0, 0].get_legend_handles_labels()
    if lines[0]:
        figure.legend(*lines, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
    return figure


def _by_lag(axes: Axes, part: pd.DataFrame, shown: dict[str, Look]) -> None:
    """The first on top; what needs no state has paler bands."""
    for i, (name, look) in enumerate(shown.items()):
        rows, mine = part.loc[part["forecast"] == name], name in PROBES
        style = f"{look.marker}{look.line}"
        curve(axes, rows, "lag", "value", label=label(name), color=look.colour, style=style, bounds=("low", "high"))
        axes.lines[-1].set(linewidth=1.8 if mine else 1.1, zorder=3 - i / 100)
        axes.collections[-1].set_alpha(0.25 if mine else 0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _one_lag(axes: Axes, part: pd.DataFrame, shown: dict[str, Look]) -> None:
    styled = {name: (look.colour, look.marker) for name, look in shown.items()}
    interval_list(axes, {name: label(name) for name in shown}, part.set_index("forecast"), styled)


def _chance(axes: Axes, part: pd.DataFrame, column: str, name: str | None, *, upright: bool) -> None:
    """The dotted line of a forecast that knows nothing: upright where forecasters have rows."""
    if upright:
        axes.axvline(part[column].iloc[0], color=INK, lw=1, ls=":", zorder=0, label=name)
    else:
        axes.plot(part["lag"], part[column], ":", color=INK, lw=1.2, zorder=0, label=name)
