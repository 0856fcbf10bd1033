"""What a cluster of heads binds to: the tokens, the places and the layers at which it works.

    rows = row_classes(score, model.tokenizer)       # class of the copied and the fed token, place, depth, length
    table = bindings(crowds, rows)                   # where each cluster works more than elsewhere
    layer_spread(crowds)                             # do its heads stand in neighbouring layers?
    coactivation(score, given=[rows["next"]])        # who works together beyond what the class explains?

A cluster's activity at a step is the share of its heads that are active. Enrichment is its mean over the steps of a
class over its mean at all steps. Each aspect has the null that leaves it free and keeps the rest:

- `next`, `fed` (class of the copied token, and of the one before it): whole answers change places within steps, so that
  the clock explains nothing.
- `place` (in the needle), which is the clock: each answer moves on by a random number of steps, its end joined to its
  beginning.
- `depth`, `length`: whole answers change places within their group, all steps at once.

Cost: seconds. The pairs and clusters themselves: `dhlens.coactivation`, `dhlens.crowds`.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dhlens.coactivation import Crowd, family_wise
from dhlens.crowds import Clusters
from dhlens.episode import Episode, Tokenizer
from dhlens.scores import Score
from dhlens.tables import depth

Move = Callable[[Crowd, np.random.Generator], Int[np.ndarray, " n"]]
_RAREST = 20
_TOKENS = {"next": "next_token", "fed": "fed"}
_COLUMNS = ("cluster", "aspect", "class", "steps", "rate", "enrichment", "low", "high", "null", "z", "p")


def token_class(text: str) -> str:
    """The class of a token: "digit", "punctuation", "space", "word start", "letter" or "other".

    Letters start a word behind a space or with a capital; "other" mixes classes.
    """
    bare = text.strip()
    if not bare:
        return "space"
    if bare.isdigit():
        return "digit"
    if bare.isalpha():
        return "word start" if text[0].isspace() or bare[0].isupper() else "letter"
    return "other" if any(c.isalnum() for c in bare) else "punctuation"


def row_classes(score: Score, tokenizer: Tokenizer) -> pd.DataFrame:
    """A row per row of the score: next, fed, place, depth and length, as words; "" where it is not known.

    `place` is where in the needle the token stands that is emitted: "before" the answer, its "first" token, the "1st",
    "2nd" and "3rd third" of the others, or "after" it.

    Raises:
        ValueError: a score without steps.
    """
    trace = score.trace
    if trace is None:
        raise ValueError(f"score {score.name!r} was made without steps: there are no tokens to bind to")
    tokens = {name: getattr(trace, column).numpy() for name, column in _TOKENS.items()}
    known = {int(t): token_class(tokenizer.decode([int(t)])) for t in np.unique(np.concatenate([*tokens.values()]))}
    table = pd.DataFrame({name: [known[int(t)] for t in column] for name, column in tokens.items()})
    said = [_places(e, o.tokens.tolist()) for e, o in zip(trace.episodes, trace.outcomes, strict=True)]
    meta = [(_word(depth(e)), _word(e.meta.get("length"))) for e in trace.episodes]
    episode, step = trace.episode.tolist(), trace.step.tolist()
    table["place"] = [said[i][s] if s >= 0 else "" for i, s in zip(episode, step, strict=True)]
    return table.assign(depth=[meta[i][0] for i in episode], length=[meta[i][1] for i in episode])


def bindings(
    found: Clusters,
    rows: pd.DataFrame,
    *,
    draws: int = 1000,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Where each cluster works more, or less, than elsewhere.

    Args:
        found: the clusters.
        rows: a row per row of the score and a column per aspect (`row_classes`); columns of your own are shuffled as
            `next` is.
        draws: of each aspect's null.
        n_boot: bootstrap resamples of groups.
        seed: of both.

    Returns:
        One row per cluster, aspect and class of at least 20 steps: steps, rate (mean activity there), enrichment with
        low and high (95 % over groups), null (mean enrichment in the null), z, and p (two-sided, family-wise over the
        classes of the aspect and all clusters).

    Raises:
        ValueError: `rows` has not a row per row of the score.
    """
    crowd = found.crowd
    if len(rows) != len(crowd.score.values):
        raise ValueError(f"rows must hold one row per row of the score ({len(crowd.score.values)}), got {len(rows)}")
    if not found.n_clusters:
        return pd.DataFrame(columns=list(_COLUMNS))
    parts = [crowd.active[:, found.labels == k].mean(1) for k in range(found.n_clusters)]
    activity = np.stack(parts, axis=1)
    tables = []
    for aspect, labels in rows.iloc[crowd.rows].items():
        counts = labels.value_counts()
        classes = [c for c in sorted(counts.index) if c != "" and counts[c] >= _RAREST]
        if len(classes) < 2:
            continue
        inside = (labels.to_numpy()[:, None] == np.array(classes, dtype=object)).astype(float)
        table = _enriched(crowd, activity, inside, MOVES.get(str(aspect), within_steps), (draws, n_boot, seed))
        names = pd.MultiIndex.from_product([range(found.n_clusters), [aspect], classes]).to_frame(index=False)
        names.columns = ["cluster", "aspect", "class"]
        tables.append(pd.concat([names, table], axis=1))
    joined = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(_COLUMNS))
    return joined.sort_values(["cluster"], kind="stable", ignore_index=True)


def layer_spread(found: Clusters, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean distance in layers of a cluster's pairs, beside that of as many kept heads drawn at random.

    One row per cluster: spread, null with its 95 % range, p (share of draws at most as wide), layers.
    """
    rng = np.random.default_rng(seed)
    layer = np.array([head[0] for head in found.crowd.heads])
    rows = []
    for k in range(found.n_clusters):
        own = layer[found.labels == k]
        null = np.array([_spread(rng.choice(layer, len(own), replace=False)) for _ in range(draws)])
        low, high = np.quantile(null, (0.025, 0.975))
        p = (1 + (null <= _spread(own) + 1e-12).sum()) / (1 + draws)
        rows.append((k, _spread(own), null.mean(), low, high, p, " ".join(map(str, sorted(own.tolist())))))
    return pd.DataFrame(rows, columns=["cluster", "spread", "null", "null_low", "null_high", "p", "layers"])


def within_steps(crowd: Crowd, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """For each row, the row whose activity it gets: answers change places, within steps."""
    return crowd.sources(rng, 1)[:, 0]


def along_answers(crowd: Crowd, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Each answer moves on by a random number of steps, its end joined to its beginning."""
    out = np.arange(len(crowd.rows))
    for rows in _by_episode(crowd):
        out[rows] = np.roll(rows, rng.integers(len(rows)))
    return out


def within_groups(crowd: Crowd, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Whole answers change places within their group; a longer one is cut, a shorter one begins again."""
    answers = _by_episode(crowd)
    group = np.array([crowd.group[rows[0]] for rows in answers])
    out = np.arange(len(crowd.rows))
    for name in np.unique(group):
        members = np.flatnonzero(group == name)
        for to, source in zip(members, rng.permutation(members), strict=True):
            out[answers[to]] = np.resize(answers[source], len(answers[to]))
    return out


MOVES: Mapping[str, Move] = {"place": along_answers, "depth": within_groups, "length": within_groups}
"""Aspects whose null is not `within_steps`."""


def _enriched(
    crowd: Crowd,
    activity: Float[np.ndarray, "n cluster"],
    inside: Float[np.ndarray, "n class"],
    move: Move,
    draws_boot_seed: tuple[int, int, int],
) -> pd.DataFrame:
    draws, n_boot, seed = draws_boot_seed
    rng = np.random.default_rng(seed)
    real = _ratio(activity.T @ inside, inside.sum(0), activity.sum(0), len(inside))
    moves = (activity[move(crowd, rng)] for _ in range(draws))
    null = np.stack([_ratio(a.T @ inside, inside.sum(0), a.sum(0), len(inside)).ravel() for a in moves])
    z, p = family_wise(real.ravel(), null)
    names, code = np.unique(crowd.group, return_inverse=True)
    ends = np.full((2, real.size), np.nan)
    if len(names) > 1:
        parts = [(activity[code == g], inside[code == g]) for g in range(len(names))]
        weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), n_boot)
        hits = np.tensordot(weights, np.stack([a.T @ i for a, i in parts]), 1)
        sizes = weights @ np.stack([i.sum(0) for _, i in parts])
        sums = weights @ np.stack([a.sum(0) for a, _ in parts])
        again = _ratio(hits, sizes[:, None], sums, (weights @ np.bincount(code))[:, None, None])
        ends = np.nanquantile(again.reshape(n_boot, -1), (0.025, 0.975), axis=0)
    columns = {
        "steps": np.tile(inside.sum(0).astype(int), len(real)),
        "rate": (activity.T @ inside / inside.sum(0)).ravel(),
    }
    columns |= {"enrichment": real.ravel(), "low": ends[0], "high": ends[1], "null": null.mean(0), "z": z, "p": p}
    return pd.DataFrame(columns)


def _ratio(hits: np.ndarray, sizes: np.ndarray, sums: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """Mean activity in a class over that at all steps, [..., cluster, class]; NaN where there is none to compare."""
    with np.errstate(divide="ignore", invalid="ignore"):
        out = (hits / sizes) / (sums[..., None] / n)
    return np.where(np.isfinite(out), out, np.nan)


def _by_episode(crowd: Crowd) -> list[np.ndarray]:
    return np.split(np.arange(len(crowd.rows)), np.flatnonzero(np.diff(crowd.episode)) + 1)


def _spread(layers: np.ndarray) -> float:
    return float(np.abs(layers[:, None] - layers).sum() / (len(layers) * (len(layers) - 1)))


def _word(value: object) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)


def _places(episode: Episode, said: Sequence[int]) -> list[str]:
    """The place of each emitted token; nowhere, where the reply does not hold the answer."""
    if not episode.has("answer"):
        return [""] * len(said)
    span = episode.span("answer")
    answer = episode.tokens[span.start : span.stop].tolist()
    starts = [i for i in range(len(said) - len(answer) + 1) if list(said[i : i + len(answer)]) == answer]
    if not starts:
        return [""] * len(said)
    first, rest = starts[0], len(answer) - 1
    thirds = [f"{('1st', '2nd', '3rd')[3 * i // rest]} third" for i in range(rest)]
    return ["before"] * first + ["first", *thirds] + ["after"] * (len(said) - first - len(answer))
