"""Direct effects: what each head writes towards the right token, straight into the unembedding.

    found = direct_effects(model, episode)                   # the logit of each answer token
    found = direct_effects(model, clean, against=twin.answer)    # its difference to the counterfactual's token
    found.heads                                              # [step layer head]; found.of(dynamic_heads), by step
    found.table

The logit of a token is the unembedding's direction times the normed residual stream, and the stream is a sum: the
embedding, every head (z through its part of the output projection), every MLP, and biases. The final norm is
linearised as TransformerLens does it, with the scale of the clean run (`dhlens.frozen`), so that all parts add up to
the logit exactly; a model where they do not (softcapped logits, normed head outputs) is refused. TransformerLens's own
`direct_logit_attribution` asks for a folded norm and a cache of the whole sequence; this takes any norm and one block
of rows behind the cached prompt.

A direct effect is what goes to the logits past everything else. What later layers make of a head, and what taking it
away does, is in `dhlens.effects`, `dhlens.causal_map` and the edges of `dhlens.attribution`. Cost: one hooked row per
step.
"""

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from dhlens import hooks as sites
from dhlens.copies import mlp_out
from dhlens.episode import Episode
from dhlens.frozen import FrozenNorm
from dhlens.heads import HeadSet, head_name
from dhlens.hooks import Hook
from dhlens.limits import check_episodes
from dhlens.model import Model
from dhlens.prefix import prefill


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """What each part adds to the logit of a token, or to its difference from others, at each step."""

    token: Int[Tensor, " step"]
    """Int[step]: the token."""
    heads: Float32[Tensor, "step layer head"]
    """Float32[step layer head]: logits, as all below."""
    mlps: Float32[Tensor, "step layer"]
    """Float32[step layer]"""
    embed: Float32[Tensor, " step"]
    """Float32[step]: what enters the first layer, of the token that is fed."""
    bias: Float32[Tensor, " step"]
    """Float32[step]: output biases of attention, and of the final norm and the unembedding."""
    logit: Float32[Tensor, " step"]
    """Float32[step]: what they add up to, as the model has it."""

    @property
    def total(self) -> Float32[Tensor, " step"]:
        """The sum of all parts."""
        return self.heads.sum((1, 2)) + self.mlps.sum(1) + self.embed + self.bias

    def of(self, heads: HeadSet) -> Float32[Tensor, " step"]:
        """What these heads add together.

        Raises:
            ValueError: heads of another model's shape.
        """
        if heads.shape != tuple(self.heads.shape[1:]):
            raise ValueError(f"heads must be of the model's shape {tuple(self.heads.shape[1:])}, got {heads.shape}")
        return (self.heads * heads.mask()).sum((1, 2))

    @property
    def table(self) -> pd.DataFrame:
        """One row per step and part: step, part (`L3H5`, `L3.mlp`, `embed`, `bias`), kind, layer (-1: none), effect."""
        n_steps, n_layers, n_heads = self.heads.shape
        layers = range(n_layers)
        parts = [(head_name((n, h)), "head", n) for n in layers for h in range(n_heads)]
        parts += [(f"L{n}.mlp", "mlp", n) for n in layers] + [("embed", "embed", -1), ("bias", "bias", -1)]
        values = torch.cat([self.heads.flatten(1), self.mlps, self.embed[:, None], self.bias[:, None]], dim=1)
        table = pd.DataFrame(parts * n_steps, columns=["part", "kind", "layer"])
        table.insert(0, "step", torch.arange(n_steps).repeat_interleave(len(parts)).numpy())
        return table.assign(effect=values.flatten().numpy())


@torch.no_grad()
def direct_effects(
    model: Model,
    episode: Episode,
    said: Int[Tensor, " step"] | None = None,
    *,
    against: Int[Tensor, " other"] | Literal["mean"] | None = None,
) -> DirectEffects:
    """The direct effect of every head, MLP and the embedding at each step of an answer.

    Args:
        model: a loaded model.
        episode: the prompt.
        said: the tokens that are fed and asked about; default the episode's answer.
        against: tokens to take the difference to, one per step (the counterfactual's; what is longer is cut); "mean":
            the mean logit of the vocabulary, which leaves out what raises all tokens alike; None: the logit as it is.

    Raises:
        ValueError: before any pass: see `limits.check_episodes`; no tokens, or fewer in `against`. After it: parts that
            do not add up to the logit.
    """
    y = episode.answer if said is None else said
    if not len(y):
        raise ValueError(f"episode {episode.id!r}: there must be a token to ask about, got an empty answer")
    if isinstance(against, Tensor) and len(against) < len(y):
        raise ValueError(f"against must hold a token for each of the {len(y)} steps, got {len(against)}")
    if isinstance(against, str) and against != "mean":
        raise ValueError(f"against must be tokens, 'mean' or None, got {against!r}")
    check_episodes(model, [episode], max_new_tokens=len(y))
    ((_, stream),) = prefill(model, [episode])
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        return name, lambda x, hook: found.update({name: x[0].to(model.device, torch.float32, copy=True)})

    layers, last = range(model.n_layers), sites.resid(model.n_layers - 1)
    names = [sites.resid_pre(0), last, *(site(n) for n in layers for site in (sites.z, mlp_out))]
    fed = torch.cat([episode.tokens[-1:], y[:-1]])
    logits = stream.feed(fed[None], hooks=[keep(name) for name in names], keep=len(y))[0].float()
    directions, constant, goal = _directions(model, logits, y, against)
    norm = FrozenNorm.of(model.hooked.ln_final, found[last].to(model.dtype))
    u = norm.pull(directions)
    blocks = model.hooked.blocks
    heads = [
        torch.einsum("rhd,hdm,rm->rh", found[sites.z(n)], blocks[n].attn.W_O.float().to(u.device), u) for n in layers
    ]
    bias = torch.stack([attention_bias(model, n).to(u) for n in layers]).sum(0) @ u.T
    out = DirectEffects(
        token=y,
        heads=torch.stack(heads, 1).cpu(),
        mlps=torch.stack([(found[mlp_out(n)] * u).sum(1) for n in layers], 1).cpu(),
        embed=(found[sites.resid_pre(0)] * u).sum(1).cpu(),
        bias=(bias + directions @ norm.shift + constant).cpu(),
        logit=goal.cpu(),
    )
    size = out.heads.abs().sum((1, 2)) + out.mlps.abs().sum(1) + out.embed.abs() + out.bias.abs()
    refuse_rest(model, out.total, out.logit, size, what="the logit")
    return out


def attention_bias(model: Model, layer: int) -> Tensor:
    """The bias of a layer's output projection; 0 where it has none."""
    bias = getattr(model.hooked.blocks[layer].attn, "b_O", None)
    return torch.zeros(model.d_model, device=model.device) if bias is None else bias.detach().float()


def refuse_rest(model: Model, total: Tensor, whole: Tensor, size: Tensor, *, what: str) -> None:
    """Parts must add up to the whole.

    Raises:
        ValueError: they do not.
    """
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.02
    gap = float(((total - whole).abs() / size.clamp(min=1e-6)).max())
    if not gap <= tolerance:
        raise ValueError(
            f"{model.card.model}: {what} must be a sum over embedding, heads and MLPs behind one norm, but the parts "
            f"miss it by {gap:.1%} of their size: something else scales, caps or norms them"
        )


def _directions(
    model: Model, logits: Tensor, right: Tensor, against: Tensor | str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the normed stream is multiplied by at each step, what is added, and the result in the model."""
    weight = model.hooked.W_U.detach().float()  # [d_model vocab]
    bias = getattr(model.hooked, "b_U", None)
    bias = weight.new_zeros(weight.shape[1]) if bias is None else bias.detach().float()
    right = right.to(weight.device)
    row = torch.arange(len(right), device=weight.device)
    logits = logits.to(weight.device)
    direction, constant, goal = weight[:, right].T, bias[right], logits[row, right]
    if against is None:
        return direction, constant, goal
    if isinstance(against, str):
        return direction - weight.mean(1), constant - bias.mean(), goal - logits.mean(1)
    other = against[: len(right)].to(weight.device)
    return direction - weight[:, other].T, constant - bias[other], goal - logits[row, other]
