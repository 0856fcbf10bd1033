"""Scrub through a generation: one page that shows which heads work at each step, and where in the context they look.

    dh.player(trace, model.tokenizer, sets={"static": static}).save("run.html")
    dh.player(edited, model.tokenizer, compare=edited.clean)  # side by side; a notebook shows it in a frame

The page is one file without network: numbers as base64 arrays, texts as JSON that no markup can leave, and a content
policy that runs the player's own script and nothing else. Its size is about 30 bytes a step and head: 0.5 MB for 4,000
tokens, 48 steps and 270 heads, twice that with `compare`. For one picture use `figures.raster`; for whole attention
rows, `tokens.attention_patterns`.
"""

import base64
import hashlib
import html
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from numbers import Integral, Real
from string import Template
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt16
from torch import Tensor

from dhlens.episode import Tokenizer
from dhlens.heads import HeadSet
from dhlens.render.check import expect, finite, heads_of, texts_only
from dhlens.render.report import Live, inert_json
from dhlens.render.sides import Side, beside, side_of
from dhlens.render.texts import token_texts
from dhlens.scores import Score
from dhlens.trace import Trace

_MAX_PEAKS = 8
"""Strongest keys kept of each head and step."""
_STEPS = 65535
"""Quantisation of a number within its range: 2 bytes."""
_SCRIPTS = ("player_draw.js", "player.js")
_FILTERS = ("dynamic", "masked", "all")
"""What player.js calls its own filters; beside them "dynamic, not " and the first set."""


class Player(Live):
    """A page to step through."""

    _height = "860px"


def player(
    trace: Trace,
    tokenizer: Tokenizer,
    *,
    score: Score | None = None,
    sets: Mapping[str, HeadSet] | None = None,
    compare: Trace | Score | None = None,
    episode: int = 0,
    threshold: float = 0.0,
    labels: tuple[str, str] | None = None,
) -> Player:
    """A page to step through one episode: text, context, head x step raster, and the heads of each step ranked.

    Args:
        trace: the record.
        tokenizer: of the model, for the texts of tokens.
        score: of the same rows as `trace`; default: Eq. 1 on the needle or, without one, Eq. 2 on the facts.
        sets: name to heads to filter by; the first is set apart by colour and shape. Not "dynamic", "masked" or "all",
            which are there in any case.
        compare: another trace of the same prompt to show beside it, or its score.
        episode: which episode of `trace`.
        threshold: a head is active where its score lies above this value.
        labels: names of `trace` and `compare`; default: "clean" and "edited", as they are.

    Raises:
        ValueError: no such episode, it has no steps from 0 on or nothing to score (`side_of`), `sets` of another
            model shape or with a name that is taken, `labels` that are not two or without `compare`, a `threshold` of
            NaN, a trace or score to compare with of another prompt (`beside`), or a score, log-probability, entropy or
            attention that is not finite.
        TypeError: an argument is something else.
    """
    expect(Trace, trace=trace)
    expect(Score | None, score=score)
    expect(Trace | Score | None, compare=compare)
    expect(Mapping | None, sets=sets)
    expect(Integral, episode=episode)
    expect(Real, threshold=threshold)
    if not hasattr(tokenizer, "decode"):
        raise TypeError(f"tokenizer must decode tokens, as model.tokenizer does, got {type(tokenizer).__name__}")
    if math.isnan(threshold):
        raise ValueError("threshold must be a number, got NaN")
    named = dict(sets or {})
    _check_sets(named, trace.shape)
    if labels is not None:
        _check_labels(labels, compare)
    names = labels or _labels(trace, compare)
    sides = [side_of(trace, episode, score=score, threshold=threshold, label=names[0])]
    if compare is not None:
        sides.append(beside(sides[0], compare, threshold=threshold, label=names[1]))
    for side in sides:
        _check_numbers(side)
    return Player(_page(pack(sides, tokenizer, named)))


def pack(sides: Sequence[Side], tokenizer: Tokenizer, sets: Mapping[str, HeadSet]) -> dict[str, Any]:
    """What the page's script reads: JSON values, arrays as base64 (`_array`)."""
    first = sides[0]
    episode, (layers, heads) = first.episode, first.part.shape
    low = min(0.0, *(float(side.score.values.min()) for side in sides))  # bars begin at 0
    high = max(float(side.score.values.max()) for side in sides)
    texts = [token_texts(tokenizer, torch.cat([episode.tokens, s.part.outcomes[0].tokens])) for s in sides]
    prompt = len(episode.tokens)
    return {
        "title": f"{first.part.card.model}, {episode.id}",
        "layers": layers,
        "heads": heads,
        "prompt": texts[0][:prompt],
        "spans": [
            {"name": s.name, "start": s.start, "stop": s.stop, "main": s.name in first.main} for s in episode.spans
        ],
        "main": first.main[0] if len(first.main) == 1 else "the facts" if first.main else "",
        "sets": [{"name": name, "heads": [la * heads + h for la, h in chosen]} for name, chosen in sets.items()],
        "score": {"name": first.score.name, "binary": first.score.binary, "low": low, "high": high},
        "sides": [
            _packed(side, said[prompt:], first.main, (low, high)) for side, said in zip(sides, texts, strict=True)
        ],
    }


def _check_sets(sets: Mapping[str, Any], shape: tuple[int, int]) -> None:
    taken = {*_FILTERS, *(f"dynamic, not {first}" for first in list(sets)[:1])}
    for name, heads in sets.items():
        expect(str, **{f"the name of set {name!r}": name})
        heads_of(shape, **{f"set {name!r}": heads})
        if name in taken:
            raise ValueError(f"set {name!r} must have a name of its own: the player has a filter of that name")


def _check_labels(labels: Any, compare: object) -> None:
    texts_only(labels=labels)
    if len(labels) != 2 or compare is None:
        got = f"{len(labels)} of them {'without' if compare is None else 'with'} compare"
        raise ValueError(f"labels must name the two sides, trace and compare, got {got}")


def _check_numbers(side: Side) -> None:
    part = side.part
    finite(f"score {side.score.name!r}", side.score.values, part.step)
    finite("logprob", part.logprob.masked_fill(part.logprob == -math.inf, 0), part.step)  # of a token with p = 0
    finite("entropy", part.entropy, part.step)
    finite("peak_weight", part.peak_weight, part.step)
    finite("mass", part.mass.nansum(1), part.step)


def _labels(trace: Trace, compare: Trace | Score | None) -> tuple[str, str]:
    other = compare.trace if isinstance(compare, Score) else compare
    untouched = [t is None or t.heads_used is None or not t.heads_used.any() for t in (trace, other)]
    first, second = ("clean" if clean else "edited" for clean in untouched)
    return (first, second) if first != second else ("first", "second")


def _packed(side: Side, said: list[str], main: Sequence[str], bounds: tuple[float, float]) -> dict[str, Any]:
    part, outcome = side.part, side.part.outcomes[0]
    n, k = len(part), min(part.peak_key.shape[-1], _MAX_PEAKS)
    mass = part.mass[:, [part.span_index(name) for name in main]].nansum(1) if main else None
    used = torch.zeros(1, 1, 1, dtype=torch.bool) if part.heads_used is None else part.heads_used
    wide = max(int(part.peak_key.max()), len(side.episode.tokens) + n) > np.iinfo(np.uint16).max
    return {
        "label": side.label,
        "correct": outcome.correct,
        "answer": said[:n],
        "p": [round(float(x), 5) for x in part.logprob.exp()],
        "entropy": [round(float(x), 4) for x in part.entropy],
        "k": k,
        "keys": _array(part.peak_key[..., :k].numpy().astype(np.uint32 if wide else np.uint16)),
        "weights": _array(_quantised(part.peak_weight[..., :k], 0.0, 1.0)),
        "mass": None if mass is None else _array(_quantised(mass, 0.0, 1.0)),
        "score": _array(_quantised(side.score.values, *bounds)),
        "flags": _array((side.active.byte() + 2 * used.byte()).numpy()),
        "edited": part.heads_used is not None,
    }


def _quantised(values: Float[Tensor, "..."], low: float, high: float) -> UInt16[np.ndarray, "..."]:
    """`low`..`high` as 0..65535; what lies outside is clipped."""
    share = (values.double().numpy() - low) / ((high - low) or 1.0)
    return np.round(np.clip(share, 0.0, 1.0) * _STEPS).astype(np.uint16)


def _array(values: Shaped[np.ndarray, "..."]) -> dict[str, str]:
    """An array as the page reads it: element type and little-endian bytes."""
    kind = {1: "u1", 2: "u2", 4: "u4"}[values.itemsize]
    raw = np.ascontiguousarray(values, dtype=f"<{kind}").tobytes()
    return {"type": kind, "data": base64.b64encode(raw).decode()}


def _page(data: Mapping[str, Any]) -> str:
    folder = files("dhlens.render")

    def asset(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    style, script = asset("player.css"), "\n".join(asset(name) for name in _SCRIPTS)
    return Template(asset("player.html")).substitute(
        title=html.escape(data["title"]),
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        style=style,
        data=inert_json(data),
        script=script,
    )


def _hash(source: str) -> str:
    """What a content policy knows an inline block by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"
