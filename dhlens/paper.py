"""The paper's first table, a measured row beside it, and a reading of the measures in plain words.

Source: arXiv 2602.11162, table 1 (the first two columns stand only in its later version). Context, never a target:
models, haystack lengths and the choice of static heads differ.
"""

import math

import pandas as pd

from dhlens.dynamics import Dynamics

TABLE_1 = pd.DataFrame(
    [
        ("Llama-3.1-8B", 12.97, 7.69, 238, 1024, 0.3512, 0.2793, 3.8154),
        ("Llama-3.2-3B", 9.69, 6.18, 149, 672, 0.3126, 0.3188, 3.0083),
        ("Qwen3-8B", 20.18, 10.43, 415, 1152, 0.4611, 0.3668, 4.1038),
        ("Llama-2-13B", 6.20, 5.49, 172, 1600, 0.2077, 0.4979, 4.8973),
        ("Phi-4-mini", 6.13, 7.09, 176, 768, 0.1845, 0.5056, 3.5532),
    ],
    columns=["model", "heads/step", "std", "activated", "heads", "J static 20", "J adjacent", "entropy"],
)


def beside_the_paper(model: str, measured: Dynamics) -> pd.DataFrame:
    """The measured row above the paper's five, one set of columns; `source` tells them apart."""
    values = (model, *measured.row().values())
    ours = pd.DataFrame([dict(zip(TABLE_1.columns, values, strict=True))])
    table = pd.concat([ours, TABLE_1], ignore_index=True).astype({"activated": int, "heads": int})
    table.insert(0, "source", ["measured"] + ["paper"] * len(TABLE_1))
    return table


def in_words(d: Dynamics, k: int = 20) -> list[str]:
    """What coverage, J / J_max and the nulls say about "dynamic", each sentence with its numbers."""
    if math.isnan(d[f"coverage_{k}"]) or math.isnan(d["jaccard_adjacent"]):
        return ["Too few heads are active, or too few haystack windows answered, for a statement about time."]
    lines = [
        f"Of the heads active at a step, {d[f'coverage_{k}']:.0%}{_range(d, f'coverage_{k}')} lie in the static top "
        f"{k}. Their Jaccard, {d[f'jaccard_static_{k}']:.2f}, is {d[f'jaccard_over_max_{k}']:.0%} of what the sizes of "
        f"the two sets allow: a low Jaccard is partly arithmetic.",
        f"Two successive steps share {d['jaccard_adjacent']:.2f} of their heads (Jaccard). The same steps in random "
        f"order share {d['jaccard_adjacent_shuffled']:.2f}, heads that fire independently at their own rates "
        f"{d['jaccard_adjacent_independent']:.2f}: {_order(d)}.",
        f"{d['activated']:.0f} of {d['total_heads']:.0f} heads fire at some step, {d['heads_seen_once']:.0f} of them "
        f"once only; the activity is spread like {d['effective_heads']:.0f} equally active heads.",
    ]
    if "chance_match" in set(d.table.metric):
        lines.append(
            f"With the copied tokens in random order {d['chance_match']:.2f} heads per step would count, against "
            f"{d['heads_per_step']:.2f}: what a repeated token gives by chance."
        )
    return lines


def _range(d: Dynamics, metric: str) -> str:
    """The interval in brackets; nothing where too few groups gave none."""
    low, high = d.table.loc[d.table.metric == metric, ["low", "high"]].to_numpy()[0]
    return f" ({low:.0%} to {high:.0%})" if low == low else ""


def _order(d: Dynamics) -> str:
    """Whether adjacent similarity leaves the band of the shuffled-time null."""
    value = d["jaccard_adjacent"]
    null = d.table[d.table.metric == "jaccard_adjacent_shuffled"].iloc[0]
    if value > null["high"]:
        return "neighbouring steps resemble each other more than their order by chance would"
    if value < null["low"]:
        return "neighbouring steps resemble each other less than their order by chance would"
    return "the order of the steps makes no difference that these data show"
