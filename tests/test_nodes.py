"""Names of senders, receivers and edges, and the order of a transformer."""

import pytest
import torch

from dhlens.heads import HeadSet
from dhlens.nodes import Edge, Receiver, Sender, Wiring, parse_edge, place_rows

SMALL = Wiring(n_layers=2, n_heads=4, n_kv_heads=2)


def test_every_name_reads_back():
    assert list(map(str, SMALL.senders)) == [
        *("embed", "L0H0", "L0H1", "L0H2", "L0H3", "L0.mlp"),
        *("L1H0", "L1H1", "L1H2", "L1H3", "L1.mlp"),
    ]
    assert list(map(str, SMALL.receivers[:9])) == [
        *("L0H0.q", "L0H1.q", "L0H2.q", "L0H3.q", "L0KV0.k", "L0KV1.k", "L0KV0.v", "L0KV1.v", "L0.mlp"),
    ]
    assert str(SMALL.receivers[-1]) == "logits" and len(SMALL.receivers) == 19
    for sender in SMALL.senders:
        for receiver in SMALL.receivers:
            for at in ("needle", "needle+12", "step"):
                edge = Edge(sender, receiver, at)
                assert parse_edge(str(edge)) == edge
    assert str(Edge(Sender("head", 3, 5), Receiver("k", 9, 0), "needle")) == "L3H5->L9KV0.k@needle"


@pytest.mark.parametrize(
    "text", ["", "L3H5", "L3H5->L9H0.k@step", "L3H5->L9KV0.q@step", "logits->L0.mlp@step", "embed->logits@end"]
)
def test_what_is_no_edge(text):
    with pytest.raises(ValueError, match=r"reads like L3H5->L9KV0\.k@needle"):
        parse_edge(text)


@pytest.mark.parametrize("parallel", [False, True])
def test_the_order_of_a_transformer(parallel):
    """A layer's attention reads what is before the layer; its MLP reads its attention too, unless they are parallel."""
    wiring = Wiring(2, 4, 2, parallel)

    def before(sender, receiver):
        if sender.kind == "embed" or receiver.kind == "logits":
            return True
        inside = sender.kind == "head" and receiver.kind == "mlp" and not parallel
        return sender.layer < receiver.layer or (inside and sender.layer == receiver.layer)

    want = [[before(s, r) for r in wiring.receivers] for s in wiring.senders]
    assert wiring.allowed.tolist() == want
    assert torch.equal(wiring.allowed.sum(0), wiring.n_before)


def test_keys_and_values_are_shared():
    def feeds(name):
        return [str(s) for s in SMALL.feeds(parse_edge(f"embed->{name}@step").receiver)]

    assert feeds("L1KV1.k") == feeds("L1KV1.v") == ["L1H2", "L1H3"] and feeds("L1H2.q") == ["L1H2"]
    assert feeds("L0.mlp") == ["L0.mlp"] and feeds("logits") == []
    asked = SMALL.into(HeadSet(["L1H1", "L0H3"], (2, 4)))
    names = {str(r) for r, a in zip(SMALL.receivers, asked.tolist(), strict=True) if a}
    assert names == {"L1H1.q", "L1KV0.k", "L1KV0.v", "L0H3.q", "L0KV1.k", "L0KV1.v"}


def test_rows_of_a_place():
    assert list(place_rows("needle", 3)) == [0, 1, 2] and list(place_rows("step", 3)) == [3]
    assert list(place_rows("needle+2", 3)) == [2]
    for at in ("needle+3", "needle-1", "question", ""):
        with pytest.raises(ValueError, match="rows are 'step', 'needle' or"):
            place_rows(at, 3)
