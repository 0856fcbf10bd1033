"""Edge attribution: what every edge of a step carries, estimated for all of them at once from one gradient.

    step = next(open_steps(model, clean, twin, steps=[5]))
    found = attribute(step)                          # gradient at the clean run
    found = attribute(step, points=5)                # integrated gradients
    found.top(200)                                   # {Edge: score}, ready for dhlens.graphs; judged by dhlens.paths

The score of an edge estimates by how much the metric of the step changes when the sender's part in that one input of
the receiver is what it is in the counterfactual: (counterfactual less clean output of the sender) . (gradient of the
metric with respect to the input of the receiver), summed over the rows of a place. It is negative where the edge helps
the clean answer.

1. One pass with gradients over the block (`dhlens.opened`) gives the gradient at every query, key and value as
   projected, and at the input of every MLP and the final norm.
2. Query, key and value gradients go back through their own projection and norm alone. Keys and values have one gradient
   per key/value head, the sum over the query heads that share it: they are never ungrouped.
3. One product of senders and receivers gives all edges.

A first-order estimate: wrong where a softmax is saturated or the change is large, and `patch_edges` is exact. `points`
average the gradient along the way of the whole needle to the twin's: what the embedding sends then adds up to the whole
effect. For what one edge does in an otherwise clean run, the gradient of the clean run is the better guide. Cost: about
two hooked passes of the block per point; in memory the scores, places x senders x receivers, and one layer's receivers
x rows x d_model.

Source: edge attribution patching, arXiv 2310.10348; with integrated gradients, arXiv 2403.17806, inputs form (EAP-IG).
We depart from the latter in taking the midpoints of `points` equal parts of the straight line between the embeddings of
the clean and the counterfactual needle, and in keeping keys and values grouped and all other rows frozen.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from dhlens import hooks as sites
from dhlens.copies import FINAL_IN, mlp_in
from dhlens.hooks import Hook
from dhlens.nodes import Edge, Wiring
from dhlens.opened import PROJECTED, OpenStep


@dataclass(frozen=True, eq=False)
class Attribution:
    """Every edge of a step, scored."""

    step: int
    wiring: Wiring
    places: tuple[str, ...]
    scores: Float32[Tensor, "place sender receiver"]
    """Float32[place sender receiver]: estimated change of the metric; 0 where `known` is not."""
    known: Bool[Tensor, "place sender receiver"]
    """Bool[place sender receiver]: the pair can be an edge there, and was asked about."""
    metric_clean: float
    metric_twin: float

    def edges(self) -> list[Edge]:
        """All edges, in the order of `self.scores[self.known]`."""
        return [self._edge(*place) for place in self.known.nonzero().tolist()]

    def top(self, n: int) -> dict[Edge, float]:
        """The `n` edges of largest score, whatever its sign; fewer where there are fewer."""
        size = self.scores.abs().masked_fill(~self.known, -1).flatten()
        order = size.argsort(descending=True, stable=True)[: min(n, int(self.known.sum()))]
        places = torch.stack(torch.unravel_index(order, self.scores.shape), 1).tolist()
        return {self._edge(*place): float(self.scores[tuple(place)]) for place in places}

    def score(self, edge: Edge) -> float:
        """The score of one edge.

        Raises:
            ValueError: it was not asked about.
        """
        self.wiring.check(edge)
        if edge.at in self.places:
            at = (
                self.places.index(edge.at),
                self.wiring.sender_index[edge.sender],
                self.wiring.receiver_index[edge.receiver],
            )
            if self.known[at]:
                return float(self.scores[at])
        raise ValueError(f"{edge} was not asked about: neither its place nor its receiver may be left out")

    @property
    def table(self) -> pd.DataFrame:
        """One row per edge: step, sender, receiver, at and score."""
        edges = self.edges()
        columns = {name: [str(getattr(e, name)) for e in edges] for name in ("sender", "receiver", "at")}
        return pd.DataFrame({"step": self.step, **columns, "score": self.scores[self.known].numpy()})

    def _edge(self, place: int, sender: int, receiver: int) -> Edge:
        return Edge(self.wiring.senders[sender], self.wiring.receivers[receiver], self.places[place])


def attribute(opened: OpenStep, *, points: int = 0, by_row: bool = False) -> Attribution:
    """Score all edges into the receivers in question.

    Args:
        opened: a step of `open_steps`.
        points: where the gradient is taken: 0 for the clean run, else the midpoints of so many parts of the way to the
            counterfactual.
        by_row: keep the needle's rows apart, as "needle+0", "needle+1", ..., instead of summing them.

    Raises:
        ValueError: `points` is below 0.
    """
    if points < 0:
        raise ValueError(f"points must be at least 0, got {points}")
    wiring, places = opened.wiring, opened.places(by_row=by_row)
    scores = torch.zeros(len(places), len(wiring.senders), len(wiring.receivers))
    clean, twin = opened.embeddings
    ways = [(i + 0.5) / points for i in range(points)] or [0.0]
    for way in ways:
        for receivers, gradients in _gradients(opened, torch.lerp(clean, twin, way)):
            for total, at in zip(scores, places, strict=True):
                total[:, receivers] += _product(opened, gradients, opened.rows(at)) / len(ways)
    known = opened.possible(places) & opened.asked
    return Attribution(opened.step, wiring, places, scores * known, known, opened.metric_clean, opened.metric_twin)


def _product(
    opened: OpenStep, gradients: Float[Tensor, "receiver row d_model"], rows: list[int]
) -> Float[Tensor, "sender receiver"]:
    return torch.einsum("srm,nrm->sn", opened.difference[:, rows].float(), gradients[:, rows].float()).cpu()


def _gradients(
    opened: OpenStep, embeddings: Tensor
) -> Iterator[tuple[list[int], Float[Tensor, "receiver row d_model"]]]:
    """Gradients of the metric at the receivers' inputs, layer by layer, with the indices of the receivers."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        def fn(x: Tensor, hook: object) -> Tensor:
            found[name] = x.clone()
            return found[name]

        return name, fn

    layers = range(opened.model.n_layers)
    names = [site(n) for n in layers for _, site in PROJECTED] + [mlp_in(n) for n in layers] + [FINAL_IN]
    inputs: dict[int, Tensor] = {}
    reads: list[Hook] = [(sites.resid_pre(n), lambda x, hook, n=n: inputs.update({n: x[0].detach()})) for n in layers]
    logits = opened.feed_from(embeddings, [*reads, *map(keep, names)])
    with torch.enable_grad():
        grads = torch.autograd.grad(opened.metric(logits), [found[name] for name in names])
    at = {name: grad[0] for name, grad in zip(names, grads, strict=True)}
    for n in layers:
        yield from _into_attention(opened, n, inputs[n], at)
        yield from _straight(opened, n, "mlp", at[mlp_in(n)])
    yield from _straight(opened, 0, "logits", at[FINAL_IN])


def _straight(opened: OpenStep, layer: int, kind: str, gradient: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    chosen = _chosen(opened, layer, kind)
    if chosen:
        yield chosen, gradient[None]


def _into_attention(
    opened: OpenStep, layer: int, inputs: Tensor, at: dict[str, Tensor]
) -> Iterator[tuple[list[int], Tensor]]:
    """Through the projection of each head and the norm before it, as one batch of copies of the layer's input."""
    block = opened.model.hooked.blocks[layer]
    chosen, normed = [], []
    for kind, site in PROJECTED:
        these = _chosen(opened, layer, kind)
        heads = [opened.wiring.receivers[i].index for i in these]
        gradient = at[site(layer)]
        weight = getattr(block.attn, f"W_{kind.upper()}")
        normed.append(torch.einsum("rhd,hmd->hrm", gradient[:, heads], weight[heads].detach().to(gradient)))
        chosen += these
    if chosen:
        with torch.enable_grad():
            copies = inputs.expand(len(chosen), -1, -1).clone().requires_grad_()
            (gradients,) = torch.autograd.grad(block.ln1(copies), copies, torch.cat(normed))
        yield chosen, gradients


def _chosen(opened: OpenStep, layer: int, kind: str) -> list[int]:
    """Indices of the receivers of a kind in a layer that are in question."""
    return [
        i
        for i, (receiver, asked) in enumerate(zip(opened.wiring.receivers, opened.asked.tolist(), strict=True))
        if asked and receiver.layer == layer and receiver.kind == kind
    ]
