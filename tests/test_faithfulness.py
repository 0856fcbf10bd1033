"""Circuits on their own against their laws and a slow judge; what they are worth, on a circuit wired by hand."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
import toy_circuit as toy
import zoo
from tiny import build, tokenizer
from torch import Tensor
from toy_steps import STEP, Judge, twins
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dhlens.attribution import attribute
from dhlens.circuits import Bench, means, run_circuits
from dhlens.edgesets import edges_of, entries_of, leading, mask_of
from dhlens.faithfulness import SHARES, Faithfulness, attention_only, faithfulness, helpful_first, random_edges
from dhlens.graphs import Graph
from dhlens.model import load
from dhlens.nodes import Edge, Receiver, Sender, parse_edge
from dhlens.opened import open_steps
from dhlens.paths import patch_edges

KINDS = {"llama": build, "qwen3": build, "pythia": zoo.build, "gpt-2": zoo.build}
FAR = "embed->L0H0.q@step"


@pytest.fixture(scope="module", params=KINDS)
def step(request):
    model = load(KINDS[request.param](request.param), tokenizer=tokenizer())
    return next(open_steps(model, *twins(), steps=[STEP]))


@pytest.fixture(scope="module")
def llama():
    return next(open_steps(load(build("llama"), tokenizer=tokenizer()), *twins(), steps=[STEP]))


@pytest.fixture(scope="module")
def planted():
    """The steps of the model wired by hand."""
    return list(open_steps(load(toy.build(), tokenizer=tokenizer()), *toy.episodes()))


def every(step, *, by_row=False):
    places = step.places(by_row=by_row)
    return edges_of(step, places, step.possible(places).nonzero())


def half(edges, share=0.5, seed=0):
    drawn = torch.rand(len(edges), generator=torch.Generator().manual_seed(seed)) < share
    return [edge for edge, kept in zip(edges, drawn.tolist(), strict=True) if kept]


def test_all_edges_are_the_clean_run_and_none_the_rest(step):
    edges, clean = every(step), step.feed()[0]
    for rest in ("counterfactual", "zero", "mean", torch.ones_like(step.difference)):
        whole, nothing = run_circuits(step, [edges, []], rest=rest)
        torch.testing.assert_close(whole, clean, atol=1e-4, rtol=0)
        assert (nothing - clean).abs().max() > 1e-2
    for through in ("rows", "run"):
        run = next(open_steps(step.model, *twins(), steps=[STEP], through=through))
        got = run.metric(run_circuits(run, [[]])[0])
        assert float(got) == pytest.approx(run.metric_twin, abs=1e-4) != pytest.approx(run.metric_clean, abs=1e-2)


@pytest.mark.parametrize("by_row", [False, True])
def test_all_edges_but_one_is_exact_path_patching(step, by_row):
    places = step.places(by_row=by_row)
    possible = step.possible(places)
    entries = possible.nonzero()
    some = torch.cat([entries[:: len(entries) // 40], entries[-5:]])
    cut = edges_of(step, places, some)
    assert {e.receiver.kind for e in cut} == {"q", "k", "v", "mlp", "logits"} and len({e.at for e in cut}) > 1
    circuits = [(0, possible & ~mask_of(step, places, entry[None])) for entry in some]
    got = step.metric(torch.cat([*Bench.of(step, places, ["counterfactual"]).run(circuits)])) - step.metric_clean
    want = patch_edges(step, cut).change
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert want.abs().max() > 1e-3


class SlowJudge(Judge):
    """Every input as a sum in a plain loop, one edge after the other; no cache, no lanes, no hooks."""

    def output(self, sender: Sender, parts: dict) -> Tensor:
        if sender.kind != "head":
            return parts["embed"] if sender.kind == "embed" else parts["mlp", sender.layer]
        part = slice(sender.head * self.config.head_dim, (sender.head + 1) * self.config.head_dim)
        return parts["z", sender.layer][:, part] @ self.layers[sender.layer].self_attn.o_proj.weight[:, part].T

    @torch.no_grad()
    def circuit(self, wiring, edges, rest: dict[Sender, Tensor]) -> Tensor:
        """Logits of the last row; `rest` holds a vector for every row of the block."""
        kept, size, rows = set(edges), self.config.head_dim, self.rows
        out = {wiring.senders[0]: self.clean_parts["embed"][rows]}

        def entered(receiver: Receiver) -> Tensor:
            total = torch.zeros_like(out[wiring.senders[0]])
            before = wiring.allowed[:, wiring.receiver_index[receiver]]
            for sender, comes_before in zip(wiring.senders, before.tolist(), strict=True):
                for i in range(len(rows)) if comes_before else ():
                    names = ["step"] if i == len(rows) - 1 else ["needle", f"needle+{i}"]
                    live = any(Edge(sender, receiver, at) in kept for at in names)
                    total[i] += (out if live else rest)[sender][i]
            return total

        for n, layer in enumerate(self.layers):
            attn, projected = layer.self_attn, {}
            for kind, heads in (("q", wiring.n_heads), ("k", wiring.n_kv_heads), ("v", wiring.n_kv_heads)):
                weight = getattr(attn, f"{kind}_proj").weight
                states = layer.input_layernorm(self.inputs[n]) @ weight.T
                for head in range(heads):
                    part = slice(head * size, (head + 1) * size)
                    states[rows, part] = layer.input_layernorm(entered(Receiver(kind, n, head))) @ weight[part].T
                projected[kind] = states.unflatten(1, (heads, size)).transpose(0, 1)[None]
            cos, sin = self.hf.model.rotary_emb(self.inputs[n][None], torch.arange(len(self.run))[None])
            q, k = apply_rotary_pos_emb(projected["q"], projected["k"], cos, sin)
            for head in range(wiring.n_heads):
                group, z = wiring.group(head), []
                for row in rows:
                    weights = (k[0, group, : row + 1] @ q[0, head, row] / size**0.5).softmax(0)
                    z.append(weights @ projected["v"][0, group, : row + 1])
                o = attn.o_proj.weight[:, head * size : (head + 1) * size]
                out[Sender("head", n, head)] = torch.stack(z) @ o.T
            out[Sender("mlp", n)] = layer.mlp(layer.post_attention_layernorm(entered(Receiver("mlp", n))))
        return self.hf.lm_head(self.hf.model.norm(entered(Receiver("logits"))[-1]))


def test_equals_the_slow_judge_edge_by_edge():
    hf = build("llama").requires_grad_(False)
    judge = SlowJudge(hf, *twins())
    step = next(open_steps(load(hf, tokenizer=tokenizer()), *twins(), steps=[STEP]))
    senders = step.wiring.senders
    clean, twin = (
        {s: judge.output(s, parts)[judge.rows] for s in senders} for parts in (judge.clean_parts, judge.twin_parts)
    )
    both = {s: (clean[s] + twin[s]) / 2 for s in senders}
    flat = {s: torch.cat([x[:-1].mean(0).expand(len(x) - 1, -1), x[-1:]]) for s, x in both.items()}
    rests = {"counterfactual": twin, "zero": {s: torch.zeros_like(x) for s, x in clean.items()}, "mean": flat}
    for (rest, vectors), by_row in itertools.product(rests.items(), (False, True)):
        share = {"counterfactual": 0.5, "zero": 0.9, "mean": 0.2}[rest]
        edges = half(every(step, by_row=by_row), share)
        got = run_circuits(step, [edges], rest=rest)[0]
        want = judge.circuit(step.wiring, edges, vectors)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert (want - judge.clean_logits).abs().max() > 1e-2


def test_company_and_budget_change_nothing(llama):
    step = llama
    edges = every(step)
    circuits = [half(edges, share, seed) for seed, share in enumerate((0.2, 0.4, 0.6, 0.8, 0.99))]
    together = run_circuits(step, circuits, rest="zero")
    torch.testing.assert_close(run_circuits(step, circuits, rest="zero", rows=17), together, atol=1e-4, rtol=1e-4)
    assert len({round(float(x), 3) for x in step.metric(together)}) == 5
    assert [Bench.of(step, step.places(), ["zero"], rows=rows).lanes for rows in (1, 17, 80)] == [1, 2, 10]


def test_half_precision():
    model = load(build("llama").bfloat16(), tokenizer=tokenizer())
    step = next(open_steps(model, *twins(), steps=[STEP]))
    whole, nothing = step.metric(run_circuits(step, [every(step), []]))
    assert float(whole) == pytest.approx(step.metric_clean, abs=0.1)
    assert float(nothing) == pytest.approx(step.metric_twin, abs=0.1)
    assert means([step]).dtype == torch.float32


def test_means_are_over_the_needle_and_over_steps(llama):
    step = llama
    steps = list(open_steps(step.model, *twins()))
    one, many = means([step]), means(steps)
    clean, twin = step.embeddings
    torch.testing.assert_close(one[0, :-1], ((clean + twin) / 2)[:-1].mean(0).expand(step.n_needle, -1))
    torch.testing.assert_close(one[0, -1], clean[-1])
    torch.testing.assert_close(many[0, -1], torch.stack([s.embeddings[:, -1] for s in steps]).mean((0, 1)))
    got, want = (run_circuits(step, [[]], rest=rest) for rest in ("mean", one))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("by_row", [False, True])
def test_what_leads_on_is_the_pruned_graph(step, by_row):
    places, edges = step.places(by_row=by_row), every(step, by_row=by_row)
    for seed, share in enumerate((0.05, 0.1, 0.3)):
        kept = half(edges, share, seed)
        graph = Graph.of(dict.fromkeys(kept, 1.0), step.wiring, step=STEP).prune()
        mask = leading(step.wiring, mask_of(step, places, entries_of(step, places, kept)))
        found = edges_of(step, places, mask.nonzero())
        assert set(found) == graph.edges and len(found) < len(kept)
        alone, pruned = run_circuits(step, [kept, found])
        torch.testing.assert_close(alone, pruned, atol=1e-4, rtol=0)
    assert found


def test_planted_edges_are_the_circuit_and_random_ones_are_not(planted):
    for step in planted:
        edges = toy.planted(step.step)
        ranked = attribute(step).top(10**6)
        rankings = {"planted": sorted(edges, key=str), "attribution": ranked}
        rankings |= {f"random {seed}": random_edges(step, seed=seed) for seed in range(3)}
        rankings["like"] = random_edges(step, seed=0, like=list(ranked)[: len(edges)])
        found = faithfulness(step, rankings, sizes=[len(edges)], rests=["counterfactual"])
        assert not found.undefined and found.metric_none["counterfactual"] == pytest.approx(step.metric_twin, abs=1e-4)
        table = found.table.set_index("ranking")
        assert table["size"].eq(len(edges)).all() and table.loc["planted", "edges"] == len(edges)
        for name in ("planted", "attribution"):
            assert table.loc[name, "faithful"] == pytest.approx(1, abs=0.15)
            assert table.loc[name, "complete"] == pytest.approx(0, abs=0.02)
        chance = table.drop(["planted", "attribution"])
        assert chance["faithful"].abs().max() < 0.05 and chance["complete"].min() > 0.9


def test_the_table(planted):
    step = planted[1]
    found = attribute(step)
    rankings = {"all": found.top(10**6), "few": found.top(20)}
    own = torch.zeros_like(step.difference)
    result = faithfulness(step, rankings, sizes=[10**6, 4, 25], means=own)
    n = int(step.possible(step.places()).sum())
    assert result.n_possible == n == len(found.edges())
    table = result.table
    assert [*table] == [
        *("step", "ranking", "rest", "size", "edges", "share"),
        *("metric_kept", "faithful", "metric_removed", "complete"),
    ]
    assert table["ranking"].tolist() == ["all"] * 9 + ["few"] * 6
    assert table["rest"].tolist() == ["counterfactual", "zero", "mean"] * 5
    assert table["size"].tolist() == [4] * 3 + [25] * 3 + [n] * 3 + [4] * 3 + [20] * 3
    assert table["share"].tolist() == (table["size"] / n).tolist() and table["step"].eq(1).all()
    whole = table[table["size"] == n]
    np.testing.assert_allclose(whole["metric_kept"], step.metric_clean, atol=1e-4)
    np.testing.assert_allclose(whole["metric_removed"], [*result.metric_none.values()], atol=1e-4)
    np.testing.assert_allclose(whole[["faithful", "complete"]], [[1, 0]] * 3, atol=1e-4)
    zero, mean = (table[table["rest"] == rest].iloc[:, 3:].reset_index(drop=True) for rest in ("zero", "mean"))
    pd.testing.assert_frame_equal(zero, mean)
    kept = [e for e in list(rankings["all"])[:25]]
    one = table[(table["size"] == 25) & (table["rest"] == "zero")].iloc[0]
    part = Graph.of(dict.fromkeys(kept, 1.0), step.wiring, step=1).prune().edges
    alone, cut = step.metric(run_circuits(step, [kept, set(every(step)) - part], rest="zero")).tolist()
    assert one["edges"] == len(part)
    assert [one["metric_kept"], one["metric_removed"]] == pytest.approx([alone, cut], abs=1e-4)
    assert one["complete"] == pytest.approx(cut / step.metric_clean, abs=1e-4)  # nothing leaves a metric of 0


def test_sizes_are_those_of_mib_if_nothing_is_said(planted):
    step = planted[0]
    found = faithfulness(step, {"any": random_edges(step, seed=1)}, rests=["zero"])
    want = sorted({max(1, round(share * found.n_possible)) for share in SHARES})
    assert found.table["size"].tolist() == want and len(want) == 9 and want[-1] == found.n_possible


def test_areas_by_hand():
    table = pd.DataFrame(
        [
            *([0, "long", "zero", *row] for row in ((0.01, 0.5), (0.1, 1.5), (1.0, 1.0))),
            *([0, "short", "zero", *row] for row in ((0.01, 0.0), (0.1, 0.5))),
        ],
        columns=["step", "ranking", "rest", "share", "faithful"],
    )
    areas = Faithfulness(0, 100, 1.0, {"zero": 0.0}, {}, table).areas
    assert areas[["ranking", "rest", "reach"]].values.tolist() == [["long", "zero", 1.0], ["short", "zero", 1.0]]
    cpr = [0.01 * 0.25 + 0.09 * 1.0 + 0.9 * 1.25, 0.09 * 0.25 + 0.9 * 0.5]
    cmd = [0.01 * 0.75 + 0.09 * 0.5 + 0.9 * 0.25, 0.01 * 1.0 + 0.09 * 0.75 + 0.9 * 0.5]
    np.testing.assert_allclose(areas["cpr"], cpr)
    np.testing.assert_allclose(areas["cmd"], cmd)
    np.testing.assert_allclose(areas["cpr_log"], [(1.0 + 1.25) / 2, (0.25 + 0.5) / 2])
    np.testing.assert_allclose(areas["cmd_log"], [(0.5 + 0.25) / 2, (0.75 + 0.5) / 2])
    one = Faithfulness(0, 100, 1.0, {"zero": 0.0}, {}, table[table["share"] == 0.1]).areas
    np.testing.assert_allclose(one["cpr"], [0.75, 0.25])
    assert one["cpr_log"].isna().all()


def test_random_edges(llama):
    step = llama
    edges = every(step)
    drawn = random_edges(step, seed=0)
    assert set(drawn) == set(edges) and len(drawn) == len(edges) and drawn not in (edges, random_edges(step, seed=1))
    assert drawn == random_edges(step, seed=0)
    assert {e.at for e in random_edges(step, seed=0, by_row=True)} == {*(f"needle+{i}" for i in range(7)), "step"}
    ranking = list(attribute(step).top(200))
    like = random_edges(step, seed=0, like=ranking)
    assert [(e.receiver, e.at) for e in like] == [(e.receiver, e.at) for e in ranking]
    assert max(Counter(like).values()) == 1 and like != tuple(ranking)
    for edge in like:
        step.wiring.check(edge)
    assert set(random_edges(step, seed=3, like=edges)) == set(edges)


def test_rankings_of_an_attribution(llama):
    found = attribute(llama)
    edges = attention_only(found)
    size = [abs(found.score(e)) for e in edges]
    assert size == sorted(size, reverse=True)
    assert set(edges) == {e for e in found.edges() if "mlp" not in str(e)} and len(edges) < len(found.edges())
    scores = [found.score(e) for e in helpful_first(found)]
    assert scores == sorted(scores) and len(scores) == len(found.edges()) and scores[0] < 0 < scores[-1]


def test_a_step_without_an_effect_is_not_a_number(planted):
    still = dataclasses.replace(planted[0], metric=lambda logits: 0 * logits[..., 0], metric_clean=0.0)
    found = faithfulness(still, {"any": random_edges(still, seed=0)}, sizes=[3, 300], rests=["zero", "counterfactual"])
    assert set(found.undefined) == {"zero", "counterfactual"} and "no effect" in found.undefined["zero"]
    assert found.table[["faithful", "complete"]].isna().all(axis=None) and found.table["metric_kept"].eq(0).all()
    assert found.areas[["cpr", "cmd", "cpr_log", "cmd_log"]].isna().all(axis=None) and len(found.areas) == 2


@pytest.mark.parametrize(
    ("rankings", "how", "message"),
    [
        ({}, {}, "at least one ranking"),
        ({"a": [FAR], "b": []}, {}, "at least one edge, got none in 'b'"),
        ({"a": [FAR, "embed->L0H1.q@step", FAR]}, {}, "got embed->L0H0.q@step more often in 'a'"),
        ({"a": [FAR, "L2H1->L1H0.q@step"]}, {}, "after its sender"),
        ({"a": [FAR, "L0H9->L1H0.q@step"]}, {}, "outside the model's"),
        ({"a": [FAR, "embed->L1H0.q@needle+70"]}, {}, r"got 'needle\+70'"),
        ({"a": ["embed->L1H0.q@needle"], "b": ["embed->L1H0.q@needle+1"]}, {}, "as a whole or one by one"),
        ({"a": [FAR]}, {"sizes": []}, "at least 1"),
        ({"a": [FAR]}, {"sizes": [3, 0]}, r"at least 1, got \[3, 0\]"),
        ({"a": [FAR]}, {"rests": []}, "each once"),
        ({"a": [FAR]}, {"rests": ["zero", "zero"]}, "each once"),
        ({"a": [FAR]}, {"rests": ["zero"], "means": torch.zeros(13 + 3, 6, 64)}, "not among"),
        ({"a": [FAR]}, {"means": torch.zeros(2, 6, 64)}, r"shape \(16, 6, 64\)"),
        ({"a": [FAR]}, {"rows": 0}, "at least one row"),
    ],
)
def test_bad_input_before_any_pass(planted, rankings, how, message, monkeypatch):
    step = planted[0]
    monkeypatch.setattr(type(step.stream), "fork", lambda *a: pytest.fail("a pass began"))
    with pytest.raises(ValueError, match=message):
        faithfulness(step, {name: map(parse_edge, edges) for name, edges in rankings.items()}, **how)


def test_bad_circuits_and_draws(planted):
    step = planted[0]
    with pytest.raises(ValueError, match="at least one circuit"):
        run_circuits(step, [])
    with pytest.raises(ValueError, match=r"of shape \(16, 6, 64\)"):
        run_circuits(step, [[]], rest=torch.zeros(1, 6, 64))
    with pytest.raises(ValueError, match="got none"):
        means([])
    with pytest.raises(ValueError, match="more often in 'like'"):
        random_edges(step, seed=0, like=[parse_edge(FAR)] * 2)
