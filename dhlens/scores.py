"""Scores: one number per step and head that says how much the head retrieves there.

A `Score` is a pure function of a `Trace`, or was read from a published file; no model is needed.

- `copy_paste`: does the head look at the very needle token that comes next (Eq. 1, yes or no; `soft=True`: how much)?
  What `dhlens.dynamics` takes, and the first thing to try.
- `reasoning_mass`: share of the attention that rests on the supporting facts (Eq. 2), where nothing is copied verbatim.

Static scores, counted per episode or read from published files, stand in `dhlens.wu`.

Cost: a few passes over [n layer head]; the soft form reads the far larger `Trace.focus`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dhlens.trace import Trace

_NO_MASS = 1e-6
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class Score:
    """One value per row and query head; a row is a step of `trace`, or a sample where there is no trace.

    Raises:
        ValueError: rows, trace, groups and labels differ in length, or there is no row.
    """

    name: str
    values: Float[Tensor, "n layer head"]
    """Float[n layer head]: never NaN."""
    binary: bool
    """Whether the values are 0 and 1 only."""
    source: str
    """Definition and options, or the file, that the values come from."""
    trace: Trace | None = None
    """The steps that the rows stand for; None for samples without steps."""
    groups: tuple[str, ...] | None = None
    """The independent unit of each row; default: that of the trace, else each row is its own."""
    span: str | None = None
    """The span that was copied from; None for scores that are no copy-paste scores."""
    labels: Int[Tensor, " n"] | None = None
    """Int[n]: the token that counted as copied at each row; None for scores that are no copy-paste scores."""

    def __post_init__(self) -> None:
        parts = {"values": self.values, "trace": self.trace, "groups": self.groups, "labels": self.labels}
        lengths = {name: len(part) for name, part in parts.items() if part is not None}
        if len(set(lengths.values())) > 1 or not len(self.values):
            raise ValueError(f"score {self.name!r}: all parts must have one number of rows, at least 1, got {lengths}")

    @property
    def shape(self) -> tuple[int, int]:
        """(n_layers, n_heads)."""
        return (self.values.shape[1], self.values.shape[2])

    @property
    def row_groups(self) -> np.ndarray:
        """The independent unit of each row, as strings [n]."""
        if self.groups is not None:
            return np.array(self.groups, dtype=object)
        if self.trace is not None:
            return self.trace.groups
        return np.array([str(i) for i in range(len(self.values))], dtype=object)

    def heads(self, threshold: float = 0.0) -> Bool[Tensor, "n layer head"]:
        """The active heads of each row: those with a value above `threshold`."""
        return self.values > threshold

    def answer_rows(self, *, answered: bool = True) -> Bool[Tensor, " n"]:
        """True at the generation steps (before the stop token) of episodes that were answered correctly.

        All episodes count with `answered=False`, and where no outcome was judged. All rows, where there is no trace.

        Raises:
            ValueError: outcomes were judged and none is correct.
        """
        if self.trace is None:
            return torch.ones(len(self.values), dtype=torch.bool)
        correct = [outcome.correct for outcome in self.trace.outcomes]
        if not answered or all(c is None for c in correct):
            return self.trace.answer_rows()
        if not any(correct):
            raise ValueError(
                f"none of {len(correct)} episodes was answered correctly; answered=False keeps failed ones"
            )
        return self.trace.answer_rows() & torch.tensor([c is True for c in correct])[self.trace.episode]

    def select(self, rows: Bool[Tensor, " n"]) -> "Score":
        """The rows where `rows` is true."""
        return dataclasses.replace(
            self,
            values=self.values[rows],
            trace=None if self.trace is None else self.trace.select(rows),
            groups=None if self.groups is None else tuple(g for g, kept in zip(self.groups, rows, strict=True) if kept),
            labels=None if self.labels is None else self.labels[rows],
        )

    def answered(self) -> "Score":
        """The rows that `answer_rows` keeps.

        Raises:
            ValueError: outcomes were judged and none is correct.
        """
        return self.select(self.answer_rows())

    def mean(self) -> Float[Tensor, "layer head"]:
        """Mean over the rows that `answer_rows` keeps: the static score of each head, float64.

        Raises:
            ValueError: outcomes were judged and none is correct.
        """
        return self.values[self.answer_rows()].mean(0, dtype=torch.float64)


Scoring = Callable[[Trace], Score]
"""What gives a trace its score: `copy_paste`, or a function of your own."""


def copy_paste(
    trace: Trace, span: str = "needle", *, soft: bool = False, labels: Int[Tensor, " n"] | None = None
) -> Score:
    """1 where a head's strongest key lies in `span` and holds the token that comes next, else 0.

    The next token is `trace.next_token`, the emitted one; in greedy decoding that is the argmax of Eq. 1. Rows of the
    prompt (`step < 0`) and rows of episodes without the span get 0.

    Args:
        trace: Rows to score.
        span: Where to copy from.
        soft: Instead of yes or no, the attention on the span's tokens that equal the label, 0..1: free of the hard
            argmax, so near-ties do not flip it. Needs the span among `Capture(focus=...)`.
        labels: Int[n]: tokens to look for in place of the next ones (nulls, counterfactual answers).

    Raises:
        ValueError: no episode has the span, `labels` has another length, or the trace lacks the span's attention.

    Source: arXiv 2602.11162, eq. 1; the soft form is ours.
    """
    labels = trace.next_token if labels is None else labels
    if len(labels) != len(trace):
        raise ValueError(f"labels must hold one token per row of the trace ({len(trace)}), got {len(labels)}")
    if soft:
        values = _soft_copy(trace, span, labels)
    else:
        values = (peak_inside(trace, span) & (trace.peak_token[..., 0] == labels[:, None, None])).float()
    name = "soft_copy_paste" if soft else "copy_paste"
    return Score(name, values, not soft, f"{name}, span {span!r}", trace, span=span, labels=labels)


def copy_rank(trace: Trace, span: str = "needle") -> Score:
    """The order in which a step's heads are taken away, for k of them whatever their number.

    Active heads (Eq. 1) first, by the weight of their strongest key (values 1..2); then the others, by their attention
    on the span's tokens that equal the next one (0..1). Needs the span among `Capture(focus=...)`.

    Raises:
        ValueError: see `copy_paste`.

    Source: our choice; arXiv 2602.11162, figure 3, takes k heads away at steps that have fewer and does not say which.
    """
    active = copy_paste(trace, span).heads()
    values = torch.where(active, 1 + trace.peak_weight[..., 0].float(), copy_paste(trace, span, soft=True).values)
    return Score("copy_rank", values, False, f"copy_rank, span {span!r}", trace, span=span)


def peak_inside(trace: Trace, span: str) -> Bool[Tensor, "n layer head"]:
    """Whether a head's strongest key lies in `span`, whatever its token; false on rows of the prompt.

    Raises:
        ValueError: no episode has the span.
    """
    start, stop = trace.span_bounds(span)
    peak = trace.peak_key[..., 0]
    inside = (peak >= start[:, None, None]) & (peak < stop[:, None, None])
    return inside & (trace.step >= 0)[:, None, None]


def _soft_copy(trace: Trace, span: str, labels: Int[Tensor, " n"]) -> Float[Tensor, "n layer head"]:
    start, stop = trace.span_bounds(span)
    advice = f"observe with Capture(focus=({span!r},)) for the soft score"
    if trace.focus is None or trace.focus_key is None:
        raise ValueError(f"the trace holds no attention by key: {advice}")
    key = trace.focus_key
    inside = (key >= start[:, None]) & (key < stop[:, None])
    if bool((inside.sum(1) != stop - start).any()):
        raise ValueError(f"the trace holds attention by key, but not for each token of span {span!r} once: {advice}")
    prompts = pad_sequence([episode.tokens for episode in trace.episodes], batch_first=True)
    match = inside & (prompts[trace.episode[:, None], key.clamp(min=0)] == labels[:, None])
    match &= (trace.step >= 0)[:, None]
    chunks = zip(trace.focus.split(_CHUNK), match.split(_CHUNK), strict=True)
    return torch.cat([torch.einsum("nlhf,nf->nlh", focus.float(), m.float()) for focus, m in chunks])


def reasoning_mass(trace: Trace, spans: str | Sequence[str] = "fact_*", *, whole: bool = False) -> Score:
    """Attention on the `spans` as a share of all attention outside the sink and the local window, 0..1.

    A head that hardly looks beyond those two can have a large share of nothing; `whole` takes the same attention as it
    is, as a share of all.

    `spans` are names or patterns such as `fact_*`; an episode needs one of them at least. They must not overlap, or
    their mass counts twice. A row with less than 1e-6 attention left outside sink and local window gets 0.

    Raises:
        ValueError: a name or pattern fits no span of the trace, or an episode has none of the spans.

    Source: arXiv 2602.11162, eq. 2. There only the denominator leaves out sink and local window, and the ratio can
        exceed 1; here the numerator does too.
    """
    wanted = [spans] if isinstance(spans, str) else list(spans)
    misses = [w for w in wanted if not any(fnmatchcase(name, w) for name in trace.span_names)]
    if misses:
        raise ValueError(f"no span of the trace is called {', '.join(misses)}; it has: {', '.join(trace.span_names)}")
    names = [name for name in trace.span_names if any(fnmatchcase(name, w) for w in wanted)]
    mass = trace.mass_core[:, [trace.span_index(name) for name in names]]
    absent = mass[:, :, 0, 0].isnan().all(1)
    if absent.any():
        ids = sorted({trace.episodes[int(i)].id for i in trace.episode[absent]})
        raise ValueError(f"{len(ids)} episodes have none of the spans {', '.join(names)}, first: {', '.join(ids[:3])}")
    total = trace.mass_core[:, trace.span_index("all")]
    values = torch.where(total < _NO_MASS, 0.0, mass.nansum(1) / total.clamp(min=_NO_MASS))
    name = "evidence_mass" if whole else "reasoning_mass"
    return Score(name, mass.nansum(1) if whole else values, False, f"{name}, spans {', '.join(names)}", trace)
