"""Figures of dynamic retrieval: what heads select, how one answer came about, what leaks; and all of a report."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dhlens.render.answers import CHOOSERS, answer_curves, answer_points
from dhlens.render.conditions import styles
from dhlens.render.draw import BLUE, GREEN, GREY, ORANGE, WIDTH, curve, need, one, tick

_BANDED = ("predicted", "static", "oracle", "by step")


def selection_curves(selection: pd.DataFrame) -> Figure:
    """Share of the supporting facts shown whole against the number of visible tokens, a curve per policy.

    `selection` has policy, visible (tokens), facts, facts_low and facts_high; ticks are its budgets, where it has them.
    The fitted policies and the oracle have a band.

    Raises:
        ValueError: a column is missing.
    """
    need(selection, "policy", "visible", "facts")
    figure, axes = one()
    for name, (color, marker) in styles(selection["policy"], CHOOSERS).items():
        rows = selection.loc[selection["policy"] == name].sort_values("visible")
        bounds = ("facts_low", "facts_high") if name in _BANDED else None
        curve(axes, rows, "visible", "facts", label=name, color=color, style=f"{marker}-", bounds=bounds)
    axes.set_xscale("log", base=2)
    ticks = sorted({round(v) for v in selection["budget" if "budget" in selection else "visible"]})
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.set(xlabel="visible tokens of the context", ylabel="supporting facts shown whole", ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.set_figwidth(WIDTH + 1.4)
    return figure


def timeline(question: pd.Series, events: pd.DataFrame) -> Figure:
    """How one answer came about: each thing written with its tokens' entropy, and what was visible for it.

    Over a draft stand the values of its trigger and their threshold, where it has them, and a line where the answer
    went back to look something up.

    Args:
        question: a row of `Rag.questions`.
        events: the rows of `Rag.events` of that question and one arm, in order.

    Raises:
        ValueError: a column is missing, or there is no event.
    """
    need(events, "kind", "step", "kept", "pieces", "entropy", "windows")
    if events.empty:
        raise ValueError("a timeline needs the events of one question in one arm, got none")
    n = len(events)
    longest = max(len(pieces) for pieces in events["pieces"])
    width = min(max(WIDTH, 1.6 + 0.27 * longest), 12)
    figure = Figure(figsize=(width, 1.75 * n + 1.1), layout="constrained")
    grid = figure.subplots(n + 1, 1, squeeze=False, height_ratios=[1.75] * n + [0.6])[:, 0]
    written = events.to_dict("records")
    drawn = np.array([0.0, 1.0, *(height for event in written for height in (*event["entropy"], *_compared(event)))])
    for axes, event in zip(grid, written, strict=False):
        _written(axes, event, longest, (np.nanmin(drawn), 1.05 * np.nanmax(drawn)))
    _ribbon(grid[-1], question, events)
    asked, right = str(question["question"]), f"right answer: {question['answer']}"
    figure.suptitle(f"{tick(asked, 96)}\n{tick(right, 96)}", fontsize=9)
    return figure


def leak_curves(leak: pd.DataFrame) -> Figure:
    """How far the first token's distribution moves when hidden tokens are replaced, a curve per visibility.

    `leak` has visibility, share (of the hidden tokens; 0 stands for a single one) and kl in nats. Each question is a
    faint point. A visibility that lets nothing through lies on the floor.

    Raises:
        ValueError: a column is missing.
    """
    need(leak, "visibility", "share", "kl")
    figure, axes = one()
    shares = sorted(leak["share"].unique())
    floor = 1e-9
    for name, color, style in zip(leak["visibility"].unique(), (BLUE, ORANGE), ("o-", "s-"), strict=False):
        rows = leak.loc[leak["visibility"] == name]
        at = rows["share"].map(shares.index).to_numpy()
        axes.plot(at, rows["kl"].clip(lower=floor), style[0], color=color, alpha=0.25, ms=4, lw=0)
        means: pd.Series = rows.groupby("share")["kl"].mean().clip(lower=floor)
        axes.plot(range(len(shares)), means.to_numpy(), style, color=color, label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(shares)), ["one" if s == 0 else f"{s:.0%}" for s in shares])
    axes.set(xlabel="hidden tokens replaced", ylabel=f"KL of the next token (nats; {floor:g}: none)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def recall_curves(summary: pd.DataFrame) -> Figure:
    """Share of the gold passages among the first ones, a curve per ranking, with bands for BM25 and query heads.

    `summary` has ranking, passages (how many come first), recall, low and high.

    Raises:
        ValueError: a column is missing.
    """
    need(summary, "ranking", "passages", "recall")
    figure, axes = one()
    for name, (color, marker) in styles(summary["ranking"], (*CHOOSERS[:2], "bm25", "query", *CHOOSERS[4:6])).items():
        rows = summary.loc[summary["ranking"] == name].sort_values("passages")
        bounds = ("low", "high") if name in ("bm25", "predicted", "query") else None
        curve(axes, rows, "passages", "recall", label=name, color=color, style=f"{marker}-", bounds=bounds)
    axes.set_xscale("log", base=2)
    ticks = sorted(set(summary["passages"]))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="passages that come first", ylabel="gold passages among them", ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.set_figwidth(WIDTH + 1.4)
    return figure


def rag_pictures(tables: Mapping[str, pd.DataFrame], *, budget: int) -> dict[str, tuple[Figure, str]]:
    """Title to figure and caption; a picture that would have nothing to show is left out.

    `tables` are those of `dhlens.recipes.rag`.
    """
    found: dict[str, tuple[Figure, str]] = {
        "What the heads find": (
            selection_curves(tables["selection"]),
            "At the first token of the answer, before anything is generated; bands are 95 % intervals over questions. "
            f"The primary contrast is taken at {budget} tokens.",
        ),
        "What answers gain": (
            answer_points(tables["summary"]),
            "none, full and gold are references: nothing, all and the supporting facts visible throughout.",
        ),
    }
    found["What visible text is worth"] = (
        answer_curves(tables["summary"]),
        "F1 against visible tokens, with 95 % intervals over questions; dotted, the references. Policies at one number "
        "of tokens are drawn side by side.",
    )
    if example := _example(tables):
        question, events, arm = example
        found["One answer"] = (
            timeline(question, events),
            f"{arm}. Bars are the entropy of each token's distribution; pale is what was not kept. Diamonds, where "
            "there are some, are what the trigger compares with its threshold (dashed), orange above it; the orange "
            "line is where the answer went back. Below, the documents of the context, the supporting facts in green, "
            "and the windows of each lookup in orange.",
        )
    if "leak" in tables:
        found["What hidden text still says"] = (
            leak_curves(tables["leak"]),
            "Hidden tokens are replaced by others of the context. Behind a clean prefill (mask_decode) visible tokens "
            "have read them; under a mask of every row nothing is left.",
        )
    return found


def _compared(event: Mapping[str, Any]) -> list[float]:
    """The trigger's threshold and values; [] where there are none, as in what was looked up and in older runs."""
    values = event.get("values")
    if values is None or not np.size(values) or np.ndim(values) != 1:
        return []
    return [float(event["threshold"]), *map(float, values)]


def _written(axes: Axes, event: Mapping[str, Any], longest: int, within: tuple[Any, Any]) -> None:
    """One draft or sentence: a bar per token, pale where it was not kept."""
    pieces, entropy, kept = event["pieces"], event["entropy"], event["kept"]
    colors = [BLUE if i < kept else "#C9CED3" for i in range(len(pieces))]
    axes.bar(range(len(pieces)), entropy, color=colors, width=0.8)
    if compared := _compared(event):
        threshold, *values = compared
        hit = [ORANGE if value > threshold else GREY for value in values]
        axes.scatter(range(len(pieces)), values, c=hit, marker="D", s=14, zorder=3)
        if np.isfinite(threshold):
            axes.axhline(threshold, color=GREY, ls="--", lw=0.8)
    if event["kind"] == "draft" and kept < len(pieces):
        axes.axvline(kept - 0.5, color=ORANGE, lw=1.5)
    axes.set(xlim=(-0.6, longest - 0.4), ylim=within, ylabel="nats")
    axes.set_xticks(range(len(pieces)), [tick(p) for p in pieces], rotation=60, ha="right", fontsize=7)
    for label in axes.get_xticklabels()[kept:]:
        label.set_color(GREY)
    what = "draft" if event["kind"] == "draft" else "written anew with what was looked up"
    axes.set_title(f"{what}, from token {event['step']} on, {kept} of {len(pieces)} kept", fontsize=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _ribbon(axes: Axes, question: pd.Series, events: pd.DataFrame) -> None:
    """The context: documents, facts, and a row of windows for each lookup."""
    start, stop = question["context"]
    looks = [windows for windows in events["windows"] if len(windows)]
    for i, (a, b) in enumerate(question["documents"]):
        axes.axvspan(a, b, color="#ECEFF1" if i % 2 else "#DDE2E6", lw=0)
    for a, b in question["facts"]:
        axes.axvspan(a, b, color=GREEN, alpha=0.6, lw=0, zorder=3)
    for row, windows in enumerate(looks):
        axes.broken_barh([(a, b - a) for a, b in windows], (-row - 0.85, 0.7), color=ORANGE, alpha=0.85)
    axes.set(xlim=(start, stop), ylim=(-max(len(looks), 1), 0.15), yticks=[], xlabel="position in the prompt (tokens)")


def _example(tables: Mapping[str, pd.DataFrame]) -> tuple[pd.Series, pd.DataFrame, str] | None:
    """The question and arm of best F1 that looked something up, with its events."""
    looked = tables["answers"].loc[tables["answers"]["retrievals"] > 0]
    if looked.empty:
        return None
    best = looked.sort_values("f1", ascending=False, kind="stable").iloc[0]
    arm = ["trigger", "visibility", "policy"]
    events = tables["events"]
    same = (events[["episode", *arm]] == best[["episode", *arm]]).all(axis=1)
    question = tables["questions"].set_index("episode").loc[best["episode"]]
    return question, events.loc[same].sort_values("event"), ", ".join(best[name] for name in arm)
