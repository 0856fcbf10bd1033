"""What the graphs of many steps say together: how far to trust them, and what stays from step to step.

    graphs(edges, wiring)                            # the graph of each step
    agreement(edges)                                 # estimated against exact scores, step by step
    overlaps(jaccards(graphs, dynamic, groups), seed=0)      # next step, same answer, another answer: edges, heads
    frequent(edges)                                  # how often an edge is in a step's graph
    curves(faithfulness, seed=0)                     # means over steps, intervals over windows

All functions of the tables that `dhlens.recipes.circuit` keeps; none sees a model. Steps of an answer are no
independent cases, so that every interval resamples whole groups (haystack windows). Which clusters of heads are
circuits is asked in `dhlens.ties`. Cost: next to nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, cast

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from dhlens.graphs import Graph
from dhlens.heads import HeadSet
from dhlens.nodes import Wiring, parse_edge
from dhlens.stats import grouped_mean, paired_mean
from dhlens.tables import spread

PAIRS = ("next step", "same answer", "other answer")
_MOST = 0.8
"""Of an answer, to say how large a circuit must be."""

Step = tuple[str, int]
"""Episode id and step."""


def spread_steps(steps: Sequence[int], n: int) -> list[int]:
    """At most `n` of the steps, in neighbouring pairs spread over all of them.

    So both what the next step changes and what a distant one does can be seen.
    """
    if len(steps) <= n:
        return list(steps)
    firsts = np.linspace(0, len(steps) - 2, n // 2).round().astype(int).tolist() if n > 1 else []
    chosen = {i + k for i in firsts for k in (0, 1)}
    left = [i for i in range(len(steps)) if i not in chosen]
    chosen |= set(left[len(left) // 2 :][: n - len(chosen)])
    return [steps[i] for i in sorted(chosen)]


def graphs(edges: pd.DataFrame, wiring: Wiring) -> dict[Step, Graph]:
    """The graph of each step, by episode and step; `edges` has sender, receiver, at, score and control."""
    found = {}
    for (episode, step), part in edges.loc[~edges["control"]].groupby(["episode", "step"], sort=False):
        scores = dict(zip(map(parse_edge, _names(part)), part["score"], strict=True))
        found[str(episode), int(step)] = Graph.of(scores, wiring, step=int(step))
    return found


def agreement(edges: pd.DataFrame) -> pd.DataFrame:
    """How estimates and exact changes of the strongest edges of each step agree; one row per step.

    n (edges judged), spearman (with sign) and spearman_size (without), same_sign (share), above: share of the edges
    whose exact change is larger than that of 95 % of the step's control edges, which were drawn at random.
    """
    rows = []
    judged: Any = edges.dropna(subset="exact").groupby(["episode", "group", "step"], sort=False)
    for (episode, group, step), part in judged:
        top, control = part.loc[~part["control"]], part.loc[part["control"], "exact"].abs()
        if top.empty:
            continue
        score, exact = top["score"].to_numpy(), top["exact"].to_numpy()
        bar = float(control.quantile(0.95)) if len(control) else np.nan
        row = {"episode": episode, "group": group, "step": step, "n": len(top)}
        row |= {"spearman": _spearman(score, exact), "spearman_size": _spearman(np.abs(score), np.abs(exact))}
        row |= {"same_sign": float((np.sign(score) == np.sign(exact)).mean())}
        rows.append({**row, "bar": bar, "above": float((np.abs(exact) > bar).mean()) if len(control) else np.nan})
    return pd.DataFrame(rows)


def jaccards(graphs: Mapping[Step, Graph], dynamic: Mapping[Step, HeadSet], groups: Mapping[str, str]) -> pd.DataFrame:
    """Every two steps beside each other: pair (`PAIRS`), lag, and the Jaccard of edges, heads and dynamic heads.

    Args:
        graphs: the graph of each step.
        dynamic: the heads that attention says are active there.
        groups: episode to its independent unit.
    """
    rows = []
    for (x, a), (y, b) in combinations(graphs.items(), 2):
        same, lag = x[0] == y[0], abs(y[1] - x[1])
        pair = PAIRS[2] if not same else PAIRS[0] if lag == 1 else PAIRS[1]
        row = {"episode": x[0], "group": groups[x[0]], "step": x[1], "other": y[0], "other_step": y[1]}
        row["other_group"] = groups[y[0]]
        if not same and row["group"] == row["other_group"]:
            continue
        row |= {"pair": pair, "lag": lag if same else -1, "edges": len(a.edges & b.edges) / len(a.edges | b.edges)}
        rows.append({**row, "heads": a.heads.jaccard(b.heads), "dynamic": dynamic[x].jaccard(dynamic[y])})
    columns = "episode group step other other_step other_group pair lag edges heads dynamic"
    return pd.DataFrame(rows, columns=columns.split())


def overlaps(alignment: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Mean Jaccard by kind of pair (next step, same answer, other answer) and of what (edges, heads, dynamic)."""
    rows = []
    for pair in PAIRS:
        part = alignment.loc[alignment["pair"] == pair]
        for what in ("edges", "heads", "dynamic"):
            ends = (part[name].to_numpy(dtype=str) for name in ("group", "other_group"))
            value, low, high = paired_mean(part[what].to_numpy(dtype=float), *ends, seed=seed)
            rows.append({"pair": pair, "of": what, "pairs": len(part), "value": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def frequent(edges: pd.DataFrame) -> pd.DataFrame:
    """One row per edge, the most frequent first.

    edge, share (of all graphs that hold it), answers (share of answers of which a step does), core (share of answers of
    which every step does), score (mean where it is).
    """
    held = edges.loc[~edges["control"]]
    steps = held.groupby("episode")["step"].nunique()
    counts = held.groupby([_names(held), "episode"])["score"].agg(["size", "sum"]).reset_index()
    counts["core"] = counts["size"] == counts["episode"].map(steps)
    table = counts.groupby("edge").agg(
        graphs=("size", "sum"), answers=("size", "count"), core=("core", "sum"), score=("sum", "sum")
    )
    table["score"] /= table["graphs"]
    table = table.assign(share=table["graphs"] / steps.sum())
    table[["answers", "core"]] /= len(steps)
    table = table.sort_values(["share", "score"], ascending=[False, True], kind="stable").reset_index()
    return table[["edge", "share", "answers", "core", "score"]]


def curves(faithfulness: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Means over steps by measure (faithful, complete), ranking, rest and size; edges: those leading to the logits."""
    rows, parts = [], list(cast(Any, faithfulness.groupby(["ranking", "rest", "size"], sort=False)))
    for measure in ("faithful", "complete"):
        for (ranking, rest, size), part in parts:
            value, low, high = grouped_mean(part[measure].to_numpy(dtype=float), part["group"].to_numpy(), seed=seed)
            row = {"measure": measure, "ranking": ranking, "rest": rest, "size": size, "edges": part["edges"].mean()}
            rows.append({**row, "value": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def side_by_side(curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Each measure as a table for reading: rest and size down, rankings across."""
    rows = curves.assign(circuit=[f"{r}, {s:,} edges" for r, s in zip(curves["rest"], curves["size"], strict=True)])
    rows = rows.sort_values(["rest", "size"], kind="stable")
    return {
        str(measure): spread(part, "circuit", "ranking").rename_axis(columns=None).reset_index()
        for measure, part in rows.groupby("measure", sort=False)
    }


def in_words(tables: Mapping[str, pd.DataFrame], *, seed: int) -> Iterator[str]:
    """What the tables of a run say of its graphs, in sentences."""
    if "agreement" in tables:
        columns = ("spearman", "spearman_size", "same_sign", "above")
        signed, size, sign, above = (_said(tables["agreement"], name, seed) for name in columns)
        yield (
            f"Estimated and exact scores of the strongest edges: Spearman {signed}, of sizes alone {size}, same sign "
            f"{sign}; {above} of these edges change more than 95 % of random ones do."
        )
    for rest, part in tables["curves"].groupby("rest", sort=False):
        alone = _least(part.loc[part["measure"] == "faithful"], lambda value: value >= _MOST)
        cut = _least(part.loc[part["measure"] == "complete"], lambda value: value <= 1 - _MOST)
        yield (
            f"Edges that do {_MOST:.0%} of the answer alone, the rest replaced ({rest}): {alone}. Edges without which "
            f"{1 - _MOST:.0%} of it or less is left: {cut}."
        )
    if set(tables["curves"]["rest"]) - {"counterfactual"}:
        yield (
            "Edges are ranked by what differs in the counterfactual: under the other rests what both have in common "
            "goes as well, so that only the counterfactual says how small a circuit can be."
        )
    sides, kinds = (_entered(tables["feeders"], by, len(tables["steps"])) for by in ("side", "kind"))
    yield f"What enters the dynamic heads, by the size of edges: into {sides}; from {kinds}."
    shown = tables["overlaps"].set_index(["of", "pair"])
    for of, name in (("edges", "Edges"), ("heads", "Heads in the graph"), ("dynamic", "Dynamic heads")):
        known = shown.loc[of].dropna(subset="value")[["value", "low", "high"]].itertuples(name=None)
        if said := ", ".join(f"{pair} {_interval(*numbers)}" for pair, *numbers in known):
            yield f"{name} shared (Jaccard): {said}."
    core, n = tables["frequent"], len(tables["steps"])
    yield (
        f"{(core['share'] == 1).sum()} of {len(core)} edges are in all {n} graphs, {(core['share'] >= 0.5).sum()} in "
        f"at least half, {(core['share'] * n < 1.5).sum()} in one alone."
    )
    dynamic, matched, heads, logit = (
        _said(tables["direct"], name, seed) for name in ("dynamic", "matched", "heads", "logit")
    )
    yield (
        f"Straight into the logit difference: dynamic heads {dynamic}, as many others of their layers {matched}, all "
        f"heads {heads}; the difference is {logit}."
    )


def _least(curve: pd.DataFrame, enough: Callable[[np.ndarray], np.ndarray]) -> str:
    """The least size at which the mean of each ranking is enough; where none is, what the largest gives."""
    found = []
    for ranking, part in curve.sort_values("size").groupby("ranking", sort=False):
        sizes, values = (part[name].to_numpy() for name in ("size", "value"))
        reached = sizes[enough(values)]
        said = f"more than {sizes[-1]:,} (there {values[-1]:z.2f})"
        if len(reached):
            before = [
                f"{size:,} ({value:z.2f})" for size, value in zip(sizes, values, strict=True) if size < reached[0]
            ]
            said = f"between {before[-1]} and {reached[0]:,}" if before else f"{reached[0]:,} or fewer"
        found.append(f"{said} by {ranking}" if ranking != "random" else f"{said} at random")
    return ", ".join(found)


def _entered(feeders: pd.DataFrame, by: str, n_steps: int) -> str:
    share = pd.DataFrame(feeders.groupby(by)[["share"]].sum()).sort_values("share", ascending=False)
    return ", ".join(f"{name} {total / n_steps:.0%}" for name, total in share.itertuples(name=None))


def _said(table: pd.DataFrame, column: str, seed: int) -> str:
    return _interval(*grouped_mean(table[column].to_numpy(dtype=float), table["group"].to_numpy(), seed=seed))


def _interval(value: float, low: float, high: float) -> str:
    return "unknown" if np.isnan(value) else f"{value:z.2f}" + ("" if np.isnan(low) else f" [{low:z.2f}, {high:z.2f}]")


def _names(edges: pd.DataFrame) -> pd.Series:
    return pd.Series(edges["sender"] + "->" + edges["receiver"] + "@" + edges["at"], name="edge")


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    return np.nan if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0 else float(np.asarray(spearmanr(x, y))[0])
