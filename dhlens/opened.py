"""A step laid open: the rows between which its edges run, fed once more over the clean cache, beside a counterfactual.

    for step in open_steps(model, clean, twin, steps=[5]):
        attribute(step).top(200)                     # dhlens.attribution: every edge, estimated from gradients
        patch_edges(step, edges).table               # dhlens.paths: some edges, exactly

A block of rows is fed behind the clean prompt and the clean answer so far: copies of the needle's rows, at their own
positions, and the row that predicts the step. The step's row sees the cache without the cached needle rows, plus the
copies; a copy sees what lies before it in the cache, the copies before it, and itself. Left alone, the block gives the
clean logits.

What is frozen: every row outside the block stays as the clean prefill left it. An edge is the direct influence of a
sender on a receiver at rows of the block, and what follows downstream follows within the block; nothing travels through
the rows between needle and step. The counterfactual is the same block with the twin's needle (`through="rows"`), so
that all differences at the step's row came from the needle's rows straight; with `through="run"` it is the twin's whole
run with the clean answer so far, whose senders at the step's row also heard of the needle by way of other rows.

Cost: one prefill for all steps (two with "run"), then two passes of one block per step, and in memory one vector of
d_model numbers for every sender and row. For full attention, hooked through a TransformerBridge.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dhlens import hooks as sites
from dhlens.copies import Run, feed_block, prove
from dhlens.episode import Episode, Span
from dhlens.heads import HeadSet
from dhlens.hooks import Hook
from dhlens.limits import check_episodes
from dhlens.model import Model
from dhlens.nodes import Wiring, place_rows
from dhlens.prefix import prefill
from dhlens.stream import Stream

PROJECTED = (("q", sites.q), ("k", sites.k), ("v", sites.v))
"""Receivers of an attention layer by kind, and where their projections come out."""
Metric = Callable[[Tensor], Tensor]
"""From logits [... vocab] to one number each [...], by operations that have gradients."""


@dataclass(frozen=True, eq=False)
class OpenStep:
    """One step, ready to be asked about its edges."""

    model: Model
    stream: Stream
    """Every position before the step's row, clean. To be forked, not fed."""
    step: int
    positions: Int[Tensor, " row"]
    """Int[row]: the positions of the block, ascending: the needle's, then the step's."""
    tokens: Int[Tensor, " row"]
    """Int[row]: the clean tokens there."""
    metric: Metric
    wiring: Wiring
    asked: Bool[Tensor, " receiver"]
    """Bool[receiver]: the receivers in question."""
    entered: Mapping[str, Float[Tensor, "row d_model"]]
    """Site to Float[row d_model]: the clean residual stream as receivers read it (`copies.entry`)."""
    embeddings: Float[Tensor, "clean_twin row d_model"]
    """Float[clean_twin row d_model]: what enters the first layer, clean and counterfactual."""
    difference: Float[Tensor, "sender row d_model"]
    """Float[sender row d_model]: what each sender adds to the residual stream, counterfactual less clean."""
    metric_clean: float
    metric_twin: float
    """The metric of the counterfactual."""

    @property
    def n_needle(self) -> int:
        """Rows of the needle in the block."""
        return len(self.positions) - 1

    def rows(self, at: str) -> list[int]:
        """The rows of the block that a place names."""
        return list(place_rows(at, self.n_needle))

    def places(self, *, by_row: bool = False) -> tuple[str, ...]:
        """The places of the block in order: the needle, as a whole or row by row, and the step."""
        needle = [f"needle+{i}" for i in range(self.n_needle)] if by_row else ["needle"]
        return (*needle, "step")

    def possible(self, places: Sequence[str]) -> Bool[Tensor, "place sender receiver"]:
        """Bool[place sender receiver]: what can be an edge at these places; the logits are read at the last alone."""
        found = self.wiring.allowed.repeat(len(places), 1, 1)
        found[:-1, :, -1] = False
        return found

    def feed(self, hooks: Sequence[Hook] = (), *, joins: Sequence[int] = ()) -> Float[Tensor, "lane vocab"]:
        """Logits of the step after the clean block with `hooks`; lanes join it as in `copies.feed_block`."""
        return feed_block(self.model, self.stream, self.tokens, self.positions, hooks, joins=joins)

    def feed_from(self, embeddings: Float[Tensor, "row d_model"], hooks: Sequence[Hook]) -> Float[Tensor, " vocab"]:
        """The same with gradients, from `embeddings` in place of those of the block's tokens."""
        start = embeddings.detach().clone().requires_grad_()
        entry: Hook = (sites.resid_pre(0), lambda x, hook: start[None].to(x.device))
        with torch.enable_grad():
            return feed_block(self.model, self.stream, self.tokens, self.positions, [entry, *hooks], grad=True)[0]


def open_steps(
    model: Model,
    clean: Episode,
    twin: Episode,
    *,
    answers: tuple[Int[Tensor, " clean"], Int[Tensor, " twin"]] | None = None,
    steps: Sequence[int] | None = None,
    heads: Mapping[int, HeadSet] | None = None,
    metric: Literal["difference", "logprob"] | Metric = "difference",
    through: Literal["rows", "run"] = "rows",
    span: str = "needle",
) -> Iterator[OpenStep]:
    """The steps of an answer, one after the other, each laid open.

    Args:
        model: a loaded model.
        clean: the prompt.
        twin: its counterfactual, a prompt of equal length (`niah.twin`).
        answers: what is right in each; default their own `answer`. The clean one is fed in both runs.
        steps: which steps; default all at which the answers differ.
        heads: the heads of each step whose inputs are the receivers (its dynamic heads); default every receiver.
        metric: "difference", logit of the clean token less that of the twin's; "logprob", log-probability of the clean
            token; or a function of the logits.
        through: what the counterfactual changes: the block's "rows" alone, or the whole "run".
        span: the span whose rows are copied, called the needle here.

    Raises:
        ValueError: before any pass: see `limits.check_episodes`; prompts of unequal length, steps outside the answers,
            without heads or without a metric, sliding windows, a HookedTransformer, weights without gradients. At a
            step: layers that do not add up what heads and MLPs put out.
    """
    check_model(model)
    said = (clean.answer, twin.answer) if answers is None else answers
    chosen = _steps(model, clean, twin, said, steps, needs_other=metric == "difference")
    if through not in ("rows", "run"):
        raise ValueError(f"through must be 'rows' or 'run', got {through!r}")
    needle = clean.span(span)
    if needle.stop > len(clean.tokens) - 1:
        raise ValueError(f"the span {span!r} must end before the prompt's last token, got {needle}")
    asked = _asked(model, chosen, heads)
    metrics = {s: metric if callable(metric) else _metric(metric, said, s) for s in chosen}
    runs = [dataclasses.replace(e, tokens=torch.cat([e.tokens, said[0]])) for e in (clean, twin)]
    row = {s: len(clean.tokens) - 1 + s for s in chosen}
    return _opened(model, runs, asked, metrics, row=row, needle=needle, through=through)


def check_model(model: Model) -> None:
    """Refuse a model whose edges cannot be told, before any pass.

    Raises:
        ValueError: it has sliding windows, takes no masks of ours, or no gradients flow through its weights.
    """
    who = model.card.model
    if torch.is_inference_mode_enabled():
        raise ValueError("edges need gradients, which torch.inference_mode() does not keep: leave it")
    if "shadow_rows" in model.limits:
        raise ValueError(f"{who}: edges need rows with a mask of their own: {model.limits['shadow_rows']}")
    if any(model.windows):
        raise ValueError(f"{who} has sliding-window layers, whose cache drops needle rows; edges need full attention")
    for name, weight in model.hooked.named_parameters():
        if weight.is_inference() or not weight.is_floating_point():
            kind = "made for inference alone" if weight.is_inference() else f"quantised ({weight.dtype})"
            raise ValueError(f"{who}: edges need gradients, which weights that are {kind} do not carry ({name})")


def wiring_of(model: Model) -> Wiring:
    """The order of a model's senders and receivers."""
    parallel = bool(getattr(model.hooked.cfg, "parallel_attn_mlp", False))
    return Wiring(model.n_layers, model.n_heads, model.n_kv_heads, parallel)


def _opened(
    model: Model,
    runs: Sequence[Episode],
    asked: Mapping[int, Tensor],
    metrics: Mapping[int, Metric],
    *,
    row: Mapping[int, int],
    needle: Span,
    through: str,
) -> Iterator[OpenStep]:
    """`runs` are the prompts with the clean answer behind them; `row` is the position that predicts each step."""
    wiring, steps = wiring_of(model), sorted(asked)
    begins = [row[steps[0]]] * (2 if through == "run" else 1)
    streams = [stream for _, stream in sorted(prefill(model, runs[: len(begins)], upto=begins, share=False))]
    for step in steps:
        for run, stream in zip(runs, streams, strict=False):
            if stream.length < row[step]:
                stream.feed(run.tokens[None, stream.length : row[step]])
        positions = torch.tensor([*range(needle.start, needle.stop), row[step]])
        a, b = (Run.of(model, s, r.tokens[positions], positions) for r, s in zip(runs, (streams * 2)[:2], strict=True))
        prove(model, wiring, a, b)
        yield OpenStep(
            model=model,
            stream=streams[0].fork(),
            step=step,
            positions=positions,
            tokens=runs[0].tokens[positions],
            metric=metrics[step],
            wiring=wiring,
            asked=asked[step],
            entered=a.entered,
            embeddings=torch.stack([a.outputs[0], b.outputs[0]]),
            difference=b.outputs - a.outputs,
            metric_clean=float(metrics[step](a.logits)),
            metric_twin=float(metrics[step](b.logits)),
        )


def _metric(kind: str, said: Sequence[Tensor], step: int) -> Metric:
    right = int(said[0][step])
    if kind == "logprob":
        return lambda logits: logits.float().log_softmax(-1)[..., right]
    other = int(said[1][step])
    return lambda logits: (logits[..., right] - logits[..., other]).float()


def _steps(
    model: Model,
    clean: Episode,
    twin: Episode,
    said: tuple[Tensor, Tensor],
    steps: Sequence[int] | None,
    *,
    needs_other: bool,
) -> list[int]:
    if len(clean.tokens) != len(twin.tokens):
        raise ValueError(f"prompts must be of equal length, got {len(clean.tokens)} and {len(twin.tokens)} tokens")
    y, other = (a.tolist() for a in said)
    check_episodes(model, [clean, twin], max_new_tokens=len(y))
    differ = [s for s, pair in enumerate(zip(y, other, strict=False)) if pair[0] != pair[1]]
    chosen = differ if steps is None else [int(s) for s in steps]
    if not chosen:
        raise ValueError("there must be a step at which the answers differ, got none")
    for s in chosen:
        if not 0 <= s < len(y):
            raise ValueError(f"a step must lie in the answer, 0..{len(y) - 1}, got {s}")
        if needs_other and s not in differ:
            raise ValueError(f"the answers must differ at step {s} for metric 'difference'; metric='logprob' needs one")
    return chosen


def _asked(model: Model, steps: Sequence[int], heads: Mapping[int, HeadSet] | None) -> dict[int, Tensor]:
    """The receivers of each step."""
    wiring = wiring_of(model)
    if heads is None:
        return {step: torch.ones(len(wiring.receivers), dtype=torch.bool) for step in steps}
    for step in steps:
        if step not in heads or not len(heads[step]):
            raise ValueError(
                f"step {step} has no heads whose inputs could be asked about: no dynamic head is active there"
            )
        if heads[step].shape != model.shape:
            raise ValueError(f"heads must be of the model's shape {model.shape}, got {heads[step].shape}")
    return {step: wiring.into(heads[step]) for step in steps}
