"""Statistics of answers and of grouped data: what the tables and the comparisons of policies share.

Steps of an episode, and episodes on one haystack window, are not independent: every interval here resamples whole
groups. With fewer than two groups an interval is NaN. Cost: work on sums per group, whatever the number of steps.
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import binomtest, bootstrap, permutation_test

_CLOSED_ANSWERS = ("yes", "no", "noanswer")
_FLIPS = 9_999


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_ratio(
    numerator_by_group: Num[np.ndarray, " group"],
    denominator_by_group: Num[np.ndarray, " group"],
    *,
    seed: int,
    n_boot: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Sum of numerators over sum of denominators, with the percentile interval over resampled groups.

    Groups whose denominator is 0 say nothing and are left out. NaN where none is left.
    """
    kept = denominator_by_group > 0
    numerator, denominator = numerator_by_group[kept], denominator_by_group[kept]
    if not len(numerator):
        return Interval(np.nan, np.nan, np.nan)
    value = float(numerator.sum() / denominator.sum())
    if len(numerator) < 2:
        return Interval(value, np.nan, np.nan)
    # Percentiles rather than BCa: BCa has no answer for data without spread, such as a head that fires at every step.
    result = bootstrap(
        (numerator, denominator),
        lambda n, d, axis: n.sum(axis) / d.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=n_boot,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(value, float(result.confidence_interval.low), float(result.confidence_interval.high))


def grouped_mean(
    values: Num[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"],
    *,
    seed: int,
    n_boot: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Mean over rows, NaN rows left out, with the bootstrap interval over `groups`."""
    valid = ~np.isnan(values)
    names, code = np.unique(groups[valid].astype(str), return_inverse=True)
    sums = np.bincount(code, weights=values[valid], minlength=len(names))
    counts = np.bincount(code, minlength=len(names))
    return bootstrap_ratio(sums, counts, seed=seed, n_boot=n_boot, confidence=confidence)


def grouped_difference(
    a: Shaped[np.ndarray, " n"],
    b: Shaped[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"],
    *,
    seed: int,
    n_boot: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Mean of `a - b` (numbers or verdicts) over the same items, with the paired bootstrap interval over `groups`."""
    return grouped_mean(a.astype(float) - b.astype(float), groups, seed=seed, n_boot=n_boot, confidence=confidence)


def paired_mean(
    values: Num[np.ndarray, " n"],
    first: Shaped[np.ndarray, " n"],
    second: Shaped[np.ndarray, " n"],
    *,
    seed: int,
    n_boot: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Mean over rows that each stand for a pair of things, of groups `first` and `second`, which may be the same.

    Groups are resampled; a row counts as often as both of its groups were drawn, a row within one group as often as
    that was. NaN bounds below two groups.
    """
    valid = ~np.isnan(values)
    names, code = np.unique(np.stack([first[valid], second[valid]]), return_inverse=True)
    if len(names) < 2:
        return Interval(float(values[valid].mean()) if valid.any() else np.nan, np.nan, np.nan)
    a, b = code.reshape(2, -1)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_boot)
    weight = np.where(a == b, drawn[:, a], drawn[:, a] * drawn[:, b]).astype(float)
    total = weight.sum(1)
    means = (weight @ values[valid])[total > 0] / total[total > 0]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values[valid].mean()), float(low), float(high))


def jackknife(
    statistic: Callable[[np.ndarray], np.ndarray], by_group: Num[np.ndarray, "group *record"]
) -> tuple[float, float]:
    """Bias-corrected estimate and standard error by leaving out one group at a time; NaN below two groups.

    Args:
        statistic: From summed records, [... *record], to values [...]; it must take leading axes.
        by_group: Each group's sum of records.

    Source: Quenouille 1956; for the number of kinds seen, Burnham and Overton 1979 (first order).
    """
    n = len(by_group)
    if n < 2:
        return np.nan, np.nan
    total = by_group.sum(0)
    left_out = statistic(total - by_group)
    estimate = n * float(statistic(total)) - (n - 1) * float(left_out.mean())
    return estimate, float(np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()))


def mcnemar(a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " n"]) -> float:
    """Exact two-sided p-value that `a` and `b` are right equally often on the same items; 1 where they never differ."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Adjusted p-values in the order given: at most `alpha` where the family-wise error is held at `alpha`.

    Source: Holm 1979.
    """
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def rouge1_recall(reference: str, text: str) -> float:
    """Share of the reference's words (stemmed) that occur in `text`, 0..1."""
    return float(RougeScorer(["rouge1"], use_stemmer=True).score(reference, text)["rouge1"].recall)


def rouge_l(reference: str, text: str) -> float:
    """F-measure of the longest common subsequence of words (stemmed), 0..1."""
    return float(RougeScorer(["rougeL"], use_stemmer=True).score(reference, text)["rougeL"].fmeasure)


def exact_match(prediction: str, gold: str) -> bool:
    """Whether both read the same without case, punctuation, articles and extra spaces.

    Source: the evaluation of HotpotQA (Yang et al. 2018).
    """
    return _plain(prediction) == _plain(gold)


def token_f1(prediction: str, gold: str) -> float:
    """F1 of the shared words, normalised as in `exact_match`; 0 where one side only is yes, no or noanswer.

    Source: the evaluation of HotpotQA (Yang et al. 2018).
    """
    ours, theirs = _plain(prediction), _plain(gold)
    if ours != theirs and (ours in _CLOSED_ANSWERS or theirs in _CLOSED_ANSWERS):
        return 0.0
    found, wanted = ours.split(), theirs.split()
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def final_answer(text: str) -> str:
    """What stands behind the first "the answer is", cut at a new "Question:" or "Note:"; all of the text without it.

    Source: the program of Su et al. 2024 (DRAGIN). There a text without the words is asked once more for its answer; we
        take it as it is, since our prompts ask for the answer alone.
    """
    for end in ("Question:", "Note:"):
        text = text[:at] if (at := text.find(end)) > 0 else text
    said = re.split(r"the answer is", text, maxsplit=1, flags=re.IGNORECASE)[-1].lstrip(" :")
    return said.strip().removesuffix(".")


def sign_flip(differences: Num[np.ndarray, " n"], groups: Shaped[np.ndarray, " n"], *, seed: int) -> float:
    """Two-sided p-value of the mean under random signs of whole groups; NaN below two groups.

    Exact for up to 13 groups, from 9,999 draws beyond; G groups cannot give less than 2 / 2^G.
    """
    names, code = np.unique(groups, return_inverse=True)
    sums = np.bincount(code, weights=differences, minlength=len(names))
    if len(sums) < 2:
        return np.nan
    if not sums.any():
        return 1.0
    test = permutation_test(
        (sums,), np.sum, permutation_type="samples", n_resamples=_FLIPS, rng=np.random.default_rng(seed)
    )
    return float(test.pvalue)


def _plain(text: str) -> str:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())
