"""Nulls of the dynamics: what each measure would be if time, company or the copied token did not matter.

- `shuffled_time`: an episode's steps in random order. Keeps who is active in the episode, forgets when. The judge of
  adjacent-step overlap: only what exceeds it is persistence in time.
- `independent_heads`: each head active by chance at its overall rate. Keeps how often, forgets with whom and when.
- `chance_match`: the labels in random order. Keeps where heads look, forgets which token came next.
- `accumulation`: not a null: how measures that grow with data grow, from draws of episodes without replacement.

All work on a `dhlens.raster.Raster`. Cost: seconds at 500 episodes x 40 steps x 1,024 heads; `independent_heads` most.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32, Num

from dhlens.raster import Raster, ever_active, share_entropy
from dhlens.scores import Score, peak_inside


def shuffled_time(
    raster: Raster, jaccard: Float32[np.ndarray, "n place"], lags: Sequence[int], *, seed: int, n_draws: int = 200
) -> Float[np.ndarray, "draw lag"]:
    """Mean Jaccard at each lag with the steps of every sequence in random order; empty pairs are skipped."""
    rng = np.random.default_rng(seed)
    place = raster.place()
    pairs = [raster.pairs(lag) for lag in lags]
    out = np.full((n_draws, len(pairs)), np.nan)
    for draw in out:
        order = np.lexsort((rng.random(len(place)), raster.sequence))
        for i, (first, lag) in enumerate(zip(pairs, lags, strict=True)):
            draw[i] = mean(jaccard[order[first], place[order[first + lag]]])
    return out


def independent_heads(raster: Raster, *, seed: int, n_draws: int = 25) -> Float[np.ndarray, " draw"]:
    """Mean adjacent Jaccard with every head drawn at every step by its overall rate; empty pairs are skipped."""
    rng = np.random.default_rng(seed)
    rate = raster.active.mean(0, dtype=np.float32)
    rate = rate[rate > 0]
    first = raster.pairs(1)
    out = np.full(n_draws, np.nan)
    for i in range(n_draws):
        drawn = (rng.random((len(raster.rows), len(rate)), dtype=np.float32) < rate).astype(np.float32)
        size = drawn.sum(1)
        both = np.einsum("nh,nh->n", drawn[first], drawn[first + 1])
        union = size[first] + size[first + 1] - both
        out[i] = mean(both[union > 0] / union[union > 0])
    return out


def chance_match(score: Score, raster: Raster) -> Float[np.ndarray, " n"] | None:
    """Expected number of active heads at each row if the labels of its episode stood in random order.

    Exact: a head that looks at a needle token matches with the token's share among the episode's labels. None for a
    score that is not a hard copy-paste score.
    """
    if score.trace is None or score.span is None or score.labels is None or not score.binary:
        return None
    labels = score.labels.numpy()[raster.rows]
    inside = peak_inside(score.trace, score.span)[raster.rows].flatten(1)
    row, head = (index.numpy() for index in inside.nonzero(as_tuple=True))
    token = score.trace.peak_token[..., 0][raster.rows].flatten(1).numpy()[row, head]
    width = int(max(labels.max(initial=0), token.max(initial=0))) + 1
    known, count = np.unique(raster.sequence * width + labels, return_counts=True)
    wanted = raster.sequence[row] * width + token
    at = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    steps = np.bincount(raster.sequence)[raster.sequence[row]]
    share = np.where(known[at] == wanted, count[at], 0) / steps
    return np.bincount(row, weights=share, minlength=len(labels)).astype(float)


def accumulation(raster: Raster, *, seed: int, n_draws: int = 50, n_points: int = 25) -> pd.DataFrame:
    """Heads activated and entropy (nats) against the number of episodes drawn without replacement: mean, 95 % range.

    The range is that of the draws, not of the estimate: with all episodes there is one draw only, and it closes.
    """
    rng = np.random.default_rng(seed)
    counts = raster.counts(raster.episode)
    sizes = np.unique(np.linspace(1, len(counts), n_points).round().astype(int))
    sums = np.stack([counts[rng.permutation(len(counts))].cumsum(0)[sizes - 1] for _ in range(n_draws)])
    table = {"episodes": sizes}
    for name, values in (("activated", ever_active(sums)), ("entropy", share_entropy(sums))):
        table |= {name + end: column for end, column in zip(("", "_low", "_high"), summary(values), strict=True)}
    return pd.DataFrame(table)


def summary(draws: Num[np.ndarray, "draw column"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, 2.5 % and 97.5 % quantile of each column over draws, NaNs left out."""
    frame = pd.DataFrame(draws)
    return frame.mean().to_numpy(), frame.quantile(0.025).to_numpy(), frame.quantile(0.975).to_numpy()


def mean(values: np.ndarray) -> float:
    """Mean without the NaNs; NaN where nothing is left."""
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if len(valid) else float("nan")
