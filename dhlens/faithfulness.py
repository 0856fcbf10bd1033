"""Is it a circuit: what the first edges of a ranking do alone, and what is left without them, at many sizes.

    found = attribute(step, points=5)
    rankings = {
        "attribution": found.top(len(found.edges())),
        "attention": attention_only(found),
        "random": random_edges(step, seed=0),
    }
    result = faithfulness(step, rankings, sizes=[50, 200, 1000, 5000])
    result.table, result.areas

For each size the first edges of a ranking are taken, and of these the ones that lead on to the logits: that is the
circuit (`Graph.prune`). It is run alone, with all other edges cut, and is cut itself, with all other edges live
(`dhlens.circuits`); the same for every rest that may stand in for what is cut. With no edge the metric is `none`, and

- faithful = (circuit alone - none) / (clean - none): 1 if the circuit does what the model does, 0 if nothing, and
  beyond 1 where the rest holds the model back;
- complete = (circuit cut - none) / (clean - none): 0 if nothing is left without it.

Areas put a curve into a number. CPR is the area under faithful, CMD the area between faithful and 1, against the share
of all possible edges that a ranking was asked for. Baselines: `random_edges`, also with the receivers of a ranking but
any senders, and `attention_only`. Cost: two lanes of `dhlens.circuits` per ranking, rest and size; what is the same
circuit runs once.

Source: MIB, arXiv 2504.13151, section 4 (faithfulness, CPR, CMD; trapezoids on a linear axis, its ten shares); we
depart in that areas start at the point (0, 0), are divided by the largest share tried, and also come on a logarithmic
axis, since on a linear one the largest circuits are nearly all of the area. Completeness: arXiv 2211.00593.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dhlens.attribution import Attribution
from dhlens.circuits import RESTS, ROWS, Bench, Rest, check_rests
from dhlens.edgesets import edges_of, entries_of, leading, mask_of, places_of
from dhlens.nodes import Edge
from dhlens.opened import OpenStep

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The sizes of MIB, as shares of all possible edges."""
_NOTHING = 1e-4
"""A difference of metrics that rounding alone can make."""


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """What circuits of one step do, alone and missing."""

    step: int
    n_possible: int
    """All edges that the model can have at the rows of the block."""
    metric_clean: float
    metric_none: Mapping[str, float]
    """Rest to the metric with no edge at all."""
    undefined: Mapping[str, str]
    """Rest to the reason why nothing can be called faithful under it: it leaves nothing to explain."""
    table: pd.DataFrame
    """One row per ranking, rest and size: step, ranking, rest, size (edges asked for), edges (of these, the ones that
    lead on to the logits), share (size over `n_possible`), metric_kept, faithful, metric_removed, complete."""

    @property
    def areas(self) -> pd.DataFrame:
        """One row per ranking and rest: step, ranking, rest, reach, cpr, cpr_log, cmd and cmd_log.

        Areas run from share 0 to `reach`, the largest share that any ranking was tried at, and are divided by it; a
        shorter ranking keeps its last value. Those on the logarithm of the share run from the smallest size tried, NaN
        where only one was.
        """
        curves = self.table.groupby(["step", "ranking", "rest"], sort=False)
        low, reach = (float(t["share"].to_numpy().max()) for t in (self.table.drop_duplicates("ranking"), self.table))

        def areas(curve: pd.DataFrame) -> pd.Series:
            x, y = curve["share"].to_numpy(), curve["faithful"].to_numpy()
            found = {"reach": reach}
            for name, height in (("cpr", lambda f: f), ("cmd", lambda f: abs(1 - f))):
                found[name] = _mean_height(np.append(0, x), height(np.append(0, y)), (0.0, reach))
                found[f"{name}_log"] = _mean_height(np.log(x), height(y), (math.log(low), math.log(reach)))
            return pd.Series(found)

        return curves[["share", "faithful"]].apply(areas).reset_index()


def faithfulness(
    opened: OpenStep,
    rankings: Mapping[str, Iterable[Edge]],
    *,
    sizes: Sequence[int] | None = None,
    rests: Sequence[Rest] = RESTS,
    means: Float[Tensor, "sender row d_model"] | None = None,
    rows: int = ROWS,
    progress: bool = False,
) -> Faithfulness:
    """Run the circuits that the first edges of each ranking make, and cut them.

    Args:
        opened: a step of `open_steps`. All receivers of the model count, whichever were asked about.
        rankings: edges by name, the best first.
        sizes: how many of them make a circuit; more than a ranking has is all it has. Default `SHARES` of all possible
            edges.
        rests: what stands in for cut edges.
        means: for the rest "mean"; default `circuits.means` of this step alone.
        rows: rows per pass, over all lanes: bounds the memory.
        progress: show a bar.

    Raises:
        ValueError: before any pass: no ranking, one that is empty or names an edge twice or one that the model cannot
            have, the needle's rows named both as a whole and one by one, sizes or `rows` below 1, no rest or one that
            is unknown or named twice, means of a wrong shape or for no rest.
    """
    ranked = {name: tuple(edges) for name, edges in rankings.items()}
    _check(opened, ranked, sizes, rests, means)
    places = places_of(opened, (edge for edges in ranked.values() for edge in edges))
    entries = {name: entries_of(opened, places, edges) for name, edges in ranked.items()}
    possible = opened.possible(places)
    if sizes is None:
        sizes = [max(1, round(share * int(possible.sum()))) for share in SHARES]
    plan, found = _Plan(len(rests)), []
    none = plan.lanes(torch.zeros_like(possible))
    for name, size, kept in _circuits(opened, places, entries, sizes):
        ways = zip(rests, plan.lanes(kept), plan.lanes(possible & ~kept), strict=True)
        found += [(name, rest, size, int(kept.sum()), *lanes) for rest, *lanes in ways]
    standing: list[Rest | Tensor] = [means if rest == "mean" and means is not None else rest for rest in rests]
    bench = Bench.of(opened, places, standing, rows=rows)
    metric = torch.cat([opened.metric(part).cpu().double() for part in bench.run(plan.circuits, progress=progress)])
    table = pd.DataFrame(found, columns=["ranking", "rest", "size", "edges", "kept", "removed"])
    without: dict[str, float] = dict(zip(rests, metric[none].tolist(), strict=True))
    return _result(opened, int(possible.sum()), without, table, metric.numpy())


def random_edges(
    opened: OpenStep, *, seed: int, like: Iterable[Edge] | None = None, by_row: bool = False
) -> tuple[Edge, ...]:
    """A ranking by chance.

    Args:
        opened: a step of `open_steps`.
        seed: of the draw.
        like: a ranking whose receivers and places are kept, one for one, while the senders are drawn from all that come
            before the receiver, none twice. Default all possible edges in any order.
        by_row: name the needle's rows one by one; without `like`.

    Raises:
        ValueError: `like` names an edge twice, or one that the model or the block cannot have.
    """
    generator = torch.Generator().manual_seed(seed)
    if like is None:
        places = opened.places(by_row=by_row)
        every = opened.possible(places).nonzero()
        return edges_of(opened, places, every[torch.randperm(len(every), generator=generator)])
    edges = tuple(like)
    _check_once("like", edges)
    places = places_of(opened, edges)
    entries = entries_of(opened, places, edges)
    drawn: dict[tuple[int, int], Iterator[int]] = {}
    for entry in entries:
        place, _, receiver = entry.tolist()
        if (place, receiver) not in drawn:
            n_before = int(opened.wiring.n_before[receiver])
            drawn[place, receiver] = iter(torch.randperm(n_before, generator=generator).tolist())
        entry[1] = next(drawn[place, receiver])
    return edges_of(opened, places, entries)


def attention_only(attribution: Attribution) -> tuple[Edge, ...]:
    """The edges of an attribution between embedding, heads and logits, the largest score first: none of an MLP."""
    ordered = attribution.top(int(attribution.known.sum()))
    return tuple(edge for edge in ordered if "mlp" not in (edge.sender.kind, edge.receiver.kind))


def helpful_first(attribution: Attribution) -> tuple[Edge, ...]:
    """All edges of an attribution, those first that help the clean answer most, and last those that harm it most."""
    scores = attribution.top(int(attribution.known.sum()))
    return tuple(sorted(scores, key=scores.__getitem__))


class _Plan:
    """Circuits to run, each once per rest however often it is asked for."""

    def __init__(self, n_rests: int) -> None:
        self.circuits: list[tuple[int, Tensor]] = []
        self._n_rests, self._known = n_rests, dict[bytes, list[int]]()

    def lanes(self, mask: Bool[Tensor, "place sender receiver"]) -> list[int]:
        """Where the results of these edges will be, for each rest."""
        key = hashlib.sha256(mask.numpy().tobytes()).digest()
        if key not in self._known:
            n = len(self.circuits)
            self._known[key] = [*range(n, n + self._n_rests)]
            self.circuits += [(rest, mask) for rest in range(self._n_rests)]
        return self._known[key]


def _circuits(
    opened: OpenStep, places: Sequence[str], entries: Mapping[str, Int[Tensor, "edge 3"]], sizes: Sequence[int]
) -> Iterator[tuple[str, int, Bool[Tensor, "place sender receiver"]]]:
    """Ranking, size, and the edges that lead on."""
    for name, edges in entries.items():
        for size in sorted({min(size, len(edges)) for size in sizes}):
            yield name, size, leading(opened.wiring, mask_of(opened, places, edges[:size]))


def _result(
    opened: OpenStep, n_possible: int, none: dict[str, float], table: pd.DataFrame, metric: np.ndarray
) -> Faithfulness:
    """With the numbers of lanes replaced by what they gave."""
    clean = opened.metric_clean
    lost = {
        rest: f"the metric is {clean:.4g} clean and {value:.4g} without any edge: there is no effect to account for"
        for rest, value in none.items()
        if not abs(clean - value) > _NOTHING * max(1, abs(clean))
    }
    without = np.array([none[rest] for rest in table["rest"]])
    effect = np.where(table["rest"].isin(list(lost)), np.nan, clean - without)
    for lane, name in (("kept", "faithful"), ("removed", "complete")):
        table[f"metric_{lane}"] = metric[table.pop(lane)]
        table[name] = (table[f"metric_{lane}"] - without) / effect
    table.insert(0, "step", opened.step)
    table.insert(5, "share", table["size"] / n_possible)
    return Faithfulness(opened.step, n_possible, clean, none, lost, table)


def _mean_height(x: np.ndarray, y: np.ndarray, ends: tuple[float, float]) -> float:
    """Area under straight lines between the points, over the way between the ends; behind the last one it is level."""
    low, high = ends
    grid = np.array([low, *x[(x > low) & (x < high)], high])
    return float(np.trapezoid(np.interp(grid, x, y), grid) / (high - low)) if high > low else float("nan")


def _check(
    opened: OpenStep,
    rankings: Mapping[str, tuple[Edge, ...]],
    sizes: Sequence[int] | None,
    rests: Sequence[Rest],
    means: Tensor | None,
) -> None:
    if not rankings:
        raise ValueError("there must be at least one ranking, got none")
    for name, edges in rankings.items():
        if not edges:
            raise ValueError(f"a ranking must name at least one edge, got none in {name!r}")
        _check_once(name, edges)
    if sizes is not None and (not sizes or min(sizes) < 1):
        raise ValueError(f"sizes are numbers of edges of at least 1, got {list(sizes)}")
    if not rests or len(set(rests)) < len(rests):
        raise ValueError(f"rests must be named, each once, got {list(rests)}")
    check_rests(opened, [*rests, *([] if means is None else [means])])
    if means is not None and "mean" not in rests:
        raise ValueError(f"means are for the rest 'mean', which is not among {list(rests)}")


def _check_once(name: str, edges: Sequence[Edge]) -> None:
    twice = [edge for edge, n in Counter(edges).items() if n > 1]
    if twice:
        raise ValueError(f"a ranking must name an edge once, got {twice[0]} more often in {name!r}")
