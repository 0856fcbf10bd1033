"""Drafts: guesses of what the model will say, so that a block of rows can confirm what single steps would find.

A guess is never trusted: the engine keeps the prefix that greedy decoding would have produced and drops the rest.
Guesses come from `transformers`' prompt-lookup drafting, over the known answer or over the whole prompt.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from dhlens.episode import Episode

Guess = Callable[[list[int]], list[int]]
"""From the ids emitted so far to ids that may follow; [] for no idea."""
Draft = bool | str
"""True: the episode's known answer; "lookup": n-grams of the prompt; False: none."""


def guesser(draft: Draft, episode: Episode, stop_ids: tuple[int, ...]) -> Guess:
    """The guess that `draft` names, for one episode; without a known answer `draft=True` has no idea.

    Raises:
        ValueError: `draft` is none of True, False, "lookup".
    """
    if draft is True and len(episode.answer):
        return _known(torch.cat([episode.answer, torch.tensor(stop_ids[:1], dtype=torch.long)]))
    if draft == "lookup":
        return _continue(episode.tokens, longest=10, ngram=3)
    if draft not in (True, False):
        raise ValueError(f"draft must be True (the known answer), 'lookup' or False, got {draft!r}")
    return lambda emitted: []


def _known(answer: Int[Tensor, " answer"]) -> Guess:
    follow = _continue(answer, longest=len(answer), ngram=4)
    return lambda emitted: follow(emitted) if emitted else answer.tolist()


def _continue(source: Int[Tensor, " source"], *, longest: int, ngram: int) -> Guess:
    search = PromptLookupCandidateGenerator(
        num_output_tokens=longest, max_matching_ngram_size=ngram, max_length=len(source)
    )

    def guess(emitted: list[int]) -> list[int]:
        if not emitted:
            return []
        ids: Any = torch.cat([source, torch.tensor(emitted, dtype=torch.long)])[None]
        found, _ = search.get_candidates(ids)
        return found[0, ids.shape[1] :].tolist()

    return guess
