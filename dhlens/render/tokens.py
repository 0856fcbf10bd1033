"""Where heads look, over the tokens: circuitsvis views that work offline, in a notebook and as one file.

`attention_to_tokens` colours a crop of the sequence by how many heads look at each token, one row per step or per head;
`attention_patterns` shows whole rows of a few heads, where the Trace captured them. Both take the token texts that
`token_texts` makes. Each view carries the bundled script of circuitsvis (1.3 MB), never a link to it. Long contexts are
cropped around a span, and the view says what was left out; to scrub through a generation use the player instead.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from circuitsvis.attention import attention_heads
from circuitsvis.tokens import colored_tokens_multi
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dhlens.heads import HeadSet, head_name
from dhlens.render.check import expect, heads_of, one_of, texts_only
from dhlens.render.crop import at_least, crop, with_gaps
from dhlens.render.draw import coded
from dhlens.render.report import Report, page
from dhlens.render.texts import circuitsvis_safe, token_texts
from dhlens.trace import Trace

__all__ = ["TokenView", "attention_patterns", "attention_to_tokens", "token_texts"]


@dataclass(frozen=True)
class TokenView:
    """A circuitsvis view: shown by a notebook, or saved as one file."""

    title: str
    """Heading of the saved page."""
    note: str
    """What the colours mean and what was left out."""
    body: str = field(repr=False)
    """HTML fragment with the note, the data and the script."""

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a self-contained page to `path` and return it.

        Raises:
            FileExistsError: the file is there and `overwrite` is false.
        """
        return Report(page(self.title, self.body, scripts=True)).save(path, overwrite=overwrite)

    def _repr_html_(self) -> str:
        return self.body


def attention_to_tokens(
    trace: Trace,
    texts: Sequence[str],
    heads: HeadSet | Bool[Tensor, "n layer head"],
    *,
    episode: int = 0,
    by: Literal["step", "head"] = "step",
    measure: Literal["count", "weight"] = "count",
    span: str | None = "needle",
    margin: int = 40,
    max_tokens: int = 400,
    max_rows: int = 48,
) -> TokenView:
    """Tokens coloured by the heads that look there while the answer is generated.

    "count" counts a head at its strongest key. "weight" adds attention weights: exact on the focus spans, elsewhere of
    the captured peaks only.

    Args:
        trace: the record.
        texts: one text per token of prompt and answer, from `token_texts`.
        heads: the same heads at every step, or the heads that fire at each row of the trace (`Score.heads()`).
        episode: which episode.
        by: one row per generation step, or per head (the most active first). The first row is their sum.
        measure: what a colour means.
        span: the span to keep in view where the sequence is longer than `max_tokens`; None keeps the end of the prompt.
        margin: tokens kept on either side of the span.
        max_tokens: longest view; the answer is always part of it.
        max_rows: most steps or heads.

    Raises:
        ValueError: no such episode or span, `texts` or `heads` do not fit the trace, another `by` or `measure`, or a
            limit is not positive.
        TypeError: an argument is something else.
    """
    one_of(("step", "head"), by=by)
    one_of(("count", "weight"), measure=measure)
    at_least(1, max_tokens=max_tokens, max_rows=max_rows)
    rows, n = _rows_of(trace, episode, texts)
    kept = crop(trace, episode, span, margin=margin, most=max_tokens)
    looks = _looks(trace, rows, _fires(trace, heads)[rows], measure=measure, by=by, n=n)
    order = _order(looks, by)
    shown = order[:max_rows]
    labels = _labels(trace, rows, texts, by)
    view = colored_tokens_multi(
        [_safe(cell if isinstance(cell, str) else texts[cell]) for cell in with_gaps(kept, n)],
        _rows_with_gaps(torch.cat([looks.sum(1, keepdim=True), looks[:, shown]], dim=1), kept),
        [f"all {by}s", *(_safe(labels[int(i)]) for i in shown)],
    )
    note = _explain(measure, by, total=float(looks.sum()), left_out=float(looks.sum() - looks[kept].sum()))
    note += f" Rows: {len(shown)} of {len(order)}." if len(shown) < len(order) else ""
    return _view("Attention to tokens", note, view.local_src)


def attention_patterns(
    trace: Trace,
    texts: Sequence[str],
    heads: HeadSet,
    *,
    episode: int = 0,
    span: str | None = "needle",
    margin: int = 10,
    max_tokens: int = 100,
    max_heads: int = 12,
) -> TokenView:
    """Whole attention rows of a few heads over a crop: the window around `span` and the answer.

    Only observed rows are filled (generation steps, and prompt rows where those were observed); the others stay empty.

    Raises:
        ValueError: the trace holds no whole rows, there is no such episode or span, `texts` do not fit, `heads` is
            empty or larger than `max_heads`.
        TypeError: an argument is something else.
    """
    _, n = _rows_of(trace, episode, texts)
    heads_of(trace.shape, heads=heads)
    if trace.rows is None:
        raise ValueError("patterns need whole attention rows, which this trace lacks: observe with Capture(rows=True)")
    if not 0 < len(heads) <= max_heads:
        raise ValueError(f"between 1 and {max_heads} heads can be shown, got {len(heads)}")
    at_least(1, max_tokens=max_tokens)
    kept = crop(trace, episode, span, margin=margin, most=max_tokens)
    grid = _grid(trace, episode, heads, kept)
    view = attention_heads(
        _short(grid),
        [_safe(texts[p]) for p in kept],
        attention_head_names=[head_name(h) for h in heads],
        min_value=0.0,
        max_value=max(float(grid.max()), 1e-7),
        positive_color="#0072B2",
    )
    note = (
        f"Attention from each token (down) to each token (across), darkest at {float(grid.max()):.2g}; rows that were "
        f"not observed are empty. {n - len(kept):,} of {n:,} tokens are left out."
    )
    return _view("Attention patterns", note, view.local_src)


def _rows_of(trace: Any, episode: Any, texts: Any) -> tuple[Int[Tensor, " m"], int]:
    """The generation rows of an episode and its length in tokens, after checking all three."""
    expect(Trace, trace=trace)
    expect(Integral, episode=episode)
    texts_only(texts=texts)
    if not 0 <= episode < len(trace.episodes):
        raise ValueError(f"episode must lie within 0..{len(trace.episodes) - 1}, got {episode}")
    n = len(trace.episodes[episode].tokens) + len(trace.outcomes[episode].tokens)
    if len(texts) != n:
        raise ValueError(f"texts must name the {n} tokens of prompt and answer, got {len(texts)}")
    return ((trace.episode == episode) & (trace.step >= 0)).nonzero().flatten(), n


def _fires(trace: Trace, heads: Any) -> Tensor:
    wanted = (len(trace), *trace.shape)
    if not isinstance(heads, Tensor):
        heads_of(trace.shape, heads=heads)
        return heads.mask().expand(wanted)
    if tuple(heads.shape) != wanted or heads.dtype != torch.bool:
        found = f"{heads.dtype} of {tuple(heads.shape)}"
        raise ValueError(f"heads must be Bool[n layer head] of shape {wanted}, got {found}")
    return heads


def _rows_with_gaps(values: Float[Tensor, "position column"], kept: Sequence[int]) -> Float[Tensor, "cell column"]:
    """The values of each cell; 0 at the gaps."""
    empty = torch.zeros_like(values[0])
    return _short(torch.stack([empty if isinstance(c, str) else values[c] for c in with_gaps(kept, len(values))]))


def _short(values: Tensor) -> Tensor:
    """Four decimals, in float64: what a page needs, and a third of float32's digits when written out."""
    return values.double().round(decimals=4)


def _grid(trace: Trace, episode: int, heads: HeadSet, kept: Sequence[int]) -> Float[Tensor, "wanted kept kept"]:
    """Attention between the kept tokens; empty where a row was not observed."""
    assert trace.rows is not None
    grid = torch.zeros(len(heads), len(kept), len(kept))
    rows = {int(trace.position[i]): int(i) for i in (trace.episode == episode).nonzero()}
    layers, indices = (list(part) for part in zip(*heads, strict=True))
    for place, position in enumerate(kept):
        if position in rows:
            seen = kept[: place + 1]
            grid[:, place, : place + 1] = trace.rows[rows[position]][layers, indices][:, seen].float()
    return grid


def _looks(
    trace: Trace, rows: Int[Tensor, " m"], fires: Bool[Tensor, "m layer head"], *, measure: str, by: str, n: int
) -> Float[Tensor, "position column"]:
    """How much each position is looked at, by step or by head."""
    row, layer, head = fires.nonzero(as_tuple=True)
    source = rows[row]
    width = trace.shape[1]
    columns = len(rows) if by == "step" else trace.shape[0] * width
    column = row if by == "step" else layer * width + head
    if measure == "count":
        key = trace.peak_key[source, layer, head, :1]
        weight = torch.ones(key.shape)
    else:
        key, weight = _weights(trace, source, layer, head)
    looks = torch.zeros(n, columns)
    return looks.index_put((key, column[:, None].expand_as(key)), weight, accumulate=True)


def _weights(trace: Trace, row: Tensor, layer: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and attention weights of each look; a focus key takes its exact weight, so its peak is not counted twice."""
    key, weight = trace.peak_key[row, layer, head], trace.peak_weight[row, layer, head]
    if trace.focus is None or trace.focus_key is None:
        return key, weight
    focus_key, focus = trace.focus_key[row], trace.focus[row, layer, head].float()
    doubled = (key[:, :, None] == focus_key[:, None, :]).any(-1)
    focus = focus.masked_fill(focus_key < 0, 0.0)
    return torch.cat([key, focus_key.clamp(min=0)], 1), torch.cat([weight.masked_fill(doubled, 0.0), focus], 1)


def _order(looks: Float[Tensor, "position column"], by: str) -> Int[Tensor, " shown"]:
    """Columns in the order to show them: steps in time, heads by activity, silent heads left out."""
    if by == "step":
        return torch.arange(looks.shape[1])
    total, order = looks.sum(0).sort(descending=True, stable=True)
    return order[total > 0]


def _labels(trace: Trace, rows: Int[Tensor, " m"], texts: Sequence[str], by: str) -> list[str]:
    if by == "head":
        return [head_name((layer, head)) for layer in range(trace.shape[0]) for head in range(trace.shape[1])]
    emitted = [(int(trace.step[r]), int(trace.position[r]) + 1) for r in rows]
    return [f"{step}:{_word(texts[p]) if p < len(texts) else '?'}" for step, p in emitted]


def _word(text: str) -> str:
    return coded(text.strip() or (text and "␣"))


def _safe(text: str) -> str:
    return circuitsvis_safe(coded(text))


def _explain(measure: str, by: str, *, total: float, left_out: float) -> str:
    if not total:
        return "None of these heads fires in this episode."
    what = "number of heads whose strongest key it is" if measure == "count" else "attention it gets from the heads"
    share = f"{left_out / total:.0%} of it lies on tokens left out of this view."
    bounds = " Positive Bound and Negative Bound are the ends of the colour scale: values beyond them look alike."
    return f"Colour of a token: {what}; pick a {by} above the text, each on its own scale. {share}{bounds}"


def _view(title: str, note: str, source: str) -> TokenView:
    # circuitsvis leaves its container open (`<div/>`), which would swallow what follows
    closed = re.sub(r'^(<div id="[^"]*"[^>]*)/>', r"\1></div>", source)
    script = closed.replace("//# sourceMappingURL=iife.js.map", "")
    # circuitsvis draws dark ink on white whatever the page's colours are
    sheet = f'<div style="background:#fff;color:#111;color-scheme:light;padding:8px;overflow-x:auto">{script}</div>'
    return TokenView(title, note, f"<p class=note>{html.escape(note)}</p>\n{sheet}")
