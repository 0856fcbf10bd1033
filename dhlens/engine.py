"""The engine: let a model answer, and look at the attention of every generation step.

Look after, not during. Prompts are prefilled on the fused-attention twin, beginnings shared. The answer is generated
on the twin, then replayed as one block of rows through the hooked model on the same cache, with reads attached. With a
draft the hooked block comes first: it confirms the guessed answer and is the observation at once. Memory is O(rows x
keys) per layer.

Greedy decoding throughout. A block confirms a token only where its top-2 logit margin exceeds `model.tie`; the others
are decoded singly, so that a draft never changes an answer (`low_margin` in the card counts them).
"""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from dhlens.card import RunCard
from dhlens.drafts import Draft, Guess, guesser
from dhlens.episode import Episode, Outcome
from dhlens.limits import at_least_one, check_episodes, finite
from dhlens.model import Model
from dhlens.prefix import prefill
from dhlens.reads import Capture
from dhlens.record import Block, outcome_of, read_block, record
from dhlens.stream import Stream
from dhlens.trace import Trace

_TRUST = 4
"""Tokens of the first guess after a wrong one."""
ROWS = 128
"""Rows per hooked block; longer stretches are read in several."""


def observe(
    model: Model,
    episodes: Sequence[Episode],
    *,
    max_new_tokens: int = 48,
    draft: Draft = True,
    rows: str | None = None,
    capture: Capture = Capture(),
    share: bool = True,
    progress: bool = True,
) -> Trace:
    """Generate greedily and read the attention of every step.

    Args:
        model: a loaded model.
        episodes: prompts; see `dhlens.tasks`.
        max_new_tokens: most answer tokens, the stop token included.
        draft: True confirms the known answer in one block, "lookup" drafts from the prompt, False decodes singly. The
            result is the same up to ties.
        rows: observe the prompt rows of the span with this name instead of an answer; nothing is generated.
        capture: what to keep of every row.
        share: compute shared beginnings once.
        progress: show a bar.

    Raises:
        ValueError: see `dhlens.limits.check_episodes`; the span `rows` is missing.

    Source: arXiv 2602.11162, section 3 (greedy decoding, attention of the last token at each step).
    """
    traces = observe_each(
        model, episodes, max_new_tokens=max_new_tokens, draft=draft, rows=rows, capture=capture, share=share
    )
    found = dict(tqdm(traces, total=len(episodes), desc="observe", unit="episode", disable=not progress))
    trace = Trace.cat([found[i] for i in range(len(episodes))])
    warn_mismatch(trace.card)
    return trace


def observe_each(
    model: Model,
    episodes: Sequence[Episode],
    *,
    max_new_tokens: int = 48,
    draft: Draft = True,
    rows: str | None = None,
    capture: Capture = Capture(),
    share: bool = True,
    only: Collection[int] | None = None,
) -> Iterator[tuple[int, Trace]]:
    """`observe`, one episode at a time as they are done: (index, its Trace). `only` picks indices, as after a kill.

    Raises:
        ValueError: see `observe`; raised here, before any pass.
    """
    at_least_one(max_new_tokens)
    check_episodes(model, episodes, max_new_tokens=0 if rows else max_new_tokens)
    guesses = [guesser(draft, e, model.stop_ids) for e in episodes]
    upto = None if rows is None else [min(e.span(rows).start, len(e.tokens) - 1) for e in episodes]
    for name in capture.hidden:
        model.hidden_site(name)
    card = observation_card(model, max_new_tokens=max_new_tokens, draft=draft, rows=rows, capture=capture, share=share)

    def each() -> Iterator[tuple[int, Trace]]:
        for i, stream in prefill(model, episodes, upto=upto, share=share, only=only):
            if rows is None:
                yield i, observe_on(model, stream, episodes[i], guesses[i], max_new_tokens, capture=capture, card=card)
            else:
                yield i, _observe_prompt(model, stream, episodes[i], rows, capture, card)

    return each()


def generate(
    model: Model,
    episodes: Sequence[Episode],
    *,
    max_new_tokens: int = 48,
    draft: Draft = False,
    share: bool = True,
    progress: bool = True,
) -> list[Outcome]:
    """Greedy answers on the fast twin, nothing observed. Arguments and errors as in `observe`."""
    at_least_one(max_new_tokens)
    check_episodes(model, episodes, max_new_tokens=max_new_tokens)
    found: dict[int, Outcome] = {}
    streams = prefill(model, episodes, share=share)
    for i, stream in tqdm(streams, total=len(episodes), desc="generate", unit="episode", disable=not progress):
        guess = guesser(draft, episodes[i], model.stop_ids)
        tokens, _ = _greedy(model, stream, [int(episodes[i].tokens[-1])], max_new_tokens, guess)
        found[i] = outcome_of(model, episodes[i], tokens)
    return [found[i] for i in range(len(episodes))]


def replay(
    model: Model,
    episodes: Sequence[Episode],
    answers: Sequence[Int[Tensor, " step"]],
    *,
    capture: Capture = Capture(),
    share: bool = True,
    progress: bool = True,
) -> Trace:
    """Observe given answers (teacher forcing): row s is fed answer token s-1 and records answer token s as next.

    Raises:
        ValueError: see `dhlens.limits.check_episodes`; an answer is empty, or their number is not that of the episodes.
    """
    if len(answers) != len(episodes) or any(len(a) == 0 for a in answers):
        raise ValueError(
            f"replay needs one non-empty answer per episode, got {len(answers)} for {len(episodes)} episodes"
        )
    check_episodes(model, episodes, max_new_tokens=max(map(len, answers), default=0))
    vocabulary = model.hooked.cfg.d_vocab
    if any(int(a.min()) < 0 or int(a.max()) >= vocabulary for a in answers):
        raise ValueError(f"answers must hold token ids within 0..{vocabulary - 1}")
    card = observation_card(model, max_new_tokens=None, draft="given", rows=None, capture=capture, share=share)
    found: dict[int, Trace] = {}
    streams = prefill(model, episodes, share=share)
    for i, stream in tqdm(streams, total=len(episodes), desc="replay", unit="episode", disable=not progress):
        tokens = answers[i].tolist()
        blocks = _read_rows(model, stream, [int(episodes[i].tokens[-1]), *tokens[:-1]], episodes[i], capture)
        outcome = outcome_of(model, episodes[i], tokens, given=True)
        found[i] = record(episodes[i], outcome, card, blocks, next_tokens=tokens, first=len(episodes[i].tokens) - 1)
    return Trace.cat([found[i] for i in range(len(episodes))])


def observation_card(model: Model, *, capture: Capture, **settings: Any) -> RunCard:
    """The model's card with what decides an observation's numbers."""
    found = {"capture": capture.settings(), "twin": model.twin is not None, "device": model.device.type}
    return model.card.with_settings(**settings, **found)


def warn_mismatch(card: RunCard) -> None:
    """Warn where the hooked model would have said something else than was emitted in over 1 % of the rows."""
    wrong, n = card.counts.get("mismatch", 0), card.counts.get("rows", 0)
    if n and wrong > 0.01 * n:
        warnings.warn(f"the hooked model disagrees with the emitted token in {wrong} of {n} rows", stacklevel=3)


def observe_on(
    model: Model, stream: Stream, episode: Episode, guess: Guess, room: int, *, capture: Capture, card: RunCard
) -> Trace:
    """`observe` one episode of at most `room` tokens on its prefilled stream. Arguments are not checked again."""
    last = int(episode.tokens[-1])
    tokens: list[int] = []
    blocks: list[Block] = []
    counts: Counter[str] = Counter()
    drafted = guess([])[: _reach(stream, room) - 1]
    if drafted:
        start = stream.mark()
        block = read_block(model, stream, torch.tensor([[last, *drafted]]), episode, capture)
        tokens = _confirmed(model, block.logits, drafted, counts)
        stream.rewind(start, keep=len(tokens))
        blocks.append(block.first(len(tokens)))
    if not tokens or (tokens[-1] not in model.stop_ids and len(tokens) < room):
        seen, start = len(tokens), stream.mark()
        tokens, more = _greedy(model, stream, [last, *tokens], room, guess)
        counts += more
        stream.rewind(start)
        blocks += _read_rows(model, stream, [last, *tokens][seen : len(tokens)], episode, capture)
    outcome = outcome_of(model, episode, tokens)
    card = dataclasses.replace(card, counts=dict(counts))
    return record(episode, outcome, card, blocks, next_tokens=tokens, first=len(episode.tokens) - 1)


def _observe_prompt(
    model: Model, stream: Stream, episode: Episode, rows: str, capture: Capture, card: RunCard
) -> Trace:
    span = episode.span(rows)
    blocks = _read_rows(model, stream, episode.tokens[stream.length : span.stop].tolist(), episode, capture)
    following = episode.tokens[span.start + 1 : span.stop + 1].tolist()
    if span.stop == len(episode.tokens):
        following.append(int(blocks[-1].logits[-1].argmax()))
    return record(
        episode, outcome_of(model, episode, [], given=True), card, blocks, next_tokens=following, first=span.start
    )


def _read_rows(model: Model, stream: Stream, fed: list[int], episode: Episode, capture: Capture) -> list[Block]:
    rows = torch.tensor(fed)[None]
    return [read_block(model, stream, part, episode, capture) for part in rows.split(ROWS, dim=1)]


def _greedy(model: Model, stream: Stream, said: list[int], room: int, guess: Guess) -> tuple[list[int], Counter[str]]:
    """Decode on the twin. `said`: the last prompt token and what is emitted; the stream lacks the last of these."""
    tokens, fed = said[1:], said[-1]
    counts: Counter[str] = Counter()
    undecided, trust = False, _TRUST
    while len(tokens) < room and not (tokens and tokens[-1] in model.stop_ids):
        drafted = [] if undecided else guess(tokens)[: min(trust, room - len(tokens) - 1, _reach(stream, room) - 1)]
        start = stream.mark()
        logits = stream.feed(torch.tensor([[fed, *drafted]]), keep=len(drafted) + 1)[0]
        found = _confirmed(model, logits, drafted, counts) if drafted else [int(finite(logits)[-1].argmax())]
        stream.rewind(start, keep=len(found))
        undecided = not found
        # a wrong guess costs its rows: guess further only as long as guesses hold
        trust = 2 * trust if len(found) > len(drafted) else _TRUST
        tokens += found
        fed = tokens[-1] if tokens else said[0]
    return tokens, counts


def _confirmed(model: Model, logits: Float[Tensor, "row vocab"], drafted: list[int], counts: Counter[str]) -> list[int]:
    """Tokens that greedy decoding would emit, as far as the rows of a drafted block decide it."""
    top = finite(logits).float().topk(2, dim=-1)
    margins, choice = (top.values[:, 0] - top.values[:, 1]).tolist(), top.indices[:, 0].tolist()
    counts["drafted"] += len(drafted)
    found: list[int] = []
    for i, token in enumerate(choice):
        if margins[i] < model.tie:
            counts["low_margin"] += 1
            break
        found.append(token)
        if token in model.stop_ids or i == len(drafted) or token != drafted[i]:
            break
    counts["accepted"] += sum(a == b for a, b in zip(found, drafted, strict=False))
    return found


def _reach(stream: Stream, room: int) -> int:
    return room if stream.reach is None else min(room, stream.reach)
