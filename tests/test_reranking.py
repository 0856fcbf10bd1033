"""Candidates ranked again by heads: recall by hand, paired contrasts, runs that are resumed, the command."""

import json

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from toy_passages import HEADS, PASSAGES, QUESTION
from toy_tokenizers import byte_level
from typer.testing import CliRunner

import dhlens as dh
from dhlens.cli import app, main
from dhlens.recipes import Reranking, rerank
from dhlens.recipes.passages import read_passages
from dhlens.recipes.reranking import _recalls
from dhlens.render.rag import recall_curves
from dhlens.tasks.corpus import Index, Passage
from dhlens.tasks.hotpot import episodes

POLICIES = {"static": dh.Static(HEADS)}
GOLD = {"q0": frozenset({"p2"}), "q1": frozenset({"p0"})}


@pytest.fixture(scope="module")
def plain():
    return tiny.reader()


@pytest.fixture(scope="module")
def model(plain):
    return dh.load(plain, tokenizer=byte_level(), check=False)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return Index.of(PASSAGES, tmp_path_factory.mktemp("bm25") / "index")


def test_heads_order_what_bm25_found(model, index):
    questions = {"q0": QUESTION, "q1": "zebra"}
    table = rerank(model, questions, GOLD, index, POLICIES, candidates=3, progress=False).recall
    candidates = [p for p, _ in index.search(QUESTION, 3)]
    values = read_passages(model, QUESTION, candidates, POLICIES)["static"]
    place = [candidates[i].id for i in values.argsort(descending=True)].index("p2")
    row = table.query("question == 'q0' and ranking == 'static'").iloc[0]
    assert row["recall_1"] == float(place < 1) and row["recall_2"] == float(place < 2)
    assert row["found"] == row["recall_5"] == 1 and row["candidates"] == len(candidates) == 2
    # no word of it is in the corpus: nothing is found, and no ranking mends that
    assert set(table.query("question == 'q1'")["ranking"]) == {"bm25", "static"}
    assert not table.query("question == 'q1'")[["found", "recall_20", "candidates"]].to_numpy().any()


def test_recall_is_worked_by_hand():
    passages = [Passage(f"p{i}", "t", "x") for i in range(30)]
    values = {"bm25": -torch.arange(30).float(), "back": torch.arange(30).float()}
    table = _recalls(frozenset({"p1", "p4", "p29", "elsewhere"}), passages, values).set_index("ranking")
    columns = ["found", "recall_1", "recall_2", "recall_5", "recall_20"]
    assert np.allclose(table.loc["bm25", columns].astype(float), [0.75, 0, 0.25, 0.5, 0.5])
    assert np.allclose(table.loc["back", columns].astype(float), [0.75, 0.25, 0.25, 0.25, 0.25])


@pytest.fixture
def made_up():
    """Ten questions of eight groups; "good" puts every gold passage first, BM25 none."""
    rows = [
        {"question": f"q{i}", "group": f"g{i % 8}", "ranking": name, "candidates": 40, "found": 1.0}
        | {f"recall_{k}": float(name == "good" or k == 20) for k in (1, 2, 5, 10, 20)}
        for i in range(10)
        for name in ("bm25", "good", "bad")
    ]
    return Reranking(pd.DataFrame(rows), object.__new__(dh.RunCard))


def test_differences_are_paired_and_bounded(made_up):
    told = made_up.tables["contrasts"].set_index(["first", "second"])
    assert set(told.index) == {("bm25", "good"), ("bm25", "bad"), ("good", "bad")}
    assert told.loc[("bm25", "good"), "difference"] == -1 and told.loc[("good", "bad"), "difference"] == 1
    # eight groups whose signs all agree: 2 of 256 flips do as well
    assert told.loc[("good", "bad"), "p"] == pytest.approx(2 / 256, abs=2e-3)
    assert told.loc[("bm25", "bad"), "difference"] == 0 and told.loc[("good", "bad"), "groups"] == 8
    assert (told["p_holm"] >= told["p"]).all() and told.loc[("good", "bad"), "p_holm"] > 0.012
    notes = made_up.notes()
    assert "10 questions, 8 of them independent; 100.0% of their gold passages" in notes[0]
    assert notes[1].startswith("Recall at 10: good 1.000")
    curves = {
        line.get_label(): [*np.asarray(line.get_ydata())]
        for line in recall_curves(made_up.tables["summary"]).axes[0].lines
    }
    assert curves == {"bm25": [0, 0, 0, 0, 1], "good": [1, 1, 1, 1, 1], "bad": [0, 0, 0, 0, 1]}


def test_a_run_goes_on_where_it_was_cut_off(model, index, tmp_path, monkeypatch):
    from dhlens.recipes import reranking

    questions = {"q0": QUESTION, "q1": "Which river did the miller watch?"}
    policies = {**POLICIES, "query": dh.Static(HEADS)}
    whole = rerank(model, questions, GOLD, index, policies, progress=False)
    read, calls = reranking.read_passages, []

    def cut(*args, **options):
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(*args, **options)

    monkeypatch.setattr(reranking, "read_passages", cut)
    with pytest.raises(KeyboardInterrupt):
        rerank(model, questions, GOLD, index, policies, out=tmp_path / "run", progress=False)
    found = rerank(model, questions, GOLD, index, policies, out=tmp_path / "run", progress=False)
    assert calls == [QUESTION, *[questions["q1"]] * 2]
    pd.testing.assert_frame_equal(found.recall, whole.recall)
    pd.testing.assert_frame_equal(Reranking.load(tmp_path / "run").tables["contrasts"], found.tables["contrasts"])
    assert (tmp_path / "run" / "report.html").is_file()
    with pytest.raises(ValueError, match="no run of dynamic retrieval"):
        dh.recipes.Rag.load(tmp_path / "run")


def test_what_cannot_be_ranked_is_refused_before_any_pass(model, index):
    with pytest.raises(ValueError, match="every question needs gold passages, 'q0' has none"):
        rerank(model, {"q0": QUESTION}, {}, index, POLICIES)
    with pytest.raises(ValueError, match="needs a question, a candidate, and at least 1 of them a prompt, got 0"):
        rerank(model, {}, {}, index, POLICIES)
    other = {"static": dh.Static(dh.HeadSet([(5, 1)], (9, 4)))}
    with pytest.raises(ValueError, match="shape"):
        rerank(model, {"q0": QUESTION}, GOLD, index, other)


def test_a_passage_too_long_stops_all_before_any_pass(model, tmp_path, monkeypatch):
    from dhlens.recipes import reranking

    monkeypatch.setattr(reranking, "read_passages", lambda *args, **options: pytest.fail("a pass was made"))
    tome = Passage("tome", "Tome", "A miller had a sluice. " * 400)
    index = Index.of([*PASSAGES, tome], tmp_path / "index")
    questions = {"q0": QUESTION, "q1": "Who had a sluice?"}
    with pytest.raises(ValueError, match=r"question 'q1': .* for the longest, 'tome'"):
        rerank(model, questions, GOLD, index, POLICIES, candidates=1, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists(), "so that another corpus or fewer a prompt can go there"


def test_recall_is_told_as_far_as_there_are_candidates(made_up):
    told = {n: Reranking(made_up.recall.assign(candidates=n), made_up.card).notes()[1:] for n in (5, 12, 30)}
    assert told[5] == ["No ranking has more than 5 candidates: all are among the first 10."]
    assert ["Recall at 20" in "".join(told[n]) for n in (12, 30)] == [False, True]
    assert all("Recall at 10, bm25 less good: -1.000" in "".join(told[n]) for n in (12, 30))


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DHLENS_CACHE", str(tmp_path / "cache"))
    tiny.reader().save_pretrained(tmp_path / "tiny")
    byte_level().save_pretrained(tmp_path / "tiny")
    asked = episodes(byte_level(), n=6, seed=0)
    corpus = [
        {"id": f"{e.id}/{t}", "title": t, "text": f"{t} is near a river."} for e in asked for t in e.meta["titles"]
    ]
    gold = [
        {"question_id": e.id, "gold": [f"{e.id}/{e.meta['titles'][i]}" for i in e.meta["fact_documents"]]}
        for e in asked
    ]
    for name, rows in {"corpus": corpus, "gold": gold}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    where = ["--corpus", str(tmp_path / "corpus.jsonl"), "--gold", str(tmp_path / "gold.jsonl")]
    command = ["rerank", *where, "--model", str(tmp_path / "tiny"), "--n", "2", "--fit", "4", "--k", "2"]
    command += [
        "--candidates",
        "4",
        "--max-new-tokens",
        "4",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
        "--quiet",
    ]
    first = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert "2 questions" in first and "predicted" in first and "query" in first
    assert CliRunner().invoke(app, ["show", str(tmp_path / "run")], catch_exceptions=False).stdout == first
    (tmp_path / "half.jsonl").write_text(json.dumps({"question_id": "other", "gold": ["x"]}))
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps({**row, "text": "A river. " * 4000}) for row in corpus))
    for refused, said in [
        (["--fit", "nowhere"], "nowhere is no dhlens run"),
        (["--candidates", "0"], "needs a question, a candidate"),
        (["--gold", str(tmp_path / "half.jsonl")], "every question needs gold passages"),
        (["--policies", "oracle"], "--policies must be one of predicted"),
        (["--corpus", str(tmp_path / "long.jsonl")], "a prompt must fit the model's"),
    ]:
        monkeypatch.setattr("sys.argv", ["dhlens", *command, "--out", str(tmp_path / "late"), *refused])
        with pytest.raises(SystemExit):
            main()
        assert said in capsys.readouterr().err
        assert not (tmp_path / "late-fit").exists(), "nothing was observed"


def test_gold_that_the_corpus_lacks_is_refused(model, index):
    gold = {"q": frozenset({"p2", "not in corpus"})}
    with pytest.raises(ValueError, match="1 are not, 'not in corpus' among them"):
        rerank(model, {"q": QUESTION}, gold, index, POLICIES, progress=False)
