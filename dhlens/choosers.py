"""Whose attention chooses the text: the policies that dynamic retrieval compares, fitted on questions of their own.

    fit = dh.observe(model, fit_episodes)
    policies = reasoning_policies(fit, k=5, seed=0)

Each names k heads by Eq. 2, the attention on supporting facts: foreseen from the hidden state (`predicted`), largest on
the fitted questions (`static`) or at the same step of these (`by step`), drawn anew at every lookup (`dynamic random`)
or once (`fixed random`), and truly largest at this very step (`oracle`), which knows the facts. Even that is no strict
bound: Eq. 2 is a share, and windows open where the heads look most.
`all heads` is no choice at all.

`by step` is the judge of `predicted`: a list for the first token of an answer, one for the second, and so on, is
dynamic without knowing the question, and what a probe has over `static` may be no more than that.

Source: arXiv 2602.11162, appendix (modified DRAGIN; k = 5). It has no `by step`, no oracle and no `all heads`.
"""

import numpy as np
import torch

from dhlens.card import digest
from dhlens.controls import RandomLike
from dhlens.fitting import fit_probe
from dhlens.heads import HeadSet
from dhlens.policies import Dynamic, Policy, Static, StepView, of_shape
from dhlens.predicted import Predicted
from dhlens.scores import Score, reasoning_mass
from dhlens.trace import Trace

CHOOSERS = ("predicted", "static", "by step", "dynamic random", "fixed random", "oracle", "all heads")
"""Names of the policies."""
_ANSWERS = 5
"""Fewer answers that reach a step make no list of it."""


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
        "by step": by_step(score, k),
        "dynamic random": RandomLike(Static(static), seed=seed),
        "fixed random": Static(HeadSet.top_k(drawn, k)),
        "oracle": Dynamic(score=lambda trace: reasoning_mass(trace, spans), top_k=k),
        "all heads": Static(HeadSet.from_mask(torch.ones(fit.shape, dtype=torch.bool))),
    }


def by_step(score: Score, k: int) -> Policy:
    """The k heads of largest mean at the same step of the answers that `score` was made of.

    Behind the last step that `_ANSWERS` of them reach, that step's; where there is none, the heads of all steps.
    """
    assert score.trace is not None
    rows = score.answer_rows(answered=False)
    values, step = score.values[rows].double(), score.trace.step[rows]
    reached = [s for s in range(int(step.max()) + 1) if (step == s).sum() >= _ANSWERS]
    lists = [HeadSet.top_k(values[step == s].mean(0), k) for s in reached] or [HeadSet.top_k(values.mean(0), k)]

    check = of_shape("heads", score.shape)

    def choose(now: StepView, past: Trace | None) -> HeadSet:
        return lists[min(now.step, len(lists) - 1)]

    return Policy(choose, needs_read=False, needs_past=False, name="by step", key=digest(*lists), check=check)
