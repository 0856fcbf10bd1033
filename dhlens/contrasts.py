"""Conditions of an ablation side by side: means with intervals, paired differences with tests.

    table = dh.contrasts.summary(result.answers, result.steps, seed=0)

Everything is paired by episode and resampled by group (haystack window); steps are never the unit. p comes from
flipping the sign of whole groups' differences; G groups cannot give less than 2 / 2^G, and a contrast that could not
have been significant is marked so. McNemar's exact test stands beside it for answers; it takes episodes as independent.
One pair is primary, fixed before any number was seen, with two measures that share Holm's bound. The other contrasts
share it within one measure, edit and commit: over all of them at once, few windows could never show anything.

Answers are compared by one of `MEASURES`. By accuracy, only episodes that the untouched model answers count, so its own
is 1 by construction; by F1, all do. The untouched model's own contrasts get no p.

`answers` has one row per episode and condition, `steps` one per generation step of the clean answer; the columns are
those of `dhlens.recipes.ablate`. A condition is (policy, k, edit, commit). Cost: seconds at 100 episodes x 50
conditions.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dhlens.stats import grouped_difference, grouped_mean, holm, mcnemar, sign_flip

CONDITION = ["policy", "k", "edit", "commit"]
_ONE_STEP = ["policy", "k", "edit"]
MEASURES = {"accuracy": {"accuracy": "correct", "rouge_l": "rouge_l"}, "f1": {"f1": "f1", "em": "em"}}
"""What answers are compared by, and the columns of `answers` for it; the first is primary."""
_YES_OR_NO = ("accuracy", "em")


def summary(answers: pd.DataFrame, steps: pd.DataFrame, *, by: str = "accuracy", seed: int) -> pd.DataFrame:
    """One row per condition, in order of first appearance.

    Columns: the condition, n (episodes), groups, heads (mean at a step of its own answer), step_heads (at a step of the
    clean one), overlap (share of the latter that copy at that very step: how far the policy names the dynamic heads),
    then with `_low` and `_high` (95 %, over groups) the `MEASURES` of answers, and of the one-step effects kept (share
    of argmaxes) and kl (nats).
    """
    rows = []
    for key, part in _grouped(answers, CONDITION):
        row = dict(zip(CONDITION, key, strict=True))
        row |= {"n": len(part), "groups": part["group"].nunique(), "heads": part["heads"].mean()}
        rows.append(row | _means(part, MEASURES[by], seed))
    alone = []
    for key, part in _grouped(steps, _ONE_STEP):
        row = dict(zip(_ONE_STEP, key, strict=True)) | {"step_heads": part["heads"].mean()}
        taken, active = (part[name].to_numpy(dtype=float).sum() for name in ("heads", "active"))
        row["overlap"] = active / taken if taken else np.nan
        alone.append(row | _means(part, {"kept": "kept", "kl": "kl"}, seed))
    if not alone:  # no answer had a step
        return pd.DataFrame(rows)
    return pd.DataFrame(rows).merge(pd.DataFrame(alone), on=_ONE_STEP, how="left")


def sweep(answers: pd.DataFrame, steps: pd.DataFrame, *, by: str = "accuracy", seed: int) -> pd.DataFrame:
    """Effects and compensation against k, for the policies that were run at several sizes; empty where none was.

    Columns: policy, edit, commit, k, n, then with `_low` and `_high` the `MEASURES`, kl (one step, nats), comp_max and
    comp_mean (newly active static heads: the most at a step, and the mean over steps), comp_steps (share of steps
    with any). The untouched model stands at k = 0.
    """
    rows = []
    names = MEASURES[by] | {n: n for n in ("comp_max", "comp_mean", "comp_steps")}
    sized, sized_steps = (table.loc[table["k"].notna()] for table in (answers, steps))
    untouched, untouched_steps = (t.loc[t["policy"] == "none"].assign(k=0.0) for t in (answers, steps))
    for (policy, edit, commit), part in _grouped(sized, ["policy", "edit", "commit"]):
        alone = sized_steps.loc[(sized_steps["policy"] == policy) & (sized_steps["edit"] == edit)]
        alone = pd.concat([untouched_steps, alone])
        for (k,), at in _grouped(pd.concat([untouched, part]).sort_values("k"), ["k"]):
            row = {"policy": policy, "edit": edit, "commit": commit, "k": k, "n": len(at)}
            rows.append(row | _means(at, names, seed) | _means(alone.loc[alone["k"] == k], {"kl": "kl"}, seed))
    return pd.DataFrame(rows)


def contrasts(
    answers: pd.DataFrame,
    steps: pd.DataFrame,
    *,
    primary: tuple[str, str] = ("dynamic", "static"),
    by: str = "accuracy",
    seed: int,
) -> pd.DataFrame:
    """The first policy of `primary` against every other one, under each edit and commit, as paired differences.

    Columns: first, second, edit, commit ("-" for one-step measures), measure (`MEASURES`, kl, kept), primary (bool),
    difference (first less second) with low and high (95 %, over groups), p, p_holm, p_mcnemar (of yes and no), least
    (the smallest p_holm that this number of groups allows), n (episodes), groups. Primary are the first measure and KL
    of that pair under the first edit and commit. Empty where the first policy was not run.
    """
    measures = MEASURES[by]
    plain = answers.loc[answers["k"].isna()].rename(columns={column: name for name, column in measures.items()})
    plain_steps = steps.loc[steps["k"].isna()]
    touched = plain.loc[plain["policy"] != "none"]
    rows: list[dict[str, Any]] = []
    for edit in touched["edit"].unique():
        within = plain_steps.loc[plain_steps["edit"] == edit]
        rows += [{**r, "edit": edit, "commit": "-"} for r in _pairs(within, primary[0], ["kl", "kept"], seed)]
        for commit in touched["commit"].unique():
            asked = (plain["edit"] == edit) & (plain["commit"] == commit) | (plain["policy"] == "none")
            found = _pairs(plain.loc[asked], primary[0], list(measures), seed)
            rows += [{**r, "edit": edit, "commit": commit} for r in found]
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows)
    first_commit = touched["commit"].iloc[0]
    table["primary"] = (
        (table["second"] == primary[1])
        & (table["edit"] == touched["edit"].iloc[0])
        & table["measure"].isin([by, "kl"])
        & table["commit"].isin(["-", first_commit])
    )
    table[["p_holm", "least"]] = np.nan
    tested = table.loc[table["p"].notna()]
    keys = tested[["measure", "edit", "commit"]].agg(" ".join, axis=1).where(~tested["primary"], "primary")
    families: Any = tested.groupby(keys)
    for _, family in families:
        table.loc[family.index, "p_holm"] = holm(family["p"].to_numpy(dtype=float))
        table.loc[family.index, "least"] = len(family) * 2.0 / 2.0 ** family["groups"].to_numpy(dtype=float)
    columns = ["first", "second", "edit", "commit", "measure", "primary", "difference", "low", "high", "p", "p_holm"]
    table = table.sort_values("primary", ascending=False, kind="stable", ignore_index=True)
    return table.loc[:, [*columns, "p_mcnemar", "least", "n", "groups"]]


def _pairs(rows: pd.DataFrame, first: str, measures: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """`first` less every other policy of `rows`, which hold one edit."""
    unit = [name for name in ("episode", "step") if name in rows]
    if first not in set(rows["policy"]):
        return
    base = rows.loc[rows["policy"] == first]
    for second in rows["policy"].unique():
        if second == first:
            continue
        both = base.merge(rows.loc[rows["policy"] == second], on=unit, suffixes=("", "_other"))
        groups = both["group"].to_numpy(dtype=str)
        for measure in measures:
            a, b = (both[name].to_numpy(dtype=float) for name in (measure, f"{measure}_other"))
            value, low, high = grouped_difference(a, b, groups, seed=seed)
            p = np.nan if second == "none" else sign_flip(a - b, groups, seed=seed)
            pairwise = mcnemar(a > 0, b > 0) if measure in _YES_OR_NO and second != "none" else np.nan
            n, n_groups = both["episode"].nunique(), len(np.unique(groups))
            row = {"first": first, "second": second, "measure": measure, "difference": value, "low": low, "high": high}
            yield row | {"p": p, "p_mcnemar": pairwise, "n": n, "groups": n_groups}


def _means(part: pd.DataFrame, columns: dict[str, str], seed: int) -> dict[str, float]:
    found: dict[str, float] = {}
    groups = part["group"].to_numpy(dtype=str)
    for name, column in columns.items():
        interval = grouped_mean(part[column].to_numpy(dtype=float), groups, seed=seed)
        found |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return found


def _grouped(table: pd.DataFrame, by: list[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Key and rows of each group, in order of first appearance; NaN is a key like others."""
    groups: Any = table.groupby(by, dropna=False, sort=False)
    yield from groups


def in_words(
    summary: pd.DataFrame, pairs: pd.DataFrame | None, primary: tuple[str, str], *, by: str = "accuracy"
) -> list[str]:
    """What is left of "the first policy hurts most" under each control, a sentence per edit and commit."""
    if pairs is None or pairs.empty:
        return [f"No contrasts: {primary[0]!r} was not run."]
    lines = [] if any(pairs["primary"]) else [f"No primary contrast: {primary[1]!r} was not run."]
    kl = summary.dropna(subset=["kl"]).drop_duplicates(_ONE_STEP)
    kl = kl.loc[kl["k"].isna()]
    for (edit,), part in _grouped(pairs.loc[pairs["measure"] == "kl"], ["edit"]):
        at = kl.loc[kl["edit"] == edit].set_index("policy")
        sizes = ", ".join(f"{name} {n:.1f}" for name, n in at["step_heads"].items())
        lines.append(f"Heads taken at a step of the clean answer: {sizes}.")
        lines.append(f"One-step KL in nats under {edit}: {_said(primary[0], part, at['kl'], '.3f')}.")
    what, form = ("Right answers", ".0%") if by == "accuracy" else ("F1 of answers", ".3f")
    for (edit, commit), part in _grouped(pairs.loc[pairs["measure"] == by], ["edit", "commit"]):
        here = summary["edit"].isin([edit, "none"]) & summary["commit"].isin([commit, "none"]) & summary["k"].isna()
        at = summary.loc[here].set_index("policy")[by]
        lines.append(f"{what} under {edit}, commit {commit}: {_said(primary[0], part, at, form)}.")
    marks = "Marks, against the first: * p < .05 after Holm; = not told apart; ? too few windows to tell."
    return [*dict.fromkeys(lines), marks]


def _said(first: str, pairs: pd.DataFrame, at: pd.Series, form: str) -> str:
    """The first policy's value and those of the others, each with its mark."""
    rows: Any = pairs.itertuples()
    others = [f"{row.second} {at[row.second]:{form}}{_verdict(row)}" for row in rows if row.second in at]
    return f"{first} {at[first]:{form}}, against {', '.join(others)}"


def _verdict(row: Any) -> str:
    if row.p_holm != row.p_holm:
        return ""
    return "*" if row.p_holm < 0.05 else "=" if row.least < 0.05 else "?"
