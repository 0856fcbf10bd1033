"""Which tokens of a long context a view shows: the answer and a window around a span, with the gaps counted."""

from collections.abc import Sequence

from dhlens.trace import Trace


def crop(trace: Trace, episode: int, span: str | None, *, margin: int, most: int) -> list[int]:
    """At most `most` positions: all, or the answer (with the last prompt token) and the window before it.

    The window is the span and up to `margin` tokens on either side; the end of the prompt where `span` is None.

    Raises:
        ValueError: the episode lacks the span, or `margin` is negative.
    """
    at_least(0, margin=margin)
    tokens = trace.episodes[episode].tokens
    n = len(tokens) + len(trace.outcomes[episode].tokens)
    last = len(tokens) - 1
    found = None if span is None else trace.episodes[episode].span(span)
    if n <= most:
        return list(range(n))
    answer = range(last, n)[:most]
    room = most - len(answer)
    start, stop = (last, last) if found is None else (found.start, found.stop)
    margin = min(margin, max((room - (stop - start)) // 2, 0))
    return [*range(max(start - margin, 0), min(stop + margin, last))[:room], *answer]


def with_gaps(kept: Sequence[int], n: int) -> list[int | str]:
    """The kept positions, with a text wherever tokens are left out."""
    cells: list[int | str] = []
    for before, here in zip([-1, *kept], [*kept, n], strict=True):
        if here - before > 1:
            cells.append(f" … {here - before - 1:,} tokens … ")
        cells += [here] if here < n else []
    return cells


def at_least(least: int, **limits: int) -> None:
    """Refuse limits that are too small.

    Raises:
        ValueError: one is below `least`.
    """
    for name, value in limits.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
