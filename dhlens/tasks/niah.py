"""Needle in a haystack: prompts of an exact length with a fresh fact at a known depth, its tokens known as spans.

`episodes(tokenizer, "walden.txt", lengths=(1000, 2000), depths=(0.1, 0.5, 0.9), n=5, needle="uuid", seed=0)` gives
n windows x lengths x depths prompts. Needles are spliced in as tokens: the prompts of one window share every token up
to theirs, so an engine can share their prefill, and spans are right by construction and checked by decoding besides.
`twin` gives the same prompt with another answer. Windows are the independent groups: take intervals over them.
A hundred episodes take a second or two, and a megabyte of haystack one more.

Source: arXiv 2602.11162, needle task: a chat prompt in three blocks, a fresh UUID, a needle moved back to a sentence
end. We depart from it in using each window at every length and depth, and in counting length over the whole prompt.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dhlens.episode import Episode, Span, Tokenizer
from dhlens.tasks.haystack import Haystack, Window, read_haystack, windows
from dhlens.tasks.needles import NEEDLES, Answer, Needle, Placed, fill, needle_called
from dhlens.tasks.prompts import Prompt, encode, told

_TWIN_DRAWS = 20_000


def episodes(
    tokenizer: Tokenizer,
    haystack: str | Path | Haystack | None = None,
    *,
    lengths: Sequence[int] = (1000, 2000),
    depths: Sequence[float | int] = (0.1, 0.5, 0.9),
    n: int = 5,
    needle: str | Needle = "uuid",
    seed: int = 0,
    template: str = "chat",
    needles_per_cell: int = 1,
    repeat: bool = False,
    max_positions: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[Episode]:
    """Needle episodes, window by window, then by length, depth and needle.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        haystack: what `haystack.read_haystack` takes; None for Python's own documentation.
        lengths: tokens of the whole prompt. A window's shorter context is the beginning of its longer one.
        depths: share of the haystack before the needle, 0..1, from where it moves back to the nearest sentence end.
            Depth 0 is the very start and 1 the very end, even where the length cuts the last sentence.
        n: haystack windows.
        needle: "uuid", "number", "words", or a `Needle`.
        seed: of the windows, and of every episode's own answer.
        template: "chat" for the tokenizer's chat template, "plain" for base models, or a text with {context} and
            {question} once each.
        needles_per_cell: episodes, each with its own answer, for every window, length and depth.
        repeat: repeat a haystack that is too short; the windows of a file then form one group.
        max_positions: the model's limit, where known.
        template_kwargs: options of the chat template: `enable_thinking=False`, or `date_string=` where it would
            write today's date and so change the prompt from day to day.

    Returns:
        Episodes with the spans "haystack" (the needle inside it), "needle", "answer" (inside the needle) and
        "question"; `answer` is the right reply. Asked and reached depth are `meta["depth"]` and `meta["depth_real"]`.

    Raises:
        ValueError: a setting cannot be met; the text says which, what was needed and what was found.
        ImportError: a Hub haystack without the package `datasets`.
    """
    fact = needle_called(needle)
    _check_grid(lengths, depths, n=n, needles_per_cell=needles_per_cell, max_positions=max_positions)
    prompt = Prompt.of(tokenizer, template, fact.question, options=template_kwargs)
    if min(lengths) <= len(prompt):
        raise ValueError(f"length {min(lengths)} must exceed the {len(prompt)} tokens of template and question")
    if needles_per_cell > 1 and not callable(fact.answer):
        raise ValueError(
            f"needles_per_cell={needles_per_cell} needs an answer that is drawn anew, a function of the draw"
        )
    source = read_haystack(haystack)
    found = windows(tokenizer, source, n=n, width=max(lengths) - len(prompt), seed=seed, repeat=repeat)
    shared = {"seed": seed, "haystack_sha256": source.sha256, **told(template_kwargs)}
    return [
        _episode(tokenizer, prompt, window, fact, cell=_Cell(w, length, float(depth), k), meta=shared)
        for w, window in enumerate(found)
        for length in lengths
        for depth in depths
        for k in range(needles_per_cell)
    ]


def twin(tokenizer: Tokenizer, episode: Episode, *, seed: int, answer: Answer | None = None) -> Episode:
    """The counterfactual twin: another answer in the same token spans, every other token of the prompt unchanged.

    Args:
        tokenizer: the one the episode was made with.
        episode: one of `episodes`.
        seed: of the new answer.
        answer: the new answer, or a function of a `random.Random`; built-in needles draw their own.

    Raises:
        ValueError: an own needle comes without `answer`, or no answer that was tried fills the same spans.
    """
    meta, old = episode.meta, episode.meta["answer_text"]
    if answer is None:
        answer = next((fact.answer for fact in NEEDLES.values() if fact.sentence == meta["sentence"]), None)
    if answer is None or old is None:
        raise ValueError(f"episode {episode.id!r} needs answer= for a twin: its needle draws no other answer")
    span, inner = episode.span("needle"), episode.span("answer")
    opens = span.start == episode.span("haystack").start
    rng = random.Random(f"{seed}/{episode.id}")
    for _ in range(_TWIN_DRAWS if callable(answer) else 1):
        new = answer(rng) if callable(answer) else answer
        if new == old:
            continue
        placed = Placed.of(tokenizer, meta["sentence"], new, opens=opens)
        if placed.spans(span.start)[:2] == (span, inner):
            tokens = episode.tokens.clone()
            tokens[span.start : span.stop] = torch.tensor(placed.tokens)
            return dataclasses.replace(
                episode,
                id=f"{episode.id}=twin",
                tokens=tokens,
                answer=_reply(tokenizer, tokens, meta["reply"], new),
                meta={**meta, "answer_text": new, "needle_text": placed.text, "twin_of": episode.id, "twin_seed": seed},
            )
    raise ValueError(f"episode {episode.id!r}: no other answer tried fills the token spans of {old!r}")


def _check_grid(
    lengths: Sequence[int], depths: Sequence[float | int], *, n: int, needles_per_cell: int, max_positions: int | None
) -> None:
    for name, values in (("n", (n,)), ("needles_per_cell", (needles_per_cell,)), ("lengths", tuple(lengths))):
        if not values or min(values) < 1:
            raise ValueError(f"{name} must be positive, got {', '.join(map(str, values)) or 'none'}")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must lie within 0..1 (start and end of the haystack), got {tuple(depths)}")
    for name, values in (("lengths", tuple(lengths)), ("depths", tuple(_label(depth) for depth in depths))):
        if len(set(values)) < len(values):
            raise ValueError(f"{name} must differ from one another, got {values}")
    if max_positions is not None and max(lengths) > max_positions:
        raise ValueError(f"length {max(lengths)} is beyond the model's {max_positions} positions")


def _label(depth: float | int) -> str:
    return f"{depth:.2f}" if round(depth, 2) == depth else f"{depth:g}"


@dataclass(frozen=True)
class _Cell:
    window: int
    length: int
    depth: float
    k: int

    @property
    def id(self) -> str:
        return f"w{self.window:03d}-L{self.length}-d{_label(self.depth)}-k{self.k}"


def _reply(tokenizer: Tokenizer, prompt: Tensor, reply: str, answer: str | None) -> Tensor:
    ids, _ = encode(tokenizer, fill(reply, answer), after=tokenizer.decode(prompt[-1:]))
    return torch.tensor(ids, dtype=torch.long)


def _before(window: Window, room: int, depth: float) -> int:
    """How many of `room` haystack tokens go before the needle."""
    if depth in (0, 1):
        return int(depth) * room
    breaks = window.breaks[window.breaks <= room]
    if len(breaks) < 2:
        raise ValueError(
            f"no sentence end found in the first {room} tokens of window {window.id!r} to put a needle behind"
        )
    return int(breaks[breaks <= depth * room][-1])


def _splice(
    tokenizer: Tokenizer, window: Window, needle: Needle, *, answer: str | None, space: int, depth: float
) -> tuple[Placed, int, int]:
    """The needle, the haystack tokens before it, and all haystack tokens; needle and haystack fill `space`."""
    placed = Placed.of(tokenizer, needle.sentence, answer, opens=depth == 0)
    room = space - len(placed.tokens)
    if room < 1:
        raise ValueError(
            f"the needle takes {len(placed.tokens)} tokens and must be shorter than the context of {space}"
        )
    before = _before(window, room, depth)
    if before == 0 and depth > 0:
        # Moved back to the start: there it stands without the space, which can cost a token less.
        placed = Placed.of(tokenizer, needle.sentence, answer, opens=True)
        room = space - len(placed.tokens)
    return placed, before, room


def _episode(
    tokenizer: Tokenizer, prompt: Prompt, window: Window, needle: Needle, *, cell: _Cell, meta: Mapping[str, Any]
) -> Episode:
    rng = random.Random(f"{meta['seed']}/{cell.id}")
    answer = needle.answer(rng) if callable(needle.answer) else needle.answer
    space = cell.length - len(prompt)
    placed, before, room = _splice(tokenizer, window, needle, answer=answer, space=space, depth=cell.depth)
    hay = window.tokens
    parts = (prompt.head, hay[:before], placed.tokens, hay[before:room], prompt.tail)
    tokens = torch.cat([torch.as_tensor(part, dtype=torch.long) for part in parts])
    start = len(prompt.head)
    reply = prompt.lead + (needle.reply or needle.sentence)
    return Episode(
        id=cell.id,
        tokens=tokens,
        answer=_reply(tokenizer, tokens, reply, answer),
        spans=(*placed.spans(start + before), prompt.question_span(space), Span("haystack", start, start + space)),
        meta={
            **meta,
            "group": window.group,
            "window": cell.window,
            "window_id": window.id,
            "length": cell.length,
            "depth": cell.depth,
            "depth_real": before / room,
            "needle": needle.kind,
            "sentence": needle.sentence,
            "needle_text": placed.text,
            "answer_text": answer,
            "question": needle.question,
            "reply": reply,
            "template": prompt.kind,
        },
    )
