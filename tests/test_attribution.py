"""Attribution against finite differences of exact patching, its laws, and a circuit wired by hand."""

import dataclasses

import pytest
import torch
import toy_circuit as toy
import zoo
from tiny import build, tokenizer
from toy_steps import STEP, twins

from dhlens.attribution import attribute
from dhlens.heads import HeadSet
from dhlens.model import load
from dhlens.nodes import parse_edge
from dhlens.opened import open_steps
from dhlens.paths import patch_edges

KINDS = {"llama": build, "qwen3": build, "phi": build, "pythia": zoo.build, "gpt-2": zoo.build, "padded": zoo.build}


@pytest.fixture(scope="module", params=KINDS)
def step(request):
    model = load(KINDS[request.param](request.param), tokenizer=tokenizer())
    return next(open_steps(model, *twins(), steps=[STEP]))


def test_equals_finite_differences_of_exact_patching(step):
    """Central, of the fourth order, along the sender's difference."""
    found = attribute(step)
    edges = [*found.top(40), *found.edges()[::31]]
    h = 0.03
    one, two = (
        patch_edges(step, edges, scale=s).change - patch_edges(step, edges, scale=-s).change for s in (h, 2 * h)
    )
    want = (8 * one - two) / (12 * h)
    got = torch.tensor([found.score(edge) for edge in edges])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(got.abs().max()))
    assert {e.receiver.kind for e in edges} == {"q", "k", "v", "mlp", "logits"} and {e.at for e in edges} == {
        "needle",
        "step",
    }


def test_integrated_gradients_of_the_embedding_add_up_to_the_whole_effect(step):
    """All that the embedding feeds, at all rows; one point is not enough."""
    whole = step.metric_twin - step.metric_clean
    fine, coarse = (float(attribute(step, points=n).scores[:, 0].sum()) for n in (40, 1))
    assert fine == pytest.approx(whole, rel=1e-3) and coarse != pytest.approx(whole, rel=1e-3)


def test_rows_add_up_to_places(step):
    apart, together = attribute(step, by_row=True), attribute(step)
    assert apart.places == (*(f"needle+{i}" for i in range(7)), "step")
    torch.testing.assert_close(apart.scores[:-1].sum(0), together.scores[0])
    torch.testing.assert_close(apart.scores[-1], together.scores[1])


def test_a_receiver_is_the_same_whoever_else_is_asked_about(step):
    n_layers, n_heads = step.wiring.n_layers, step.wiring.n_heads
    heads = HeadSet([(1, 0), (2, n_heads - 1)], (n_layers, n_heads))
    few = attribute(dataclasses.replace(step, asked=step.wiring.into(heads)), points=2)
    every = attribute(step, points=2)
    assert few.known.any() and not (few.known & ~every.known).any()
    torch.testing.assert_close(few.scores, every.scores * few.known)
    last = step.wiring.n_kv_heads - 1
    names = {str(e.receiver) for e in few.edges()}
    assert names == {"L1H0.q", "L1KV0.k", "L1KV0.v", f"L2H{n_heads - 1}.q", f"L2KV{last}.k", f"L2KV{last}.v"}


def test_the_table_holds_every_edge_once(step):
    found = attribute(step)
    table, edges = found.table, found.edges()
    assert len(set(edges)) == len(edges) == len(table) == int(found.known.sum())
    top = found.top(7)
    sizes = table["score"].abs().sort_values(ascending=False)
    assert [abs(s) for s in top.values()] == pytest.approx(sizes[:7].tolist())
    for edge, score in top.items():
        row = table[
            (table["sender"] == str(edge.sender)) & (table["receiver"] == str(edge.receiver)) & (table["at"] == edge.at)
        ]
        assert row["score"].item() == pytest.approx(score) == found.score(edge)
    assert len(found.top(10**6)) == len(edges) and table["step"].eq(STEP).all()


def test_nothing_flows_up_or_into_logits_at_the_needle(step):
    found = attribute(step)
    assert not found.scores[~found.known].any()
    assert not found.known[0, :, -1].any() and found.known[1, :, -1].all()
    with pytest.raises(ValueError, match="was not asked about"):
        found.score(parse_edge("embed->L0H0.q@needle+1"))
    with pytest.raises(ValueError, match="after its sender"):
        found.score(parse_edge("L1H0->L0H0.q@step"))
    with pytest.raises(ValueError, match="at least 0, got -1"):
        attribute(step, points=-1)


@pytest.mark.parametrize("points", [0, 5])
def test_the_planted_edges_and_nothing_else(points):
    """Every planted edge far above every other one, and the pairs take turns."""
    model = load(toy.build(), tokenizer=tokenizer())
    for step in open_steps(model, *toy.episodes()):
        found, planted = attribute(step, points=points), toy.planted(step.step)
        top = found.top(len(planted) + 1)
        *kept, rest = (abs(score) for score in top.values())
        assert set(list(top)[:-1]) == planted and min(kept) > 5 * rest
        assert all(score < 0 for edge, score in top.items() if edge in planted)


@pytest.mark.slow
def test_smollm2_estimates_what_patching_measures(smollm2):
    """On a real needle, for the strongest edges of a step and for any edges."""
    from scipy.stats import spearmanr

    from dhlens.tasks import niah

    clean = niah.episodes(smollm2.tokenizer, lengths=(300,), depths=(0.5,), n=1, seed=0)[0]
    step = list(open_steps(smollm2, clean, niah.twin(smollm2.tokenizer, clean, seed=0)))[4]
    assert step.metric_clean > 3 and step.metric_twin < step.metric_clean - 3
    found = attribute(step)
    top = found.top(60)
    exact = patch_edges(step, top).change.numpy()
    assert spearmanr(exact, list(top.values())).statistic > 0.7
    assert ((exact < 0) == (torch.tensor(list(top.values())) < 0).numpy()).mean() > 0.8
