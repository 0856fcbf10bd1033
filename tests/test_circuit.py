"""The circuit recipe on the circuit wired by hand: planted edges above the null, resuming, words, and refusals."""

import dataclasses
import json
import sys

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import toy_circuit as toy
from toy_crowds import crowds as toy_crowds
from typer.testing import CliRunner

import dhlens as dh
import dhlens.heads
from dhlens import dissection, findings, ties
from dhlens.attribution import Attribution
from dhlens.cli import app, main
from dhlens.counterparts import Answer
from dhlens.dissection import Asked
from dhlens.episode import Outcome
from dhlens.graphs import Graph
from dhlens.nodes import Wiring, parse_edge
from dhlens.recipes import Circuit, circuit

N = 2
RECIPE = sys.modules["dhlens.recipes.circuit"]  # the package calls the function so, too
ASKED = Asked(edges=12, exact=8, controls=10, sizes=(4, 30, 400), rests=("counterfactual", "zero"), more=1)
SETTINGS = {"steps": 4, "asked": ASKED, "min_steps": 2, "draws": 20, "max_new_tokens": 4, "progress": False}


def pair(k):
    """The toy's prompt and its twin in other filler."""
    found = []
    for e in toy.episodes():
        tokens = e.tokens.clone()
        hay = tokens >= toy.FILLER[0]
        tokens[hay] = toy.FILLER[0] + (tokens[hay] - toy.FILLER[0] + k) % len(toy.FILLER)
        text = " ".join(f"w{t}" for t in e.answer.tolist())
        found.append(
            dataclasses.replace(e, id=f"{e.id}{k}", tokens=tokens, meta={"answer_text": text, "group": f"g{k}"})
        )
    return found


TWINS = {clean.id: twin for clean, twin in map(pair, range(N))}
EPISODES = [pair(k)[0] for k in range(N)]


def run(model, **changes):
    return circuit(model, EPISODES, **{**SETTINGS, "twin": lambda e: TWINS[e.id], **changes})


@pytest.fixture(scope="module")
def model():
    return dh.load(toy.build(), tokenizer=tiny.tokenizer(), check=False)


@pytest.fixture(scope="module")
def result(model):
    return run(model)


def test_the_planted_edges_are_found_above_the_null(result):
    graphs = result.graphs()
    assert set(graphs) == {(e.id, s) for e in EPISODES for s in range(4)}
    for (name, step), graph in graphs.items():
        planted = toy.planted(step)
        assert set(list(graph.scores)[: len(planted)]) == planted
        part = result.edges.set_index(["episode", "step"]).loc[(name, step)]
        exact = {(r.sender, r.receiver, r.at): abs(r.exact) for r in part.itertuples() if not np.isnan(r.exact)}
        least = min(exact[str(e.sender), str(e.receiver), e.at] for e in planted)
        assert least > 5 * part.loc[part["control"], "exact"].abs().max() and part["control"].sum() == 10
    # the pairs take turns, so that every second step is alike and no neighbours are
    frequent = result.tables["frequent"].set_index("edge")
    assert frequent.loc["L1H0->logits@step", ["share", "answers", "core"]].tolist() == [0.5, 1, 0]
    assert frequent.loc["embed->L0KV1.v@needle", ["share", "answers", "core"]].tolist() == [1, 1, 1]
    shared = result.tables["overlaps"].set_index(["of", "pair"])["value"]
    assert shared["dynamic", "next step"] == 0 and shared["dynamic", "same answer"] > 0.4
    assert shared["edges", "next step"] < 0.2 < shared["edges", "same answer"]
    assert (result.tables["agreement"]["above"] > 0.8).all() and (result.tables["agreement"]["n"] == 8).all()


def test_the_dynamic_heads_are_fed_as_planted(result):
    table = result.feeders.query("step == 1").groupby(["side", "at", "kind"])[["share", "share_others"]].sum() / N
    feeds, others = table["share"], table["share_others"]
    assert feeds["v", "needle", "embed"] > 0.5 and feeds["k", "needle", "head"] > 0.1
    assert others["k", "needle", "head"] < 0.5 * feeds["k", "needle", "head"]
    total = result.feeders.groupby(["episode", "step"])[["share", "share_others"]].sum()
    np.testing.assert_allclose(total, 1, atol=1e-6)
    direct = result.direct
    parts = direct[["heads", "mlps", "embed", "bias"]].sum(axis=1)
    np.testing.assert_allclose(parts, direct["logit"], atol=1e-4)
    assert (direct["dynamic"] > 0.95 * direct["heads"]).all() and (direct["matched"].abs() < 0.2).all()


def test_curves_reach_the_model_with_all_edges_and_nothing_without_the_planted_ones(result):
    table = result.tables["curves"].query("rest == 'counterfactual'").set_index(["measure", "ranking", "size"])["value"]
    assert table["faithful", "attribution", 4] > 0.9 > 0.1 > table["faithful", "random", 4]
    assert abs(table["complete", "attribution", 4]) < 0.05 < 0.9 < table["complete", "random", 4]
    whole = (
        result.tables["curves"].query("ranking == 'random' and measure == 'faithful'").groupby("rest")["value"].last()
    )
    assert whole.to_numpy() == pytest.approx(1, abs=1e-4)


def test_a_killed_run_goes_on_and_ends_the_same(model, result, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(RECIPE, "circuit_pictures", lambda *tables: {})
    whole, done = dissection.dissect, []

    def dies(m, answer, *args, **kwargs):
        if done:
            raise KeyboardInterrupt
        done.append(answer.episode.id)
        return whole(m, answer, *args, **kwargs)

    monkeypatch.setattr(dissection, "dissect", dies)
    with pytest.raises(KeyboardInterrupt):
        run(model, out=folder)
    assert [p.stem for p in (folder / "shards").glob("*=circuit.parquet")] == [f"{done[0]}=circuit"]
    asked = []
    monkeypatch.setattr(
        dissection, "dissect", lambda m, a, *r, **k: (asked.append(a.episode.id), whole(m, a, *r, **k))[1]
    )
    again = run(model, out=folder)
    assert sorted([*done, *asked]) == sorted(e.id for e in EPISODES)
    assert set(again.tables) == set(result.tables)
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table, obj=name)
    monkeypatch.setattr(dissection, "dissect", dies)
    loaded = run(model, out=folder)
    assert loaded.folder == folder and loaded.notes() == again.notes() == Circuit.load(folder).notes()
    assert {n: g.scores for n, g in loaded.graphs().items()} == {n: g.scores for n, g in again.graphs().items()}
    saved = json.loads((folder / "graphs.json").read_text())
    assert Graph.from_json(saved[0]).scores == again.graphs()[saved[0]["episode"], saved[0]["step"]].scores
    assert all((folder / name).stat().st_size > 1000 for name in ("report.html", "lapse.html", "summary.txt"))


def test_more_steps_are_asked_for_ties_alone(model):
    """With one step taken apart the others at which two heads are dynamic still say who feeds whom."""
    found = run(model, steps=1, asked=dataclasses.replace(ASKED, more=5, sizes=(4,), rests=("zero",), exact=0))
    both = found.ties[["episode", "step"]].drop_duplicates()
    assert len(found.steps) == N and len(both) > N and set(both["step"]) > set(found.steps["step"])
    # the decoy's query is fed as that of the head it imitates
    pair = found.ties.loc[(found.ties["a"] == "L1H0") & (found.ties["b"] == "L1H1")]
    assert len(pair) and pair["alike"].min() > 0.99 and pair["feeds"].isna().all()


def test_what_it_says(result):
    notes = " ".join(result.notes())
    assert (
        "2 of 2 episodes answered, 2 haystack windows." in notes
        and "Steps taken apart: 8, of 2 of the answers." in notes
    )
    assert "(zero): 4 or fewer by attribution, 4 or fewer by attention only, between" in notes
    assert "20% of it or less is left: 4 or fewer by attribution, 4 or fewer by attention only, between" in notes
    assert "0 clusters hold" in notes
    assert result.values()["notes"] == result.notes() and set(result.values()) >= {"overlaps", "agreement", "curves"}
    assert set(result.measures().columns) == {"value", "low", "high"}
    assert result.report().html.count("<figure>") == 7


REFUSED = {
    "asked before any pass: twin": (
        {"twin": lambda e: dataclasses.replace(TWINS[e.id], tokens=e.tokens[:-1])},
        "equal length",
    ),
    "twin that says the same": (
        {"twin": lambda e: e},
        "must differ in the needle and nowhere else, got 0 tokens there",
    ),
    "twin of another text": (
        {"twin": lambda e: dataclasses.replace(TWINS[e.id], tokens=TWINS[e.id].tokens.roll(1))},
        "must differ in the needle and nowhere else",
    ),
    "steps": ({"steps": 0}, "steps must be at least 1, got 0"),
    "graphs": ({"n_graphs": 0}, "n_graphs must be at least 1"),
    "seed": ({"seed": -1}, "seed must be at least 0"),
    "answer": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    "own needle": ({"twin": None}, "sentence"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_refused_before_any_pass(model, name, monkeypatch):
    monkeypatch.setattr(RECIPE, "gathered", lambda *a, **k: pytest.fail("a pass was made"))
    changes, message = REFUSED[name]
    with pytest.raises((ValueError, KeyError), match=message):
        run(model, **changes)


def test_models_and_needles_that_cannot_be_asked(model, monkeypatch):
    monkeypatch.setattr(RECIPE, "gathered", lambda *a, **k: pytest.fail("a pass was made"))
    sliding = dh.load(tiny.build("mistral"), tokenizer=tiny.tokenizer(), check=False)
    with pytest.raises(ValueError, match="sliding-window"):
        run(sliding)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"gradients, which torch\.inference_mode"):
        run(model)
    bare = dataclasses.replace(EPISODES[0], spans=())
    with pytest.raises(ValueError, match="has no span 'needle'"):
        circuit(model, [bare], **{**SETTINGS, "twin": lambda e: e})
    with pytest.raises(ValueError, match="is no dhlens run"):
        Circuit.load("nowhere")
    for bad, message in (
        ({"edges": 0}, "at least 1 edge"),
        ({"exact": 300}, r"0..edges are patched exactly"),
        ({"sizes": (5, 5)}, "different numbers"),
        ({"rests": ()}, "each once"),
        ({"more": -1}, "must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Asked(**bad)


def test_answers_without_a_step_are_said_to_be_so(model):
    wrong = [dataclasses.replace(e, meta={**e.meta, "answer_text": "w0"}) for e in EPISODES]
    with pytest.raises(ValueError, match="none of 2 episodes was answered"):
        circuit(model, wrong, **{**SETTINGS, "twin": lambda e: TWINS[e.id]})
    silent = [dataclasses.replace(TWINS[e.id], answer=e.answer) for e in EPISODES]
    with pytest.raises(ValueError, match="none of 2 answers has a step"):
        run(model, twin=lambda e: next(t for t in silent if t.id == TWINS[e.id].id))


def test_what_was_said_has_its_counterpart():
    """The known reply; any other that holds the needle's answer; nothing else. Steps without a dynamic head are out."""
    clean, twin = tiny.episode(40), tiny.episode(40, seed=5)
    span = clean.span("answer")
    active = np.zeros((9, 2, 2), dtype=bool)
    active[[0, 3, 8], 1, 0] = True

    def of(tokens, **changes):
        said = Outcome(clean.tokens.new_tensor(tokens), "", True, "stop_token")
        on = clean.tokens.new_tensor(active[: len(tokens)]).bool()
        return Answer.of(dataclasses.replace(clean, **changes), twin, said, on)

    answer = clean.answer.tolist()
    known = of([*answer, 1])
    assert known.said.tolist() == answer and known.other.tolist() == twin.answer.tolist()
    assert known.steps == [s for s in (0, 3) if known.said[s] != known.other[s]]
    own = of([50, 51, *answer, 52, 1], answer=clean.answer.new_tensor([9, 9]))
    right = twin.tokens[span.start : span.stop].tolist()
    assert own.said.tolist() == [50, 51, *answer] and own.other.tolist() == [50, 51, *right]
    assert of([50, *answer[1:], 1], answer=clean.answer.new_tensor([9, 9])) is None


@pytest.mark.parametrize(
    ("n", "wanted"),
    [(1, [5]), (2, [0, 1]), (4, [0, 1, 8, 9]), (5, [0, 1, 5, 8, 9]), (10, list(range(10))), (20, list(range(10)))],
)
def test_steps_are_spread_in_neighbouring_pairs(n, wanted):
    assert findings.spread_steps(list(range(10)), n) == wanted


def ties_of(crowds, *, inside, outside, seed=0):
    """Pairs that are on together at some steps; those of one cluster feed each other by `inside`."""
    rng = np.random.default_rng(seed)
    crowd, rows = crowds.crowd, []
    for step in rng.choice(len(crowd.rows), 60, replace=False):
        on = np.flatnonzero(crowd.active[step])
        for i, j in ((i, j) for i in on for j in on if i < j):
            same = crowds.labels[i] == crowds.labels[j] >= 0
            feeds, alike = rng.normal(inside if same else outside, 0.05, 2).clip(0, 1)
            names = [dh.heads.head_name(crowd.heads[k]) for k in (i, j)]
            rows.append({"a": names[0], "b": names[1], "feeds": feeds, "alike": alike, "group": crowd.group[step]})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def crowds():
    found = ties.crowds(toy_crowds(0), draws=60, min_steps=20, seed=0)
    assert found.n_clusters == 3
    return found


def test_a_cluster_is_a_circuit_where_its_heads_feed_each_other(crowds):
    """Positive and negative control: the same clusters, tied and not."""
    tied = ties.tested(ties_of(crowds, inside=0.5, outside=0.3), crowds, given_p=[0.001] * 3, draws=300, seed=0)
    assert tied["circuit"].tolist()[:2] == [True, True]
    assert (tied["feeds_value"] > tied["feeds_null_high"]).tolist()[:2] == [True, True]
    loose = ties.tested(ties_of(crowds, inside=0.3, outside=0.3), crowds, given_p=[0.001] * 3, draws=300, seed=0)
    assert not loose["circuit"].any()
    explained = ties.tested(ties_of(crowds, inside=0.5, outside=0.3), crowds, given_p=[0.4] * 3, draws=300, seed=0)
    assert not explained["circuit"].any()
    said = ties.in_words(crowds, {"clusters": tied})
    assert "3 clusters hold 9 of 12 heads" in said[0] and "is a circuit by these tests" in said[1]
    none = ties.tested(
        tied.iloc[:0].reindex(columns=["a", "b", "feeds", "alike", "group"]), crowds, given_p=[0.001] * 3, seed=0
    )
    assert none["feeds_p"].isna().all() and not none["circuit"].any()
    assert "cannot be told, 0 pairs seen" in ties.in_words(crowds, {"clusters": none})[1]
    assert ties.in_words("too few heads", {}) == ["No clusters: too few heads."]


def test_heads_with_nothing_between_them_are_seldom_called_a_circuit(crowds):
    """Some heads send to all: ties differ by head, and know nothing of clusters."""
    rng, wrong = np.random.default_rng(0), []
    for world in range(40):
        loud = rng.gamma(2, 0.2, 12)
        table = ties_of(crowds, inside=0.3, outside=0.3, seed=world)
        sender = table["a"].map({dh.heads.head_name(h): i for i, h in enumerate(crowds.crowd.heads)})
        table["feeds"] += loud[sender]
        wrong.append(ties.tested(table, crowds, given_p=[0.001] * 3, draws=150, seed=world)["circuit"].any())
    assert np.mean(wrong) <= 0.1


def test_few_pairs_or_few_other_heads_tell_nothing(crowds):
    table = ties_of(crowds, inside=0.5, outside=0.3)
    few = ties.tested(table.head(12), crowds, given_p=[0.001] * 3, draws=150, seed=0)
    assert few["feeds_p"].isna().all() and not few["circuit"].any()
    window = ties.tested(table.assign(group="one"), crowds, given_p=[0.001] * 3, draws=150, seed=0)
    assert window["feeds_p"].isna().all()
    members = [dh.heads.head_name(h) for h in crowds.members[0]]
    alone = table.loc[table["a"].isin(members) & table["b"].isin(members)]
    assert np.isnan(ties.tested(alone, crowds, given_p=[0.001] * 3, draws=150, seed=0)["feeds_p"].iloc[0])


def test_the_class_that_explains_company_explains_it_away(crowds):
    crowd = crowds.crowd
    same = ties.given(crowds, crowd, draws=60, seed=0)
    assert max(same) < 0.05
    event = np.zeros(len(crowd.score.values), dtype=int)
    event[crowd.rows] = crowd.active[:, crowds.labels == 0].sum(1) >= 2
    shared = ties.Crowd.of(crowd.score, given=[event], min_steps=20)
    kept = ties.given(crowds, shared, draws=60, seed=0)
    assert kept[0] > same[0] and kept[1] < 0.05
    # where the strata say all about a cluster nothing is left to shuffle
    event[crowd.rows] = crowd.active[:, crowds.labels == 0] @ (2 ** np.arange((crowds.labels == 0).sum()))
    fixed = ties.Crowd.of(crowd.score, given=[event], min_steps=20)
    assert ties.given(crowds, fixed, draws=60, seed=0)[0] == 1


def test_the_command_runs_shows_and_says_where_the_pages_are(model, tmp_path, monkeypatch):
    monkeypatch.setattr("dhlens.cli.options.needle_episodes", lambda given: (model, EPISODES))
    monkeypatch.setattr("dhlens.tasks.niah.twin", lambda tokenizer, e, **rest: TWINS[e.id])
    monkeypatch.setattr(RECIPE, "circuit_pictures", lambda *tables: {})
    out = tmp_path / "run"
    small = "--graphs 2 --steps 1 --edges 8 --exact 4 --sizes 4,30 --rests zero --min-steps 2 --draws 9".split()
    command = ["circuit", *small, "--max-new-tokens", "4", "--out", str(out)]
    said = CliRunner().invoke(app, [*command, "--quiet"], catch_exceptions=False).stdout
    assert "Steps taken apart: 2, of 2 of the answers." in said and f"time-lapse: {out / 'lapse.html'}" in said
    shown = CliRunner().invoke(app, ["show", str(out)], catch_exceptions=False).stdout
    assert said.startswith(shown)
    values = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout)
    assert {row["rest"] for row in values["curves"]} == {"zero"} and values["folder"] == str(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rests", "noise"], "--rests must be one of counterfactual, zero, mean, got 'noise'"),
        (["--sizes", "ten"], "--sizes takes int numbers"),
        (["--exact", "500"], "0..edges are patched exactly"),
        (["--needle", "The word is {answer}."], "--twin goes with an own needle sentence"),
        (["--twin", "x"], "--twin goes with an own needle sentence"),
        (["--needle", "sonnet", "--twin", "x"], "--needle is uuid, number, words"),
    ],
)
def test_what_the_command_refuses_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dhlens", "circuit", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and said.count("\n") == 1


def test_ties_by_hand():
    """Ten parts enter L1H1, five of them from L0H0; the queries of layer 1 are (3, 0, 4, 0) and (4, 2, 0, 0)."""
    wiring = Wiring(n_layers=2, n_heads=2, n_kv_heads=1)
    scores = torch.zeros(2, len(wiring.senders), len(wiring.receivers))
    for edge, score in {
        "L0H0->L1KV0.k@needle": -3.0,
        "embed->L1KV0.v@needle": 1.0,
        "embed->L1H1.q@step": 4.0,
        "L0H0->L1H1.q@step": -2.0,
        "embed->L1H0.q@step": 3.0,
        "L0H1->L1H0.q@step": 4.0,
        "L0.mlp->logits@step": 9.0,
    }.items():
        e = parse_edge(edge)
        place = ("needle", "step").index(e.at)
        scores[place, wiring.sender_index[e.sender], wiring.receiver_index[e.receiver]] = score
    found = Attribution(0, wiring, ("needle", "step"), scores, scores != 0, 0.0, 0.0)
    heads = dh.HeadSet(["L0H0", "L1H0", "L1H1"], (2, 2))
    ties = {(r["a"], r["b"]): r for r in dissection._ties(found, heads)}
    assert ties["L0H0", "L1H1"]["feeds"] == pytest.approx(0.5)
    assert ties["L0H0", "L1H0"]["feeds"] == pytest.approx(3 / 11)
    assert np.isnan(ties["L1H0", "L1H1"]["feeds"])
    assert ties["L1H0", "L1H1"]["alike"] == pytest.approx(12 / (5 * 20**0.5))
