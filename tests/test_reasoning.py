"""Reasoning heads: Eq. 2 by hand and by a brute-force pass, thresholds that reach their size, the run, the commands."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import build, eager, episode, tokenizer
from toy_traces import toy_trace
from typer.testing import CliRunner

import dhlens as dh
from dhlens.card import RunCard
from dhlens.carryover import MEASURES, carry_over
from dhlens.cli import app, main
from dhlens.contrasts import contrasts, summary
from dhlens.controls import static_ranking
from dhlens.episode import Episode, Span
from dhlens.forecasts import Forecasts, joint
from dhlens.observation import Observation
from dhlens.reasoning import (
    ReasoningHeads,
    beside_needles,
    calibrated,
    evidence_share,
    facts_table,
    mass_by_step,
    needle_size,
    samples,
)
from dhlens.recipes import Reasoning, ablate, reason
from dhlens.render.carryover import carry_map
from dhlens.render.reasoning import mass_raster, score_maps
from dhlens.scores import reasoning_mass
from dhlens.tables import depth, marks, spread

SHORT = Observation(max_new_tokens=5, draft=False, capture=dh.Capture(sink=2, local=4, focus=()))


def facts_trace(values, *, core=1.0, correct=False, groups=None):
    """A toy trace whose two facts get `values`, [episode step layer head], of the attention `core` beyond the sink."""
    values = torch.as_tensor(values, dtype=torch.float32)
    trace = toy_trace(torch.zeros(values.shape, dtype=torch.bool), stop_token=False, correct=correct, groups=groups)
    answers = torch.cat([torch.cat([v[:1], v]) for v in values])  # step -1 stands before
    one = torch.ones_like(answers)
    mass = torch.stack([answers * 0.25, answers * 0.75, answers, one, core * one], 1)
    n = values.shape[1]
    spans = (Span("fact_0", 3, 4), Span("fact_1", 4, 3 + n), Span("context", 1, 4 + n))
    episodes = tuple(dataclasses.replace(e, spans=spans) for e in trace.episodes)
    card = RunCard("toy", settings={"capture": {"sink": 2, "local": 1}})
    names = ("fact_0", "fact_1", "context", "prompt", "all")
    return dataclasses.replace(trace, episodes=episodes, mass=mass, mass_core=mass, span_names=names, card=card)


def drawn(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_eq_2_by_hand():
    """Facts get .1 and .3 of the .5 that lie outside sink and local window: .8 of it, .4 of all."""
    trace = facts_trace(torch.full((2, 3, 1, 2), 0.4), core=0.5)
    assert reasoning_mass(trace).values == pytest.approx(0.8)
    assert reasoning_mass(trace, "fact_1").values == pytest.approx(0.6)
    assert reasoning_mass(trace, whole=True).values == pytest.approx(0.4)
    assert ReasoningHeads(0.79)(trace).values.all() and not ReasoningHeads(0.81)(trace).values.any()
    assert ReasoningHeads(0.79)(trace).binary


@pytest.mark.parametrize("size", [0.2, 1.0, 3.4])
def test_the_threshold_reaches_its_size(size):
    trace = facts_trace(drawn(4, 5, 2, 4))
    tau = calibrated(reasoning_mass(trace), size)
    heads = ReasoningHeads(tau)(trace).heads()[trace.step >= 0]
    assert heads.sum() == round(size * 20)
    assert tau in reasoning_mass(trace).values  # the value at the border


def test_ties_at_the_border_stay_outside():
    values = torch.zeros(2, 2, 1, 4)
    values[..., 0] = 0.9
    assert ReasoningHeads(calibrated(reasoning_mass(t := facts_trace(values)), 2.0))(t).heads().sum(-1).max() == 1


@pytest.mark.parametrize("size", [0.0, -1.0, 8.0, 0.001])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="more than 0 and fewer than 8 heads"):
        calibrated(reasoning_mass(facts_trace(drawn(4, 5, 2, 4))), size)


def test_the_size_of_a_needle_scan():
    active = drawn(4, 6, 2, 4) < 0.3
    niah = toy_trace(active, correct=[True, True, False, True])
    right = active[[0, 1, 3]].float().sum((1, 2, 3)).sum() / 18
    assert needle_size(niah, niah.shape) == pytest.approx(float(right))
    assert dh.dynamics(dh.copy_paste(niah))["heads_per_step"] == pytest.approx(needle_size(niah, niah.shape))
    assert needle_size(None, (2, 4)) == 4 and needle_size(None, (30, 9)) == 20


def test_threshold_and_static_heads_never_see_a_measured_group():
    values = drawn(6, 8, 2, 6)
    trace = facts_trace(values)
    tau, table = beside_needles(trace, None, size=2.0)
    fit, held = trace.split(0.5, seed=0)
    assert tau == calibrated(reasoning_mass(fit), 2.0)
    found = table.loc[(table["heads"] == "reasoning") & (table["metric"] == "heads_per_step")].iloc[0]
    assert found["value"] == pytest.approx(float(ReasoningHeads(tau)(held).heads()[held.step >= 0].sum() / 24))
    assert found["n"] == 24  # all steps of wrong answers, of the other groups
    of_held = [i for i, e in enumerate(trace.episodes) if e.id in {e.id for e in held.episodes}]
    values[of_held] = drawn(3, 8, 2, 6, seed=1) ** 3
    moved = facts_trace(values)
    assert beside_needles(moved, None, size=2.0)[0] == tau
    assert list(table["heads"].unique())[1:] == [f"reasoning above {t}" for t in (0.1, 0.2, 0.3, 0.5)]


def test_needles_stand_beside():
    niah = toy_trace(drawn(6, 8, 2, 6) < 0.3)
    needles = dh.dynamics(dh.copy_paste(niah))
    _, table = beside_needles(facts_trace(drawn(6, 8, 2, 6)), needles, size=needles["heads_per_step"])
    copying = table.loc[table["heads"] == "copying"].set_index("metric")["value"]
    assert copying["entropy"] == needles["entropy"]


def test_tables_by_hand():
    values = torch.zeros(2, 3, 1, 4)
    values[0, :, 0, 1] = torch.tensor([0.1, 0.2, 0.3])
    trace = facts_trace(values)
    static = dh.HeadSet([(0, 1), (0, 2)], (1, 4))
    steps = mass_by_step(trace, static).set_index(["heads", "step"])["value"]
    assert steps["static", 2] == pytest.approx(0.3 / 4) and steps["all", 0] == pytest.approx(0.1 / 8)
    table = facts_table(trace, static, fitted={"toy-1"})
    assert table["mass"].tolist() == pytest.approx([0.05, 0])
    assert table["mass_static"].tolist() == pytest.approx([0.1, 0])
    assert table["fitted"].tolist() == [False, True] and table["em"].isna().all()
    # the facts are positions 3..5 of the prompt's 7; sink 0..1 and the last key are left out
    assert evidence_share(trace).tolist() == pytest.approx([3 / 4, 3 / 4])
    assert table["depth"].tolist() == pytest.approx([((3 + 4) / 2 + (4 + 6) / 2 - 2) / 2 / 6] * 2)


def test_depth_is_the_tasks_own_where_it_says_one():
    e = Episode("e", torch.arange(20), torch.tensor([1]), (Span("context", 4, 14), Span("fact_0", 8, 10)))
    assert depth(e) == pytest.approx(0.5)
    assert depth(dataclasses.replace(e, meta={"depth": 0.1})) == 0.1
    assert depth(dataclasses.replace(e, spans=e.spans[:1])) is None


def test_marks_take_the_best_spelling():
    e = Episode("e", torch.arange(3), torch.tensor([1]), (), {"answer_text": "New York City", "aliases": ["the NYC"]})
    assert marks(e, "So the answer is NYC.") == {"em": 1.0, "f1": 1.0}
    assert marks(e, "New York") == {"em": 0.0, "f1": pytest.approx(0.8)}
    assert all(np.isnan(v) for v in marks(dataclasses.replace(e, meta={}), "NYC").values())


def asked(n=6, groups=3, length=60):
    """Prompts with two facts and a question, whose answer is not what a random model says."""
    found = []
    for i in range(n):
        e = episode(length, name=f"q{i}", seed=i)
        spans = (Span("fact_0", 8, 12), Span("fact_1", 20, 26 + i), Span("context", 4, 50), Span("question", 50, 56))
        meta = {"group": f"g{i % groups}", "answer_text": "w5 w6", "aliases": ["w7"], "length": length}
        found.append(Episode(e.id, e.tokens, e.answer, spans, meta))
    return found


@pytest.fixture(scope="module")
def model():
    return dh.load(build("llama"), tokenizer=tokenizer())


@pytest.fixture(scope="module")
def niah():
    return dataclasses.replace(toy_trace(drawn(6, 8, 3, 6) < 0.1), card=RunCard("none"))


@pytest.fixture(scope="module")
def result(model):
    return reason(model, asked(), observation=SHORT, size=3.0, progress=False)


def test_eq_2_equals_the_eager_pass(model):
    """All steps and heads, sink and local window removed key by key."""
    e, capture = asked()[1], SHORT.capture
    trace = dh.observe(model, [e], max_new_tokens=5, draft=False, capture=capture, progress=False)
    hf = build("llama")
    _, pattern, _ = eager(hf, torch.cat([e.tokens, trace.outcomes[0].tokens[:-1]]))
    found = reasoning_mass(trace).values
    for row, position in enumerate(trace.position.tolist()):
        kept = [k for k in range(position + 1) if k >= capture.sink and k <= position - capture.local]
        facts = [k for k in kept if 8 <= k < 12 or 20 <= k < 27]
        want = pattern[:, :, position, facts].sum(-1) / pattern[:, :, position, kept].sum(-1)
        torch.testing.assert_close(found[row], want, atol=1e-5, rtol=0)


def same(a, b):
    assert a.threshold == b.threshold and set(a.tables) == set(b.tables)
    for name, table in a.tables.items():
        pd.testing.assert_frame_equal(table, b.tables[name], obj=name)


def test_in_memory_on_disk_and_read_again(model, result, tmp_path):
    disk = reason(model, asked(), observation=SHORT, size=3.0, out=tmp_path / "run", progress=False)
    same(result, disk)
    again = Reasoning.load(tmp_path / "run")
    same(disk, again)
    assert again.summary() == disk.summary() and "<img" in (tmp_path / "run" / "report.html").read_text()
    assert set(result.figures()) >= {"One answer", "Where the heads are", "How alike", "Answers by length and depth"}
    assert result.values()["threshold"] == result.threshold


def test_killed_in_its_second_part_and_resumed(model, result, tmp_path, monkeypatch):
    import dhlens.recipes.reasoning as recipe

    left, score = [2], recipe._query_score

    def dies(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return score(*args)

    monkeypatch.setattr(recipe, "_query_score", dies)
    options = {"observation": SHORT, "size": 3.0, "out": tmp_path / "run", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        reason(model, asked(), **options)
    left[0] = 4  # of six, two are kept
    monkeypatch.setattr("dhlens.observation.observe_each", lambda *a, **k: iter(()))
    same(result, reason(model, asked(), **options))
    assert left[0] == 0


def test_query_heads_are_those_of_the_detector(model, result):
    facts, null = ("fact_0", "fact_1"), torch.tensor(model.tokenizer("N/A", add_special_tokens=False)["input_ids"])
    capture = dh.Capture(focus=facts)
    traces = [
        dh.observe(model, dh.query_episodes(asked(), null=n), rows="query", capture=capture, progress=False)
        for n in (None, null)
    ]
    want = dh.qr_score(*traces, facts).mean().flatten().numpy()
    np.testing.assert_allclose(result.tables["heads"]["query"], want, atol=2e-4)


def test_static_columns_are_of_the_fitted_half(result):
    fit, _ = result.trace.split(0.5, seed=0)
    means = samples(reasoning_mass(fit)).mean().flatten()
    ranked = result.tables["heads"].sort_values("static_rank").index.to_numpy()
    assert (np.diff(means.numpy()[ranked]) <= 0).all()
    assert set(result.tables["outcomes"].query("fitted")["episode"]) == {e.id for e in fit.episodes}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda e: dataclasses.replace(e, spans=e.spans[2:]), {}, "no span 'fact_0'"),
        (lambda e: dataclasses.replace(e, spans=e.spans[:3]), {}, "no span 'question'"),
        (lambda e: dataclasses.replace(e, meta={"group": "one"}), {}, "at least 2, got 1"),
        (lambda e: e, {"fit_from": 1.0}, "fit_from must lie between 0 and 1"),
        (lambda e: e, {"niah": toy_trace(drawn(4, 3, 2, 4) < 0.5)}, "toy"),
    ],
)
def test_bad_input_before_any_pass(model, monkeypatch, change, options, message):
    monkeypatch.setattr(type(model), "stream", lambda self: pytest.fail("a forward pass began"))
    with pytest.raises(ValueError, match=message):
        reason(model, [change(e) for e in asked()], observation=SHORT, progress=False, **options)


def test_a_question_before_its_facts_has_no_query_heads(model):
    def turned(e):
        return dataclasses.replace(e, spans=(*e.spans[:3], Span("question", 0, 4)))

    with pytest.raises(ValueError, match="must stand behind the facts"):
        reason(model, [turned(e) for e in asked()], observation=SHORT, progress=False)


def test_masking_counts_every_answer_by_f1(model, tmp_path):
    """No question is answered, so accuracy has nothing to compare, and F1 has all."""
    episodes = asked()
    fit = dh.observe(model, asked(8)[6:], max_new_tokens=5, capture=SHORT.capture, progress=False)
    scoring = ReasoningHeads(calibrated(reasoning_mass(fit), 4.0))
    policies = dh.standard_policies(fit, seed=0, score=scoring)
    chosen = {name: policies[name] for name in ("none", "dynamic", "static", "random", "other step")}
    options = {"span": "context", "score": scoring, "max_new_tokens": 5, "progress": False}
    found = ablate(model, episodes, chosen, by="f1", out=tmp_path / "run", **options)
    assert not found.answers["answered"].any()
    table = found.tables["summary"].set_index("policy")
    assert (table["n"] == 6).all() and "accuracy" not in table
    for name in chosen:
        texts = found.answers.loc[found.answers["policy"] == name]
        want = [marks(e, t)["f1"] for e, t in zip(episodes, texts["text"], strict=True)]
        assert texts["f1"].tolist() == want and table.loc[name, "f1"] == pytest.approx(np.mean(want))
    assert table.loc["dynamic", "overlap"] == 1 > table.loc["random", "overlap"]
    assert table.loc["static", "step_heads"] == table.loc["dynamic", "step_heads"] > 0
    pairs = found.tables["contrasts"]
    assert set(pairs["measure"]) == {"f1", "em", "kl", "kept"} and set(pairs.query("primary")["measure"]) == {
        "f1",
        "kl",
    }
    assert type(found).load(tmp_path / "run").summary() == found.summary() and "F1 of answers" in found.summary()
    assert found.figures()
    assert "summary" not in ablate(model, episodes, {"none": None}, **options).tables
    with pytest.raises(ValueError, match="compared by accuracy or f1, got 'bleu'"):
        ablate(model, episodes, chosen, by="bleu", **options)


def test_policies_of_another_score(model):
    trace = dh.observe(model, asked(4), max_new_tokens=5, capture=SHORT.capture, progress=False)
    scoring = ReasoningHeads(calibrated(reasoning_mass(trace), 3.0))
    policies, one = dh.standard_policies(trace, seed=0, score=scoring), trace.pick([0])
    from dhlens.policies import along

    for i, heads in enumerate(along(policies["dynamic"], one)):
        assert heads == dh.HeadSet.from_mask(scoring(one).heads()[i])
    assert scoring.key in policies["dynamic"].key and policies["dynamic"].key != dh.Dynamic(score=dh.copy_paste).key
    assert torch.equal(static_ranking(trace, score=scoring), scoring(trace).values.double().mean(0))
    sized = dh.sized_policies(trace, [2], seed=0, score=reasoning_mass)
    best = dh.HeadSet.top_k(reasoning_mass(one).values[1], 2)
    assert along(sized["dynamic"][2], one)[1] == best


def test_f1_contrasts_by_hand():
    rows = [
        {
            "episode": f"e{i}",
            "group": f"g{i}",
            "policy": p,
            "k": np.nan,
            "edit": "zero",
            "commit": "edited",
            "heads": 3.0,
        }
        | {"correct": False, "rouge_l": 0.0, "em": float(i == 0), "f1": f}
        for p, f in (("dynamic", 0.2), ("static", 0.5))
        for i in range(8)
    ]
    steps = pd.DataFrame(
        [
            {
                "episode": r["episode"],
                "group": r["group"],
                "policy": r["policy"],
                "k": np.nan,
                "edit": "zero",
                "step": 0,
            }
            | {"heads": 3, "active": 1, "kept": True, "kl": 0.1}
            for r in rows
        ]
    )
    table = contrasts(pd.DataFrame(rows), steps, by="f1", seed=0).set_index("measure")
    assert table.loc["f1", "difference"] == pytest.approx(-0.3) and bool(table.loc["f1", "primary"])
    assert table.loc["em", "p_mcnemar"] == 1 and np.isnan(table.loc["f1", "p_mcnemar"])
    assert summary(pd.DataFrame(rows), steps, by="f1", seed=0)["f1"].tolist() == pytest.approx([0.2, 0.5])


def test_figures_refuse():
    score = reasoning_mass(facts_trace(drawn(2, 3, 2, 4)))
    assert mass_raster(score, 1, static=dh.HeadSet([(0, 0)], (2, 4))).axes
    with pytest.raises(ValueError, match="got number 2"):
        mass_raster(score, 2)
    with pytest.raises(ValueError, match="need a column of reasoning"):
        score_maps(pd.DataFrame({"layer": [0], "head": [0]}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "--task", "poems"], "--task must be one of niah, hotpot, evidence, got 'poems'"),
        (["scan", "--task", "hotpot", "--haystack", "x.txt"], "--haystack does not go with --task hotpot"),
        (["scan", "--task", "hotpot", "--kind", "code"], "--kind does not go with --task hotpot"),
        (["scan", "--questions", "x.json"], "--questions does not go with --task niah"),
        (["scan", "--task", "evidence", "--kind", "code"], "--task evidence needs --questions FILE and --kind"),
        (["scan", "--task", "evidence", "--questions", "x", "--kind", "poems"], "kind must be one of contracts"),
        (["scan", "--task", "hotpot", "--questions", "nowhere.json"], "nowhere.json"),
        (["scan", "--task", "hotpot", "--niah", "nowhere"], "nowhere is no dhlens run"),
        (["ablate", "--task", "hotpot", "--edits", "patch"], "--edits must be one of zero, mean, uniform, resample"),
        (["ablate", "--task", "hotpot", "--policies", "copying"], "--policies must be one of none"),
    ],
)
def test_cli_refuses_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dhlens", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("dhlens: ") and message in err and err.count("\n") == 1


def test_cli_on_made_up_questions(smollm2, tmp_path):
    run, folder = CliRunner().invoke, str(tmp_path / "scan")
    asking = ["--task", "hotpot", "--n", "6", "--length", "420", "--max-new-tokens", "6"]
    first = run(app, ["scan", *asking, "--out", folder, "--json"], catch_exceptions=False)
    values = json.loads(first.stdout)
    assert {row["heads"] for row in values["dynamics"]} >= {"reasoning", "reasoning above 0.5"}
    assert {row["a"] for row in values["overlap"]} == {"reasoning", "attention", "query"}
    shown = run(app, ["show", folder], catch_exceptions=False).stdout
    assert "6 questions, 6 of them independent" in shown and "report.html" in shown
    out = str(tmp_path / "predict")
    options = ["--lags", "0", "--kinds", "linear", "--sweep", "0", "--draws", "2", "--controls", "none"]
    run(app, ["predict", folder, *options, "--out", out, "--quiet"], catch_exceptions=False)
    study = dh.recipes.Prediction.load(out)
    assert set(study.tables["probes"]["metric"]) >= {"mse", "mae", "r2_pooled", "skill"}
    joint = study.tables["joint"]
    cells = joint.loc[joint["forecast"] == "linear", "cells"].sum()
    assert cells == 270 * int(study.tables["probes"]["rows"].iloc[0])
    assert "Predicted and actual values" in study.figures()
    assert study.card.settings["answered"] is False
    taken = ["--policies", "none,dynamic,static,random", "--causal-maps", "0", "--out", str(tmp_path / "ablate")]
    masked = run(app, ["ablate", *asking, *taken, "--json"], catch_exceptions=False)
    rows = {row["policy"]: row for row in json.loads(masked.stdout)["summary"]}
    assert rows["none"]["n"] == 3 and rows["dynamic"]["step_heads"] == rows["static"]["step_heads"] > 1


def with_states(trace, states):
    """The trace with these hidden states, [episode step d_model]; the prompt row before each answer gets zeros."""
    states = torch.as_tensor(states).float()
    whole = torch.cat([torch.zeros(len(states), 1, states.shape[-1]), states], 1).flatten(0, 1)
    return dataclasses.replace(trace, hidden={"final": whole})


def known(seed, a):
    """Facts whose mass is a map `a` of the state."""
    states = torch.randn(24, 8, 4, generator=torch.Generator().manual_seed(seed))
    values = (states @ a).sigmoid().unflatten(-1, (2, 6)) * 0.8
    return with_states(facts_trace(values, groups=[f"s{seed}-{i}" for i in range(24)]), states)


@pytest.fixture(scope="module")
def carried():
    a = torch.randn(4, 12, generator=torch.Generator().manual_seed(9)) * 0.5
    states = torch.randn(24, 8, 4, generator=torch.Generator().manual_seed(7))
    niah = with_states(toy_trace((states @ a).unflatten(-1, (2, 6)) > 1.0, stop_token=False), states)
    niah = dataclasses.replace(niah, card=RunCard("toy", settings={"capture": {"sink": 2, "local": 1}}))
    runs = {"reference": known(1, a), "alike": known(2, a), "other": known(3, -a)}
    return runs, niah, carry_over(runs, niah=niah)


def test_probes_carry_over_where_the_map_does(carried):
    _, _, table = carried
    skill = table.loc[table["measure"] == "reference_probe"].set_index("task")["value"]
    assert skill["reference"] > 0.2 and skill["alike"] > 0.2 and skill["other"] < 0
    needle = table.loc[table["measure"] == "needle_probe"].set_index("task")
    assert needle.loc["alike", "value"] > needle.loc["alike", "chance"] + 0.2
    assert needle.loc["other", "value"] < needle.loc["alike", "value"]


def test_the_table_of_tasks_holds_what_its_functions_say(carried):
    runs, niah, table = carried
    assert list(table["task"].unique()) == list(runs)
    at = table.set_index(["task", "measure"])
    fit, _ = runs["reference"].split(0.5, seed=0)
    tau = calibrated(reasoning_mass(fit), needle_size(niah, niah.shape))
    _, held = runs["alike"].split(0.5, seed=0)
    size = ReasoningHeads(tau)(held).heads()[held.step >= 0].flatten(1).sum(1).double().mean()
    assert at.loc[("alike", "heads_per_step"), "value"] == pytest.approx(float(size))
    assert at.loc[("alike", "mass"), "value"] == pytest.approx(float(samples(reasoning_mass(held)).values.mean()))
    assert at.loc[("alike", "mass"), "chance"] == pytest.approx(float(evidence_share(held).mean()))
    best = [dh.HeadSet.top_k(samples(reasoning_mass(runs[name])).mean(), 11) for name in ("reference", "alike")]
    assert at.loc[("alike", "as_reference"), "value"] == pytest.approx(best[0].jaccard(best[1]))
    assert ("reference", "as_reference") not in at.index
    limits = table.dropna(subset="low")
    assert (limits["low"] <= limits["high"]).all() and len(carry_map(table).axes) == table["measure"].nunique()


def test_the_table_of_tasks_from_a_shell(carried, tmp_path, monkeypatch):
    runs, niah, table = carried
    monkeypatch.setattr(
        dh.recipes.Reasoning, "load", classmethod(lambda cls, run: SimpleNamespace(trace=runs[run.name]))
    )
    monkeypatch.setattr("dhlens.cli.options.needle_trace", lambda folder: niah)
    asked, out = ["carryover", *runs, "--niah", "needles"], str(tmp_path / "tasks")
    shown = CliRunner().invoke(app, [*asked, "--out", out, "--quiet"], catch_exceptions=False).stdout
    cell = spread(table, "measure", "task").loc["mass", "other"]
    assert cell in shown and MEASURES["mass"] in shown and "by chance" in shown
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "tasks" / "carryover.csv"), table, check_exact=False)
    assert cell in (tmp_path / "tasks" / "report.html").read_text()
    for wrong, message in (([], "exists"), (["--fit-from", "1"], "between 0 and 1")):
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(app, [*asked, *(wrong or ["--out", out])], catch_exceptions=False)
    with pytest.raises(ValueError, match="differ in their last name"):
        CliRunner().invoke(app, [*asked, "elsewhere/alike"], catch_exceptions=False)


def test_a_table_of_tasks_refuses(carried):
    runs, niah, _ = carried
    with pytest.raises(ValueError, match="at least one run, got none"):
        carry_over({}, niah=niah)
    elsewhere = dataclasses.replace(niah, card=RunCard("another"))
    with pytest.raises(ValueError, match="another"):
        carry_over(runs, niah=elsewhere)
    with pytest.raises(ValueError, match="lacks measure"):
        carry_map(pd.DataFrame({"task": [], "value": [], "low": [], "high": [], "chance": []}))


def test_wrong_answers_count_where_asked():
    """A study of wrong answers is that of the same answers unjudged."""
    a = torch.randn(4, 12, generator=torch.Generator().manual_seed(9))
    wrong = known(1, a)
    unjudged = dataclasses.replace(wrong, outcomes=tuple(dataclasses.replace(o, correct=None) for o in wrong.outcomes))
    options = {"scoring": reasoning_mass, "lags": (0,), "kinds": ("linear",), "sweep": (0,), "draws": 2}
    options |= {"controls": (), "progress": False}
    with pytest.raises(ValueError, match="none of 24 episodes"):
        dh.recipes.predict(wrong, **options)
    found, plain = dh.recipes.predict(wrong, answered=False, **options), dh.recipes.predict(unjudged, **options)
    for name in ("cca", "probes", "joint", "example"):
        pd.testing.assert_frame_equal(found.tables[name], plain.tables[name])
    assert found.card.settings["answered"] is False and "answered" not in plain.card.settings
    assert 0 < found.tables["example"]["active"].mean() < 1


def test_joint_histogram_by_hand():
    """Bins are 0.04 wide: a forecast of 0.22 for what came as 0, 0, 0.5 and 1."""
    truth = np.array([[0.0, 1.0], [0.0, 0.5]], dtype=np.float32)
    said = np.full_like(truth, 0.22)
    table = joint(Forecasts("linear", 0, truth, said, None, truth, np.array(["a", "b"])))
    assert table["predicted"].tolist() == pytest.approx([0.22] * 3)
    assert table["actual"].tolist() == pytest.approx([0.02, 0.5, 0.98]) and table["cells"].tolist() == [2, 1, 1]
