"""Static detectors: how other methods score the heads of a model, each a Score from a Trace.

| method | function | what the trace must hold |
|---|---|---|
| copy-paste by step, arXiv 2602.11162 | `dhlens.scores.copy_paste` | an answer |
| Wu et al., by needle token or as a set | `dhlens.wu.copy_paste_wu` | an answer |
| attention mass on the needle | `attention_mass` | an answer |
| HeadKV-R2 | `headkv_r2` | an answer; `Capture(k=...)` of at least the needle's tokens |
| QRHead | `qr_score`, `qr_ndcg` | the prompt's question rows, and once more under an empty question |

So one model is scored by all of them, and `dhlens.compare` sets the results side by side:

    trace = dh.observe(model, episodes, capture=dh.Capture(k=48))
    asked, null = (
        dh.observe(model, query_episodes(episodes, null=ids), rows="query") for ids in (None, tokens_of_na)
    )
    dh.compare({"wu": dh.copy_paste_wu(trace), "r2": headkv_r2(trace), "qr": qr_score(asked, null)}, k=20)

Cost: one pass over [n layer head k] or over `Trace.focus`; the null of QRHead is one more observation.
"""

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dhlens.episode import Episode, Span
from dhlens.scores import Score
from dhlens.trace import Trace
from dhlens.wu import kept_episodes

NULL = "N/A"
"""The question that asks for nothing, QRHead's, which scores are calibrated with."""
_DROP = 2.0
"""Standard deviations below a document's mean at which QRHead drops a token."""


def attention_mass(trace: Trace, span: str = "needle") -> Score:
    """All attention on `span` at each row, 0..1, whatever token it looks at and whatever comes next.

    `dhlens.scores.reasoning_mass` leaves out sink and local window and takes several spans.

    Raises:
        ValueError: no episode has the span, or one lacks it.
    """
    values = trace.mass[:, trace.span_index(span)]
    absent = sorted({trace.episodes[int(i)].id for i in trace.episode[values[:, 0, 0].isnan()]})
    if absent:
        raise ValueError(f"{len(absent)} episodes lack the span {span!r}, first: {', '.join(absent[:3])}")
    return Score("attention_mass", values, False, f"attention_mass, span {span!r}", trace)


def headkv_r2(trace: Trace, span: str = "needle", *, keep: str = "f1") -> Score:
    """HeadKV's retrieval-reasoning score of each kept episode and head: one row per episode.

    At each step, of as many strongest keys as the span has tokens, those inside the span add their weight, divided by
    that number of tokens; no token needs to match. Steps count up to the length of the known answer.

    Args:
        trace: Rows to count over, with at least as many peaks as the span has tokens; the step that emits the stop
            token is left out.
        span: The sentence that holds the answer.
        keep: Which episodes count, see `dhlens.wu.kept_episodes`.

    Raises:
        ValueError: too few peaks, a kept episode lacks the span; see `dhlens.wu.kept_episodes`.

    Source: HeadKV (arXiv 2410.19258), the code of its R2 scores; versions of it differ by factors of the answer's
        length that are the same for all heads.
    """
    kept = kept_episodes(trace, keep)
    spans = {i: trace.episodes[i].span(span) for i in kept}
    longest, k = max(map(len, spans.values())), trace.peak_key.shape[-1]
    if longest > k:
        raise ValueError(
            f"the span {span!r} has {longest} tokens, the trace {k} peaks: observe with Capture(k={longest})"
        )
    answer = trace.answer_rows()
    values = []
    for i in kept:
        n = len(spans[i])
        rows = answer & (trace.episode == i) & (trace.step < (len(trace.episodes[i].answer) or len(trace)))
        key, weight = trace.peak_key[rows, ..., :n], trace.peak_weight[rows, ..., :n]
        inside = (key >= spans[i].start) & (key < spans[i].stop)
        values.append((weight * inside).sum((0, -1)) / n)
    groups = tuple(trace.episodes[i].group for i in kept)
    return Score("headkv_r2", torch.stack(values), False, f"headkv_r2, span {span!r}, keep {keep}", groups=groups)


def query_episodes(
    episodes: Sequence[Episode], *, question: str = "question", null: Int[Tensor, " null"] | None = None
) -> list[Episode]:
    """The episodes with a span "query", from the question to the prompt's end: the rows that `qr_score` needs.

    Args:
        episodes: prompts with the question behind the context.
        question: its span.
        null: token ids to put in the question's place ("N/A" in QRHead), for the calibrating observation.

    Returns:
        Episodes of the same ids, with the spans before the question, the question, and "query".

    Raises:
        ValueError: an episode lacks the span, or `null` is empty.
    """
    return [_asking(episode, episode.span(question), null) for episode in episodes]


def _asking(episode: Episode, asked: Span, null: Tensor | None) -> Episode:
    tokens, stop = episode.tokens, asked.stop
    if null is not None:
        tokens = torch.cat([tokens[: asked.start], null.to(tokens), tokens[asked.stop :]])
        stop = asked.start + len(null)
    before = [span for span in episode.spans if span.stop <= asked.start]
    spans = (*before, Span(asked.name, asked.start, stop), Span("query", asked.start, len(tokens)))
    return dataclasses.replace(episode, tokens=tokens, spans=spans)


def qr_score(trace: Trace, null: Trace | None = None, spans: str | Sequence[str] = "needle") -> Score:
    """QRHead's score of each episode and head: attention from the query's rows to the documents that answer it.

    A document token's value is its mean attention over the query's rows, less the same under the null question. Of
    each document, tokens below its mean less two standard deviations are dropped, the rest summed.

    Args:
        trace: `observe(model, query_episodes(episodes), rows="query")`, with `spans` among `Capture(focus=...)`.
        null: the same of `query_episodes(episodes, null=...)`; None leaves out calibration.
        spans: Names or patterns of the gold documents, such as "fact_*".

    Raises:
        ValueError: rows, spans or their attention by key are missing, or `null` is not of the same prompts.

    Source: QRHead (arXiv 2506.09944) and its detection on LongMemEval. There a query begins with the instruction
        before the question; here with the question. Its detection on NQ is `qr_ndcg`.
    """
    wanted, raw = _names(spans), _calibration(trace, null)
    values = [
        torch.stack([document_value(trace, null, i, span) for span in _named(episode, wanted)]).sum(0)
        for i, episode in enumerate(trace.episodes)
    ]
    source = f"qr_score, spans {', '.join(wanted)}, {raw}"
    return Score("qr_score", torch.stack(values), False, source, groups=tuple(e.group for e in trace.episodes))


def qr_ndcg(
    trace: Trace,
    null: Trace | None = None,
    *,
    gold: str | Sequence[str] = "fact_*",
    documents: str | Sequence[str] = "doc_*",
    k: int = 10,
) -> Score:
    """QRHead's other score: how well each head alone ranks the documents, as nDCG of its best `k`, 0..1.

    A head ranks an episode's documents by their values in `qr_score`; equal ones in the order of the prompt. A gold
    document gains 1, another 0, divided by log2(rank + 1).

    Args:
        trace: as for `qr_score`, with all `documents` among `Capture(focus=...)`.
        null: as for `qr_score`.
        gold: Names or patterns of the spans that answer; a document that overlaps one is gold.
        documents: Names or patterns of the documents.
        k: Ranks that count.

    Raises:
        ValueError: see `qr_score`; no document of an episode is gold, or `k` is below 1.

    Source: QRHead (arXiv 2506.09944), its detection on NQ.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1 rank, got {k}")
    answering, ranked, raw = _names(gold), _names(documents), _calibration(trace, null)
    values = []
    for i, episode in enumerate(trace.episodes):
        docs, facts = _named(episode, ranked), _named(episode, answering)
        gain = torch.tensor([any(d.start < f.stop and f.start < d.stop for f in facts) for d in docs]).double()
        if not gain.any():
            raise ValueError(f"episode {episode.id!r}: none of its {len(docs)} documents holds {', '.join(answering)}")
        value = torch.stack([document_value(trace, null, i, d) for d in docs], dim=-1)
        order = value.sort(dim=-1, descending=True, stable=True).indices
        weight = 1 / torch.log2(torch.arange(len(docs), dtype=torch.double) + 2)
        weight[k:] = 0
        values.append((gain[order] @ weight) / (gain.sort(descending=True).values @ weight))
    source = f"qr_ndcg, best {k}, gold {', '.join(answering)} of {', '.join(ranked)}, {raw}"
    return Score("qr_ndcg", torch.stack(values), False, source, groups=tuple(e.group for e in trace.episodes))


def _names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _named(episode: Episode, wanted: Sequence[str]) -> list[Span]:
    """The episode's spans of these names or patterns."""
    found = [span for span in episode.spans if any(fnmatchcase(span.name, w) for w in wanted)]
    if not found:
        raise ValueError(f"episode {episode.id!r} has none of the spans {', '.join(wanted)} before its question")
    return found


def _calibration(trace: Trace, null: Trace | None) -> str:
    """How values are calibrated, once the null is known to be of the same prompts."""
    if null is None:
        return "raw"
    _same_prompts(trace, null)
    return "less the null question"


def document_value(trace: Trace, null: Trace | None, i: int, span: Span) -> Float[Tensor, "layer head"]:
    """What each head makes of one document of episode `i`, the terms of `qr_score`; arguments as there."""
    return _kept_sum(_look(trace, i, span) - (0 if null is None else _look(null, i, span)))


def _look(trace: Trace, i: int, span: Span) -> Float[Tensor, "layer head key"]:
    """Mean attention of the query's rows on each token of a span."""
    episode = trace.episodes[i]
    query = episode.span("query")
    rows = (trace.episode == i) & (trace.position >= query.start) & (trace.position < query.stop)
    if int(rows.sum()) != len(query):
        raise ValueError(f'episode {episode.id!r}: {int(rows.sum())} of {len(query)} query rows: observe rows="query"')
    found: list[int] = []
    if trace.focus_key is not None:
        key = trace.focus_key[rows][0]
        found = ((key >= span.start) & (key < span.stop)).nonzero().flatten().tolist()
    if trace.focus is None or len(found) != len(span):
        raise ValueError(f"the trace lacks attention by key on {span.name!r}: name it in Capture(focus=...)")
    return trace.focus[rows][..., found].float().mean(0)


def _kept_sum(look: Float[Tensor, "layer head key"]) -> Float[Tensor, "layer head"]:
    if look.shape[-1] == 1:
        return look[..., 0]
    floor = look.mean(-1, keepdim=True) - _DROP * look.std(-1, keepdim=True)
    return (look * (look >= floor)).sum(-1)


def _same_prompts(trace: Trace, null: Trace) -> None:
    if len(trace.episodes) != len(null.episodes):
        raise ValueError(f"the null must be of the same episodes, got {len(null.episodes)} for {len(trace.episodes)}")
    for a, b in zip(trace.episodes, null.episodes, strict=True):
        start = a.span("query").start
        if b.span("query").start != start or not torch.equal(a.tokens[:start], b.tokens[:start]):
            raise ValueError(
                f"the null must have the prompts of the trace up to the question, episode {a.id!r} has not"
            )
