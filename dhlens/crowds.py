"""Crowds of heads: clusters of those that are active together, and whether they come back elsewhere.

    found = coactivation(copy_paste(trace))
    crowds = clusters(found)                         # which heads belong together; None of them where the null does so
    halves(crowds)                                   # adjusted Rand index across random halves of the windows
    across({"uuid": crowds, "number": others})       # across haystacks or needle kinds

1. Average linkage on 1 - phi, by default `within` the strata of the co-activation, so that heads which only share the
   clock are far apart. `on="phi"` clusters what is seen, clock and all.
2. The number of clusters, single heads included, is the one whose silhouette lies furthest above that of shuffled
   heads at the same number; of 30 numbers at most.
3. `p` is how often shuffled heads do as well at their own best number; above `alpha` there are no clusters.
4. A cluster of two heads or more holds where its pairs go together more than those of any cluster of shuffled heads
   do (in all but `alpha` of the draws). All other heads are in none.

Every comparison stands beside its null: the same heads shuffled first, in the way of `dhlens.coactivation`. Cost:
seconds for 50 heads, a minute for 270. Pairs alone are in `Coactivation.pairs`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import adjusted_rand_score, silhouette_score

from dhlens.coactivation import Coactivation, Crowd
from dhlens.heads import HeadSet, head_name

_SIZES = 30


@dataclass(frozen=True, eq=False)
class Clusters:
    """The kept heads, joined."""

    crowd: Crowd
    on: str
    """What was clustered: "within" or "phi"."""
    labels: Int[np.ndarray, " head"]
    """Int[head]: cluster of each kept head, from 0, largest first; -1 for heads in none."""
    cut: Int[np.ndarray, " head"]
    """Int[head]: the cut of the tree, with heads that stand alone and clusters that do not hold."""
    p: float
    """How often shuffled heads have as clear clusters."""
    cluster_p: tuple[float, ...]
    """For each cluster that holds, how often the tightest cluster of shuffled heads is as tight."""
    curve: pd.DataFrame
    """n_clusters, silhouette, and that of shuffled heads: null with its 95 % band."""
    order: Int[np.ndarray, " head"]
    """Int[head]: the kept heads as they stand in the tree, those of a cluster together."""

    @property
    def n_clusters(self) -> int:
        """Clusters of two heads or more that hold against the null."""
        return int(self.labels.max()) + 1

    @property
    def members(self) -> list[HeadSet]:
        """The heads of each cluster."""
        named = list(zip(self.crowd.heads, self.labels, strict=True))
        return [HeadSet([h for h, c in named if c == k], self.crowd.score.shape) for k in range(self.n_clusters)]

    @property
    def table(self) -> pd.DataFrame:
        """One row per cluster, from the largest.

        cluster, size, layer_min, layer_max, p, mean within and phi of its pairs and of those with other heads
        (`*_out`), the share of steps with any and with all of its heads, heads.
        """
        rows = []
        for k, members in enumerate(self.members):
            inside = np.flatnonzero(self.labels == k)
            outside, layers = np.flatnonzero(self.labels != k), [layer for layer, _ in members]
            i, j = np.triu_indices(len(inside), 1)
            row: dict[str, Any] = {
                "cluster": k,
                "size": len(members),
                "layer_min": min(layers),
                "layer_max": max(layers),
            }
            row["p"] = self.cluster_p[k]
            for name in ("within", "phi"):
                matrix = getattr(self.crowd, name)
                row[name] = matrix[inside[i], inside[j]].mean()
                row[f"{name}_out"] = matrix[np.ix_(inside, outside)].mean() if len(outside) else np.nan
            active = self.crowd.active[:, inside]
            row |= {
                "any": active.any(1).mean(),
                "all": active.all(1).mean(),
                "heads": " ".join(map(head_name, members)),
            }
            rows.append(row)
        return pd.DataFrame(rows)


def clusters(
    found: Coactivation,
    *,
    on: str = "within",
    n_clusters: int | None = None,
    draws: int = 200,
    alpha: float = 0.05,
    seed: int = 0,
) -> Clusters:
    """Join heads that are active together.

    Args:
        found: the pairs.
        on: "within" the strata, or "phi" as it is seen.
        n_clusters: how many, single heads included; default as the silhouette says.
        draws: shuffles of the null.
        alpha: the largest `p` at which there are clusters.
        seed: of the shuffles.

    Raises:
        ValueError: another `on`, or a number of clusters that the heads do not allow.
    """
    crowd, n = found.crowd, len(found.crowd.heads)
    if on not in ("within", "phi"):
        raise ValueError(f"on must be 'within' or 'phi', got {on!r}")
    if n_clusters is not None and not 2 <= n_clusters < n:
        raise ValueError(f"n_clusters must lie within 2..{n - 1} for {n} heads, got {n_clusters}")
    sizes = (
        np.unique(np.linspace(2, n - 1, _SIZES).round()).astype(int).tolist() if n_clusters is None else [n_clusters]
    )
    phi = getattr(crowd, on)
    shuffled = np.stack([getattr(c, on) for c in crowd.shuffles(draws, seed=seed)])
    real, null = _silhouettes(phi, sizes), np.stack([_silhouettes(s, sizes) for s in shuffled])
    # what is tested counts as one more draw wherever draws are averaged: else p is too small
    gain, *chance = np.vstack([real, null]) - np.vstack([real, null]).mean(0)
    p = float((1 + sum(c.max() >= gain.max() - 1e-12 for c in chance)) / (1 + draws))
    best, tree = sizes[int(gain.argmax())], _tree(phi)
    cut = _by_size(_cut(tree, best))
    every = np.concatenate([phi[None], shuffled])
    centre, width = every.mean(0), np.maximum(every.std(0), 1e-6)
    tight = _tightness((phi - centre) / width, cut)
    tightest = np.array([max(_tightness((s - centre) / width, _cut(_tree(s), best)), default=0.0) for s in shuffled])
    cluster_p = [float((1 + (tightest >= t - 1e-12).sum()) / (1 + draws)) for t in tight]
    holds = [k for k, own in enumerate(cluster_p) if max(own, p) <= alpha]
    labels = np.array([holds.index(c) if c in holds else -1 for c in cut])
    low, high = np.quantile(null, (0.025, 0.975), axis=0)
    curve = pd.DataFrame({"n_clusters": sizes, "silhouette": real, "null": null.mean(0)})
    curve = curve.assign(null_low=low, null_high=high)
    order = leaves_list(tree).astype(int)
    return Clusters(crowd, on, labels, cut, p, tuple(cluster_p[k] for k in holds), curve, order)


def halves(found: Clusters, *, splits: int = 50, seed: int = 0) -> pd.DataFrame:
    """How well random halves of the groups agree.

    Each half is cut at the number of clusters found. Measures: "ari", adjusted Rand index of the halves; "phi_r",
    correlation of all pairs' phi; "jaccard" of each cluster with the most alike one of a half. One row per measure
    and cluster (-1: all): value and the 95 % range of the splits; the same of shuffled heads (null, null_low,
    null_high); `p` is the share of null splits at least as alike as the mean.

    Raises:
        ValueError: fewer than 4 groups.

    Source: Hubert and Arabie 1985 (adjusted Rand index); Hennig 2007 (clusterwise Jaccard, there of bootstrap samples).
    """
    names = np.unique(found.crowd.group)
    if len(names) < 4:
        raise ValueError(f"halves need 4 groups (haystack windows) at least, got {len(names)}")
    rng = np.random.default_rng(seed)
    n = int(found.cut.max()) + 1
    members = [found.labels == k for k in range(found.n_clusters)]
    real, null = [], []
    for shuffled in found.crowd.shuffles(splits, seed=seed):
        first = np.isin(found.crowd.group, rng.permutation(names)[: len(names) // 2])
        for crowd, out in ((found.crowd, real), (shuffled, null)):
            sides = [_Side(crowd.at(half), found.on, n) for half in (first, ~first)]
            again = [np.mean([_jaccard(m, side.labels) for side in sides]) for m in members]
            out.append((*_alike(*sides), *again))
    table = _beside(np.array(real), np.array(null))
    return table.assign(cluster=[-1, -1, *range(len(members))], groups=len(names))


def across(found: Mapping[str, Clusters], *, draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """Adjusted Rand index, and correlation of all pairs' phi, between runs: other haystacks or needle kinds.

    Over the heads kept in both, each side cut at its own number of clusters. One row per pair of runs and measure: a,
    b, heads, value, and what shuffling both sides gives (null with its 95 % range, p).

    Raises:
        ValueError: fewer than 2 runs, clustered on different things, or two that share fewer than 3 kept heads.
    """
    if len(found) < 2 or len({c.on for c in found.values()}) > 1:
        what = ", ".join(f"{name} on {c.on}" for name, c in found.items())
        raise ValueError(f"there must be at least 2 runs, clustered on one thing, got {what or 'none'}")
    tables = []
    for a, b in combinations(found, 2):
        mine = [found[name].crowd for name in (a, b)]
        common = sorted({*mine[0].heads} & {*mine[1].heads})
        if len(common) < 3:
            raise ValueError(f"{a} and {b} must share 3 kept heads at least to be compared, got {len(common)}")
        at = [np.array([crowd.heads.index(h) for h in common]) for crowd in mine]
        n = [int(found[name].cut.max()) + 1 for name in (a, b)]
        drawn = zip(*(crowd.shuffles(draws, seed=seed + k) for k, crowd in enumerate(mine)), strict=True)
        real, *null = [
            _alike(*(_Side(crowd, found[a].on, n[k], at[k]) for k, crowd in enumerate(pair)))
            for pair in (tuple(mine), *drawn)
        ]
        table = _beside(np.array([real]), np.array(null)).assign(a=a, b=b, heads=len(common))
        tables.append(table.drop(columns=["low", "high"]))
    order = ["a", "b", "measure", "value", "null", "null_low", "null_high", "p", "heads"]
    return pd.concat(tables, ignore_index=True).reindex(columns=order)


class _Side(NamedTuple):
    """One of two crowds to be compared: how it is cut, and which of its heads count."""

    crowd: Crowd
    on: str
    n_clusters: int
    at: np.ndarray | slice = slice(None)

    @property
    def labels(self) -> np.ndarray:
        return _cut(_tree(getattr(self.crowd, self.on)), self.n_clusters)[self.at]

    @property
    def pairs(self) -> np.ndarray:
        phi = getattr(self.crowd, self.on)[self.at][:, self.at]
        return phi[np.triu_indices(len(phi), 1)]


def _alike(a: _Side, b: _Side) -> tuple[float, float]:
    x, y = a.pairs, b.pairs
    correlation = float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else 0.0
    return adjusted_rand_score(a.labels, b.labels), correlation


def _jaccard(member: Bool[np.ndarray, " head"], labels: Int[np.ndarray, " head"]) -> float:
    """With the most alike cluster."""
    others = [labels == k for k in np.unique(labels)]
    return max(float((member & other).sum() / (member | other).sum()) for other in others)


def _beside(real: Float[np.ndarray, "split measure"], null: Float[np.ndarray, "draw measure"]) -> pd.DataFrame:
    low, high = np.quantile(real, (0.025, 0.975), axis=0)
    null_low, null_high = np.quantile(null, (0.025, 0.975), axis=0)
    columns = {"value": real.mean(0), "low": low, "high": high, "null": null.mean(0)}
    columns |= {"null_low": null_low, "null_high": null_high}
    columns["p"] = (1 + (null >= real.mean(0) - 1e-12).sum(0)) / (1 + len(null))
    measures = ["ari", "phi_r", *["jaccard"] * (real.shape[1] - 2)]
    return pd.DataFrame({"measure": measures, **columns})


def _tree(phi: Float[np.ndarray, "head head"]) -> np.ndarray:
    return linkage(squareform(_distance(phi), checks=False), "average")


def _distance(phi: Float[np.ndarray, "head head"]) -> Float[np.ndarray, "head head"]:
    out = 1 - (phi + phi.T) / 2
    np.fill_diagonal(out, 0)
    return np.maximum(out, 0)


def _cut(tree: np.ndarray, n_clusters: int) -> Int[np.ndarray, " head"]:
    return fcluster(tree, n_clusters, "maxclust").astype(int) - 1


def _silhouettes(phi: Float[np.ndarray, "head head"], sizes: Sequence[int]) -> Float[np.ndarray, " size"]:
    """Of the cuts into so many clusters; 0 where ties leave no such cut."""
    distance, tree = _distance(phi), _tree(phi)
    cuts = [_cut(tree, n) for n in sizes]
    return np.array(
        [
            silhouette_score(distance, cut, metric="precomputed") if 1 <= cut.max() < len(phi) - 1 else 0.0
            for cut in cuts
        ]
    )


def _by_size(cut: Int[np.ndarray, " head"]) -> Int[np.ndarray, " head"]:
    """The same clusters, numbered by size and then by first head."""
    _, first, inverse, count = np.unique(cut, return_index=True, return_inverse=True, return_counts=True)
    return np.argsort(np.lexsort((first, -count)))[inverse].astype(int)


def _tightness(z: Float[np.ndarray, "head head"], cut: Int[np.ndarray, " head"]) -> list[float]:
    """Its pairs' distances from the null, their sum over the root of their count, of each cluster of two or more."""
    inside = [np.flatnonzero(cut == k) for k in range(int(cut.max()) + 1)]
    pairs = [z[np.ix_(i, i)][np.triu_indices(len(i), 1)] for i in inside if len(i) > 1]
    return [float(p.sum() / len(p) ** 0.5) for p in pairs]
