"""Reasoning heads in pictures and words: where they are, when they look at the facts, and whether they copy needles."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dhlens.compare import Comparison, tops
from dhlens.heads import HeadSet, head_name
from dhlens.render.draw import BLUE, GREY, INK, ORANGE, WIDTH, curve, need, one, whole_ticks
from dhlens.render.grids import answer_grids
from dhlens.render.overlap import overlap_map
from dhlens.scores import Score

Pictures = dict[str, tuple[Figure, str]]
_SCORES = {
    "reasoning": "mean reasoning mass",
    "attention": "mean attention on facts",
    "copying": "copying on needles (share of steps)",
    "query": "QRHead's score",
}
_COLUMNS = (
    "heads_per_step",
    "empty_share",
    "activated",
    "jaccard_static_20",
    "coverage_20",
    "jaccard_over_max_20",
    "jaccard_adjacent",
    "jaccard_adjacent_shuffled",
    "entropy",
)


def mass_raster(score: Score, episode: int = 0, *, static: HeadSet | None = None, max_heads: int = 40) -> Figure:
    """Reasoning mass of each head at each step of one answer, as shade; the heads of largest mean mass there.

    Args:
        score: a score of values with a trace.
        episode: index into `score.trace.episodes`.
        static: heads whose names are set in bold.
        max_heads: most rows.

    Raises:
        ValueError: the score has no steps, or there is no such episode.
    """
    trace = score.trace
    if trace is None or not 0 <= episode < len(trace.episodes):
        raise ValueError(f"a raster needs a score with a trace and one of its episodes, got number {episode}")
    values = score.values[(trace.episode == episode) & (trace.step >= 0)].numpy()
    means = values.mean(0)
    best = np.sort(np.argsort(-means.ravel(), kind="stable")[:max_heads])
    heads = [divmod(int(i), score.shape[1]) for i in best]
    figure = Figure(figsize=(max(WIDTH, 1.9 + 0.17 * len(values)), 1.4 + 0.15 * len(heads)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values.reshape(len(values), -1)[:, best].T, cmap="cividis", aspect="auto", vmin=0)
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.01, label="reasoning mass")
    axes.set_title(f"Episode {trace.episodes[episode].id}: {len(heads)} heads", loc="left", fontsize=10)
    axes.set_yticks(range(len(heads)), [head_name(h) for h in heads], fontsize=7)
    for text, head in zip(axes.get_yticklabels(), heads, strict=True):
        text.set_fontweight("bold" if static is not None and head in static else "normal")
    axes.set_xlabel("generation step", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def score_maps(heads: pd.DataFrame, *, k: int = 20) -> Figure:
    """Layer by head, a panel per score; the `k` best heads of each are marked.

    `heads` has layer, head and any of reasoning, attention, copying and query.

    Raises:
        ValueError: a column is missing, or there is no score.
    """
    need(heads, "layer", "head")
    shown = [name for name in _SCORES if name in heads]
    if not shown:
        raise ValueError(f"maps need a column of {', '.join(_SCORES)}, got none")
    shape = len(set(heads["layer"])), len(set(heads["head"]))
    size = (len(shown) * (1.3 + 0.11 * shape[1]), 1.0 + 0.14 * shape[0])
    figure = Figure(figsize=(max(WIDTH, size[0]), max(2.6, size[1])), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        grid = heads.pivot(index="layer", columns="head", values=name).to_numpy(dtype=float)
        image = axes.imshow(grid, cmap="cividis", aspect="auto", vmin=min(0.0, grid.min()))
        best = tops(grid.ravel(), min(k, grid.size)).reshape(grid.shape)
        layer, head = best.nonzero()
        axes.scatter(head, layer, s=16, facecolors="white", edgecolors=INK, linewidths=0.9)
        bar = figure.colorbar(image, ax=axes, location="top", shrink=0.9)
        bar.ax.tick_params(labelsize=7)
        bar.set_label(_SCORES[name], fontsize=8)
        axes.set_xlabel("head", fontsize=8)
        whole_ticks(axes)
    figure.axes[0].set_ylabel("layer")
    figure.supxlabel(f"circles: the {k} heads of largest score", fontsize=8)
    return figure


def step_curves(steps: pd.DataFrame) -> Figure:
    """Mean mass of all and of static heads at each step of the answers, with 95 % bands.

    Raises:
        ValueError: a column is missing.
    """
    need(steps, "step", "heads", "value", "low", "high")
    figure, axes = one()
    for name, colour, style in (("static", ORANGE, "s-"), ("all", BLUE, "o-")):
        part = steps.loc[steps["heads"] == name]
        curve(axes, part, "step", "value", label=f"{name} heads", color=colour, style=style, bounds=("low", "high"))
    axes.set(xlabel="generation step", ylabel="mean reasoning mass", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    return figure


def share_points(outcomes: pd.DataFrame) -> Figure:
    """Mean mass of a question's static and of all heads against the share of its text that is facts.

    Raises:
        ValueError: a column is missing.
    """
    need(outcomes, "share", "mass", "mass_static")
    figure, axes = one()
    for name, colour, marker in (("mass_static", ORANGE, "s"), ("mass", BLUE, "o")):
        label = "static heads" if name == "mass_static" else "all heads"
        axes.plot(outcomes["share"], outcomes[name], marker, color=colour, ms=4, alpha=0.7, label=label)
    end = float(outcomes["share"].to_numpy().max())
    axes.plot([0, end], [0, end], "--", color=GREY, lw=1, label="even attention")
    axes.set(xlabel="share of the text that is facts", ylabel="mean reasoning mass", ylim=(0, None))
    axes.legend(frameon=False, fontsize=9)
    return figure


def side_by_side(dynamics: pd.DataFrame) -> pd.DataFrame:
    """A row per set of heads with its threshold and main measures, intervals in brackets."""
    rows = []
    for name in dynamics["heads"].unique():
        part = dynamics.loc[dynamics["heads"] == name].set_index("metric")
        threshold = float(part["threshold"].iloc[0])
        row: dict[str, Any] = {"heads": name, "threshold": "" if np.isnan(threshold) else f"{threshold:.3f}"}
        for metric in _COLUMNS:
            if metric in part.index:
                value, low, high = part.loc[metric, ["value", "low", "high"]].astype(float)
                row[metric] = f"{value:.3g}" + ("" if np.isnan(low) else f" [{low:.3g}, {high:.3g}]")
        rows.append(row)
    return pd.DataFrame(rows)


def in_words(tables: Mapping[str, pd.DataFrame], threshold: float) -> list[str]:
    """What was asked and what came out, in sentences."""
    return [*_answers(tables["outcomes"]), *_sizes(tables["dynamics"], threshold), *_alike(tables)]


def _answers(outcomes: pd.DataFrame) -> Iterator[str]:
    judged = outcomes.dropna(subset=["f1"])
    said = f": F1 {judged['f1'].mean():.3f}, exact matches {judged['em'].mean():.0%}" if len(judged) else ""
    yield f"{len(outcomes)} questions, {outcomes['group'].nunique()} of them independent{said}."
    held = outcomes.loc[~outcomes["fitted"].astype(bool)]
    if len(held):
        share, mass, static = (float(held[c].mean()) for c in ("share", "mass", "mass_static"))
        yield (
            f"Facts are {share:.1%} of the text outside sink and local window; of the attention there all heads give "
            f"them {mass:.1%}, the static top 20 {static:.1%} (questions that these were not fitted on)."
        )


def _sizes(dynamics: pd.DataFrame, threshold: float) -> Iterator[str]:
    def of(name: str) -> Any:
        return dynamics.loc[dynamics["heads"] == name].set_index("metric")["value"]

    mine = of("reasoning")
    size = f"{mine['heads_per_step']:.1f} heads a step on the questions that it was not fitted on"
    needles = of("copying") if "copying" in set(dynamics["heads"]) else None
    aim = "20 heads a step" if needles is None else f"the {needles['heads_per_step']:.1f} that copy on needles"
    yield (
        f"The threshold {threshold:.3f} is fitted to {aim}; it gives {size}; "
        f"{mine['empty_share']:.0%} of these steps have none."
    )
    for name, found in (("Reasoning", mine), ("Copying", needles)):
        if found is not None:
            yield (
                f"{name} heads from step to step: Jaccard {found['jaccard_adjacent']:.2f}, with each answer's steps "
                f"shuffled {found['jaccard_adjacent_shuffled']:.2f}; {found['activated']:.0f} of "
                f"{found['total_heads']:.0f} heads ever, of the active {found['coverage_20']:.0%} in the static top 20."
            )


def _alike(tables: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    ranks = {(r["a"], r["b"]): r["spearman"] for r in tables["ranks"].to_dict("records")}
    for row in tables["overlap"].to_dict("records"):
        pair = (row["a"], row["b"])
        if pair in ranks:
            yield (
                f"{pair[0]} and {pair[1]}: {row['both']} of {row['size_a']} and {row['size_b']} static heads in "
                f"common, Jaccard {row['jaccard']:.2f} (chance {row['jaccard_chance']:.2f}); ranks of all heads "
                f"{ranks[pair]:.2f} (Spearman)."
            )


def reasoning_pictures(tables: Mapping[str, pd.DataFrame], score: Score, threshold: float) -> Pictures:
    """Title to figure and caption; a picture that would have nothing to show is left out.

    `tables` are those of `dhlens.recipes.reason`, `score` the reasoning mass of its trace.
    """
    heads, outcomes = tables["heads"], tables["outcomes"]
    assert score.trace is not None
    static = HeadSet(heads.loc[heads["in_static_20"], ["layer", "head"]].to_numpy().tolist(), score.shape)
    held = outcomes.loc[~outcomes["fitted"].astype(bool) & outcomes["mass"].notna()]
    candidates = held if len(held) else outcomes
    shown = int(candidates.index[candidates["f1"].fillna(0).to_numpy().argmax()])
    found: Pictures = {
        "One answer": (
            mass_raster(score, shown, static=static),
            "Share of the attention outside sink and local window that rests on the supporting facts. Bold: static "
            f"top 20, fitted on other questions. Above {threshold:.2f} a head counts as reasoning.",
        ),
        "Where the heads are": (score_maps(heads, k=len(static)), f"Circles: the best {len(static)} of each score."),
        "From step to step": (step_curves(tables["steps"]), "Bands are 95 % intervals over questions."),
        "Beside even attention": (
            share_points(candidates),
            "Each question as two points; a head that spreads its attention evenly lies on the line.",
        ),
    }
    found["How alike"] = (
        overlap_map(_comparison(tables, heads, score.shape)),
        "Reasoning: Eq. 2; attention: the same without its denominator. In italics: how well a score agrees with "
        "itself between halves of its groups.",
    )
    placed = outcomes.dropna(subset=["length", "depth"])
    for value, title, what in (("f1", "Answers", "F1"), ("mass", "Mass", "Mean reasoning mass, all heads,")):
        judged = placed.dropna(subset=[value])
        if len(judged):
            caption = f"{what} by length of the prompt and mean place of the facts in the context."
            found[f"{title} by length and depth"] = (answer_grids(judged, value), caption)
    return found


def _comparison(tables: Mapping[str, pd.DataFrame], heads: pd.DataFrame, shape: tuple[int, int]) -> Comparison:
    """The comparison that the tables were taken from."""
    k = int(tables["methods"]["size"].to_numpy().max())
    sets = {}
    for name in tables["methods"]["name"]:
        best = tops(heads[name].to_numpy(dtype=float).round(12), k)
        sets[name] = HeadSet(heads.loc[best, ["layer", "head"]].to_numpy().tolist(), shape)
    return Comparison(k, sets, tables["methods"], tables["overlap"], tables["ranks"])
