"""Which clusters of heads are circuits, and which only work at the same time.

    found = crowds(score, draws=500, min_steps=20, seed=0)
    tables = cluster_tables(found, row_classes(score, tokenizer), ties, draws=500, min_steps=20, seed=0)
    in_words(found, tables)

Heads that are on together are a circuit, by what is asked here, where

1. they are so beyond the clock of the answer (`dhlens.crowds`) and, with the class of the copied token kept too, still
   are (`given`); and
2. two of them that are on at a step feed each other, or have their queries fed by the same senders, more than heads
   do that are on at the same step and are others (`tested`). The null puts in the place of each member one of the
   heads nearest in layer that are on as well, so that neither activity nor depth explains what is found. Members may
   be drawn themselves, which keeps the test honest where few others are left, and makes it a careful one. Where fewer
   than three heads stand against each member, or fewer than ten pairs were seen, nothing can be told.

p-values are Holm-adjusted over clusters and tests. A cluster that fails the second works side by side at one time. Both
are tests of tables: none sees a model. Cost: seconds.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dhlens.bindings import bindings
from dhlens.coactivation import Crowd, coactivation
from dhlens.crowds import Clusters, clusters, halves
from dhlens.heads import Head, HeadSet, head_name, parse_head
from dhlens.scores import Score
from dhlens.stats import grouped_mean, holm

TIES = ("feeds", "alike")
_NEAREST = 10
"""So many heads, nearest in layer, may stand in for a member of a cluster, itself and other members among them."""
_FEWEST = 100
"""Draws below which a null says nothing."""
_PAIRS = 10
"""Pairs below which, or in one window alone, nothing is said of a cluster."""


def given(found: Clusters, crowd: Crowd, *, draws: int, seed: int) -> list[float]:
    """For each cluster, how often its pairs go as well together when shuffled within the strata of `crowd`."""
    assert crowd.heads == found.crowd.heads
    masks = [found.labels == k for k in range(found.n_clusters)]

    def means(part: Crowd) -> np.ndarray:
        inside = [part.within[np.ix_(m, m)] for m in masks]
        return np.array([w[np.triu_indices(len(w), 1)].mean() for w in inside])

    real = means(crowd)
    more = sum((means(part) >= real - 1e-12).astype(int) for part in crowd.shuffles(draws, seed=seed))
    return [float(p) for p in (1 + np.asarray(more)) / (1 + draws)]


def tested(
    ties: pd.DataFrame, found: Clusters, *, given_p: Sequence[float], draws: int = 2000, seed: int, alpha: float = 0.05
) -> pd.DataFrame:
    """The clusters with their tests, one row each.

    Args:
        ties: pairs of heads that are on at a step: a, b (names), feeds, alike, group.
        found: the clusters.
        given_p: of each cluster, see `given`.
        draws: random sets of heads.
        seed: of the draws and the bootstrap.
        alpha: of the verdict.

    Returns:
        `Clusters.table`, p_given, and for feeds and alike: pairs (seen on together in the graphs), value with low and
        high, null with its 95 % range, p (share of the draws at least as large; NaN: it cannot be told) and p_holm;
        circuit: whether it is one by these tests.
    """
    table = found.table.assign(p_given=list(given_p)) if found.n_clusters else pd.DataFrame()
    names = sorted({parse_head(h) for h in pd.concat([ties["a"], ties["b"]])}) if len(ties) else []
    for tie in TIES if found.n_clusters else ():
        rows = [_tied(ties.dropna(subset=tie), tie, heads, names, draws, seed) for heads in found.members]
        table = pd.concat([table, pd.DataFrame(rows).add_prefix(f"{tie}_")], axis=1)
    if not found.n_clusters:
        return table
    every = table[["p_given", *(f"{tie}_p" for tie in TIES)]].to_numpy(dtype=float)
    adjusted = np.full(every.shape, np.nan)
    known = ~np.isnan(every)
    adjusted[known] = holm(every[known])
    table[["given_p_holm", *(f"{tie}_p_holm" for tie in TIES)]] = adjusted
    both = np.nanmin(np.where(np.isnan(adjusted[:, 1:]), 1.0, adjusted[:, 1:]), axis=1)
    return table.assign(circuit=(adjusted[:, 0] <= alpha) & (both <= alpha))


def _tied(ties: pd.DataFrame, tie: str, heads: HeadSet, names: list[Head], draws: int, seed: int) -> dict[str, Any]:
    """Mean tie of pairs of these heads, and of as many others, each the neighbour in layer of one of them."""
    index = {head_name(h): i for i, h in enumerate(names)}
    a, b = (np.array([index[name] for name in ties[side]], dtype=int) for side in "ab")
    sums, counts = np.zeros((2, len(names), len(names)))
    np.add.at(sums, (a, b), ties[tie].to_numpy(dtype=float))
    np.add.at(counts, (a, b), 1)
    members = [index[head_name(h)] for h in heads if head_name(h) in index]
    inside = np.isin(a, members) & np.isin(b, members)
    value, low, high = grouped_mean(ties.loc[inside, tie].to_numpy(), ties.loc[inside, "group"].to_numpy(), seed=seed)
    out = {"pairs": int(inside.sum()), "value": value, "low": low, "high": high}
    layers = np.array([layer for layer, _ in names])
    null = _replaced(members, layers, sums, counts, draws=draws, seed=seed)
    seen = inside.sum() >= _PAIRS and ties.loc[inside, "group"].nunique() > 1
    if not seen or len(null) < min(_FEWEST, draws):
        return {**out, "null": np.nan, "null_low": np.nan, "null_high": np.nan, "p": np.nan}
    p = float((1 + (null >= value - 1e-12).sum()) / (1 + len(null)))
    return {
        **out,
        "null": null.mean(),
        "null_low": np.quantile(null, 0.025),
        "null_high": np.quantile(null, 0.975),
        "p": p,
    }


def _replaced(
    members: list[int], layers: np.ndarray, sums: np.ndarray, counts: np.ndarray, *, draws: int, seed: int
) -> np.ndarray:
    """Mean ties of sets of heads that stand in for `members`; none where too few heads were seen."""
    rng = np.random.default_rng(seed)
    if len(members) < 2 or len(layers) < 3 * len(members):
        return np.empty(0)
    out = []
    for _ in range(draws):
        chosen: list[int] = []
        for member in rng.permutation(members):
            free = np.setdiff1d(np.arange(len(layers)), chosen)
            near = free[np.argsort(np.abs(layers[free] - layers[member]), kind="stable")[:_NEAREST]]
            chosen.append(int(rng.choice(near)))
        n = counts[np.ix_(chosen, chosen)].sum()
        if n:
            out.append(sums[np.ix_(chosen, chosen)].sum() / n)
    return np.array(out)


def crowds(score: Score, *, draws: int, min_steps: int, seed: int) -> Clusters | str:
    """The clusters of heads that are on together beyond the clock; or why none can be sought."""
    try:
        found = coactivation(score, min_steps=min_steps, draws=draws, seed=seed)
    except ValueError as error:
        return str(error)
    return clusters(found, draws=min(draws, 200), seed=seed)


def cluster_tables(
    found: Clusters, classes: pd.DataFrame, ties: pd.DataFrame, *, draws: int, min_steps: int, seed: int
) -> dict[str, pd.DataFrame]:
    """By name: clusters (`tested`), bindings, and halves where there are 4 groups.

    `classes` is that of `bindings.row_classes`.
    """
    same = Crowd.of(found.crowd.score, given=[classes["next"].to_numpy()], min_steps=min_steps)
    p = given(found, same, draws=draws, seed=seed)
    tables = {"clusters": tested(ties, found, given_p=p, seed=seed)}
    tables["bindings"] = bindings(found, classes, draws=draws, seed=seed)
    if len(np.unique(found.crowd.group)) >= 4:
        tables["halves"] = halves(found, seed=seed)
    return tables


def in_words(found: Clusters | str, tables: Mapping[str, pd.DataFrame], *, alpha: float = 0.05) -> list[str]:
    """Who works together, how stable that is, and for each cluster what it is by these tests."""
    if isinstance(found, str):
        return [f"No clusters: {found}."]
    n, inside = len(found.crowd.heads), int((found.labels >= 0).sum())
    holds = "cluster holds" if found.n_clusters == 1 else "clusters hold"
    said = [
        f"{found.n_clusters} {holds} {inside} of {n} heads that are on often enough (against shuffles that keep the "
        f"clock, p {found.p:.3f}); {found.crowd.left_out} other heads are on more rarely."
    ]
    if "halves" in tables:
        ari = tables["halves"].set_index("measure").loc["ari"]
        said.append(
            "Random halves of the windows agree on them by an adjusted Rand index of "
            f"{ari['value']:.2f} (shuffled {ari['null']:.2f})."
        )
    return [*said, *(_verdict(row, alpha) for row in tables.get("clusters", pd.DataFrame()).to_dict("records"))]


def _verdict(row: dict[Hashable, Any], alpha: float) -> str:
    about = {
        "given": f"together beyond the class of the copied token (p {row['given_p_holm']:.3f})",
        "feeds": f"feeding each other ({_beside(row, 'feeds')})",
        "alike": f"of queries with the same senders ({_beside(row, 'alike')})",
    }
    passed = {name: bool(row[f"{name}_p_holm"] <= alpha) for name in about}
    what = "is a circuit by these tests" if row["circuit"] else "is no circuit by these tests"
    shown = "; ".join(f"{'' if passed[name] else 'not shown to be '}{text}" for name, text in about.items())
    return f"Cluster {row['cluster']} ({row['heads']}) {what}: together beyond the clock; {shown}."


def _beside(row: dict[Hashable, Any], tie: str) -> str:
    if np.isnan(row[f"{tie}_p"]):
        return f"cannot be told, {_pairs(row, tie)} seen"
    value, null, p = (row[f"{tie}_{name}"] for name in ("value", "null", "p_holm"))
    return f"{value:.3f} in {_pairs(row, tie)} against {null:.3f} of others, p {p:.3f}"


def _pairs(row: dict[Hashable, Any], tie: str) -> str:
    n = row[f"{tie}_pairs"]
    return f"{n} pair{'' if n == 1 else 's'}"
