"""Exact path patching: what single edges of a step carry, each by a run of its own; the judge of `dhlens.attribution`.

    step = next(open_steps(model, clean, twin, steps=[5]))
    patch_edges(step, attribute(step).top(200)).table

For each edge, the sender's part in the one input of the receiver, at the named rows alone, is replaced by what the
sender puts out in the counterfactual; what lies downstream is recomputed within the block (`dhlens.opened`), and the
change of the metric is read. Whatever else reads the sender still reads the clean run. An edge into a key or value
changes it for all query heads of its group and for all rows of the block that see it.

Up to the receiver nothing differs from the clean run, so its new input is known beforehand and is put in by a hook.
An edge at the step's own row is a shadow row (`dhlens.masks`), and hundreds share a pass; an edge at the needle's rows
is a lane of its own that runs the block from the layer of its receiver on. Cost: about one hooked row for the former,
for the latter one block through the layers that are left.

Source: path patching, arXiv 2304.05969, in the form where the paths of an edge are all that leave its receiver.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import pandas as pd
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from tqdm.auto import tqdm

from dhlens import hooks as sites
from dhlens.copies import FINAL_IN, attn_in, mlp_in
from dhlens.hooks import Hook
from dhlens.nodes import Edge
from dhlens.opened import OpenStep
from dhlens.shadow import feed_shadows
from dhlens.transplant import KEYS_A_ROW

_SITES: dict[str, Callable[[int], str]] = {
    "q": sites.q,
    "k": sites.k,
    "v": sites.v,
    "mlp": mlp_in,
    "logits": lambda layer: FINAL_IN,
}


@dataclass(frozen=True, eq=False)
class PathEffects:
    """What replacing each edge did to the metric of the step."""

    step: int
    edges: tuple[Edge, ...]
    change: Float32[Tensor, " edge"]
    """Float32[edge]: the metric with the edge replaced, less the clean one."""
    metric_clean: float
    metric_twin: float

    @property
    def scores(self) -> dict[Edge, float]:
        """Edge to its change, in the order the edges were given."""
        return dict(zip(self.edges, self.change.tolist(), strict=True))

    @property
    def table(self) -> pd.DataFrame:
        """One row per edge: step, sender, receiver, at and change."""
        columns = {name: [str(getattr(e, name)) for e in self.edges] for name in ("sender", "receiver", "at")}
        return pd.DataFrame({"step": self.step, **columns, "change": self.change.numpy()})


def patch_edges(
    opened: OpenStep, edges: Iterable[Edge], *, scale: float = 1.0, rows: int = 256, progress: bool = False
) -> PathEffects:
    """Replace edges one at a time.

    Args:
        opened: a step of `open_steps`.
        edges: which, in any order; whether their receivers were asked about does not matter.
        scale: how much of the sender's difference is put in: 1 for the counterfactual, less for a smaller step.
        rows: rows per pass, over all lanes: bounds the memory, rows x (vocabulary + keys x heads).
        progress: show a bar.

    Raises:
        ValueError: no edge, one that the model cannot have (its receiver upstream of its sender), rows that the block
            has not, `rows` below 1.
    """
    asked = tuple(edges)
    if not asked or rows < 1:
        raise ValueError(f"patching needs at least one edge and one row per pass, got {len(asked)} and {rows}")
    for edge in asked:
        opened.wiring.check(edge)
        opened.rows(edge.at)
    order = sorted(range(len(asked)), key=lambda i: asked[i].receiver.layer)
    own, far = ([i for i in order if (asked[i].at == "step") == here] for here in (True, False))
    a_lane = max(len(opened.positions), opened.stream.length // KEYS_A_ROW)
    change = torch.empty(len(asked))
    with tqdm(total=len(asked), desc="edges", unit="edge", disable=not progress) as bar:
        for run, which, size in ((_own_rows, own, rows), (_lanes, far, max(1, rows // a_lane))):
            for begin in range(0, len(which), size):
                part = which[begin : begin + size]
                logits = run(opened, [asked[i] for i in part], scale)
                change[part] = opened.metric(logits).float().cpu() - opened.metric_clean
                bar.update(len(part))
    return PathEffects(opened.step, asked, change, opened.metric_clean, opened.metric_twin)


@dataclass(frozen=True, eq=False)
class _Change:
    """What some edges add at one site."""

    site: str
    edge: Int[Tensor, " n"]
    """Int[n]: which of the edges."""
    head: Int[Tensor, " n"] | None
    """Int[n]: on which head; None where the site has none."""
    value: Float[Tensor, "n row d"]
    """Float[n row d]: what each adds to every row of the block."""


def _own_rows(opened: OpenStep, edges: Sequence[Edge], scale: float) -> Float[Tensor, "edge vocab"]:
    """Shadow rows of the step's row, which stands before them once, plain."""

    def adding(c: _Change) -> Hook:
        return c.site, lambda x, hook: _added(x, (torch.zeros_like(c.edge), c.edge + 1), c.head, c.value[:, -1])

    hooks = [adding(change) for change in _changes(opened, edges, scale)]
    return feed_shadows(opened.model, opened.stream.fork(), opened.tokens[-1:], [0] * len(edges), hooks)


def _lanes(opened: OpenStep, edges: Sequence[Edge], scale: float) -> Float[Tensor, "edge vocab"]:
    """A lane for each edge, in order of layers, behind a plain one; it joins at the layer of its receiver."""
    joins = torch.tensor([edge.receiver.layer for edge in edges]).bincount(minlength=opened.model.n_layers)
    row = torch.arange(len(opened.positions))

    def adding(c: _Change) -> Hook:
        head = None if c.head is None else c.head[:, None]
        return c.site, lambda x, hook: _added(x, (c.edge[:, None] + 1, row), head, c.value)

    return opened.feed([adding(change) for change in _changes(opened, edges, scale)], joins=joins.tolist())[1:]


def _added(x: Tensor, at: tuple[Tensor, ...], head: Tensor | None, value: Tensor) -> Tensor:
    out = x.clone()
    index = at if head is None else (*at, head)
    out[index] = out[index] + value.to(out)
    return out


def _changes(opened: OpenStep, edges: Sequence[Edge], scale: float) -> Iterator[_Change]:
    """Site by site; the rows that an edge does not name add 0."""

    def place(i: int) -> tuple[int, str]:
        return edges[i].receiver.layer, edges[i].receiver.kind

    for (layer, kind), group in groupby(sorted(range(len(edges)), key=place), place):
        which = list(group)
        moved = torch.zeros_like(opened.difference[:1]).repeat(len(which), 1, 1)
        for entry, i in zip(moved, which, strict=True):
            at = opened.rows(edges[i].at)
            entry[at] = scale * opened.difference[opened.wiring.sender_index[edges[i].sender], at]
        head = torch.tensor([edges[i].receiver.index for i in which])
        if kind in ("mlp", "logits"):
            yield _Change(_SITES[kind](layer), torch.tensor(which), None, moved)
        else:
            value = projected(opened, layer, kind, head, moved)
            yield _Change(_SITES[kind](layer), torch.tensor(which), head, value)


@torch.no_grad()
def projected(
    opened: OpenStep, layer: int, kind: str, head: Int[Tensor, " n"], moved: Float[Tensor, "n row d_model"]
) -> Float[Tensor, "n row d_head"]:
    """How far queries, keys or values move when the input of the layer does."""
    block = opened.model.hooked.blocks[layer]
    clean = opened.entered[attn_in(layer)]
    normed = block.ln1(clean + moved) - block.ln1(clean[None])
    return torch.einsum("nrm,nmd->nrd", normed, getattr(block.attn, f"W_{kind.upper()}")[head].to(normed))
