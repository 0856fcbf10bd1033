"""Agreement: are the heads that attention calls dynamic the heads that the next token depends on?

Attention says where a head looks, a causal map (`dhlens.causal_map`) what its absence does to the very next token. Do
both put the heads of a step in the same order, and how far up does the causal order hold the active heads?

One row per step; a mean with its interval is `dhlens.stats.grouped_mean` over the steps of many episodes. Effects of
single heads do not add up to the effect of a set: for that, ask `dhlens.effects` with the set itself. Cost: a few
sorts of one number per head at each step.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

_COLUMNS = ["step", "spearman", "auroc", "average_precision", "precision_at_active", "n_active", "chance"]


def rank_agreement(
    causal: Float[Tensor, "step layer head"],
    attention: Float[Tensor, "step layer head"],
    active: Bool[Tensor, "step layer head"],
) -> pd.DataFrame:
    """How well the causal order of the heads agrees with attention, step by step.

    Args:
        causal: Effect of each head, larger where more depends on it: KL, or minus the change of the logit.
        attention: Attention of each head on what is copied, as `copy_paste(..., soft=True)` gives it.
        active: The heads called dynamic.

    Returns:
        One row per step: step; spearman, of effect and attention over all heads; of the effect as a ranking that is to
        find the active heads: auroc, average_precision and precision_at_active, the share of active heads among the
        n_active strongest (equal effects in random order: the expectation); n_active; and chance, n_active / heads:
        what a random ranking reaches in precision_at_active, and about what it reaches in average_precision (a little
        more, where few heads are active). In auroc it reaches 0.5. NaN where a measure has no answer: no active head,
        nothing but active heads (auroc), equal values throughout (spearman).

    Raises:
        ValueError: arrays of different shapes, no head, or NaN.
    """
    _check(active, causal=causal, attention=attention)
    effects, looks, found = (x.detach().flatten(1).cpu().numpy() for x in (causal.double(), attention.double(), active))
    rows = [
        {"step": step, "spearman": _spearman(effect, look), **_finds(effect, on)}
        for step, (effect, look, on) in enumerate(zip(effects, looks, found, strict=True))
    ]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _spearman(effect: np.ndarray, look: np.ndarray) -> float:
    constant = np.ptp(effect) == 0 or np.ptp(look) == 0
    return np.nan if constant else float(np.asarray(spearmanr(effect, look))[0])


def _finds(effect: np.ndarray, active: np.ndarray) -> Mapping[str, float]:
    """How well the order of `effect` finds the `active` heads."""
    n, heads = int(active.sum()), len(active)
    some = n > 0
    return {
        "auroc": float(roc_auc_score(active, effect)) if 0 < n < heads else np.nan,
        "average_precision": float(average_precision_score(active, effect)) if some else np.nan,
        "precision_at_active": _hits(effect, active, n) / n if some else np.nan,
        "n_active": n,
        "chance": n / heads,
    }


def _hits(effect: np.ndarray, active: np.ndarray, n: int) -> float:
    """Active heads among the `n` strongest, heads of equal effect in random order."""
    last = np.partition(effect, -n)[-n]
    above, tied = effect > last, effect == last
    return float(active[above].sum() + (n - above.sum()) * active[tied].mean())


def _check(active: Tensor, **values: Tensor) -> None:
    for name, value in values.items():
        if value.shape != active.shape or not value.shape[1:].numel():
            raise ValueError(
                f"{name} and active must both be [step layer head], got {tuple(value.shape)} and {tuple(active.shape)}"
            )
        if value.isnan().any():
            raise ValueError(f"{name} must be numbers to rank heads, got NaN")


def causal_arrays(
    table: pd.DataFrame,
) -> tuple[
    Float[Tensor, "step layer head"], Bool[Tensor, "step layer head"], Float[Tensor, "step layer head"], list[str]
]:
    """KL, active, attention [step layer head] and the tokens of the first episode of a `causal_table`."""
    first = table.loc[table["episode"] == table["episode"].iloc[0]].sort_values(["step", "layer", "head"])
    shape = [len(set(first[name])) for name in ("step", "layer", "head")]
    kl, active, attention = (
        torch.from_numpy(first[name].to_numpy().copy()).reshape(shape) for name in ("kl", "active", "attention")
    )
    return kl, active, attention, first.drop_duplicates("step")["token"].tolist()


def agreement_table(table: pd.DataFrame) -> pd.DataFrame:
    """Per episode and step how the two rankings of all heads agree; columns of `dhlens.agreement.rank_agreement`."""
    parts = []
    for episode, part in table.groupby("episode", sort=False):
        kl, active, attention, tokens = causal_arrays(part)
        parts.append(rank_agreement(kl, attention, active).assign(episode=episode, token=tokens))
    return pd.concat(parts, ignore_index=True)
