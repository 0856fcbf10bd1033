"""Dynamics: how the set of active heads changes from step to step; the paper's first table with intervals and nulls.

    print(dh.dynamics(dh.copy_paste(trace)))

1. Take the steps of correctly answered episodes and the heads active at each (`dhlens.raster`).
2. Average each measure over steps, with a bootstrap interval over groups (haystack windows), never over steps.
3. Fit the static ranking on some groups and compare it with the steps of the others.
4. Set each number beside what chance gives (`dhlens.nulls`): J with the static top K is at most |D| / K whatever the
   heads do, so read it with coverage and J / J_max; adjacent J beside shuffled time; activated and entropy, which grow
   with the number of episodes, beside their accumulation.

Cost: seconds at 500 episodes x 40 steps x 1,024 heads. For static scores alone use `Score.mean` and `HeadSet.top_k`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32, Int
from scipy.stats import t as student
from torch import Tensor

from dhlens.nulls import accumulation, chance_match, independent_heads, shuffled_time, summary
from dhlens.raster import Raster, ever_active, share_entropy
from dhlens.scores import Score
from dhlens.static import rank_heads, static_curve, static_steps
from dhlens.stats import Interval, grouped_mean, jackknife

_CURVE = 100
_LAGS = range(1, 11)
_PAPER = ("heads_per_step", "heads_per_step_std", "activated", "total_heads")
_NOTES = {
    "heads_per_step": "all steps",
    "heads_per_nonempty_step": "steps with a head",
    "chance_match": "heads per step if the copied tokens came in random order",
    "jaccard_static": "0 at a step without heads",
    "jaccard_max": "what the sizes of the sets allow",
    "jaccard_over_max": "share of that",
    "coverage": "share of the active heads",
    "overlap": "share of the smaller set",
    "jaccard_adjacent": "empty pairs skipped",
    "jaccard_adjacent_paper": "empty pairs count 1",
    "jaccard_adjacent_shuffled": "null: each episode's steps in random order",
    "jaccard_adjacent_independent": "null: each head at its own rate",
    "activated": "grows with data: see accumulation",
    "activated_jackknife": "leaving out one group at a time",
    "heads_seen_once": "active at one step only",
    "entropy": "nats; grows with data: see accumulation",
    "entropy_jackknife": "leaving out one group at a time",
    "effective_heads": "exp(entropy)",
    "entropy_over_max": "entropy / ln(activated)",
}


@dataclass(frozen=True, eq=False)
class Dynamics:
    """Measures of one score's dynamics, as tidy tables."""

    table: pd.DataFrame
    """One row per measure: metric, value, low, high (95 %; of a null: its band), n (steps, pairs or groups), note."""
    static: pd.DataFrame
    """Means over steps against k = 1..100, on groups the ranking was not fitted on: jaccard_static, jaccard_max (what
    the sizes of the sets allow), jaccard_over_max, coverage, overlap."""
    lags: pd.DataFrame
    """lag (steps), jaccard with low and high (95 %), pairs, and the shuffled-time null: null, null_low, null_high."""
    heads: pd.DataFrame
    """Every head by rank: layer, head, count (steps), rate (of steps), share (of activations), rank, static_rank,
    in_static_20."""
    accumulation: pd.DataFrame
    """episodes, activated and entropy (nats) with the 95 % range over draws without replacement."""
    episodes: pd.DataFrame
    """Means over each episode's steps: episode, group, steps, activated, and the measures of `table` that are means."""

    def __getitem__(self, metric: str) -> float:
        """The value of a measure of `table`.

        Raises:
            KeyError: there is none of that name.
        """
        values = dict(zip(self.table["metric"], self.table["value"], strict=True))
        if metric not in values:
            raise KeyError(f"no metric {metric!r}; there are: {', '.join(values)}")
        return float(values[metric])

    def row(self) -> dict[str, float]:
        """The paper's columns: heads per step (mean, std), activated of total, static and adjacent Jaccard, entropy."""
        static = next(m for m in self.table["metric"] if m.startswith("jaccard_static_"))
        return {metric: self[metric] for metric in (*_PAPER, static, "jaccard_adjacent", "entropy")}

    def __str__(self) -> str:
        lines = [("metric", "value", "95 %", "n", "")]
        for metric, value, low, high, n, note in self.table.itertuples(index=False):
            lines.append((metric, _number(value), _range(low, high), f"{n:,}", note))
        name, *widths = (max(map(len, column)) for column in list(zip(*lines, strict=True))[:4])
        form = f"{{:<{name}}}" + "".join(f"  {{:>{width}}}" for width in widths) + "  {}"
        return "\n".join(form.format(*line).rstrip() for line in lines)


def dynamics(
    score: Score,
    *,
    static_from: float | Float[Tensor, "layer head"] = 0.5,
    threshold: float | None = None,
    ks: Sequence[int] = (20, 50, 100),
    seed: int = 0,
    n_boot: int = 1000,
    answered: bool = True,
) -> Dynamics:
    """How the active heads of `score` change over steps. A score without a trace counts as one sequence of samples.

    Args:
        score: Heads above `threshold` are active.
        static_from: The static ranking: a share of the groups to fit it on (by mean score, ties by (layer, head)), the
            other groups then being the ones measured; or a score per head, measured on all groups.
        threshold: Activity is a value above this; a score of yes and no needs none.
        ks: Sizes of the static sets.
        seed: Of the split, the bootstrap and the nulls.
        n_boot: Bootstrap resamples.
        answered: Leave out episodes that were judged wrong.

    Raises:
        ValueError: a continuous score without a threshold, a share without 2 groups to part, a ranking of another
            shape, a size below 1, or no step to measure.
    Source: arXiv 2602.11162, table 1 and A.3. What it leaves open is chosen and named: a step without heads has Jaccard
        0 with the static set; an empty pair of steps is skipped (`jaccard_adjacent_paper` counts it as 1); entropy is
        that of shares of activations, in nats.
    """
    if min(ks, default=0) < 1:
        raise ValueError(f"ks must be sizes of static sets, at least 1 each, got {tuple(ks)}")
    if threshold is None and not score.binary:
        raise ValueError(f"score {score.name!r} is continuous: say from which value on a head is active, threshold=")
    raster = Raster.of(score, threshold=threshold or 0.0, answered=answered)
    ranking, held = rank_heads(score, raster, static_from, seed=seed)
    jaccard = raster.jaccard()
    steps = _sizes(score, raster) | static_steps(raster, ranking, held, ks) | _adjacent(raster, jaccard)
    lags = _lags(raster, jaccard, seed, n_boot)
    rows = [*_means(steps, raster.group, seed, n_boot), *_pair_rows(raster, steps, lags, seed), *_growing_rows(raster)]
    return Dynamics(
        table=pd.DataFrame(rows),
        static=static_curve(raster, ranking, held, max(*ks, _CURVE)),
        lags=lags,
        heads=_heads(raster, ranking, score.shape[1]),
        accumulation=accumulation(raster, seed=seed),
        episodes=_episodes(score, raster, steps),
    )


def _sizes(score: Score, raster: Raster) -> dict[str, np.ndarray]:
    size = raster.size.astype(float)
    columns = {"heads_per_step": size, "empty_share": (size == 0.0) * 1.0}
    columns["heads_per_nonempty_step"] = np.where(size > 0, size, np.nan)
    chance = chance_match(score, raster)
    return columns if chance is None else columns | {"chance_match": chance}


def _adjacent(raster: Raster, jaccard: Float32[np.ndarray, "n place"]) -> dict[str, np.ndarray]:
    first = raster.pairs(1)
    skip, paper = np.full((2, len(raster.rows)), np.nan)
    skip[first] = jaccard[first, raster.place()[first + 1]]
    paper[first] = np.nan_to_num(skip[first], nan=1.0)
    return {"jaccard_adjacent": skip, "jaccard_adjacent_paper": paper}


def _lags(raster: Raster, jaccard: Float32[np.ndarray, "n place"], seed: int, n_boot: int) -> pd.DataFrame:
    place, rows = raster.place(), []
    nulls = summary(shuffled_time(raster, jaccard, _LAGS, seed=seed))
    for lag, null, low, high in zip(_LAGS, *nulls, strict=True):
        first = raster.pairs(lag)
        values = jaccard[first, place[first + lag]]
        found = grouped_mean(values, raster.group[first], seed=seed, n_boot=n_boot)
        rows.append((lag, *found, _known(values), null, low, high))
    return pd.DataFrame(rows, columns=["lag", "jaccard", "low", "high", "pairs", "null", "null_low", "null_high"])


def _known(values: np.ndarray) -> int:
    return int((~np.isnan(values)).sum())


def _row(metric: str, interval: Interval, n: int) -> dict[str, Any]:
    note = _NOTES.get(metric, _NOTES.get(metric.rpartition("_")[0], ""))
    return {"metric": metric, **interval._asdict(), "n": n, "note": note}


def _exactly(value: float | np.number) -> Interval:
    return Interval(float(value), np.nan, np.nan)


def _means(steps: dict[str, np.ndarray], group: np.ndarray, seed: int, n_boot: int) -> Iterator[dict[str, Any]]:
    for metric, values in steps.items():
        yield _row(metric, grouped_mean(values, group, seed=seed, n_boot=n_boot), _known(values))
        if metric == "heads_per_step":
            yield _row("heads_per_step_std", _exactly(values.std()), len(values))


def _pair_rows(raster: Raster, steps: dict[str, np.ndarray], lags: pd.DataFrame, seed: int) -> Iterator[dict[str, Any]]:
    paper, pairs = (_known(steps[name]) for name in ("jaccard_adjacent_paper", "jaccard_adjacent"))
    yield _row("skipped_pairs", _exactly(float(paper - pairs)), paper)
    yield _row("jaccard_adjacent_shuffled", Interval(*lags[["null", "null_low", "null_high"]].to_numpy()[0]), pairs)
    draws = independent_heads(raster, seed=seed)
    yield _row("jaccard_adjacent_independent", Interval(*(float(x[0]) for x in summary(draws[:, None]))), pairs)


def _growing_rows(raster: Raster) -> Iterator[dict[str, Any]]:
    by_group = raster.counts(raster.group)
    counts, n = by_group.sum(0), len(raster.rows)
    activated, nats = int(ever_active(counts)), float(share_entropy(counts))
    yield _row("activated", _exactly(float(activated)), n)
    yield _row("activated_jackknife", _jackknife(ever_active, by_group), len(by_group))
    yield _row("heads_seen_once", _exactly((counts == 1).sum()), n)
    yield _row("total_heads", _exactly(float(len(counts))), n)
    yield _row("entropy", _exactly(nats), n)
    yield _row("entropy_jackknife", _jackknife(share_entropy, by_group), len(by_group))
    yield _row("effective_heads", _exactly(np.exp(nats)), n)
    yield _row("entropy_over_max", _exactly(nats / np.log(activated) if activated > 1 else np.nan), n)


def _jackknife(statistic: Callable[[np.ndarray], np.ndarray], by_group: np.ndarray) -> Interval:
    estimate, error = jackknife(statistic, by_group)
    reach = error * float(student.ppf(0.975, len(by_group) - 1)) if len(by_group) > 1 else np.nan
    return Interval(estimate, estimate - reach, estimate + reach)


def _heads(raster: Raster, ranking: Int[np.ndarray, " heads"], width: int) -> pd.DataFrame:
    count = raster.active.sum(0)
    order = np.argsort(-count, kind="stable")
    static_rank = np.empty(len(count), dtype=int)
    static_rank[ranking] = np.arange(1, len(count) + 1)
    table = pd.DataFrame({"layer": order // width, "head": order % width, "count": count[order]})
    table["rate"] = table["count"] / len(raster.rows)
    table["share"] = table["count"] / max(int(count.sum()), 1)
    table["rank"] = np.arange(1, len(count) + 1)
    table["static_rank"] = static_rank[order]
    table["in_static_20"] = table["static_rank"] <= 20
    return table


def _episodes(score: Score, raster: Raster, steps: dict[str, np.ndarray]) -> pd.DataFrame:
    first = raster.runs(raster.episode)
    index = raster.episode[first]
    names = [str(i) if score.trace is None else score.trace.episodes[i].id for i in index]
    table = pd.DataFrame(
        {"episode": names, "group": raster.group[first], "steps": np.diff(first, append=len(raster.rows))}
    )
    table["activated"] = ever_active(raster.counts(raster.episode))
    means = pd.DataFrame(pd.DataFrame(steps).groupby(raster.episode).mean())
    return table.join(means.reset_index(drop=True))


def _number(value: float) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:,.4f}" if value % 1 else f"{value:,.0f}"


def _range(low: float, high: float) -> str:
    return "" if np.isnan(low) else f"{_number(low)} .. {_number(high)}"
