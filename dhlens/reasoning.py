"""Reasoning heads: those that look at the supporting facts while the model answers, as many as copy on needles.

    needles = dh.dynamics(dh.copy_paste(niah_trace))
    fit, held = trace.split(0.5, seed=0)
    tau = calibrated(dh.reasoning_mass(fit), needles["heads_per_step"])
    heads = ReasoningHeads(tau)                      # a Scoring: what policies, probes and `dynamics` take
    dh.dynamics(heads(held), static_from=0.5, answered=False)

The paper leaves open from which mass on a head counts. A threshold that gives as many heads a step as the needle task
makes the two sets comparable in size, which Jaccard, coverage and entropy all depend on; it is fitted on other groups
than it is measured on, and a sweep stands beside it. Steps of wrong answers count: what heads look at is asked, not
whether the answer is right. Cost: a sort of all values.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dhlens.dynamics import Dynamics, dynamics
from dhlens.heads import HeadSet
from dhlens.scores import Score, copy_paste, reasoning_mass
from dhlens.stats import grouped_mean
from dhlens.tables import marks, outcomes
from dhlens.trace import Trace

SWEEP = (0.1, 0.2, 0.3, 0.5)
"""Thresholds that stand beside the calibrated one."""
TOP = 20
"""Size of the static set, the paper's."""


@dataclass(frozen=True)
class ReasoningHeads:
    """A scoring: 1 where a head's reasoning mass (Eq. 2) is above `threshold`, else 0."""

    threshold: float
    """Share of the attention outside sink and local window."""
    spans: str = "fact_*"
    """Name or pattern of the supporting facts."""

    @property
    def key(self) -> str:
        """What tells it from other scorings."""
        return f"reasoning mass of {self.spans} above {self.threshold:g}"

    def __call__(self, trace: Trace) -> Score:
        """The score of a trace.

        Raises:
            ValueError: see `reasoning_mass`.
        """
        mass = reasoning_mass(trace, self.spans)
        values = mass.heads(self.threshold).float()
        return Score("reasoning_heads", values, True, f"{mass.source}, above {self.threshold:g}", trace)


def needle_size(niah: Trace | None, shape: tuple[int, int]) -> float:
    """How many heads copy at a step of a needle scan, in the mean over answered episodes; 20 where there is none.

    Raises:
        ValueError: none was answered.
    """
    if niah is None:
        return float(min(TOP, shape[0] * shape[1] // 2))
    return float(copy_paste(niah).answered().heads().flatten(1).sum(1).double().mean())


def calibrated(score: Score, size: float) -> float:
    """The threshold above which `size` heads are found at a step, in the mean over all steps of answers.

    Where values tie at the border fewer heads are found.

    Raises:
        ValueError: `size` is no number of heads that a step can have, or there is no step.
    """
    values = answer_steps(score).flatten(1)
    n = round(size * len(values))
    if not 0 < n < values.numel():
        raise ValueError(
            f"a step can have more than 0 and fewer than {values.shape[1]} heads, got {size:g} as the mean number "
            f"over {len(values)} steps"
        )
    return float(values.flatten().kthvalue(values.numel() - n).values)


def answer_steps(score: Score) -> Float[Tensor, "n layer head"]:
    """The values at all steps of answers, right or wrong.

    Raises:
        ValueError: there is none.
    """
    rows = score.answer_rows(answered=False)
    if not rows.any():
        raise ValueError("the score has no answer step: replies are empty, or no row has step >= 0")
    return score.values[rows]


def samples(score: Score) -> Score:
    """The steps of all answers, right or wrong, as plain samples: what `dhlens.compare` takes a mean of."""
    rows = score.answer_rows(answered=False)
    groups = tuple(str(g) for g in score.row_groups[rows.numpy()])
    return dataclasses.replace(score, values=answer_steps(score), trace=None, groups=groups, span=None, labels=None)


def beside_needles(
    trace: Trace, needles: Dynamics | None, *, size: float, fit_from: float = 0.5, spans: str = "fact_*", seed: int = 0
) -> tuple[float, pd.DataFrame]:
    """Dynamics of reasoning heads at the calibrated threshold and over the sweep, beside those of copying heads.

    Threshold and static ranking are fitted on some groups, everything is measured on the others.

    Args:
        trace: observed answers over supporting facts.
        needles: dynamics of the copying heads of the same model.
        size: heads at a step that the calibrated threshold is to give, in the mean.
        fit_from: share of the groups that it is fitted on.
        spans: the supporting facts.
        seed: of the split, the bootstrap and the nulls.

    Returns:
        The threshold, and a row per set and measure: heads ("copying", "reasoning", "reasoning above 0.1", ...),
        threshold, and the columns of `Dynamics.table`.

    Raises:
        ValueError: fewer than two groups; see `calibrated` and `reasoning_mass`.
    """
    fit, held = trace.split(fit_from, seed=seed)
    tau = calibrated(reasoning_mass(fit, spans), size)
    tables = [] if needles is None else [needles.table.assign(heads="copying", threshold=np.nan)]
    for name, threshold in {"reasoning": tau, **{f"reasoning above {t:g}": t for t in SWEEP}}.items():
        scoring = ReasoningHeads(threshold, spans)
        ranking = answer_steps(scoring(fit)).mean(0, dtype=torch.float64)
        found = dynamics(scoring(held), static_from=ranking, seed=seed, answered=False)
        tables.append(found.table.assign(heads=name, threshold=threshold))
    table = pd.concat(tables, ignore_index=True)
    return tau, table.loc[:, ["heads", "threshold", *(c for c in table if c not in ("heads", "threshold"))]]


def mass_by_step(trace: Trace, static: HeadSet, *, spans: str = "fact_*", seed: int = 0) -> pd.DataFrame:
    """Mean reasoning mass at each step of the answers: step, heads ("all", "static"), value, low, high, n."""
    score = reasoning_mass(trace, spans)
    rows = score.answer_rows(answered=False)
    values, groups = answer_steps(score), score.row_groups[rows.numpy()].astype(str)
    step = trace.step[rows].numpy()
    means = {"all": values.flatten(1).mean(1), "static": values[:, static.mask()].mean(1)}
    found = []
    for name, mean in means.items():
        for s in np.unique(step):
            here = step == s
            interval = grouped_mean(mean.double().numpy()[here], groups[here], seed=seed)
            found.append({"step": int(s), "heads": name, **interval._asdict(), "n": int(here.sum())})
    return pd.DataFrame(found)


def evidence_share(trace: Trace, spans: str = "fact_*") -> Float[Tensor, " episode"]:
    """What share of the prompt outside sink and local window the supporting facts are: uniform attention's mass."""
    capture: Mapping[str, Any] = trace.card.settings["capture"]
    found = []
    for e in trace.episodes:
        first, last = capture["sink"], len(e.tokens) - capture["local"]
        core = [(max(s.start, first), min(s.stop, last)) for s in e.spans if fnmatchcase(s.name, spans)]
        found.append(sum(max(stop - start, 0) for start, stop in core) / max(last - first, 1))
    return torch.tensor(found, dtype=torch.float64)


def heads_table(scores: Mapping[str, Score], active: Any, fit: Trace, spans: str = "fact_*") -> pd.DataFrame:
    """A row per head: layer, head, its mean under each score, rate, static_rank, in_static_20.

    The rate is the share of steps at which it is `active`; it is ranked by its mean mass in `fit`.
    """
    layers, heads = fit.shape
    ranking = answer_steps(reasoning_mass(fit, spans)).mean(0, dtype=torch.float64).flatten()
    table = pd.DataFrame({"layer": np.repeat(range(layers), heads), "head": np.tile(range(heads), layers)})
    for name, score in scores.items():
        table[name] = score.mean().flatten().numpy()
    table["rate"] = active.float().mean(0).flatten().numpy()
    order = torch.sort(ranking, descending=True, stable=True).indices
    table["static_rank"] = order.argsort().numpy() + 1
    return table.assign(in_static_20=table["static_rank"] <= TOP)


def facts_table(trace: Trace, static: HeadSet, *, fitted: set[str], spans: str = "fact_*") -> pd.DataFrame:
    """A row per question: `dhlens.tables.outcomes`, em, f1, mass, mass_static, share, fitted.

    Masses are means over the steps, of all and of static heads; share is that of `evidence_share`; fitted tells the
    questions that static heads were fitted on.
    """
    score = reasoning_mass(trace, spans)
    rows = score.answer_rows(answered=False)
    values, of = answer_steps(score), trace.episode[rows].numpy()
    by_step = {"mass": values.flatten(1).mean(1), "mass_static": values[:, static.mask()].mean(1)}
    means: Any = pd.DataFrame({name: v.numpy() for name, v in by_step.items()}).groupby(of).mean()
    marked = [marks(e, o.text) for e, o in zip(trace.episodes, trace.outcomes, strict=True)]
    table = outcomes(trace).join(pd.DataFrame(marked)).join(means)
    return table.assign(share=evidence_share(trace, spans).numpy(), fitted=table["episode"].isin(sorted(fitted)))
