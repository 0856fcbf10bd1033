"""From one hooked block to rows of a Trace."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from dhlens import reads
from dhlens.card import RunCard
from dhlens.episode import Episode, Outcome
from dhlens.hooks import Hook
from dhlens.model import Model
from dhlens.reads import Capture
from dhlens.stream import Stream
from dhlens.trace import Trace


@dataclass(frozen=True, eq=False)
class Block:
    """What a hooked pass over consecutive rows gave."""

    fed: Int[Tensor, " row"]
    logits: Float[Tensor, "row vocab"]
    fields: dict[str, Tensor]
    """Field to [row, layer, head, ...]; hidden sites to [row, d_model]."""

    def first(self, n: int) -> "Block":
        """The first `n` rows."""
        return self.rows(slice(n))

    def rows(self, at: slice) -> "Block":
        """A run of rows."""
        return Block(self.fed[at], self.logits[at], {name: f[at] for name, f in self.fields.items()})


def read_block(
    model: Model,
    stream: Stream,
    fed: Int[Tensor, "lane new"],
    episode: Episode,
    capture: Capture,
    *,
    edits: Sequence[Hook] = (),
) -> Block:
    """Feed `fed` through the hooked model with `edits` and, behind them, the reads that `capture` asks for.

    Rows of the block are those of the first lane, then of the next.
    """
    out: reads.Readings = {}
    sites = {name: model.hidden_site(name) for name in capture.hidden}
    focus_at = _focus_at(episode, capture)
    hooks = reads.capture_hooks(
        out,
        capture,
        n_layers=model.n_layers,
        keys=stream.length + fed.shape[1],
        spans=_runs(episode),
        focus_at=focus_at,
        hidden_sites=sites,
    )
    logits = stream.feed(fed, hooks=[*edits, *hooks], keep=fed.shape[1]).flatten(0, 1)
    if bool(logits.isnan().any()):
        raise ValueError(f"episode {episode.id!r}: the logits are NaN; weights, dtype or an edit cannot carry it")
    fields = {name: by[0].cpu() if name in sites else reads.stack(by) for name, by in out.items()}
    if capture.focus:
        fields["focus_key"] = focus_at.expand(fed.numel(), -1)
    return Block(fed.flatten(), logits, fields)


def outcome_of(model: Model, episode: Episode, tokens: Sequence[int], *, given: bool = False) -> Outcome:
    """What the generated `tokens` amount to; `given` where the model did not choose them. No tokens are not judged."""
    stopped = bool(tokens) and tokens[-1] in model.stop_ids
    text = model.tokenizer.decode(tokens[:-1] if stopped else tokens)
    why = "stop_token" if stopped else "given" if given else "max_new_tokens"
    correct = episode.judge(text) if tokens else None
    return Outcome(torch.tensor(list(tokens), dtype=torch.long), text, correct, why)


def record(
    episode: Episode,
    outcome: Outcome,
    card: RunCard,
    blocks: Sequence[Block],
    *,
    next_tokens: Sequence[int],
    first: int,
) -> Trace:
    """A Trace of one episode whose rows start at position `first`; each of `next_tokens` followed its row."""
    blocks = [b for b in blocks if len(b.fed)]
    n = sum(len(b.fed) for b in blocks)
    following = torch.tensor(list(next_tokens), dtype=torch.long)
    assert len(following) == n, (len(following), n)
    # whole rows are as wide as the keys at their block's end
    width = blocks[-1].fields["rows"].shape[-1] if "rows" in blocks[-1].fields else 0
    for b in blocks[:-1] if width else ():
        b.fields["rows"] = pad(b.fields["rows"], (0, width - b.fields["rows"].shape[-1]))
    fields = {name: torch.cat([b.fields[name] for b in blocks]) for name in blocks[-1].fields}
    logits = torch.cat([b.logits for b in blocks]).float().cpu()
    logp = logits.log_softmax(-1)
    argmax = logits.argmax(-1)
    position = torch.arange(first, first + n)
    wrong = (argmax != following) & (position >= len(episode.tokens) - 1)
    counts = {**card.counts, "rows": n, "mismatch": int(wrong.sum())}
    peak_key = fields.pop("peak_key")
    tokens = torch.cat([episode.tokens, outcome.tokens])
    return Trace(
        episodes=(episode,),
        outcomes=(outcome,),
        card=dataclasses.replace(card, counts=counts),
        episode=torch.zeros(n, dtype=torch.long),
        step=position - (len(episode.tokens) - 1),
        position=position,
        fed=torch.cat([b.fed for b in blocks]),
        next_token=following,
        argmax=argmax,
        logprob=logp.gather(1, following[:, None])[:, 0],
        entropy=-(logp.exp() * logp.nan_to_num(neginf=0)).sum(-1),
        peak_key=peak_key,
        peak_token=torch.where(peak_key >= 0, tokens[peak_key.clamp(min=0)], -1),
        peak_weight=fields.pop("peak_weight"),
        span_names=(*(span.name for span in episode.spans), "prompt", "all"),
        mass=fields.pop("mass").movedim(-1, 1),
        mass_core=fields.pop("mass_core").movedim(-1, 1),
        focus=fields.pop("focus", None),
        focus_key=fields.pop("focus_key", None),
        rows=fields.pop("rows", None),
        z=fields.pop("z", None),
        hidden=fields,
    )


def _runs(episode: Episode) -> list[tuple[int, int]]:
    """Position runs along the span axis: the episode's spans, the prompt, everything."""
    spans = [(span.start, span.stop) for span in episode.spans]
    return [*spans, (0, len(episode.tokens)), (0, torch.iinfo(torch.long).max)]


def _focus_at(episode: Episode, capture: Capture) -> Int[Tensor, " focus"]:
    """Positions of the focus spans that the episode has, each once, ascending."""
    keys = {p for s in episode.spans if s.name in capture.focus for p in range(s.start, s.stop)}
    return torch.tensor(sorted(keys), dtype=torch.long)
