"""Static retrieval scores after Wu et al.: counted from a Trace, or read from the files that they and HeadKV published.

One row per episode or sample, none per step. `Score.mean` and `HeadSet.top_k` make a static set of it; for what changes
from step to step use `dhlens.scores.copy_paste`. Cost: one pass over [n layer head], plus one ROUGE per episode with
`keep="rouge"`.
"""

import json
import math
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dhlens.episode import Episode, Outcome
from dhlens.heads import Head, head_name, parse_head
from dhlens.scores import Score, copy_paste
from dhlens.stats import rouge1_recall
from dhlens.trace import Trace

_MODES = ("count", "set_recall")
_KEEPS = ("rouge", "answered", "all")
_ROUGE_PASS = 0.5


def copy_paste_wu(
    trace: Trace,
    span: str = "needle",
    *,
    mode: str = "count",
    keep: str = "rouge",
) -> Score:
    """The static retrieval score of each kept episode and head: one row per episode, no steps.

    Args:
        trace: Rows to count over; the step that emits the stop token is left out.
        span: Where to copy from.
        mode: "count": copying steps per span token, as the published code counts; a token that is copied twice counts
            twice, so values may exceed 1. "set_recall": distinct token ids copied, as a share of the distinct ids in
            the span, as the paper defines it.
        keep: "rouge": episodes whose reply recalls more than half the words of `meta["needle_text"]` (where there is
            none, of `"answer_text"`); "answered": those judged correct; "all".

    Raises:
        ValueError: an unknown mode or keep, no episode is kept, a kept one lacks the span or the reference text.

    Source: Wu et al. 2024 (arXiv 2404.15574), eq. 1 and the filter of its experiments.
    """
    if mode not in _MODES or keep not in _KEEPS:
        raise ValueError(f"mode must be one of {_MODES} and keep one of {_KEEPS}, got {mode!r} and {keep!r}")
    kept = [i for i, pair in enumerate(zip(trace.episodes, trace.outcomes, strict=True)) if _keeps(*pair, keep)]
    if not kept:
        n = len(trace.episodes)
        raise ValueError(f"keep={keep!r} leaves none of {n} episodes; keep='all' takes the failed ones too")
    spans = {i: trace.episodes[i].span(span) for i in kept}
    fired = copy_paste(trace, span).heads()
    answer = trace.answer_rows()
    values = []
    for i in kept:
        rows = answer & (trace.episode == i)
        if mode == "count":
            values.append(fired[rows].sum(0) / len(spans[i]))
        else:
            needle = trace.episodes[i].tokens[spans[i].start : spans[i].stop].unique()
            values.append(_distinct(fired[rows], trace.next_token[rows]) / len(needle))
    groups = tuple(trace.episodes[i].group for i in kept)
    source = f"copy_paste_wu, span {span!r}, mode {mode}, keep {keep}"
    return Score("copy_paste_wu", torch.stack(values), False, source, groups=groups)


def _distinct(fired: Bool[Tensor, "step layer head"], labels: Int[Tensor, " step"]) -> Float[Tensor, "layer head"]:
    ids, which = labels.unique(return_inverse=True)
    copies = torch.zeros(len(ids), *fired.shape[1:]).index_add_(0, which, fired.float())
    return (copies > 0).sum(0).float()


def _keeps(episode: Episode, outcome: Outcome, keep: str) -> bool:
    if keep != "rouge":
        return keep == "all" or outcome.correct is True
    reference = episode.meta.get("needle_text", episode.meta.get("answer_text"))
    if reference is None:
        raise ValueError(f"keep='rouge' needs meta 'needle_text' or 'answer_text', episode {episode.id!r} has neither")
    return rouge1_recall(str(reference), outcome.text) > _ROUGE_PASS


def read_head_scores(path: str | PathLike[str]) -> Score:
    """Published static scores: one JSON object from a head (`"16-19"`) to its score in each sample.

    The files of Wu et al. and HeadKV. Rows are samples, each its own group; the keys tell the layers and heads.

    Raises:
        ValueError: not such a file; the message names the line, or the heads that are wrong.
    """
    path = Path(path)
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda items: items)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, tuple) for pair in pairs):
        raise ValueError(f"{path.name} must hold one JSON object from heads to lists of scores")
    samples: dict[Head, list[float]] = {}
    for key, values in pairs:
        head = _head_key(path.name, key)
        if head in samples:
            raise ValueError(f"{path.name}: head {key!r} is given twice")
        samples[head] = _sample_scores(path.name, key, values)
    layers, heads = (1 + max(axis) for axis in zip(*samples, strict=True))
    grid = [(layer, head) for layer in range(layers) for head in range(heads)]
    _refuse(path.name, f"of {layers} layers x {heads} heads are missing", [h for h in grid if h not in samples])
    n = len(samples[0, 0])
    _refuse(path.name, f"have another number of samples than L0H0 ({n})", [h for h in grid if len(samples[h]) != n])
    values = torch.tensor([samples[h] for h in grid], dtype=torch.float64)
    return Score("head_scores", values.T.reshape(n, layers, heads), False, path.name)


def _head_key(file: str, key: str) -> Head:
    try:
        return parse_head(key)
    except ValueError as error:
        raise ValueError(f"{file}, key {key!r}: {error}") from None


def _sample_scores(file: str, key: str, values: Any) -> list[float]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{file}, key {key!r}: must be a list of at least one score, got {values!r:.60}")
    for value in values:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{file}, key {key!r}: scores must be finite numbers, got {value!r:.60}")
    return [float(value) for value in values]


def _refuse(file: str, fault: str, heads: Iterable[Head]) -> None:
    names = [head_name(h) for h in heads]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"{file}: heads {', '.join(names[:5])}{more} {fault}")
