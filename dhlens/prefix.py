"""Prefill: the prompt of every episode in a stream, with shared beginnings computed once.

Episodes that begin alike (one haystack, many depths and needles) form a tree; each branch is fed once and forked.
Where the tree branches depends on the list of episodes alone, not on which of them are wanted, so a resumed run
repeats the same passes and finds the same numbers. Episodes come out family by family, not in the order of the list.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from dhlens.episode import Episode
from dhlens.model import Model
from dhlens.stream import Stream

BEHIND = 512
"""Tokens per block behind a shared prefix."""
SHORTEST_SHARE = 64
"""Tokens that a shared run must have to be worth a pass of its own."""


def prefill(
    model: Model,
    episodes: Sequence[Episode],
    *,
    upto: Sequence[int] | None = None,
    share: bool = True,
    only: Collection[int] | None = None,
) -> Iterator[tuple[int, Stream]]:
    """Streams that hold each episode's prompt but its last token, which the first observed row feeds.

    Args:
        model: a loaded model.
        episodes: what to prefill.
        upto: tokens to feed of each episode, instead of all but the last.
        share: compute shared beginnings once.
        only: indices that are wanted; default all.

    Yields:
        (index of the episode, its stream); the stream is the caller's to change.
    """
    ends = [len(e.tokens) - 1 for e in episodes] if upto is None else list(upto)
    rows = [e.tokens[:end] for e, end in zip(episodes, ends, strict=True)]
    wanted = set(range(len(rows)) if only is None else only)
    if share:
        yield from _grow(model, model.stream(), list(range(len(rows))), rows, wanted)
        return
    for i in sorted(wanted):
        yield i, _fed(model, model.stream(), rows[i])


def straddles(breaks: Sequence[int], shorter: int, longer: int) -> bool:
    """Whether position factors change between two sequence lengths."""
    return any(shorter <= b < longer for b in breaks)


def _grow(
    model: Model, stream: Stream, members: list[int], rows: list[Tensor], wanted: set[int]
) -> Iterator[tuple[int, Stream]]:
    """`stream` holds tokens that all `members` begin with; walk on from there."""
    done = stream.length
    for family in _families(members, rows, done):
        if not wanted & set(family):
            continue
        cut = _common(family, rows)
        if len(family) > 1 and not straddles(model.rope_breaks, cut, max(len(rows[i]) for i in family) + 1):
            yield from _grow(model, _fed(model, stream.fork(), rows[family[0]][done:cut]), family, rows, wanted)
            continue
        for i in family:
            if i in wanted:
                yield i, _fed(model, stream.fork(), rows[i][done:])


def _families(members: list[int], rows: list[Tensor], done: int) -> list[list[int]]:
    """Members that share at least SHORTEST_SHARE tokens from `done` on, in order of first appearance."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i in members:
        key = tuple(rows[i][done : done + SHORTEST_SHARE].tolist())
        found.setdefault(key if len(key) == SHORTEST_SHARE else (-1, i), []).append(i)
    return list(found.values())


def _common(family: list[int], rows: list[Tensor]) -> int:
    shortest = min(len(rows[i]) for i in family)
    same = torch.stack([rows[i][:shortest] == rows[family[0]][:shortest] for i in family]).all(0)
    return shortest if bool(same.all()) else int((~same).nonzero()[0])


def _fed(model: Model, stream: Stream, tokens: Tensor) -> Stream:
    # rows behind a prefix come with a mask, and attention computes what it hides: shorter blocks have less to hide
    size = max(len(tokens), 1) if model.rope_breaks or not stream.length else BEHIND
    for part in tokens.split(size):
        if len(part):
            stream.feed(part[None])
    return stream
