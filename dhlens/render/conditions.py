"""The conditions of an ablation in its pictures: their order, their titles, their colours and markers.

The untouched model is the policy "none"; "none" and "-" as an edit or a commit mean that there is none to name.
"""

from collections.abc import Iterable, Sequence

import pandas as pd

from dhlens.render.draw import BLUE, GREEN, GREY, INK, ORANGE

EDITS = ("zero", "mean", "uniform", "resample", "patch", "hide")
POLICIES = ("dynamic", "static", "random", "tail", "common", "other step", "other episode")
_STYLES = (
    (BLUE, "o"),
    (ORANGE, "s"),
    (GREEN, "D"),
    ("#CC79A7", "^"),
    ("#56B4E9", "v"),
    ("#E69F00", "P"),
    (INK, "X"),
    (GREY, "p"),
    ("#7A4E1D", "<"),
)
_UNNAMED = ("none", "-")


def compared_by(summary: pd.DataFrame) -> str:
    """The measure of answers that a summary holds, "accuracy" or "f1"."""
    return "f1" if "f1" in summary else "accuracy"


def plain(table: pd.DataFrame) -> pd.DataFrame:
    """The table without the conditions of a k sweep, the untouched model first."""
    table = table.loc[table["k"].isna()] if "k" in table else table
    return table.sort_values("policy", key=lambda name: name != "none", kind="stable")


def parts(table: pd.DataFrame, first: str, *others: str) -> list[tuple[list[str], pd.DataFrame]]:
    """Name and rows of each condition, in order of appearance.

    A name holds the value of `first`, and of each of the `others` (columns that may be absent) that tells conditions
    apart.
    """
    names = [first, *(n for n in others if n in table)]
    told = [first, *(n for n in names[1:] if table.loc[~table[n].isin(_UNNAMED), n].nunique() > 1)]
    found = []
    for _, part in table.groupby(names, sort=False, dropna=False):
        main, *rest = (str(part[n].iloc[0]) for n in told)
        found.append(([main, *(x for x in rest if x not in _UNNAMED)], part))
    return found


def styles(names: Iterable[str], known: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each name: `known` ones have their own, others take the next."""
    present = list(dict.fromkeys(names))
    order = [*known, *(n for n in present if n not in known)]
    return {name: _STYLES[i % len(_STYLES)] for i, name in enumerate(order) if name in present}
