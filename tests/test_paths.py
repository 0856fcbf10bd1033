"""Exact path patching against the plain model on the whole sequence, and on a circuit wired by hand."""

import pytest
import torch
import toy_circuit as toy
from tiny import build, tokenizer
from toy_steps import STEP, Judge, twins

from dhlens.model import load
from dhlens.nodes import Edge, parse_edge
from dhlens.opened import open_steps
from dhlens.paths import patch_edges


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def case(request):
    hf = build(request.param).requires_grad_(False)
    step = next(open_steps(load(hf, tokenizer=tokenizer()), *twins(), steps=[STEP]))
    return step, Judge(hf, *twins())


def some_edges(step):
    """Every kind of receiver at every kind of place, and every kind of sender."""
    wiring = step.wiring
    pairs = wiring.allowed.nonzero().tolist()
    edges = [
        Edge(wiring.senders[s], wiring.receivers[r], at) for s, r in pairs for at in ("needle", "needle+2", "step")
    ]
    edges = [e for e in edges if e.receiver.kind != "logits" or e.at == "step"]
    return edges[::13] + [e for e in edges if e.receiver.kind == "logits"]


def test_equals_the_plain_model_on_the_whole_sequence(case):
    step, judge = case
    edges = some_edges(step)
    want = torch.tensor([judge.change(edge) for edge in edges])
    got = patch_edges(step, edges, rows=20)
    torch.testing.assert_close(got.change, want, atol=1e-5, rtol=1e-5)
    assert {e.receiver.kind for e in edges} == {"q", "k", "v", "mlp", "logits"}
    for at in ("needle", "needle+2", "step"):
        assert max(abs(c) for e, c in got.scores.items() if e.at == at) > 1e-3


def test_order_and_company_change_nothing(case):
    step, _ = case
    edges = some_edges(step)[::-1]
    together = patch_edges(step, edges)
    apart = patch_edges(step, edges[::4], rows=1)
    torch.testing.assert_close(together.change[::4], apart.change, atol=1e-5, rtol=1e-5)
    assert together.edges == tuple(edges) and together.table["change"].tolist() == pytest.approx(
        together.change.tolist()
    )
    assert together.table["receiver"].tolist() == [str(e.receiver) for e in edges]


def test_nothing_put_in_changes_nothing(case):
    step, _ = case
    assert patch_edges(step, some_edges(step)[::3], scale=0.0).change.abs().max() < 1e-5


def test_the_planted_edges_and_nothing_else():
    model = load(toy.build(), tokenizer=tokenizer())
    steps = list(open_steps(model, *toy.episodes()))
    assert [step.step for step in steps] == [0, 1, 2, 3]
    for step in steps:
        wiring = step.wiring
        edges = [
            Edge(wiring.senders[s], wiring.receivers[r], at)
            for s, r in wiring.allowed.nonzero().tolist()
            for at in ("needle", "step")
            if at == "step" or wiring.receivers[r].kind != "logits"
        ]
        found = {e: abs(c) for e, c in patch_edges(step, edges).scores.items()}
        planted = toy.planted(step.step)
        assert min(found[e] for e in planted) > 10 * max(c for e, c in found.items() if e not in planted)


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        ("L2H1->L1H0.q@step", "after its sender, got one upstream"),
        ("L1H1->L1KV0.k@needle", "after its sender"),
        ("L1.mlp->L1.mlp@step", "after its sender"),
        ("L0H6->L1H0.q@step", "outside the model's 3 layers x 6 heads"),
        ("L0H0->L1KV2.v@step", "2 key/value heads"),
        ("L0H0->logits@needle", "its own row, 'step'"),
        ("L0H0->L1H0.q@needle+7", r"'needle\+6', got 'needle\+7'"),
    ],
)
def test_impossible_edges_before_any_pass(case, edge, message, monkeypatch):
    step, _ = case
    monkeypatch.setattr(type(step.stream), "fork", lambda *a: pytest.fail("a pass began"))
    with pytest.raises(ValueError, match=message):
        patch_edges(step, [parse_edge("embed->L0H0.q@step"), parse_edge(edge)])


def test_no_edges_or_rows(case):
    for edges, rows in (([], 8), ([parse_edge("embed->L0H0.q@step")], 0)):
        with pytest.raises(ValueError, match="at least one edge and one row per pass"):
            patch_edges(case[0], edges, rows=rows)
