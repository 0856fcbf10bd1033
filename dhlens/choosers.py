"""Whose attention chooses the text: the policies that dynamic retrieval compares, fitted on questions of their own.

    fit = dh.observe(model, fit_episodes)
    policies = reasoning_policies(fit, k=5, seed=0)

Each names k heads by Eq. 2, the attention on supporting facts: foreseen from the hidden state (`predicted`), largest on
the fitted questions (`static`), drawn anew at every lookup (`dynamic random`) or once (`fixed random`), and truly
largest at this very step (`oracle`), which knows the facts and is a bound. `all heads` is no choice at all.

Source: arXiv 2602.11162, appendix (modified DRAGIN; k = 5). It has no oracle and no `all heads`.
"""

import numpy as np
import torch

from dhlens.controls import RandomLike
from dhlens.fitting import fit_probe
from dhlens.heads import HeadSet
from dhlens.policies import Dynamic, Policy, Static
from dhlens.predicted import Predicted
from dhlens.scores import reasoning_mass
from dhlens.trace import Trace

CHOOSERS = ("predicted", "static", "dynamic random", "fixed random", "oracle", "all heads")
"""Names of the policies."""


def reasoning_policies(fit: Trace, *, k: int = 5, spans: str = "fact_*", seed: int) -> dict[str, Policy]:
    """The policies of `CHOOSERS`.

    Args:
        fit: observed answers to questions that are not asked again, with the hidden site "final".
        k: heads of each.
        spans: the supporting facts.
        seed: of the probe and the draws.

    Raises:
        ValueError: k is out of range, or see `fit_probe` and `reasoning_mass`.
    """
    n = fit.shape[0] * fit.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k must lie within 1..{n}, the heads of the model, got {k}")
    score = reasoning_mass(fit, spans)
    static = HeadSet.top_k(score.values[fit.answer_rows()].mean(0, dtype=torch.float64), k)
    drawn = torch.from_numpy(np.random.default_rng(seed).random(fit.shape))
    return {
        "predicted": Predicted(fit_probe(fit, score, lag=0, answered=False, seed=seed), top_k=k),
        "static": Static(static),
        "dynamic random": RandomLike(Static(static), seed=seed),
        "fixed random": Static(HeadSet.top_k(drawn, k)),
        "oracle": Dynamic(score=lambda trace: reasoning_mass(trace, spans), top_k=k),
        "all heads": Static(HeadSet.from_mask(torch.ones(fit.shape, dtype=torch.bool))),
    }
