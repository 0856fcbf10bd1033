"""A block of copied rows behind a cache: how it is fed, and what every sender puts out in it.

The copies stand at the positions of rows that the cache holds already and take their place: who sees what is
`block_visible`. `dhlens.opened` says which rows and what for. To feed rows that follow the cache is `Stream.feed`, and
copies that nothing but themselves shall see are shadow rows (`dhlens.masks`).
"""

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dhlens import hooks as sites
from dhlens.hooks import Hook, HookFn
from dhlens.masks import additive
from dhlens.model import Model
from dhlens.nodes import Receiver, Wiring
from dhlens.stream import HFStream, Stream

_feed_with_gradients = inspect.unwrap(HFStream.feed)  # below its `no_grad`


FINAL_IN = "ln_final.hook_in"
"""The residual stream as it enters the final norm."""


def attn_in(layer: int) -> str:
    """The residual stream as it enters the norm of a layer's attention, and nothing else."""
    return f"blocks.{layer}.ln1.hook_in"


def mlp_in(layer: int) -> str:
    """The residual stream as it enters the norm of a layer's MLP, and nothing else."""
    return f"blocks.{layer}.ln2.hook_in"


def entry(receiver: Receiver) -> str:
    """Where a receiver reads the residual stream."""
    if receiver.kind == "logits":
        return FINAL_IN
    return mlp_in(receiver.layer) if receiver.kind == "mlp" else attn_in(receiver.layer)


def mlp_out(layer: int) -> str:
    """What a layer's MLP adds to the residual stream."""
    return f"blocks.{layer}.hook_mlp_out"


def block_visible(cached: int, positions: Int[Tensor, " row"]) -> Bool[Tensor, "row key"]:
    """Which key each row of a block sees, over `cached` columns and the block's own.

    A cached row that has a copy in the block is seen by none; the copy is, from its own position on.
    """
    column = torch.arange(cached)
    before = (column < positions[:, None]) & ~torch.isin(column, positions)
    return torch.cat([before, positions <= positions[:, None]], dim=1)


def feed_block(
    model: Model,
    stream: Stream,
    tokens: Int[Tensor, " row"],
    positions: Int[Tensor, " row"],
    hooks: Sequence[Hook],
    *,
    joins: Sequence[int] = (),
    grad: bool = False,
) -> Float[Tensor, "lane vocab"]:
    """Logits of the last row of a block; the stream stays as it was.

    Args:
        model: a loaded model.
        stream: what lies before the block.
        tokens: of the block.
        positions: of the block, ascending.
        hooks: for this pass.
        joins: how many lanes join at each layer, as copies of the first lane; what is the same up to there runs once.
        grad: give the logits gradients, of what the hooks put in.
    """
    assert len(joins) in (0, model.n_layers)
    branch = stream.fork()
    assert isinstance(branch, HFStream)
    lanes = [1 + n for n in itertools.accumulate(joins)]
    layers: list[Any] = branch._cache.layers
    for layer, n in zip(layers, lanes, strict=False):
        layer.keys, layer.values = (x.expand(n, -1, -1, -1) for x in (layer.keys, layer.values))
    joining = [(sites.resid_pre(layer), _joining(n, first=layer == 0)) for layer, n in enumerate(joins)]
    feed: Any = _feed_with_gradients if grad else HFStream.feed
    return feed(
        branch,
        tokens.expand(1 + sum(joins), -1),
        hooks=[*joining, *hooks],
        positions=positions[None],
        mask=additive(block_visible(stream.length, positions), model.dtype),
    )[:, -1]


def _joining(n: int, *, first: bool) -> HookFn:
    """All lanes are fed, since models shape what they return like their input; they set out with the first alone."""

    def fn(x: Tensor, hook: Any) -> Tensor:
        return torch.cat([x[:1] if first else x, x[:1].expand(n, -1, -1)])

    return fn


@dataclass(frozen=True, eq=False)
class Run:
    """What a pass over a block put out and read."""

    outputs: Float[Tensor, "sender row d_model"]
    """Float[sender row d_model]: what each sender added to the residual stream."""
    entered: dict[str, Float[Tensor, "row d_model"]]
    """Site to Float[row d_model]: the residual stream as receivers read it."""
    logits: Float[Tensor, " vocab"]
    """Float[vocab]: of the last row."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, stream: Stream, tokens: Int[Tensor, " row"], positions: Int[Tensor, " row"]) -> "Run":
        """Feed a block and look."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Hook:
            return name, lambda x, hook: found.update({name: x[0].to(model.device, copy=True)})

        layers, embed = range(model.n_layers), sites.resid_pre(0)
        ins = [site(n) for n in layers for site in (attn_in, mlp_in)] + [FINAL_IN]
        outs = [site(n) for n in layers for site in (sites.z, mlp_out)] + [embed]
        logits = feed_block(model, stream, tokens, positions, [keep(name) for name in (*ins, *outs)])[0]
        outputs = [found[embed][None]]
        for n in layers:
            outputs += [head_outputs(model, n, found[sites.z(n)]), found[mlp_out(n)][None]]
        return cls(torch.cat(outputs), {name: found[name] for name in ins}, logits)


def head_outputs(
    model: Model, layer: int, z: Float[Tensor, "*lane row head d_head"]
) -> Float[Tensor, "*lane head row d_model"]:
    """What each head of a layer adds to the residual stream, without the bias that they share."""
    return torch.einsum("...rhd,hdm->...hrm", z, model.hooked.blocks[layer].attn.W_O.to(z))


def prove(model: Model, wiring: Wiring, clean: Run, twin: Run) -> None:
    """What senders put out differently must add up to what receivers read differently.

    Raises:
        ValueError: it does not: head outputs are normed or scaled before they are added.
    """
    entered = {site: twin.entered[site] - clean.entered[site] for site in clean.entered}
    add_up(model, wiring, twin.outputs - clean.outputs, entered, size=clean.entered)


def add_up(
    model: Model,
    wiring: Wiring,
    outputs: Float[Tensor, "sender row d_model"],
    entered: Mapping[str, Float[Tensor, "row d_model"]],
    *,
    size: Mapping[str, Float[Tensor, "row d_model"]],
) -> None:
    """What senders put out must add up to what entered receivers, up to a part of the `size` of their inputs.

    Raises:
        ValueError: it does not.
    """
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.05
    total, seen = torch.zeros_like(outputs[0]), 0
    for receiver, n_before in zip(wiring.receivers, wiring.n_before.tolist(), strict=True):
        total = total + outputs[seen:n_before].sum(0)
        seen, site = n_before, entry(receiver)
        gap = float((total - entered[site]).norm() / size[site].norm())
        if not gap <= tolerance:
            raise ValueError(
                f"{model.card.model}: edges need heads and MLPs that add to the residual stream as they are, but the "
                f"input of {receiver} is not the sum of those before it (off by {gap:.0%}): they are normed or scaled"
            )
