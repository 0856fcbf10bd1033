"""Tokens with known spans: what a task hands to the engine, and what the model made of it.

Every task (needle, HotpotQA, contracts) yields `Episode`s; the engine yields an `Outcome` for each.
Positions are token positions in the prompt, half-open, counted from 0.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from torch import Tensor

RESERVED_SPANS = ("prompt", "all")
"""Span names that a Trace computes for every episode: all prompt keys, and all keys."""


@runtime_checkable
class Tokenizer(Protocol):
    """What tasks need of a Hugging Face fast tokenizer."""

    def __call__(self, text: str, **kwargs: Any) -> Any:
        """Tokenise `text`."""
        ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """The text of token ids."""
        ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render chat messages."""
        ...


@dataclass(frozen=True)
class Span:
    """A named run of prompt tokens, `start <= position < stop`.

    Raises:
        ValueError: the span is empty or starts before 0.
    """

    name: str
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"span {self.name!r} must hold 0 <= start < stop, got {self.start}..{self.stop}")

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Episode:
    """One prompt with its known answer.

    Raises:
        ValueError: the id cannot name a file, the prompt is empty, or a span is doubled, reserved or leaves it.
    """

    id: str
    """Unique within a run; names the shard file, so letters, digits, `-`, `_`, `.` and `=` only."""
    tokens: Int[Tensor, " prompt"]
    """Int[prompt]: the whole prompt, special tokens included."""
    answer: Int[Tensor, " answer"]
    """Int[answer]: the reply that is right, tokenised as the model would write it; may be empty."""
    spans: tuple[Span, ...] = ()
    """Named token spans: "needle", "answer", "question", "haystack", "fact_0", "doc_3"."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """JSON values. "group" names the independent unit (haystack window) for intervals; "answer_text" is judged."""

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if not re.fullmatch(r"[\w=-][\w.=-]*", self.id):
            raise ValueError(f"an episode id is made of letters, digits, '-', '_', '.' and '=', got {self.id!r}")
        if n == 0:
            raise ValueError(f"episode {self.id!r} must have at least one prompt token")
        names = [span.name for span in self.spans]
        for span in self.spans:
            if names.count(span.name) > 1 or span.name in RESERVED_SPANS:
                raise ValueError(f"episode {self.id!r}: span name {span.name!r} is doubled or reserved")
            if span.stop > n:
                raise ValueError(f"episode {self.id!r}: span {span.name!r} ends at {span.stop}, the prompt at {n}")

    @property
    def group(self) -> str:
        """The independent unit this episode belongs to; the episode itself where the task named none."""
        return str(self.meta.get("group", self.id))

    def span(self, name: str) -> Span:
        """The span called `name`.

        Raises:
            ValueError: there is none.
        """
        for span in self.spans:
            if span.name == name:
                return span
        known = ", ".join(span.name for span in self.spans) or "none"
        raise ValueError(f"episode {self.id!r} has no span {name!r}; it has: {known}")

    def has(self, name: str) -> bool:
        """Whether a span is called `name`."""
        return any(span.name == name for span in self.spans)

    def judge(self, text: str) -> bool | None:
        """Whether `text` contains the whole answer (the paper's accuracy); None where the answer is not known."""
        answer = self.meta.get("answer_text")
        return None if answer is None else str(answer) in text


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a model generated for an episode."""

    tokens: Int[Tensor, " step"]
    """Int[step]: the generated ids, the stop token included."""
    text: str
    """The generated text without the stop token."""
    correct: bool | None
    """`Episode.judge(text)`; None where nothing was said."""
    stopped: Literal["stop_token", "max_new_tokens", "given"]
    """Why generation ended; "given" where tokens without a stop token were handed in to be replayed."""


def split_groups(groups: Iterable[str], fraction: float, *, seed: int) -> set[str]:
    """`fraction` of the groups, drawn; at least one and not all of them.

    Raises:
        ValueError: `fraction` is not within 0..1, or there are not two groups to part.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    names = sorted(set(groups))
    if len(names) < 2:
        raise ValueError(f"a split by group needs at least 2 groups (haystack windows), got {len(names)}")
    order = np.random.default_rng(seed).permutation(len(names))
    n_first = min(max(round(fraction * len(names)), 1), len(names) - 1)
    return {names[i] for i in order[:n_first]}


def split_episodes(episodes: Sequence[Episode], fraction: float, *, seed: int) -> tuple[list[Episode], list[Episode]]:
    """Two lists with disjoint groups; the first gets `fraction` of the groups. The split of `Trace.split`.

    Raises:
        ValueError: see `split_groups`.
    """
    first = split_groups((e.group for e in episodes), fraction, seed=seed)
    return [e for e in episodes if e.group in first], [e for e in episodes if e.group not in first]
