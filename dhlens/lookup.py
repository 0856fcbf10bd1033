"""Look something up in the context: heads are chosen, their attention picks windows, and the windows become visible.

`ContextLookup` answers for one question, over its clean prompt: at any point of an answer a policy names heads from
the clean read there, as everywhere in dhlens, and `Windows` turns their mean attention, from the last token, into what
is shown. Looks and views are kept, since many ways to answer a question ask for the same ones. Cost of a look: one
hooked pass over the answer so far; of a view: its prefill (`dhlens.views`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dhlens.engine import observation_card
from dhlens.episode import Episode
from dhlens.heads import HeadSet
from dhlens.model import Model
from dhlens.policies import Policy, at_row, sites_of
from dhlens.reads import Capture
from dhlens.record import outcome_of, read_block, record
from dhlens.stream import HFStream
from dhlens.trace import Trace
from dhlens.triggers import Draft
from dhlens.views import View, hidden_in_decode, masked, spliced
from dhlens.windows import Windows, fact_recall, runs

VISIBILITIES = ("mask", "mask_decode", "concat")
"""How windows of a context become visible: `views.masked`, `views.hidden_in_decode`, `views.spliced`."""


@dataclass(frozen=True, eq=False)
class Found:
    """What was looked up."""

    view: View
    """The prompt that shows it."""
    heads: HeadSet
    """Whose attention chose it."""
    visible: int
    """Tokens of text shown."""
    facts: float
    """Share of the supporting facts shown whole."""
    fact_tokens: float
    """Share of the supporting facts' tokens shown."""
    windows: tuple[tuple[int, int], ...] = ()
    """Token runs of the prompt, half-open, where the text is part of it."""
    passages: tuple[str, ...] = ()
    """Ids of the passages, where it comes from a corpus."""


Lookup = Callable[[str, Sequence[int], Draft, int], Found]
"""Something to look things up in: from (policy, said so far, draft, its token to go back to) to what is found."""


class ContextLookup:
    """The context of one question."""

    def __init__(
        self,
        model: Model,
        full: HFStream,
        episode: Episode,
        policies: Mapping[str, Policy],
        *,
        windows: Windows,
        head: HFStream,
        joint: Sequence[int],
    ) -> None:
        """Keep what all looks share.

        Args:
            model: a loaded model.
            full: the clean prompt but for its last token.
            episode: the prompt, with the spans "context" and "fact_*".
            policies: who chooses heads, by name.
            windows: how attention becomes windows.
            head: the part of the prompt before the context.
            joint: tokens between windows that are put one behind the other.
        """
        self.episode, self.policies, self.windows = episode, policies, windows
        self._model, self._full, self._head, self._joint = model, full, head, joint
        self._states: dict[tuple[int, ...], Trace] = {}
        self._views: dict[tuple[str, tuple[tuple[int, int], ...]], View] = {}

    def through(self, visibility: str) -> Lookup:
        """Looking up, with what is found made visible in this way."""

        def lookup(policy: str, said: Sequence[int], draft: Draft, at: int) -> Found:
            heads = self.heads(policy, said)
            shown = self.windows(self.attention(heads, said), self.episode.span("context"))
            return self.found(visibility, shown & bool(len(heads)), heads)

        return lookup

    @property
    def shape(self) -> tuple[int, int]:
        """(n_layers, n_heads) of the model."""
        return self._model.shape

    def found(self, visibility: str, shown: Bool[Tensor, " prompt"], heads: HeadSet) -> Found:
        """Tokens of the context, made visible."""
        recalled, at = self.recalled(shown), tuple(runs(shown))
        return Found(view=self.view(visibility, shown), heads=heads, windows=at, **recalled)

    def recalled(self, shown: Bool[Tensor, " prompt"]) -> dict[str, Any]:
        """How much is shown, and how much of the facts: the fields visible, facts and fact_tokens of `Found`."""
        recall = fact_recall(shown, self.episode.spans)
        return {"visible": int(shown.sum()), "facts": recall.whole, "fact_tokens": recall.tokens}

    def view(self, visibility: str, shown: Bool[Tensor, " prompt"]) -> View:
        """The prompt with this much of its context."""
        context = self.episode.span("context")
        whole = bool(shown[context.start : context.stop].all())
        # all of it looks the same in every way
        key = ("mask_decode" if whole else visibility, tuple(runs(shown)))
        if key not in self._views:
            self._views[key] = self._view(key[0], shown)
        return self._views[key]

    def _view(self, visibility: str, shown: Bool[Tensor, " prompt"]) -> View:
        context = self.episode.span("context")
        visible = torch.ones(len(self.episode.tokens), dtype=torch.bool)
        visible[context.start : context.stop] = shown[context.start : context.stop]
        if visibility == "mask_decode":
            return hidden_in_decode(self._full, self.episode, visible)
        if visibility == "mask":
            return masked(self._model, self.episode, visible, head=self._head)
        assert visibility == "concat", visibility
        return spliced(self._model, self.episode, visible, within=context, joint=self._joint, head=self._head)

    def heads(self, policy: str, said: Sequence[int]) -> HeadSet:
        """The heads that a policy names behind `said`."""
        return at_row(self.policies[policy], self.state(said), len(said))

    def attention(self, heads: HeadSet, said: Sequence[int]) -> Float[Tensor, " prompt"]:
        """Mean attention of these heads from the last token on the prompt; zero without heads."""
        rows = self.state(said).rows
        assert rows is not None
        mean = rows[-1][heads.mask()].float().sum(0) / max(len(heads), 1)
        return mean[: len(self.episode.tokens)]

    def state(self, said: Sequence[int]) -> Trace:
        """The clean read of every step up to the one behind `said`, with whole attention rows."""
        key = tuple(said)
        if key not in self._states:
            capture = Capture(focus=(), rows=True).seeing(sites_of(self.policies.values()))
            fed = [int(self.episode.tokens[-1]), *key]
            block = read_block(self._model, self._full.fork(), torch.tensor([fed]), self.episode, capture)
            self._states[key] = record(
                self.episode,
                outcome_of(self._model, self.episode, key, given=True),
                observation_card(self._model, capture=capture),
                [block],
                next_tokens=[*key, int(block.logits[-1].argmax())],
                first=len(self.episode.tokens) - 1,
            )
        return self._states[key]
