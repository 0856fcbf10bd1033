"""Write an answer, and look up what the draft was unsure of: the loop of dynamic retrieval, for many arms at once.

(1) Draft on with what is visible. (2) The trigger names a sentence of the draft, or none: then the draft stands and the
answer ends. (3) Go back to that sentence's beginning and look up: heads, windows, a new view. (4) Write one sentence
under the new view, append it, and go on with (1), which still sees these windows.

Every arm (trigger, visibility, policy) goes through the same question; what arms share is drafted, looked up and
prefilled once. No arm can run on for ever: every round adds a token or ends the answer.

Source: arXiv 2602.11162, appendix, algorithms 1 and 2, after Su et al. 2024 (DRAGIN), whose program keeps the first
sentence written after a retrieval, as we do.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dhlens.lookup import Found, Lookup
from dhlens.model import Model
from dhlens.triggers import Draft, Trigger
from dhlens.views import View, generate


class Arm(NamedTuple):
    """One way to answer, by the names of its parts."""

    trigger: str
    visibility: str
    policy: str


@dataclass(frozen=True, eq=False)
class Event:
    """One thing that was written on the way to an answer."""

    step: int
    """Tokens said before it."""
    draft: Draft
    """What was written."""
    kept: int
    """How many of its tokens were kept."""
    found: Found | None
    """What had been looked up for it; None for a draft."""


@dataclass(eq=False)
class Answer:
    """An answer, and how it came about."""

    view: View
    """What is visible now."""
    said: list[int] = field(default_factory=list)
    """Token ids of the answer, the stop token left out."""
    done: bool = False
    events: list[Event] = field(default_factory=list)
    """In order; each is one call of the language model."""

    @property
    def lookups(self) -> list[Found]:
        """What was looked up, in order."""
        return [event.found for event in self.events if event.found is not None]

    def keep(self, draft: Draft, n: int, found: Found | None = None) -> None:
        """Say the first `n` tokens of a draft."""
        self.events.append(Event(len(self.said), draft, n, found))
        self.said += draft.tokens[:n]


def answer(
    model: Model,
    arms: Mapping[Arm, View],
    *,
    triggers: Mapping[str, Trigger],
    lookups: Mapping[str, Lookup],
    max_new_tokens: int,
    read: Collection[str] = (),
    batch: int = 16,
) -> dict[Arm, Answer]:
    """Answer one question in every arm.

    Args:
        model: a loaded model, see `views.check_views`.
        arms: to what is visible at first.
        triggers: by the name that arms have for them.
        lookups: where to look things up, by visibility; needed of arms whose trigger ever triggers.
        max_new_tokens: most tokens of an answer, the stop token included.
        read: what triggers need of a draft, see `views.generate`.
        batch: lanes decoded at once.
    """
    answers = {arm: Answer(view) for arm, view in arms.items()}
    while open_arms := [arm for arm, one in answers.items() if not one.done]:
        drafts = _written(model, [answers[arm] for arm in open_arms], max_new_tokens, read, batch)
        looked: dict[Arm, Found] = {}
        for arm, draft in zip(open_arms, drafts, strict=True):
            one, at = answers[arm], triggers[arm.trigger](draft)
            one.keep(draft, len(draft.tokens) if at is None else at)
            one.done = at is None
            if at is not None:
                looked[arm] = lookups[arm.visibility](arm.policy, one.said, draft, at)
                one.view = looked[arm].view
        written = _written(model, [answers[arm] for arm in looked], max_new_tokens, (), batch)
        for (arm, found), draft in zip(looked.items(), written, strict=True):
            one, sentences = answers[arm], draft.sentences()
            one.keep(draft, sentences[0][1] if sentences else 0, found)
            ended = draft.stopped and one.events[-1].kept == len(draft.tokens)
            one.done = ended or not sentences or len(one.said) >= max_new_tokens
    return answers


def _written(
    model: Model, answers: Sequence[Answer], max_new_tokens: int, read: Collection[str], batch: int
) -> list[Draft]:
    """How each answer goes on; equal answers under equal views are written once."""
    keys = [(id(one.view), tuple(one.said)) for one in answers]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    once = [answers[i] for i in sorted(first.values())]
    drafts = generate(
        model,
        [one.view for one in once],
        [one.said for one in once],
        max_new_tokens=[max_new_tokens - len(one.said) for one in once],
        read=read,
        batch=batch,
    )
    by_key = {(id(one.view), tuple(one.said)): draft for one, draft in zip(once, drafts, strict=True)}
    return [by_key[key] for key in keys]
