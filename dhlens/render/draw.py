"""What the figures share: colours, a curve with its band, the check of columns, text that the font can draw."""

from collections.abc import Container
from unicodedata import category

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8A8F94", "#22262A"
"""Okabe and Ito's blue, vermilion and green, and two neutrals."""
WIDTH = 5.2
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Controls, bidi and other format marks, lone surrogates and separators."""
_KEPT = "\n\r\t\u200c\u200d"


def coded(text: str, known: Container[int] | None = None) -> str:
    """`text` with what cannot be seen, or is not `known` to a font, as its code, `U+202E`; `∅` where there is no text.

    Line ends and tabs stay, and the joiners that emoji and Persian words are written with.
    """

    def shows(c: str) -> bool:
        return (c in _KEPT or category(c) not in _UNSEEN) and (known is None or ord(c) in known)

    return "".join(c if shows(c) else f"U+{ord(c):04X}" for c in text) or "∅"


def drawable(text: str) -> str:
    """`text` with white space made visible and each character that matplotlib's font lacks as its code, `U+4F60`."""
    visible = text.replace("\n", "↵").replace("\t", "⇥")
    visible = "␣" if visible.isspace() else visible.replace("\r", "").strip()
    return coded(visible, get_font(findfont(FontProperties())).get_charmap())


def tick(text: str, most: int = 12) -> str:
    """`drawable` text as a tick label, cut to `most` characters."""
    shown = drawable(text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def need(table: pd.DataFrame, *columns: str) -> None:
    """Refuse a table that lacks one of `columns`.

    Raises:
        ValueError: it does.
    """
    missing = [c for c in columns if c not in table]
    if missing:
        raise ValueError(f"the table must have the columns {', '.join(columns)}; it lacks {', '.join(missing)}")


def one() -> tuple[Figure, Axes]:
    """An empty figure of one panel."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    return figure, figure.add_subplot()


def curve(
    axes: Axes,
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    label: str,
    color: str,
    style: str,
    bounds: tuple[str, str] | None = None,
) -> None:
    """Draw column `y` against `x`, with a band where the table has both `bounds`."""
    axes.plot(table[x], table[y], style, color=color, label=label, ms=4)
    if bounds is not None and set(bounds) <= set(table.columns):
        low, high = (table[b].astype(float) for b in bounds)
        axes.fill_between(table[x], low, high, color=color, alpha=0.2, linewidth=0)


def whole_ticks(axes: Axes) -> None:
    """Ticks at whole numbers only, on both axes."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def binned(values: pd.Series, most: int = 12, bins: int = 8) -> np.ndarray:
    """The values, or the middles of `bins` equal bins where there are more than `most` different ones."""
    found = values.to_numpy(dtype=float)
    if len(np.unique(found)) <= most:
        return found
    edges = np.linspace(found.min(), found.max(), bins + 1)
    return ((edges[:-1] + edges[1:]) / 2)[np.searchsorted(edges[1:-1], found, side="right")]
