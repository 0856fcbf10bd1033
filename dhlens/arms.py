"""Arms of dynamic retrieval side by side: what they show, what they answer, and which differences are real.

    table = dh.arms.answer_summary(result.answers, seed=0)

Two questions are kept apart. Selection: which heads' attention finds the supporting facts, at one number of visible
tokens, before anything is generated (`selection`)? Its contrast is primary, fixed beforehand. Answers: what is gained
by it (`answer_summary`, `answer_contrasts`)? Everything is paired by question and resampled by group; p comes from
flipping signs of groups, beside McNemar's exact test for exact matches, with Holm's bound within a measure,
trigger and visibility.
`detectable` is the difference that would have been found with 80 % power at 5 %: smaller ones are not told from none.

The columns of `answers` and `looks` are those of `dhlens.recipes.rag`. Cost: seconds.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dhlens.stats import grouped_difference, grouped_mean, holm, mcnemar, sign_flip

ARM = ["trigger", "visibility", "policy"]
ELSEWHERE = "retrieve"
"""The visibility of a corpus in place of the context."""
_POWER = 2.8
"""Standard errors between no difference and one found with 80 % power at 5 %: 1.96 + 0.84."""


def answer_summary(answers: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """One row per arm, in order of first appearance.

    Columns: trigger, visibility, policy, n (questions), then with `_low` and `_high` (95 %, over groups) f1, em,
    contains (the answer stands in the text), facts (share of the facts shown whole), then means: visible (tokens at a
    lookup), retrievals, calls (of the language model), tokens (of the answer), looked_up (share of questions with a
    retrieval).
    """
    rows = []
    for key, part in _grouped(answers, ARM):
        row = dict(zip(ARM, key, strict=True)) | {"n": len(part)}
        groups = part["group"].to_numpy(dtype=str)
        for name in ("f1", "em", "contains", "facts"):
            found = grouped_mean(part[name].to_numpy(dtype=float), groups, seed=seed)
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        row |= {name: part[name].mean() for name in ("visible", "retrievals", "calls", "tokens")}
        rows.append(row | {"looked_up": (part["retrievals"] > 0).mean()})
    return pd.DataFrame(rows)


def reference_visibility(visibility: str) -> str:
    """Where the references of a visibility stand: passages come in a new prompt, as windows do in "concat"."""
    return "concat" if visibility == ELSEWHERE else visibility


def selection(looks: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """One row per policy and budget.

    Columns: policy, budget, n, visible (tokens), then facts (shown whole) and fact_tokens with `_low` and `_high`.
    """
    rows = []
    for (policy, budget), part in _grouped(looks, ["policy", "budget"]):
        row = {"policy": policy, "budget": budget, "n": len(part), "visible": part["visible"].mean()}
        for name in ("facts", "fact_tokens"):
            found = grouped_mean(part[name].to_numpy(dtype=float), part["group"].to_numpy(dtype=str), seed=seed)
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows)


def contrasts(
    answers: pd.DataFrame, looks: pd.DataFrame, *, primary: tuple[str, str], budget: int, seed: int
) -> pd.DataFrame:
    """The first policy of `primary` against every other one, as paired differences.

    Selection at `budget` (trigger and visibility "-"), then the answers under each trigger and visibility, against the
    references too. Columns: first, second, trigger, visibility, measure (facts, f1, em), primary (bool), difference
    (first less second) with low and high (95 %, over groups), p, p_holm, p_mcnemar (em), detectable, n, groups. Empty
    where the first policy was not run.
    """
    at_budget = looks.loc[looks["budget"] == budget]
    rows = [{**row, "trigger": "-", "visibility": "-"} for row in paired(at_budget, primary[0], ["facts"], seed=seed)]
    tried = answers.loc[answers["policy"] == primary[0]].drop_duplicates(["trigger", "visibility"])
    for trigger, visibility in tried[["trigger", "visibility"]].itertuples(index=False):
        never = (answers["trigger"] == "never") & (answers["visibility"] == reference_visibility(visibility))
        here = (answers["trigger"] == trigger) & (answers["visibility"] == visibility)
        found = paired(answers.loc[here | never], primary[0], ["f1", "em"], seed=seed)
        rows += [{**row, "trigger": trigger, "visibility": visibility} for row in found]
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows)
    table["primary"] = (table["second"] == primary[1]) & (table["measure"] == "facts")
    table["p_holm"] = np.nan
    # the primary contrast stands alone; the others share the bound within a measure, trigger and visibility
    keys = table[["measure", "trigger", "visibility"]].agg(" ".join, axis=1).where(~table["primary"], "primary")
    families: Any = table.loc[table["p"].notna()].groupby(keys)
    for _, family in families:
        table.loc[family.index, "p_holm"] = holm(family["p"].to_numpy(dtype=float))
    columns = ["first", "second", "trigger", "visibility", "measure", "primary", "difference", "low", "high"]
    return table.loc[:, [*columns, "p", "p_holm", "p_mcnemar", "detectable", "n", "groups"]]


def paired(rows: pd.DataFrame, first: str, measures: Sequence[str], *, seed: int) -> Iterator[dict[str, Any]]:
    """`first` less every other policy of `rows`, question by question: rows of `contrasts` without their arm.

    `rows` has policy, episode, group and the measures.
    """
    base = rows.loc[rows["policy"] == first]
    for second in rows["policy"].unique():
        both = base.merge(rows.loc[rows["policy"] == second], on="episode", suffixes=("", "_other"))
        if second == first or both.empty:
            continue
        groups = both["group"].to_numpy(dtype=str)
        for measure in measures:
            a, b = (both[name].to_numpy(dtype=float) for name in (measure, f"{measure}_other"))
            value, low, high = grouped_difference(a, b, groups, seed=seed)
            _, code = np.unique(groups, return_inverse=True)
            # groups differ in size: what is left of a group's sum where each of its questions has the mean
            rest = np.bincount(code, weights=a - b - np.mean(a - b))
            error = float(np.sqrt(len(rest)) * rest.std(ddof=1) / len(a)) if len(rest) > 1 else 0.0
            yield {
                **{"first": first, "second": second, "measure": measure},
                **{"difference": value, "low": low, "high": high},
                "p": sign_flip(a - b, groups, seed=seed),
                "p_mcnemar": mcnemar(a > 0, b > 0) if measure == "em" else np.nan,
                "detectable": _POWER * error if error > 1e-12 else np.nan,
                **{"n": len(a), "groups": len(rest)},
            }


def in_words(
    looks: pd.DataFrame, summary: pd.DataFrame, pairs: pd.DataFrame, *, primary: tuple[str, str], budget: int
) -> list[str]:
    """What the heads find and what that is worth, in sentences."""
    ranked = looks.loc[looks["budget"] == budget].sort_values("facts", ascending=False)
    at = dict(zip(ranked["policy"], ranked["facts"], strict=True))
    lines = [f"Supporting facts shown whole at {budget} visible tokens: {_listed(at, '.0%')}."]
    main = pairs.loc[pairs["primary"]] if len(pairs) else pairs
    for row in main.to_dict("records"):
        lines.append(
            f"Primary, {primary[0]} less {primary[1]}: {row['difference']:+.1%} (95 % {row['low']:+.1%} to "
            f"{row['high']:+.1%}), p = {row['p']:.2g}{_power(row['detectable'], '.1%')}."
        )
    if not len(main):
        lines.append(f"No primary contrast: {primary[0]!r} and {primary[1]!r} were not both run.")
    for (trigger, visibility), part in _grouped(summary, ["trigger", "visibility"]):
        f1 = dict(zip(part["policy"], part["f1"], strict=True))
        lines.append(f"F1, {trigger}, {visibility}: {_listed(f1, '.3f')}.")
    answers = pairs.loc[pairs["measure"] == "f1"] if len(pairs) else pairs
    real = [
        f"{r['second']} ({r['trigger']}, {r['visibility']})" for r in answers.to_dict("records") if r["p_holm"] < 0.05
    ]
    if len(answers):
        told = ", ".join(real) or "none"
        power = _power(float(np.median(answers["detectable"].to_numpy(dtype=float))), ".3f")
        lines.append(f"Arms whose F1 is told from {primary[0]} (p < .05 by Holm's bound in each panel): {told}{power}.")
    return lines


def _power(difference: float, form: str) -> str:
    """What would have been found; nothing where there was no spread to tell it from."""
    return f"; a difference of {difference:{form}} would have been found with 80 % power" if difference > 0 else ""


def _listed(values: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())


def _grouped(table: pd.DataFrame, by: list[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Key and rows of each group, in order of first appearance."""
    groups: Any = table.groupby(by, dropna=False, sort=False)
    yield from groups
