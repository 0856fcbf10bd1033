"""What a head reads: which parts of the residual stream make it look where it looks.

    found = read_keys(model, episode, step=5, heads=dynamic_heads)
    found.table                                      # head, side, part, effect on the attention score
    read_keys(model, episode, step=5, heads=dynamic_heads, contrast=True)    # why this token and not its neighbours?

The attention score of a query and a key is linear in either, once the other and the norms stand still. So the score
that a head gives to a key splits into what each part of the residual stream adds: on the `query` side the parts at the
step's own row, on the `key` side those at the needle's rows; each adds up to the score exactly. Norms before the
projections, and of queries and keys themselves (Qwen 3), are linearised with their clean scale (`dhlens.frozen`); the
rotation is that of the two positions. A model where the parts do not add up is refused.

Softmax forgets what all keys have in common. `contrast` therefore takes the score of the key less the mean score of the
needle's other tokens. Query heads of a group share their key: its parts are those of one key, weighed by each head's
own query. What the parts do to the step's token: `dhlens.attribution`. Cost: two passes over the needle's rows and the
step's, behind the cached prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from dhlens import hooks as sites
from dhlens.copies import Run, attn_in, feed_block
from dhlens.direct import attention_bias, refuse_rest
from dhlens.episode import Episode
from dhlens.frozen import FrozenNorm
from dhlens.heads import Head, HeadSet, head_name
from dhlens.hooks import Hook
from dhlens.limits import check_episodes
from dhlens.model import Model
from dhlens.nodes import Sender
from dhlens.opened import check_model, wiring_of
from dhlens.prefix import prefill

SIDES = ("query", "key")


@dataclass(frozen=True, eq=False)
class Reading:
    """What each part of the residual stream adds to the attention score of each head."""

    heads: tuple[Head, ...]
    keys: Int[Tensor, " head"]
    """Int[head]: the position that each looks at."""
    senders: tuple[Sender, ...]
    """The parts; those behind a head's layer add nothing."""
    parts: Float32[Tensor, "head side sender"]
    """Float32[head side sender]: of the query (0) and of the key (1); attention score before the softmax."""
    bias: Float32[Tensor, "head side"]
    """Float32[head side]: biases."""
    score: Float32[Tensor, " head"]
    """Float32[head]: what either side adds up to, as the model has it."""

    @property
    def total(self) -> Float32[Tensor, "head side"]:
        """The sum of all parts."""
        return self.parts.sum(2) + self.bias

    @property
    def table(self) -> pd.DataFrame:
        """One row per head, side and part before the head: head, key, side, part, kind, layer, effect."""
        rows = []
        for i, head in enumerate(self.heads):
            before = [(j, s) for j, s in enumerate(self.senders) if s.kind == "embed" or s.layer < head[0]]
            for k, side in enumerate(SIDES):
                named = (head_name(head), int(self.keys[i]), side)
                rows += [(*named, str(s), s.kind, s.layer, float(self.parts[i, k, j])) for j, s in before]
                rows.append((*named, "bias", "bias", -1, float(self.bias[i, k])))
        return pd.DataFrame(rows, columns=["head", "key", "side", "part", "kind", "layer", "effect"])


def read_keys(
    model: Model,
    episode: Episode,
    step: int,
    heads: HeadSet,
    *,
    keys: Mapping[Head, int] | None = None,
    said: Int[Tensor, " said"] | None = None,
    contrast: bool = False,
    span: str = "needle",
) -> Reading:
    """What makes heads look at a token of the needle at a step.

    Args:
        model: a loaded model.
        episode: the prompt.
        step: the step whose row looks.
        heads: the heads.
        keys: the position that each looks at, within the span; default the span's strongest key.
        said: the tokens that are fed; default the episode's answer.
        contrast: the score less the mean score of the span's other tokens.
        span: where they look.

    Raises:
        ValueError: before any pass: see `limits.check_episodes` and `opened.check_model`; no heads, heads of another
            shape, a step outside the answer, a key outside the span, a contrast in a span of one token. After it: parts
            that do not add up to the score.
    """
    check_model(model)
    said = episode.answer if said is None else said
    where = episode.span(span)
    if where.stop > len(episode.tokens) - 1:
        raise ValueError(f"the span {span!r} must end before the prompt's last token, got {where}")
    _check(model, step, len(said), heads, keys, range(where.start, where.stop), contrast=contrast)
    check_episodes(model, [episode], max_new_tokens=len(said))
    tokens = torch.cat([episode.tokens, said])
    row = len(episode.tokens) - 1 + step
    ((_, stream),) = prefill(model, [episode], upto=[min(row, len(episode.tokens) - 1)])
    if step:
        stream.feed(tokens[None, stream.length : row])
    positions = torch.tensor([*range(where.start, where.stop), row])
    run = Run.of(model, stream, tokens[positions], positions)
    chosen = tuple(heads)
    found: dict[str, Tensor] = {}
    hooks = [hook for layer in sorted({n for n, _ in chosen}) for hook in _opened(model, layer, found)]
    feed_block(model, stream, tokens[positions], positions, hooks, grad=True)
    wiring, n_before = wiring_of(model), _before(model)
    parts = torch.zeros(len(chosen), 2, len(wiring.senders))
    bias, at, score = torch.zeros(len(chosen), 2), [], []
    for i, head in enumerate(chosen):
        seen = found[sites.scores(head[0])][0, head[1], -1, stream.length : -1]
        key = int(seen.argmax()) if keys is None else keys[head] - where.start
        others = torch.arange(len(seen)) != key
        goal = seen[key] - seen[others.to(seen.device)].mean() if contrast else seen[key]
        for k in range(2):
            pulled, constant = _functional(model, run, found, head, goal, k)
            n = n_before[head[0]]
            parts[i, k, :n] = torch.einsum("srd,rd->s", run.outputs[:n].float(), pulled).cpu()
            biases = sum((attention_bias(model, m).to(pulled) for m in range(head[0])), torch.zeros_like(pulled[0]))
            bias[i, k] = float((pulled @ biases).sum()) + constant
        at.append(where.start + key)
        score.append(float(goal.detach()))
    out = Reading(chosen, torch.tensor(at), wiring.senders, parts, bias, torch.tensor(score))
    size = out.parts.abs().sum(2) + out.bias.abs()
    refuse_rest(model, out.total, out.score[:, None], size, what="an attention score")
    return out


def _functional(
    model: Model, run: Run, found: Mapping[str, Tensor], head: Head, goal: Tensor, side: int
) -> tuple[Tensor, float]:
    """What the goal is of the residual stream that enters the layer: a direction for each row, and a constant."""
    layer, letter = head[0], "qk"[side]
    index = head[1] if side == 0 else wiring_of(model).group(head[1])
    block = model.hooked.blocks[layer]
    (grad,) = torch.autograd.grad(goal, found[f"leaf {letter} {layer}"], retain_graph=True)
    raw = found[f"{letter} {layer}"][0, :, index].float()
    w = grad[0, :, index]
    if f"{letter} normed {layer}" in found:  # [batch head row d_head]
        normed = found[f"{letter} normed {layer}"][0, index].float()
        w = grad[0, index] * torch.where(raw == 0, 0.0, normed / raw)
    w = w.detach().float()
    read = getattr(block.attn, f"W_{letter.upper()}")[index].detach().float()
    offset = getattr(block.attn, f"b_{letter.upper()}", None)
    norm = FrozenNorm.of(block.ln1, run.entered[attn_in(layer)])
    behind = w @ read.T.to(w)
    constant = float((behind @ norm.shift).sum())
    if offset is not None:
        constant += float((w @ offset.detach().float().reshape(-1, w.shape[1])[index].to(w)).sum())
    return norm.pull(behind), constant


def _opened(model: Model, layer: int, found: dict[str, Tensor]) -> list[Hook]:
    """Hooks that make the queries and keys of a layer leaves of a graph that ends in its attention scores."""
    attention, hooks = model.hooked.blocks[layer].attn, []
    for letter, site in (("q", sites.q), ("k", sites.k)):
        normed = hasattr(attention, f"hook_{letter}_normed")

        def see(x: Tensor, hook: object, name: str = f"{letter} {layer}") -> None:
            found[name] = x.detach().clone()

        def leaf(x: Tensor, hook: object, name: str = f"{letter}", normed: bool = normed) -> Tensor:
            found[f"leaf {name} {layer}"] = out = x.detach().clone().requires_grad_()
            if normed:
                found[f"{name} normed {layer}"] = x.detach().clone()
            return out

        hooks += [(site(layer), see), (f"{site(layer)}_normed" if normed else site(layer), leaf)]
    return [*hooks, (sites.scores(layer), lambda x, hook: found.update({sites.scores(layer): x}))]


def _before(model: Model) -> list[int]:
    """How many senders come before each layer's attention."""
    wiring = wiring_of(model)
    return [1 + layer * (wiring.n_heads + 1) for layer in range(wiring.n_layers)]


def _check(
    model: Model,
    step: int,
    n_said: int,
    heads: HeadSet,
    keys: Mapping[Head, int] | None,
    span: range,
    *,
    contrast: bool,
) -> None:
    if heads.shape != model.shape:
        raise ValueError(f"heads must be of the model's shape {model.shape}, got {heads.shape}")
    if not len(heads):
        raise ValueError(
            f"step {step} has no heads whose reading could be asked about: no dynamic head is active there"
        )
    if not 0 <= step < n_said:
        raise ValueError(f"a step must lie in the answer, 0..{n_said - 1}, got {step}")
    if keys is not None and (outside := [h for h in heads if keys.get(h, -1) not in span]):
        name = head_name(outside[0])
        raise ValueError(f"each head's key must lie in the span, {span.start}..{span.stop - 1}, got {keys} for {name}")
    if contrast and len(span) < 2:
        raise ValueError("a contrast needs a span of 2 tokens at least, got 1")
