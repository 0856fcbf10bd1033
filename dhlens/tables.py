"""Tables for reading: a number and its interval in one cell, and no column that says nothing.

    print(compact(result.tables["summary"]).to_string(index=False))

The tidy tables of a run keep every number in a column of its own; `summary()` and the report show them this way.
"""

from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pandas as pd

from dhlens.episode import Episode
from dhlens.stats import exact_match, final_answer, token_f1
from dhlens.trace import Trace

_NO_BREAK = "\u00a0"


def compact(table: pd.DataFrame, *, digits: int = 3) -> pd.DataFrame:
    """The table with each value and the interval behind it (columns that end in low and high) as "0.50 [0.41, 0.62]".

    Columns without any value, and columns of False only, are left out; True reads "yes"; what is not known is empty.
    """
    names, out = list(table), {}
    for i, name in enumerate(names):
        if name.endswith(("low", "high")):
            continue
        if names[i + 1 : i + 3] and names[i + 1].endswith("low"):
            ends = table[[name, *names[i + 1 : i + 3]]].to_numpy(dtype=float)
            out[name] = [_interval(*row, digits=digits) for row in ends]
        else:
            out[name] = [_cell(value, digits) for value in table[name]]
    return pd.DataFrame({name: column for name, column in out.items() if any(column)})


def spread(table: pd.DataFrame, rows: str, columns: str, *, digits: int = 3) -> pd.DataFrame:
    """Values and their intervals (columns value, low, high) as cells, `rows` down and `columns` across.

    Both in the order in which they appear; empty where there is none.
    """
    cells = [_interval(*row, digits=digits) for row in table[["value", "low", "high"]].to_numpy(dtype=float)]
    wide = table.assign(cell=cells).pivot(index=rows, columns=columns, values="cell")
    return wide.reindex(index=table[rows].unique(), columns=table[columns].unique()).fillna("")


def outcomes(trace: Trace) -> pd.DataFrame:
    """One row per episode: id, group, length, depth, answer, text, correct, stopped, steps."""
    rows = [
        {
            "episode": e.id,
            "group": e.group,
            "length": e.meta.get("length", len(e.tokens)),
            "depth": depth(e),
            "answer": e.meta.get("answer_text"),
            "text": o.text,
            "correct": o.correct,
            "stopped": o.stopped,
            "steps": len(o.tokens),
        }
        for e, o in zip(trace.episodes, trace.outcomes, strict=True)
    ]
    return pd.DataFrame(rows)


def depth(episode: Episode, *, spans: str = "fact_*", within: str = "context") -> float | None:
    """Where the evidence stands, 0..1: as the task says, else the mean place of the facts' middles in the context."""
    facts = [s for s in episode.spans if fnmatchcase(s.name, spans)]
    if "depth" in episode.meta or not facts or not episode.has(within):
        return episode.meta.get("depth")
    whole = episode.span(within)
    return float(np.mean([(s.start + s.stop) / 2 - whole.start for s in facts]) / len(whole))


def marks(episode: Episode, text: str) -> dict[str, float]:
    """EM and F1 of a reply, the best over the ways to write the answer; NaN where the answer is not known."""
    answer = episode.meta.get("answer_text")
    if answer is None:
        return {"em": np.nan, "f1": np.nan}
    said, right = final_answer(text), [str(answer), *episode.meta.get("aliases", ())]
    return {
        "em": float(max(exact_match(said, gold) for gold in right)),
        "f1": max(token_f1(said, gold) for gold in right),
    }


def _interval(value: float, low: float, high: float, *, digits: int) -> str:
    if np.isnan(low) or low == high == value:
        return _cell(value, digits)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".replace(" ", _NO_BREAK)


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else ""
    if not isinstance(value, float | np.floating):
        return str(value)
    if np.isnan(value):
        return ""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.{digits}f}"
