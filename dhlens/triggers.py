"""When to look things up: triggers read a draft and name the sentence that should not have been written unaided.

A trigger takes a `Draft` and returns the draft's token at which to go back, the first of a sentence, or None:

    rind = RIND(threshold=1.0)                    # uncertainty x influence x content word (DRAGIN)
    at = rind(draft)

`MeanEntropy` asks for the mean uncertainty of a sentence alone, `every_sentence` always looks up, `never` does not.
Your own is a function. If it has `values`, a number for each token, and a `threshold`, as `RIND` and `MeanEntropy`
have, they are drawn in an answer's timeline. No model is seen; cost: some text work on a few dozen tokens.

Source: Su et al. 2024 (DRAGIN, arXiv 2403.10081), section 3.1 and its published code; they differ, see `RIND`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from sentencex import segment  # pyright: ignore[reportAttributeAccessIssue] - compiled, without types
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Draft:
    """What a model would say next, and how it came to say it."""

    tokens: tuple[int, ...]
    """Token ids, the stop token left out."""
    text: str
    """Their text."""
    starts: tuple[int, ...]
    """Character of `text` at which each token starts."""
    entropy: Float[Tensor, " token"]
    """Float[token]: of the distribution that each token was taken from, in nats."""
    stopped: bool
    """Whether a stop token follows."""
    attention: Float[Tensor, "token token"] | None = None
    """Float[token token]: last layer, mean over heads, from each token (row) to those of the draft; None where it was
    not read."""
    alone: Float[Tensor, " token"] | None = None
    """Float[token]: last layer, largest weight from any row per head, mean over heads, of a pass over the generated
    text alone; None where it was not read."""

    def pieces(self) -> list[str]:
        """The text of each token."""
        ends = [*self.starts[1:], len(self.text)] if self.tokens else []
        return [self.text[a:b] for a, b in zip(self.starts, ends, strict=True)]

    def sentences(self) -> list[tuple[int, int]]:
        """Token runs of the sentences, half-open, in order; a token belongs to the sentence that it writes first."""
        found: list[tuple[int, int]] = []
        end, writes = 0, self._writes()
        for sentence in segment("en", self.text):
            end += len(sentence)
            first, stop = found[-1][1] if found else 0, sum(at < end for at in writes)
            if stop > first and (sentence.strip() or not found):
                found.append((first, stop))
        # white space behind the last sentence belongs to it
        return [*found[:-1], (found[-1][0], len(self.tokens))] if found else []

    def words(self) -> list[tuple[str, list[int]]]:
        """Words, each with the tokens that begin in it, in order."""
        found, writes = [], self._writes()
        for match in re.finditer(r"\S+", self.text):
            inside = [i for i, at in enumerate(writes) if match.start() <= at < match.end()]
            if inside:
                found.append((match.group(), inside))
        return found

    def _writes(self) -> list[int]:
        """The character that each token writes first, the space in front of a word left out."""
        parts = zip(self.starts, self.pieces(), strict=True)
        return [a + (len(p) - len(p.lstrip())) * bool(p.strip()) for a, p in parts]


Trigger = Callable[[Draft], int | None]
"""From a draft to the token at which to go back, or None."""


def is_content(word: str) -> bool:
    """Whether a word is no stop word and holds a letter or a digit."""
    bare = re.sub(r"^\W+|\W+$", "", word).lower()
    return bool(bare) and bare not in ENGLISH_STOP_WORDS


@dataclass(frozen=True)
class RIND:
    """Real-time information need: entropy x attention that later tokens pay x content word, above a threshold.

    `form="published"` is the paper's product for each token: entropy, times the largest weight that any later token
    of the draft puts on it (last layer, mean over heads), 0 for stop words. `form="coded"` is the authors' program:
    the attention comes from a pass over the generated text alone, where a token may look at itself, sub-tokens are
    merged to words (attention summed, entropy averaged), and a sentence's attention is scaled to a mean of 1. Their
    thresholds, .8 to 1.2 on HotpotQA, belong to that form.

    We depart from both in what a content word is: none of scikit-learn's stop words, where they ask a tagger; and from
    the program in leaving stop words out before the test, so that a sentence without a hit cannot trigger.

    Raises:
        ValueError: the form is neither, or the threshold is negative or no number.
    """

    threshold: float = 1.0
    form: str = "coded"

    def __post_init__(self) -> None:
        if self.form not in ("published", "coded"):
            raise ValueError(f"RIND is taken as 'published' or as 'coded', got {self.form!r}")
        _check_threshold(self.threshold)

    def __call__(self, draft: Draft) -> int | None:
        """The first token of the first sentence that holds a hit.

        Raises:
            ValueError: the draft comes without the attention that this form needs.
        """
        needs = draft.alone if self.form == "coded" else draft.attention
        if needs is None:
            raise ValueError(f"RIND as {self.form} needs the draft's attention, which was not read")
        return _first_hit(draft, self.values(draft) > self.threshold)

    def values(self, draft: Draft) -> Float[Tensor, " token"]:
        """What is compared with the threshold, for every token; a word's tokens share its value in the coded form."""
        return self._coded(draft) if self.form == "coded" else self._published(draft)

    def _published(self, draft: Draft) -> Float[Tensor, " token"]:
        assert draft.attention is not None
        later = draft.attention.tril(-1).amax(0) if len(draft.tokens) else draft.entropy
        content = draft.entropy.new_zeros(len(draft.tokens))
        for word, inside in draft.words():
            content[inside] = float(is_content(word))
        for i, piece in enumerate(draft.pieces()):
            content[i] *= any(c.isalnum() for c in piece)  # the full stop of "capital." is no content
        return draft.entropy * later * content

    def _coded(self, draft: Draft) -> Float[Tensor, " token"]:
        assert draft.alone is not None
        values = draft.entropy.new_zeros(len(draft.tokens))
        words = draft.words()
        for first, stop in draft.sentences():
            here = [(word, inside) for word, inside in words if first <= inside[0] < stop]
            weights = [draft.alone[inside].sum() for _, inside in here]
            for (word, inside), weight in zip(here, weights, strict=True):
                if is_content(word):
                    relative = weight / sum(weights) * len(here)
                    values[inside] = relative * draft.entropy[inside].mean()
        return values


@dataclass(frozen=True)
class MeanEntropy:
    """A sentence whose tokens have a mean entropy above the threshold, in nats.

    Raises:
        ValueError: the threshold is negative or no number.
    """

    threshold: float = 1.0

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def __call__(self, draft: Draft) -> int | None:
        """The first token of the first such sentence."""
        return _first_hit(draft, self.values(draft) > self.threshold)

    def values(self, draft: Draft) -> Float[Tensor, " token"]:
        """What is compared with the threshold: every token has the mean of its sentence."""
        values = draft.entropy.new_zeros(len(draft.tokens))
        for first, stop in draft.sentences():
            values[first:stop] = draft.entropy[first:stop].mean()
        return values


def every_sentence(draft: Draft) -> int | None:
    """The first token of the draft: each sentence is written anew with what was looked up for it."""
    return 0 if draft.tokens else None


def never(draft: Draft) -> int | None:
    """None."""
    return None


def reading(trigger: Trigger, draft: Draft) -> tuple[list[float], float]:
    """What a trigger compares with its threshold, token by token, and that; [] and NaN where it has no `values`.

    Raises:
        ValueError: its `values` do not give a finite number for each token, or its threshold is no number.
    """
    values: Any = getattr(trigger, "values", None)
    if not callable(values):
        return [], math.nan
    try:
        found = np.asarray(values(draft), dtype=float)
        threshold = float(getattr(trigger, "threshold", math.nan))
    except (TypeError, ValueError) as error:
        raise ValueError(f"values and threshold of the trigger {trigger!r} must be numbers: {error}") from error
    if found.shape != (len(draft.tokens),) or not np.isfinite(found).all():
        raise ValueError(
            f"values of the trigger {trigger!r} must be a finite number for each of the draft's {len(draft.tokens)} "
            f"tokens, got shape {found.shape}"
        )
    return found.tolist(), threshold


def check_trigger(trigger: Trigger) -> None:
    """Try the `values` of a trigger on a draft of two words.

    Raises:
        ValueError: see `reading`.
    """
    two = torch.ones(2)
    reading(trigger, Draft((0, 1), "Two words", (0, 3), two, stopped=True, attention=torch.eye(2), alone=two))


def _first_hit(draft: Draft, hits: Bool[Tensor, " token"]) -> int | None:
    """The first token of the first sentence that holds a hit."""
    return next((first for first, stop in draft.sentences() if bool(hits[first:stop].any())), None)


def _check_threshold(threshold: float) -> None:
    if not threshold >= 0:
        raise ValueError(f"a threshold must be a number, 0 or more, got {threshold}")
