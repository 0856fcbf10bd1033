"""From attention to windows of text: what a reader may see of a long context.

    pick = Windows(reach=64, budget=256)
    shown = pick(attention, span)                  # Bool[prompt]: the windows, inside the span "context"
    fact_recall(shown, episode.spans)              # how much of the supporting facts they hold

Positions are gone through from the most looked at down. One that lies within `gap` tokens of a stronger one belongs to
its cluster and adds nothing; each other is shown with `reach` tokens on both sides, overlaps merged, until the budget
is used up. Compare selections at one budget: more text holds more facts, whoever chose it. Cost: one sort.

Source: arXiv 2602.11162, appendix (modified DRAGIN), which leaves peaks, gap and window open; a budget is ours.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dhlens.episode import Span


@dataclass(frozen=True)
class Windows:
    """How attention becomes windows.

    Raises:
        ValueError: a size is out of range, or neither peaks nor tokens are limited.
    """

    reach: int = 64
    """Tokens shown on each side of a peak."""
    budget: int | None = 256
    """Most tokens shown, the last window cut to it; None: as many as the peaks take."""
    peaks: int | None = None
    """Most positions gone through; None: until the budget is used up. The paper's k, for which we took 20."""
    gap: int = 16
    """Positions this near to a stronger one belong to its cluster."""

    def __post_init__(self) -> None:
        if self.reach < 0 or self.gap < 0:
            raise ValueError(f"reach and gap must be at least 0 tokens, got {self.reach} and {self.gap}")
        for name in ("budget", "peaks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1: with {value} nothing would be shown")
        if self.budget is None and self.peaks is None:
            raise ValueError("give a budget, peaks, or both: without either everything would be shown")

    def __call__(self, attention: Float[Tensor, " prompt"], within: Span) -> Bool[Tensor, " prompt"]:
        """The tokens of the windows: true inside `within` only, whatever rests on keys outside it.

        Equal weights go by position. With a budget and no limit of peaks exactly so many tokens are shown, or the
        whole span where it is shorter.

        Raises:
            ValueError: the span leaves the attention's keys.
        """
        if within.stop > len(attention):
            raise ValueError(f"span {within.name!r} ends at {within.stop}, the attention at {len(attention)}")
        order = attention[within.start : within.stop].argsort(descending=True, stable=True)
        shown = torch.zeros(len(within), dtype=torch.bool)
        left = len(within) if self.budget is None else min(self.budget, len(within))
        centres: list[int] = []
        for position in order[: self.peaks].tolist():
            if any(abs(position - centre) <= self.gap for centre in centres):
                continue
            centres.append(position)
            left -= self._show(shown, position, left)
            if not left:
                break
        # a gap wider than the reach leaves tokens between windows that no centre may show
        for position in order.tolist() if left and self.peaks is None else ():
            left -= self._show(shown, position, left)
            if not left:
                break
        whole = torch.zeros(len(attention), dtype=torch.bool)
        whole[within.start : within.stop] = shown
        return whole

    def _show(self, shown: Bool[Tensor, " span"], centre: int, room: int) -> int:
        """Show the window of one peak, its nearest tokens first, at most `room` new ones; how many they were."""
        around = torch.arange(max(centre - self.reach, 0), min(centre + self.reach + 1, len(shown)))
        new = around[~shown[around]]
        new = new[(new - centre).abs().argsort(stable=True)][:room]
        shown[new] = True
        return len(new)


class FactRecall(NamedTuple):
    """How much of the supporting facts is shown."""

    whole: float
    """Share of the facts that are shown to their last token."""
    tokens: float
    """Share of the facts' tokens."""


def fact_recall(shown: Bool[Tensor, " prompt"], spans: Iterable[Span], facts: str = "fact_*") -> FactRecall:
    """Recall of the spans whose names match `facts`, 0..1.

    Raises:
        ValueError: none does.
    """
    named = [span for span in spans if fnmatchcase(span.name, facts)]
    found, lengths = [shown[s.start : s.stop].float().mean().item() for s in named], [len(s) for s in named]
    if not found:
        raise ValueError(f"no span is called {facts!r}: without supporting facts there is nothing to recall")
    share = sum(part * n for part, n in zip(found, lengths, strict=True)) / sum(lengths)
    return FactRecall(sum(part == 1 for part in found) / len(found), share)


def runs(shown: Bool[Tensor, " prompt"]) -> list[tuple[int, int]]:
    """The windows as (start, stop), half-open and ascending."""
    edges = torch.diff(shown.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, stops = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return list(zip(starts, stops, strict=True))
