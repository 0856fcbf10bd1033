"""A context laid from pieces of text whose borders fall between tokens, so that every named stretch is an exact span.

`cut` tokenises neighbouring texts as one where it can, and each by itself where a token would reach over a border.
`lay` puts pieces between the two sides of a prompt and gives the spans, checked by decoding. A needle is spliced in by
`dhlens.tasks.niah`; this is for contexts that are evidence all over. Cost: a tokeniser call for each text that is cut.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from dhlens.episode import Episode, Span, Tokenizer
from dhlens.tasks.prompts import Prompt, check_decodes, covering, encode


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of text as tokens."""

    text: str
    """What it says."""
    tokens: list[int]
    """Its token ids."""
    offsets: ndarray
    """Int[token 2]: the characters of `text` that each token covers, half-open."""
    names: tuple[str, ...] = ()
    """The spans it belongs to; a span is the run of all pieces that name it."""

    def __len__(self) -> int:
        return len(self.tokens)

    def named(self, *names: str) -> "Piece":
        """The piece as part of more spans."""
        return dataclasses.replace(self, names=(*self.names, *names))


def cut(tokenizer: Tokenizer, texts: Sequence[str], *, after: str = "\n") -> list[Piece]:
    """The pieces of texts that follow one another behind `after`, one a text; no token belongs to two of them."""
    ids, offsets = encode(tokenizer, "".join(texts), after=after)
    borders = np.cumsum([0, *map(len, texts)])
    if any(((offsets[:, 0] < border) & (offsets[:, 1] > border)).any() for border in borders):
        # What stands before is a mark or a line break: nothing that a token would join with a word.
        return [Piece(t, *encode(tokenizer, t, after="." if t[:1].isspace() else "\n")) for t in texts]
    at = np.searchsorted(offsets[:, 0], borders)
    at[-1] = len(ids)
    return [
        Piece(text, ids[at[i] : at[i + 1]], offsets[at[i] : at[i + 1]] - borders[i]) for i, text in enumerate(texts)
    ]


def lay(tokenizer: Tokenizer, prompt: Prompt, pieces: Sequence[Piece]) -> tuple[Tensor, tuple[Span, ...]]:
    """The whole prompt, and its spans: those that pieces name in order of appearance, "context" and "question".

    Raises:
        ValueError: the tokenizer loses or changes characters of a named stretch.
    """
    starts = np.cumsum([len(prompt.head), *map(len, pieces)]).tolist()
    tokens = [*prompt.head, *(token for piece in pieces for token in piece.tokens), *prompt.tail]
    runs: dict[str, list[int]] = {}
    for i, piece in enumerate(pieces):
        for name in piece.names:
            runs.setdefault(name, []).append(i)
    spans = []
    for name, run in runs.items():
        assert run == list(range(run[0], run[-1] + 1)), f"the pieces of {name} stand together"
        text = "".join(pieces[i].text for i in run)
        spans.append(Span(name, starts[run[0]] + _blank([pieces[i] for i in run]), starts[run[-1] + 1]))
        check_decodes(tokenizer, tokens[spans[-1].start : spans[-1].stop], text.strip(), name.replace("_", " "))
    context = Span("context", len(prompt.head), starts[-1])
    question = prompt.question_span(len(context))
    return torch.tensor(tokens, dtype=torch.long), (*spans, context, question)


def _blank(run: Sequence[Piece]) -> int:
    """How many of its first tokens are white space only."""
    blank = 0
    for piece in run:
        lead = len(piece.text) - len(piece.text.lstrip())
        blank += int((np.cumsum(piece.offsets[:, 1] > lead) == 0).sum())
        if lead < len(piece.text):
            break
    return blank


def standing(text: str, phrase: str) -> re.Match[str] | None:
    """The first place where `phrase` stands in `text` as it is written, as whole words."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text)


def episode_id(name: str) -> str:
    """The id of an episode made of the question of this id: it names files, so other characters become "_"."""
    return re.sub(r"[^\w.=-]|^\.", "_", name)


@dataclass(frozen=True, eq=False)
class Draft:
    """An episode before its pieces are laid."""

    id: str
    """Of the question in its source."""
    answer: str
    """The reply that is right."""
    prompt: Prompt
    """What stands around the context."""
    pieces: list[Piece]
    """The context."""
    meta: Mapping[str, Any]
    """Of the episode."""

    def episode(self, tokenizer: Tokenizer, **meta: Any) -> Episode:
        """The prompt with its spans, "answer" among them where a fact says it; `meta` is added."""
        tokens, spans = lay(tokenizer, self.prompt, self.pieces)
        reply, _ = encode(tokenizer, self.prompt.lead + self.answer, after=tokenizer.decode(tokens[-1:]))
        return Episode(
            id=episode_id(self.id),
            tokens=tokens,
            answer=torch.tensor(reply, dtype=torch.long),
            spans=(*spans, *answer_span(tokenizer, self.pieces, spans, self.answer)),
            meta={**self.meta, "template": self.prompt.kind, "length": len(tokens), **meta},
        )


def drawn(n_items: int, n: int | None, *, seed: int) -> list[int]:
    """The order in which items are tried: theirs where all are asked for, else a drawn one that `n` does not change."""
    return list(range(n_items)) if n is None else np.random.default_rng(seed).permutation(n_items).tolist()


def finished(
    tokenizer: Tokenizer,
    order: Sequence[int],
    draft: Callable[[int], Draft | None],
    *,
    n: int | None,
    max_positions: int | None,
) -> list[Episode]:
    """Episodes of the first `n` items of `order`, or of all; those whose draft is None are passed over and counted.

    Raises:
        ValueError: fewer than `n` fit, or a prompt is longer than the model.
    """
    drafts: list[Draft] = []
    left_out = 0
    for i in order:
        if len(drafts) == n:
            break
        made = draft(i)
        left_out += made is None
        drafts += [made] if made is not None else []
    if len(drafts) < (n or 1):
        unfit = f", and the evidence of {left_out} does not fit the length" if left_out else ""
        raise ValueError(f"{n or 1} questions are asked for, the source has {len(order)}{unfit}")
    episodes = [made.episode(tokenizer, left_out=left_out) for made in drafts]
    for episode in episodes:
        if max_positions is not None and len(episode.tokens) > max_positions:
            raise ValueError(
                f"the prompt of question {episode.id!r} has {len(episode.tokens)} tokens, beyond the model's "
                f"{max_positions} positions; length={max_positions} drops what is no evidence"
            )
    return episodes


def check_sizes(n: int | None, length: int | None, max_positions: int | None) -> None:
    """Refuse sizes that no question can meet.

    Raises:
        ValueError: one is not positive, or the length is beyond the model.
    """
    for name, value in (("n", n), ("length", length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if length is not None and max_positions is not None and length > max_positions:
        raise ValueError(f"length {length} is beyond the model's {max_positions} positions")


def answer_span(tokenizer: Tokenizer, pieces: Sequence[Piece], spans: Sequence[Span], answer: str) -> tuple[Span, ...]:
    """Where the answer stands first in a fact that is one piece, by the number of the fact; () if nowhere."""
    runs: dict[str, list[Piece]] = {}
    for piece in pieces:
        for name in piece.names:
            runs.setdefault(name, []).append(piece)
    facts = [span for span in spans if span.name.startswith("fact_")]
    for span in sorted(facts, key=lambda span: int(span.name.removeprefix("fact_"))):
        fact, *more = runs[span.name]
        if not more and (match := standing(fact.text, answer)):
            first, stop = covering(fact.offsets, *match.span())
            check_decodes(tokenizer, fact.tokens[first:stop], answer, "answer")
            start = span.stop - len(fact)
            return (Span("answer", start + first, start + stop),)
    return ()
