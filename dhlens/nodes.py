"""Names in a circuit: what writes into the residual stream, what reads it, and who can feed whom.

    wiring = Wiring(n_layers=30, n_heads=9, n_kv_heads=3)
    wiring.allowed                                   # [sender receiver]: which pairs can be an edge at all
    parse_edge("L3H5->L9KV0.k@needle")               # and str(edge) back again

Senders are the embedding (`embed`: what enters the first layer), every query head (`L3H5`) and every MLP (`L3.mlp`).
Receivers are the query input of a head (`L9H2.q`), the key and value inputs of a key/value head (`L9KV0.k`,
`L9KV0.v`), the input of an MLP (`L3.mlp`) and the final norm (`logits`). An edge is what a sender adds to the one input
of a receiver, at the same rows of the pass: "needle" (all of the needle's rows), "needle+2" (one of them, counted from
0) or "step" (the row that predicts the step's token).

Under grouped-query attention the query heads of a group read one key and one value. An edge into `L9KV0.k` therefore
acts through all heads of the group at once, in the row itself and in those behind it that see it; there is no such
thing as the key of one query head. Where every head has a key of its own, a group is one head.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dhlens.heads import HeadSet, head_name

_SENDER = re.compile(r"embed|L(?P<layer>\d+)(?:H(?P<head>\d+)|\.mlp)")
_RECEIVER = re.compile(r"logits|L(?P<layer>\d+)(?:H(?P<head>\d+)\.q|KV(?P<group>\d+)\.(?P<kv>[kv])|\.mlp)")
_PLACE = re.compile(r"step|needle(?:\+(?P<row>\d+))?")


@dataclass(frozen=True)
class Sender:
    """What adds to the residual stream."""

    kind: Literal["embed", "head", "mlp"]
    layer: int = 0
    head: int = 0
    """Query head; 0 for the embedding and MLPs."""

    def __str__(self) -> str:
        names = {"embed": "embed", "head": head_name((self.layer, self.head)), "mlp": f"L{self.layer}.mlp"}
        return names[self.kind]


@dataclass(frozen=True)
class Receiver:
    """An input that is computed from the residual stream."""

    kind: Literal["q", "k", "v", "mlp", "logits"]
    layer: int = 0
    index: int = 0
    """Query head for "q", key/value head for "k" and "v", else 0."""

    def __str__(self) -> str:
        if self.kind in ("k", "v"):
            return f"L{self.layer}KV{self.index}.{self.kind}"
        names = {"q": f"{head_name((self.layer, self.index))}.q", "mlp": f"L{self.layer}.mlp", "logits": "logits"}
        return names[self.kind]


@dataclass(frozen=True)
class Edge:
    """One sender's part in one receiver's input, at some rows."""

    sender: Sender
    receiver: Receiver
    at: str
    """"needle", "needle+2" or "step"."""

    def __str__(self) -> str:
        return f"{self.sender}->{self.receiver}@{self.at}"


@dataclass(frozen=True)
class Wiring:
    """The order of a transformer: every sender and receiver of a model, and which come before which."""

    n_layers: int
    n_heads: int
    """Query heads per layer."""
    n_kv_heads: int
    parallel: bool = False
    """Attention and MLP of a layer read the same residual stream, so that they do not feed each other (GPT-NeoX)."""

    @cached_property
    def senders(self) -> tuple[Sender, ...]:
        """Embedding, then layer by layer the heads and the MLP."""
        layers = range(self.n_layers)
        blocks = [[*(Sender("head", n, h) for h in range(self.n_heads)), Sender("mlp", n)] for n in layers]
        return (Sender("embed"), *(sender for block in blocks for sender in block))

    @cached_property
    def receivers(self) -> tuple[Receiver, ...]:
        """Layer by layer queries, keys, values and the MLP; then the logits."""
        inputs: tuple[tuple[Literal["q", "k", "v"], int], ...]
        inputs = (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads))
        blocks = [
            [*(Receiver(kind, n, i) for kind, many in inputs for i in range(many)), Receiver("mlp", n)]
            for n in range(self.n_layers)
        ]
        return (*(receiver for block in blocks for receiver in block), Receiver("logits"))

    @cached_property
    def sender_index(self) -> dict[Sender, int]:
        """Where each sender stands in `senders`."""
        return {sender: i for i, sender in enumerate(self.senders)}

    @cached_property
    def receiver_index(self) -> dict[Receiver, int]:
        """Where each receiver stands in `receivers`."""
        return {receiver: i for i, receiver in enumerate(self.receivers)}

    @cached_property
    def n_before(self) -> Int[Tensor, " receiver"]:
        """Int[receiver]: how many senders, from the first on, come before each receiver."""
        block = self.n_heads + 1

        def before(receiver: Receiver) -> int:
            if receiver.kind == "logits":
                return len(self.senders)
            inside = self.n_heads if receiver.kind == "mlp" and not self.parallel else 0
            return 1 + receiver.layer * block + inside

        return torch.tensor([before(receiver) for receiver in self.receivers])

    @cached_property
    def allowed(self) -> Bool[Tensor, "sender receiver"]:
        """Bool[sender receiver]: the sender comes before the receiver."""
        return torch.arange(len(self.senders))[:, None] < self.n_before

    def into(self, heads: HeadSet) -> Bool[Tensor, " receiver"]:
        """Which receivers are inputs of these heads: their queries, and keys and values of their groups."""
        groups = {(layer, self.group(head)) for layer, head in heads}
        asked = [
            (r.layer, r.index) in (heads.pairs if r.kind == "q" else groups if r.kind in "kv" else ())
            for r in self.receivers
        ]
        return torch.tensor(asked)

    def group(self, head: int) -> int:
        """The key/value head that a query head reads."""
        return head // (self.n_heads // self.n_kv_heads)

    def feeds(self, receiver: Receiver) -> tuple[Sender, ...]:
        """The senders whose output a receiver enters: all heads of the group for a key or value."""
        if receiver.kind == "logits":
            return ()
        if receiver.kind == "mlp":
            return (Sender("mlp", receiver.layer),)
        heads = range(self.n_heads)
        mine = [h for h in heads if (h if receiver.kind == "q" else self.group(h)) == receiver.index]
        return tuple(Sender("head", receiver.layer, h) for h in mine)

    def check(self, edge: Edge) -> None:
        """Refuse an edge that this model cannot have.

        Raises:
            ValueError: a name outside the model, a receiver upstream of its sender, or logits at the needle's rows.
        """
        for name, known in ((edge.sender, self.sender_index), (edge.receiver, self.receiver_index)):
            if name not in known:
                size = f"{self.n_layers} layers x {self.n_heads} heads, {self.n_kv_heads} key/value heads"
                raise ValueError(f"edge {edge}: {name} lies outside the model's {size}")
        if not self.allowed[self.sender_index[edge.sender], self.receiver_index[edge.receiver]]:
            raise ValueError(f"edge {edge}: a receiver must come after its sender, got one upstream of it or beside it")
        if edge.receiver.kind == "logits" and edge.at != "step":
            raise ValueError(f"edge {edge}: the step's logits are read off its own row, 'step', got {edge.at!r}")


def parse_edge(text: str) -> Edge:
    """`L3H5->L9KV0.k@needle` as an Edge.

    Raises:
        ValueError: it is none.
    """
    sender, arrow, rest = text.partition("->")
    receiver, _, at = rest.partition("@")
    s, r = _SENDER.fullmatch(sender), _RECEIVER.fullmatch(receiver)
    if not (arrow and s and r and _PLACE.fullmatch(at)):
        raise ValueError(f"an edge reads like L3H5->L9KV0.k@needle, embed->L0H2.q@step, got {text!r}")
    return Edge(_sender(s), _receiver(r), at)


def place_rows(at: str, n_needle: int) -> range:
    """Which rows of a block of `n_needle` needle rows and the step's row a place names.

    Raises:
        ValueError: no place, or a row that the needle has not.
    """
    found = _PLACE.fullmatch(at)
    row = found["row"] if found else None
    if found is None or (row is not None and int(row) >= n_needle):
        raise ValueError(f"rows are 'step', 'needle' or 'needle+0'..'needle+{n_needle - 1}', got {at!r}")
    if at == "step":
        return range(n_needle, n_needle + 1)
    return range(n_needle) if row is None else range(int(row), int(row) + 1)


def _sender(found: re.Match[str]) -> Sender:
    if found["layer"] is None:
        return Sender("embed")
    layer = int(found["layer"])
    return Sender("mlp", layer) if found["head"] is None else Sender("head", layer, int(found["head"]))


def _receiver(found: re.Match[str]) -> Receiver:
    if found["layer"] is None:
        return Receiver("logits")
    layer = int(found["layer"])
    if found["kv"]:
        return Receiver("k" if found["kv"] == "k" else "v", layer, int(found["group"]))
    return Receiver("mlp", layer) if found["head"] is None else Receiver("q", layer, int(found["head"]))
