"""The head x step raster: which head fires at which generation step of one episode. Use it as `figures.raster`."""

from collections.abc import Sequence
from numbers import Integral

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dhlens.heads import Head, HeadSet, head_name
from dhlens.render.check import expect, heads_of, texts_only
from dhlens.render.crop import at_least
from dhlens.render.draw import BLUE, GREY, ORANGE, WIDTH, tick
from dhlens.scores import Score


def raster(
    score: Score,
    episode: int = 0,
    *,
    static: HeadSet | None = None,
    tokens: Sequence[str] | None = None,
    max_heads: int = 48,
    threshold: float = 0.0,
) -> Figure:
    """Which head fires at which generation step of one episode; heads that never fire there have no row.

    Args:
        score: a score with a trace.
        episode: index into `score.trace.episodes`.
        static: heads to set apart, by shape and colour.
        tokens: text of the token emitted at each step.
        max_heads: most rows; the heads that fire most often stay, and the title counts the others.
        threshold: a head fires above this value.

    Raises:
        ValueError: the score has no steps, there is no such episode, `static` is of another model shape, `tokens` does
            not name every step, or `max_heads` is not positive.
        TypeError: an argument is something else.
    """
    expect(Score, score=score)
    expect(Integral, episode=episode, max_heads=max_heads)
    at_least(1, max_heads=max_heads)
    trace = score.trace
    if trace is None:
        raise ValueError(f"a raster needs a score with a trace; {score.name!r} was made without steps")
    if not 0 <= episode < len(trace.episodes):
        raise ValueError(f"episode must lie within 0..{len(trace.episodes) - 1}, got {episode}")
    if static is not None:
        heads_of(trace.shape, static=static)
    if tokens is not None:
        texts_only(tokens=tokens)
    rows = (trace.episode == episode) & (trace.step >= 0)
    steps = trace.step[rows].numpy()
    if tokens is not None and len(tokens) != len(steps):
        raise ValueError(f"tokens must name the {len(steps)} steps of episode {episode}, got {len(tokens)}")
    fired = score.heads(threshold)[rows].numpy()
    shown, total = _most_active(fired, max_heads)
    size = (max(WIDTH, 1.6 + 0.17 * len(steps)), 1.5 + 0.17 * max(len(shown), 4))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for name, marker, colour, group in _groups(shown, static):
        marks = [(step, row) for row in group for step in steps[fired[:, shown[row][0], shown[row][1]]]]
        if marks:
            axes.scatter(*zip(*marks, strict=True), marker=marker, s=46, c=colour, linewidths=0, label=name)
    which = f"the {len(shown)} most active of {total} heads" if total > len(shown) else f"{total} heads fire"
    # on the left, as the labels of the axis: a phone shows a wide raster from there
    axes.set_title(f"Episode {trace.episodes[episode].id}: {which}", loc="left", fontsize=10, parse_math=False)
    _step_axis(axes, steps, tokens)
    _head_axis(axes, shown)
    if static is not None and shown:
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    return figure


def _most_active(fired: np.ndarray, most: int) -> tuple[list[Head], int]:
    """The heads to show, by layer and head, and how many fire in all; `fired` is Bool[step layer head]."""
    counts = fired.sum(0)
    heads = [(int(layer), int(head)) for layer, head in zip(*counts.nonzero(), strict=True)]
    return sorted(sorted(heads, key=lambda h: -counts[h])[:most]), len(heads)


def _groups(shown: Sequence[Head], static: HeadSet | None) -> list[tuple[str, str, str, list[int]]]:
    """Name, marker, colour and row numbers of the heads outside and inside the static set."""
    inside = [static is not None and h in static for h in shown]
    others = [row for row, x in enumerate(inside) if not x]
    marked = [row for row, x in enumerate(inside) if x]
    named = f"static ({len(marked)} of {len(static)} shown)" if static is not None else ""
    return [("other heads", "s", BLUE, others), (named, "D", ORANGE, marked)]


def _step_axis(axes: Axes, steps: np.ndarray, tokens: Sequence[str] | None) -> None:
    axes.set_xlim(-0.7, max([*steps, 0]) + 0.7)
    if tokens is None:
        axes.set_xlabel("generation step", loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    axes.set_xticks(steps, [tick(t) for t in tokens], rotation=90, fontsize=8, parse_math=False)
    axes.set_xlabel("generation step (emitted token)", loc="left")


def _head_axis(axes: Axes, shown: Sequence[Head]) -> None:
    axes.set_yticks(range(len(shown)), [head_name(h) for h in shown], fontsize=8)
    axes.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    axes.set_ylabel("head")
    axes.grid(color="#E6E8EA", linewidth=0.5)
    axes.set_axisbelow(True)
    if not shown:
        axes.text(0.5, 0.5, "no head fires in this episode", ha="center", transform=axes.transAxes, color=GREY)
