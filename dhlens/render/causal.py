"""The exact causal map beside the heads that attention calls dynamic, head x step. Use it as `figures.causal_raster`.

Two panels with the same rows and columns: what the next token depends on, and what looks at the token that is copied.
Their agreement in numbers is `dhlens.agreement`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from dhlens.heads import Head, head_name
from dhlens.render.draw import BLUE, WIDTH, tick

_DECADES = 4


def causal_raster(
    kl: Float[Tensor, "step layer head"],
    active: Bool[Tensor, "step layer head"],
    tokens: Sequence[str],
    *,
    max_heads: int = 40,
) -> Figure:
    """One-step KL of taking away each single head (log colour), and the heads that are active by attention.

    Args:
        kl: effect of each head at each step, nats; what is under a ten-thousandth of the largest has its palest colour.
        active: the dynamic heads.
        tokens: text of the token emitted at each step.
        max_heads: most rows: the heads of largest KL anywhere and those active at most steps, taken by turns; they
            stand in the order of layers, and the title counts the others.

    Raises:
        ValueError: arrays of different shapes, tokens that do not name every step, NaN, or nothing to draw: no head
            ever has an effect or is active.
    """
    effects, found = _checked(kl, active, tokens)
    shown, total = _that_matter(effects, found, max_heads)
    if not shown:
        raise ValueError("a causal raster needs a head with an effect or an active head, got none")
    rows = tuple(np.array(shown).T)
    effects, found = effects[:, *rows].T, found[:, *rows].T
    size = (max(WIDTH, 1.3 + 2 * 0.145 * len(tokens)), 2.3 + 0.15 * max(len(shown), 4))
    figure = Figure(figsize=size, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    _effects(left, effects)
    row, step = found.nonzero()
    right.scatter(step, row, marker="s", s=30, c=BLUE, linewidths=0)
    right.set_title("dynamic heads, by attention", fontsize=9)
    right.grid(color="#E6E8EA", linewidth=0.5)
    right.set_axisbelow(True)
    right.tick_params(left=False)
    for axes in (left, right):
        _frame(axes, tokens, shown)
    left.set_ylabel(f"head ({len(shown)} of {total})")
    figure.supxlabel("generation step (emitted token)", fontsize=10)
    return figure


def _checked(kl: Tensor, active: Tensor, tokens: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    if kl.shape != active.shape or len(tokens) != len(kl):
        raise ValueError(
            f"kl and active must be of one shape with a token per step, got {tuple(kl.shape)}, {tuple(active.shape)} "
            f"and {len(tokens)} tokens"
        )
    effects = kl.detach().double().cpu().numpy()
    if np.isnan(effects).any():
        raise ValueError("kl must be numbers, got NaN")
    return effects, active.cpu().numpy()


def _that_matter(effects: np.ndarray, found: np.ndarray, most: int) -> tuple[list[Head], int]:
    """The heads to show, by layer and head, and how many the model has; arrays are [step layer head]."""
    peak, often = effects.max(0, initial=0), found.sum(0)
    place = np.minimum(_places(peak), _places(often))
    place[(peak <= 0) & (often == 0)] = place.size
    order = np.argsort(place, axis=None, kind="stable")[:most]
    kept = [divmod(int(i), place.shape[1]) for i in np.sort(order) if place.flat[i] < place.size]
    return kept, place.size


def _places(values: np.ndarray) -> np.ndarray:
    """Rank of each value from the largest, 0; those of no value stand last."""
    places = np.empty(values.size, dtype=int)
    places[np.argsort(-values, axis=None, kind="stable")] = np.arange(values.size)
    return np.where(values > 0, places.reshape(values.shape), values.size)


def _effects(axes: Axes, effects: np.ndarray) -> None:
    """The KL of each head (row) at each step, with its colour bar above."""
    peak = effects.max() or 1.0
    norm = LogNorm(vmin=peak / 10**_DECADES, vmax=peak)
    image = axes.imshow(effects, cmap="Blues", norm=norm, aspect="auto", interpolation="nearest")
    bar = axes.figure.colorbar(
        image, ax=axes, location="top", aspect=max(12, 0.9 * effects.shape[1]), pad=0.01, extend="min"
    )
    bar.set_label("KL without the head (nats)", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _frame(axes: Axes, tokens: Sequence[str], shown: Sequence[Head]) -> None:
    axes.set_xticks(range(len(tokens)), [tick(t) for t in tokens], rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(shown)), [head_name(h) for h in shown], fontsize=8)
    axes.set_xlim(-0.5, len(tokens) - 0.5)
    axes.set_ylim(len(shown) - 0.5, -0.5)
