"""The pictures of a prediction: which of the figures go into its report, each with its caption."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from dhlens.render import prediction
from dhlens.render.forecasts import PROBES, extent, label, probe_and_rival

Pictures = dict[str, tuple[Figure, str]]


def predict_pictures(tables: Mapping[str, pd.DataFrame]) -> Pictures:
    """Title to figure and caption; a picture that would have nothing to show is left out.

    `tables` are those of the predict recipe, any of: cca, controlled, probes, contrasts, transfers, curves,
    joint, reliability, heads, sites, example, monitor_roc and monitor. Pictures of a single lag show lag 1, or the
    first where that was not measured.
    """
    given = {name: table for name, table in tables.items() if len(table)}
    return _correlations(given) | _by_lag(given) | _one_lag(given) | _sites(given) | _episode(given) | _monitor(given)


def _correlations(tables: Mapping[str, pd.DataFrame]) -> Pictures:
    found: Pictures = {}
    for name, top, title in (
        ("cca", 1, "Canonical correlations: the largest"),
        ("cca", 10, "Canonical correlations: the first ten"),
        ("controlled", 1, "Canonical correlations: controls partialled out"),
    ):
        cca = tables.get(name)
        if cca is not None and top in set(cca["top"]):
            found[title] = (
                prediction.lagged_correlations(cca, top),
                f"{'The controls are partialled out of both sides. ' * (name == 'controlled')}"
                "State at a step and heads a lag later, on groups (haystack windows) that were not fitted; dashed with "
                "hollow marks: on the rows they were fitted on, as the paper reads it. Bands: 95 %, over groups, of "
                f"nulls over draws. What counts is the distance to the same step of another episode. {_n(cca)}.",
            )
    return found


def _by_lag(tables: Mapping[str, pd.DataFrame]) -> Pictures:
    if "probes" not in tables:
        return {}
    probes = tables["probes"]
    metric = _metric(probes)
    if metric is None:
        return {}
    what = {
        "auprc": "Average precision over all cells (step, head); dotted: the share of active ones, which a blind guess "
        "gets.",
        "skill": "Share of the squared error left by each head's training mean that a forecast removes; 0 knows no "
        "more than that mean.",
    }
    several = "on" in probes and len(set(probes["on"])) > 1
    found = {
        "How far ahead": (
            prediction.lag_curves(probes, metric),
            f"{what[metric]} Steps of groups that were not fitted, with 95 % intervals over groups. Solid: probes; "
            f"dashed: baselines, which need no state.{' A panel for each run that is forecast.' * several} "
            f"{_n(probes)}.",
        )
    }
    leads = [tables[name] for name in ("contrasts", "transfers") if name in tables]
    if leads and _metric(contrasts := pd.concat(leads, ignore_index=True)) == metric:
        contrasts["on"] = contrasts["on"].fillna("") if "on" in contrasts else ""
        found["Lead over baselines"] = (
            prediction.lead_curves(contrasts, metric),
            "The same measure, probe less baseline, with paired 95 % intervals over groups, for the four baselines "
            f"that come nearest. Above 0 the state knows more than they do. {_n(probes)}.",
        )
    return found


def _one_lag(tables: Mapping[str, pd.DataFrame]) -> Pictures:
    found: Pictures = {}
    if "curves" in tables:
        curves, lag = tables["curves"], _lag(tables["curves"])
        found["Precision and recall"] = (
            prediction.precision_recall_curves(curves, lag, base_rate=_base_rate(tables.get("probes"), lag)),
            f"Lag {lag}: all cells (step, head) of groups that were not fitted; marks: the largest F1 of each "
            f"curve.{_n_at(tables, lag)}",
        )
    if "reliability" in tables and set(PROBES) & set(tables["reliability"]["forecast"]):
        table, lag = tables["reliability"], _lag(tables["reliability"])
        cells = extent(table.loc[table["lag"] == lag].groupby("forecast", as_index=False)["cells"].sum()["cells"])
        found["Calibration"] = (
            prediction.calibration(table, lag),
            f"Lag {lag}: above, how often heads are active by the probability that the probe gave them; below, how "
            f"many cells (step, head) had it, {cells} in all. Probabilities as log-odds, cells as powers of ten; "
            f"what is 0 or 1 lies at the edge.{_n_at(tables, lag)}",
        )
    if "joint" in tables:
        lag = _lag(tables["joint"])
        found["Predicted and actual values"] = (
            prediction.joint_map(tables["joint"], lag),
            f"Lag {lag}: every cell (step, head) of groups that were not fitted.{_n_at(tables, lag)}",
        )
    if "heads" in tables and "f1" in tables["heads"]:
        heads, lag = tables["heads"], _lag(tables["heads"])
        active = heads.loc[(heads["lag"] == lag) & (heads["rate"] > 0)]
        probe, rival = probe_and_rival(active, "f1")
        if probe is not None:
            beside = f" beside the best baseline ({label(rival)})" if rival else ""
            n = len(active.drop_duplicates(["layer", "head"]))
            found["Common and rare heads"] = (
                prediction.f1_by_frequency(heads, lag),
                f"Lag {lag}: F1 of each head under the {label(probe)}{beside}; lines: means over heads of like rate. "
                f"{n} heads are active at least once.{_n_at(tables, lag)}",
            )
    return found


def _sites(tables: Mapping[str, pd.DataFrame]) -> Pictures:
    if "sites" not in tables:
        return {}
    sites, metric = tables["sites"].dropna(subset=["value"]), _metric(tables["sites"])
    sites = sites.loc[(sites["metric"] == metric) & sites["forecast"].isin(PROBES)]
    if metric is None or len(set(sites["site"])) < 2:
        return {}
    n = f" {_n(sites)}." if {"rows", "groups"} <= set(sites.columns) else ""
    caption = f"A probe for each state that is read{' and each lag' * (len(set(sites['lag'])) > 1)}, on groups that it"
    return {"Layer by layer": (prediction.site_lag_map(sites, metric), f"{caption} was not fitted on.{n}")}


def _episode(tables: Mapping[str, pd.DataFrame]) -> Pictures:
    if "example" not in tables:
        return {}
    example = tables["example"]
    return {
        "One episode, predicted": (
            prediction.predicted_raster(example),
            f"Shade: predicted probability; dots: active and predicted; diamonds: active and missed; crosses: "
            "predicted and not active. Heads that are neither at any step have no row. "
            f"n = {example['step'].nunique()} steps of an episode that the probe was not fitted on.",
        )
    }


def _monitor(tables: Mapping[str, pd.DataFrame]) -> Pictures:
    if not {"monitor", "monitor_roc"} <= set(tables) or tables["monitor"].dropna(subset=["auroc"]).empty:
        return {}
    return {
        "Does it know that it is wrong?": (
            prediction.monitor_curves(tables["monitor_roc"], tables["monitor"]),
            "Signals that tell wrong from right, on groups that they were not fitted on: AUROC with 95 % intervals "
            "over groups (dotted: chance), and the curves of at most six. Worst: at the worst step of an answer; told: "
            "knows where the needle is, which no monitor does. n above each picture.",
        )
    }


def _metric(table: pd.DataFrame) -> str | None:
    """Which measure is shown: that of yes and no, or that of values."""
    known = set(table.dropna(subset=["value"])["metric"])
    return next((m for m in ("auprc", "skill") if m in known), None)


def _lag(table: pd.DataFrame) -> int:
    lags = {int(x) for x in table["lag"]}
    return 1 if 1 in lags else min(lags)


def _base_rate(probes: pd.DataFrame | None, lag: int) -> float | None:
    at = None if probes is None else probes.loc[probes["lag"] == lag, "base_rate"]
    return None if at is None or at.empty else float(at.iloc[0])


def _n(table: pd.DataFrame) -> str:
    """As in "n = 2,596–3,212 steps of 10 groups"."""
    return f"n = {extent(table['rows'])} steps of {extent(table['groups'])} groups"


def _n_at(tables: Mapping[str, pd.DataFrame], lag: int) -> str:
    """The steps behind a picture of one lag, where the probes tell: those of the first run."""
    probes = tables.get("probes")
    at = None if probes is None else probes.loc[probes["lag"] == lag].head(1)
    return "" if at is None or at.empty else f" {_n(at)}."
