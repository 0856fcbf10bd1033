"""Sets of edges of an open step as masks over places, senders and receivers; which of them lead on to the logits.

    places = places_of(step, edges)                  # ("needle", "step"), or the needle's rows one by one
    mask = mask_of(step, places, entries_of(step, places, edges))
    leading(step.wiring, mask)                       # `Graph.prune`, at any number of edges

For circuits of any size (`dhlens.circuits`). A graph to look at, with scores, is `dhlens.graphs`. Cost: next to
nothing.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dhlens.nodes import Edge, Wiring
from dhlens.opened import OpenStep


def places_of(opened: OpenStep, edges: Iterable[Edge]) -> tuple[str, ...]:
    """The places of the block as these edges name them.

    Raises:
        ValueError: rows that the block has not, or the needle's both as a whole and one by one.
    """
    named = {edge.at for edge in edges}
    for at in sorted(named):
        opened.rows(at)
    apart = named - {"needle", "step"}
    if apart and "needle" in named:
        raise ValueError(f"the needle's rows must be named as a whole or one by one, got 'needle' and {min(apart)!r}")
    return opened.places(by_row=bool(apart))


def entries_of(opened: OpenStep, places: Sequence[str], edges: Iterable[Edge]) -> Int[Tensor, "edge 3"]:
    """Int[edge 3]: place, sender and receiver of each edge.

    Raises:
        ValueError: an edge that the model cannot have.
    """
    wiring, at = opened.wiring, {place: i for i, place in enumerate(places)}
    found: list[tuple[int, int, int]] = []
    for edge in edges:
        wiring.check(edge)
        found.append((at[edge.at], wiring.sender_index[edge.sender], wiring.receiver_index[edge.receiver]))
    return torch.tensor(found, dtype=torch.long).reshape(-1, 3)


def edges_of(opened: OpenStep, places: Sequence[str], entries: Int[Tensor, "edge 3"]) -> tuple[Edge, ...]:
    """The edges at these entries."""
    senders, receivers, named = opened.wiring.senders, opened.wiring.receivers, tuple(places)
    return tuple(Edge(senders[s], receivers[r], named[p]) for p, s, r in entries.tolist())


def mask_of(
    opened: OpenStep, places: Sequence[str], entries: Int[Tensor, "edge 3"]
) -> Bool[Tensor, "place sender receiver"]:
    """Bool[place sender receiver]: which edges are there."""
    mask = torch.zeros(len(places), *opened.wiring.allowed.shape, dtype=torch.bool)
    mask[tuple(entries.T)] = True
    return mask


def leading(wiring: Wiring, mask: Bool[Tensor, "place sender receiver"]) -> Bool[Tensor, "place sender receiver"]:
    """The edges that lead on to the logits by way of others in the set."""
    heads, groups, n_places = wiring.n_heads, wiring.n_kv_heads, len(mask)
    alive = torch.zeros(n_places, len(wiring.receivers), dtype=torch.bool)
    alive[-1, -1] = True
    for layer in reversed(range(wiring.n_layers)):
        sender, into = of_layer(wiring, layer)
        alive[:, into["mlp"]] = (mask[:, sender + heads, None] & alive[:, None]).any(-1)
        alive[:, into["q"]] = (mask[:, sender : sender + heads] & alive[:, None]).any(-1)
        read = alive[:, into["q"]].reshape(n_places, groups, -1).any(-1)
        behind = read.int().flip(0).cummax(0).values.flip(0).bool()  # keys and values are read behind their row too
        alive[:, into["k"]] = alive[:, into["v"]] = behind
    return mask & alive[:, None]


def of_layer(wiring: Wiring, layer: int) -> tuple[int, dict[str, slice]]:
    """Where a layer's senders begin, heads first, and where its receivers of each kind stand."""
    begin = layer * (wiring.n_heads + 2 * wiring.n_kv_heads + 1)
    found: dict[str, slice] = {}
    for kind, n in (("q", wiring.n_heads), ("k", wiring.n_kv_heads), ("v", wiring.n_kv_heads), ("mlp", 1)):
        found[kind] = slice(begin, begin + n)
        begin += n
    return 1 + layer * (wiring.n_heads + 1), found
