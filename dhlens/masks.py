"""Attention masks for rows that are not a plain continuation: shadow rows.

A shadow row is a second copy of a clean row of the same pass. It has the position of its original and sees the cached
prompt, the clean rows before its original, and itself - never the original or another shadow - so an edit of one
shadow row is an experiment of its own, and many of them share one pass. Masks are additive (0 or the dtype's minimum),
[1, 1, row, key], one for each window size that the model's layers use.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LayerMasks = Tensor | dict[str, Tensor]
"""What Hugging Face takes: one mask for all layers, or one per layer type."""


def shadow_positions(cached: int, n_clean: int, sources: Sequence[int]) -> Int[Tensor, "1 row"]:
    """Position ids of `n_clean` clean rows behind `cached` keys, then of shadow rows of the clean rows `sources`."""
    return torch.cat([torch.arange(n_clean), torch.tensor(list(sources), dtype=torch.long)])[None] + cached


def shadow_visible(
    cached: int, n_clean: int, sources: Sequence[int], window: int | None = None
) -> Bool[Tensor, "row key"]:
    """Which key each row sees, over the columns that a layer of this `window` holds.

    A windowed layer shows a row the keys whose position differs by less than `window`, and its cache holds
    min(cached, window - 1) columns.

    Raises:
        ValueError: a source is not one of the clean rows.
    """
    if any(not 0 <= s < n_clean for s in sources):
        raise ValueError(f"a shadow row copies one of the {n_clean} clean rows, got sources {sorted(set(sources))}")
    held = cached if window is None else min(cached, window - 1)
    query = shadow_positions(cached, n_clean, sources)[0]
    key = torch.cat([torch.arange(cached - held, cached), query])
    is_shadow = torch.arange(len(query)) >= n_clean
    fed_shadow = torch.cat([torch.zeros(held, dtype=torch.bool), is_shadow])
    itself = torch.cat(
        [torch.zeros(len(query), held, dtype=torch.bool), torch.eye(len(query), dtype=torch.bool)], dim=1
    )
    before = torch.where(is_shadow[:, None], key < query[:, None], key <= query[:, None])
    visible = (before & ~fed_shadow) | itself
    return visible if window is None else visible & (query[:, None] - key < window)


def additive(visible: Bool[Tensor, "row key"], dtype: torch.dtype) -> Float[Tensor, "1 1 row key"]:
    """0 where visible, the dtype's minimum elsewhere."""
    out = torch.zeros(visible.shape, dtype=dtype)
    return out.masked_fill(~visible, torch.finfo(dtype).min)[None, None]


def shadow_masks(
    cached: int, n_clean: int, sources: Sequence[int], *, windows: Sequence[int | None], dtype: torch.dtype
) -> LayerMasks:
    """The masks of a pass with shadow rows, for layers with these `windows` (None: full attention)."""
    by_window = {w: additive(shadow_visible(cached, n_clean, sources, w), dtype) for w in set(windows)}
    if len(by_window) == 1:
        return next(iter(by_window.values()))
    if len(by_window) > 2 or None not in by_window:
        raise ValueError(
            f"layers must share one sliding window beside full attention, got {sorted(map(str, by_window))}"
        )
    window = next(w for w in by_window if w is not None)
    return {"full_attention": by_window[None], "sliding_attention": by_window[window]}
