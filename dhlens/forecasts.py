"""How good are forecasts of heads: micro and per-head measures with intervals over groups, from predictions alone.

- `Forecasts`: what one forecaster said of some steps, and what was so.
- `measures`: the numbers, each with its bootstrap draws, so that two forecasters of the same steps can be compared in
  pairs. For yes and no: precision, recall and F1 of the heads that were called active, all (step, head) cells pooled
  (micro) as in the paper; AUPRC; Brier; ECE. For values: MSE and MAE, and R2 in four readings, since the pooled one
  rewards nothing but knowing each head's mean.
- `by_head`, `reliability`, `precision_recall`: tables behind them.

Cost: a sort of all cells per forecaster. Draws resample sums per group; those of AUPRC take `_BINS` steps of the curve
instead of all, which moves them by less than 0.001.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Float32, Int, Shaped
from sklearn.metrics import average_precision_score, precision_recall_curve

_BINS = 1000
_ECE_BINS = 15
_CURVE = 200
_JOINT = 25

Measured = dict[str, tuple[float, Float[np.ndarray, " draw"]]]
"""Measure to value and bootstrap draws; NaN draws where it has none."""


@dataclass(frozen=True, eq=False)
class Forecasts:
    """What one forecaster said of some steps."""

    name: str
    """"linear", "mlp", "persistence"."""
    lag: int
    """Steps ahead."""
    truth: Float32[np.ndarray, "n heads"]
    """Float32[n heads]: the score as it was, heads flattened layer by layer."""
    predicted: Float32[np.ndarray, "n heads"]
    """Float32[n heads]: probabilities, or values of a continuous score."""
    called: Bool[np.ndarray, "n heads"] | None
    """Bool[n heads]: the heads called active; None for a continuous score."""
    usual: Float32[np.ndarray, "n heads"]
    """Float32[n heads]: each head's mean over the training steps."""
    groups: Shaped[np.ndarray, " n"]
    """Str[n]: the independent unit of each step."""


def resamples(groups: Shaped[np.ndarray, " n"], *, seed: int, n_boot: int) -> Int[np.ndarray, "draw group"]:
    """How often each group (in sorted order) is taken in each bootstrap draw; none with fewer than 2 groups."""
    n = len(np.unique(groups))
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_boot if n > 1 else 0)


def measures(found: Forecasts, taken: Int[np.ndarray, "draw group"]) -> Measured:
    """All measures of a forecaster; `taken` are the draws of `resamples` over its groups."""
    code = np.unique(found.groups, return_inverse=True)[1]
    whole = np.ones((1, taken.shape[1]), dtype=np.int64)
    sums = {name: _group_sums(cells, code) for name, cells in _cells(found).items()}
    ratios = _rates if found.called is not None else _errors
    values, draws = (ratios({n: np.tensordot(w, s, 1) for n, s in sums.items()}) for w in (whole, taken))
    out = {name: (float(values[name][0]), draws[name]) for name in values}
    if found.called is not None:
        histogram = _histogram(found, code)
        out["auprc"] = (_auprc(found.truth, found.predicted), _binned_auprc(np.tensordot(taken, histogram, 1)))
        predicted, observed, cells = reliability(found)[["predicted", "observed", "cells"]].to_numpy().T
        out["ece"] = (float(np.average(np.abs(predicted - observed), weights=cells)), np.full(len(taken), np.nan))
    return out


def by_head(found: Forecasts, unit: Shaped[np.ndarray, " heads"]) -> pd.DataFrame:
    """The measures of each unit of heads (each head, each layer), cells of the unit pooled.

    Columns: unit, then for yes and no: rate, precision, recall, f1, auprc; for values: mean, mse, mae, r2 (over the
    mean of these steps) and skill (over that of the training steps). NaN where a measure has no answer.
    """
    names, code = np.unique(unit, return_inverse=True)
    sums = {name: _group_sums(cells.sum(0)[:, None], code)[:, 0] for name, cells in _cells(found).items()}
    cells = np.bincount(code) * len(found.truth)
    if found.called is None:
        variance = sums["square"] - sums["value"] ** 2 / cells
        columns = {"mean": sums["value"] / cells, "mse": sums["error"] / cells, "mae": sums["absolute"] / cells}
        columns |= {"r2": 1 - _ratio(sums["error"], variance), "skill": 1 - _ratio(sums["error"], sums["usual"])}
        return pd.DataFrame({"unit": names} | columns)
    columns = {"rate": (sums["tp"] + sums["fn"]) / cells}
    columns |= _f1(sums["tp"], sums["fp"], sums["fn"])
    columns["auprc"] = np.array([_auprc(found.truth[:, unit == n], found.predicted[:, unit == n]) for n in names])
    return pd.DataFrame({"unit": names} | columns)


def reliability(found: Forecasts) -> pd.DataFrame:
    """Predicted and observed rates of cells by predicted probability, in 15 bins of equal width; empty ones left out.

    Columns: low, high (edges), predicted, observed, cells.

    Source: Guo et al. 2017 (arXiv 1706.04599), whose ECE is the mean gap weighted by cells.
    """
    edges = np.linspace(0, 1, _ECE_BINS + 1)
    code = np.clip(np.searchsorted(edges, found.predicted.ravel(), side="right") - 1, 0, _ECE_BINS - 1)
    cells = np.bincount(code, minlength=_ECE_BINS)
    sums = (np.bincount(code, weights=x.ravel(), minlength=_ECE_BINS) for x in (found.predicted, found.truth))
    predicted, observed = (_ratio(s, cells) for s in sums)
    table = {"low": edges[:-1], "high": edges[1:], "predicted": predicted, "observed": observed, "cells": cells}
    return pd.DataFrame({name: column[cells > 0] for name, column in table.items()})


def precision_recall(found: Forecasts) -> pd.DataFrame:
    """The precision-recall curve over all cells, at most 200 points of it: threshold, precision, recall.

    No points where no head was active.
    """
    if not found.truth.any():
        return pd.DataFrame({"threshold": [], "precision": [], "recall": []})
    precision, recall, threshold = precision_recall_curve(found.truth.ravel(), found.predicted.ravel())
    kept = np.unique(np.searchsorted(-recall[:-1], -np.linspace(1, 0, _CURVE)).clip(max=len(threshold) - 1))
    return pd.DataFrame({"threshold": threshold[kept], "precision": precision[kept], "recall": recall[kept]})


def joint(found: Forecasts) -> pd.DataFrame:
    """How often each value was forecast beside each that came: predicted, actual (middles of bins), cells.

    Both in 25 bins of equal width from the least to the largest of them; bins without cells are left out.
    """
    both = np.stack([found.predicted.ravel(), found.truth.ravel()])
    edges = np.linspace(both.min(), max(both.max(), both.min() + 1e-6), _JOINT + 1)
    cells, *_ = np.histogram2d(*both, bins=(edges, edges))
    middles = (edges[1:] + edges[:-1]) / 2
    predicted, actual = cells.nonzero()
    return pd.DataFrame(
        {"predicted": middles[predicted], "actual": middles[actual], "cells": cells[predicted, actual].astype(int)}
    )


def _cells(found: Forecasts) -> dict[str, np.ndarray]:
    """What is to be summed, [n heads] each."""
    error = found.predicted - found.truth
    if found.called is None:
        usual = found.truth - found.usual
        return {"error": error**2, "absolute": np.abs(error), "value": found.truth, "square": found.truth**2,
                "usual": usual**2, "cells": np.ones_like(error)}  # fmt: skip
    active = found.truth > 0
    return {"tp": found.called & active, "fp": found.called & ~active, "fn": ~found.called & active,
            "error": error**2, "cells": np.ones_like(error)}  # fmt: skip


def _group_sums(cells: np.ndarray, code: Int[np.ndarray, " n"]) -> Float[np.ndarray, "group heads"]:
    return (np.arange(int(code.max()) + 1)[:, None] == code).astype(np.float64) @ cells


def _f1(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> dict[str, np.ndarray]:
    return {"precision": _ratio(tp, tp + fp), "recall": _ratio(tp, tp + fn), "f1": _ratio(2 * tp, 2 * tp + fp + fn)}


def _rates(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    total = {name: s.sum(1) for name, s in sums.items()}
    return _f1(total["tp"], total["fp"], total["fn"]) | {"brier": _ratio(total["error"], total["cells"])}


def _errors(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    total = {name: s.sum(1) for name, s in sums.items()}
    variance = sums["square"] - _ratio(sums["value"] ** 2, sums["cells"])
    some = variance > 1e-12 * sums["square"]
    return {
        "mse": _ratio(total["error"], total["cells"]),
        "mae": _ratio(total["absolute"], total["cells"]),
        "r2_pooled": 1 - _ratio(total["error"], total["square"] - _ratio(total["value"] ** 2, total["cells"])),
        "r2_weighted": 1 - _ratio(total["error"], variance.sum(1)),
        "r2_heads": _ratio(np.where(some, 1 - _ratio(sums["error"], variance), 0.0).sum(1), some.sum(1)),
        "skill": 1 - _ratio(total["error"], total["usual"]),
    }


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), np.nan)


def _auprc(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(average_precision_score(truth.ravel(), predicted.ravel())) if truth.any() else np.nan


def _histogram(found: Forecasts, code: np.ndarray) -> Float[np.ndarray, "group bin sign"]:
    """Negative and positive cells of each group by predicted value, in bins that part the positives evenly."""
    active = found.truth > 0
    wanted = found.predicted[active] if active.any() else found.predicted
    edges = np.unique(np.quantile(wanted, np.linspace(0, 1, _BINS), method="nearest"))
    bins = np.searchsorted(edges, found.predicted, side="right")
    shape = (int(code.max()) + 1, len(edges) + 1, 2)
    cell = np.ravel_multi_index((np.broadcast_to(code[:, None], bins.shape), bins, active.astype(int)), shape)
    return np.bincount(cell.ravel(), minlength=int(np.prod(shape))).reshape(shape).astype(float)


def _binned_auprc(histograms: Float[np.ndarray, "draw bin sign"]) -> Float[np.ndarray, " draw"]:
    falling = histograms[:, ::-1]
    above = falling.cumsum(1)
    precision = np.nan_to_num(_ratio(above[..., 1], above.sum(2)))
    return _ratio((precision * falling[..., 1]).sum(1), falling[..., 1].sum(1))
