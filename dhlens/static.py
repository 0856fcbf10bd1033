"""Static against dynamic: a fixed ranking of heads, and what each step's active heads share with its top k.

The ranking is fitted on some groups and measured on the others, so no step is compared with a ranking it helped to
make. Jaccard alone misleads: with |D| active heads it is at most min(|D|, k) / max(|D|, k), so it must fall once k
outgrows |D|, even where every active head is in the static set. Coverage and the share of that ceiling tell them apart.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dhlens.episode import split_groups
from dhlens.raster import Raster
from dhlens.scores import Score


def rank_heads(
    score: Score, raster: Raster, static_from: float | Float[Tensor, "layer head"], *, seed: int
) -> tuple[Int[np.ndarray, " heads"], Bool[np.ndarray, " n"]]:
    """Heads (flattened) from best to worst, as `HeadSet.top_k` ranks them, and the rows to measure them on.

    Raises:
        ValueError: a share outside 0..1 or without 2 groups to part; a ranking of another shape or with NaN.
    """
    if isinstance(static_from, Tensor):
        if tuple(static_from.shape) != score.shape or static_from.isnan().any():
            got = "NaN" if tuple(static_from.shape) == score.shape else f"shape {tuple(static_from.shape)}"
            raise ValueError(f"static_from must hold one number per head, shape {score.shape}, got {got}")
        means, held = static_from, np.ones(len(raster.rows), dtype=bool)
    else:
        fit = _fit_rows(raster.group, static_from, seed)
        means, held = score.values[torch.from_numpy(raster.rows[fit])].mean(0, dtype=torch.float64), ~fit
    return torch.sort(means.flatten(), descending=True, stable=True).indices.numpy(), held


def _fit_rows(group: np.ndarray, fraction: float, seed: int) -> Bool[np.ndarray, " n"]:
    try:
        first = split_groups(group, fraction, seed=seed)
    except ValueError as error:
        raise ValueError(
            f"static_from={fraction} is a share of the groups to fit on: {error}; "
            "add haystack windows, or pass a ranking (a score per head)"
        ) from None
    return np.isin(group, sorted(first))


def static_steps(
    raster: Raster, ranking: Int[np.ndarray, " heads"], held: Bool[np.ndarray, " n"], ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """Per row and k: jaccard_static, jaccard_max (what the sizes allow), jaccard_over_max, coverage, overlap.

    NaN off `held`, and where k exceeds the model's heads. A row without active heads has 0 in the first two, else NaN.
    """
    size = raster.size
    columns = {}
    for k in ks:
        measures = _measures(raster.active[:, ranking[:k]].sum(1), size, k)
        measured = held & (k <= len(ranking))
        columns |= {f"{name}_{k}": np.where(measured, value, np.nan) for name, value in measures.items()}
    return columns


def static_curve(
    raster: Raster, ranking: Int[np.ndarray, " heads"], held: Bool[np.ndarray, " n"], k_max: int
) -> pd.DataFrame:
    """Means of the measures of `static_steps` over the `held` rows, against k = 1..`k_max`."""
    k = np.arange(1, min(k_max, len(ranking)) + 1)
    hits = raster.active[held][:, ranking[: len(k)]].cumsum(1)
    measures = _measures(hits, raster.size[held][:, None], k)
    return pd.DataFrame({"k": k} | {name: pd.DataFrame(values).mean() for name, values in measures.items()})


def _measures(hits: np.ndarray, size: np.ndarray, k: int | np.ndarray) -> dict[str, np.ndarray]:
    some = np.where(size > 0, size, np.nan)
    smaller, larger = np.minimum(some, k), np.maximum(some, k)
    jaccard = hits / (size + k - hits)
    return {
        "jaccard_static": jaccard,
        "jaccard_max": np.nan_to_num(smaller / larger),
        "jaccard_over_max": jaccard * larger / smaller,
        "coverage": hits / some,
        "overlap": hits / smaller,
    }
