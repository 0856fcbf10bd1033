"""`dhlens rag` on a small random model: a run, the same again, its corpus, and what it refuses before any model."""

import json

import pytest
import tiny
from toy_tokenizers import byte_level
from typer.testing import CliRunner

from dhlens.cli import app, main
from dhlens.tasks.twohop import generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model on disk that reads text."""
    path = tmp_path_factory.mktemp("tiny")
    tiny.reader().save_pretrained(path)
    byte_level().save_pretrained(path)
    return str(path)


SMALL = "--n 2 --fit 4 --k 2 --max-new-tokens 5 --budget 40 --reach 8 --length 1500 --device cpu".split()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DHLENS_CACHE", str(tmp_path / "cache"))


def test_a_run_and_what_it_says(folder, tmp_path):
    run, out = CliRunner().invoke, str(tmp_path / "run")
    command = ["rag", "--model", folder, *SMALL, "--triggers", "every,entropy", "--out", out]
    first = run(app, [*command, "--visibilities", "mask,concat", "--quiet"], catch_exceptions=False)
    assert "2 questions" in first.stdout and f"report: {out}" in first.stdout
    assert (tmp_path / "run-fit" / "trace.safetensors").is_file() and (tmp_path / "run" / "report.html").is_file()
    shown = run(app, ["show", out], catch_exceptions=False).stdout
    assert shown == first.stdout
    again = run(app, [*command, "--visibilities", "mask,concat", "--json"], catch_exceptions=False)
    values = json.loads(again.stdout)
    assert {row["policy"] for row in values["summary"]} >= {"predicted", "static", "oracle", "none", "full", "gold"}
    # the finished scan serves another run as what it is fitted on; its questions are not asked again
    fit = [word if word != "4" else out + "-fit" for word in SMALL]
    other = ["rag", "--model", folder, *fit, "--policies", "static", "--out", str(tmp_path / "other"), "--json"]
    assert json.loads(run(app, other, catch_exceptions=False).stdout)["summary"][0]["n"] == 2


def test_a_corpus_is_looked_up_in(folder, tmp_path):
    documents = [d for question in generate(8, seed=0) for d in question.documents]
    rows = [{"id": f"p{i}", "title": d.title, "text": d.text} for i, d in enumerate(documents)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(map(json.dumps, rows)))
    command = ["rag", "--model", folder, *SMALL, "--visibilities", "retrieve", "--corpus", str(corpus)]
    command += ["--triggers", "every", "--policies", "static,oracle", "--out", str(tmp_path / "run"), "--json"]
    values = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)
    steered = [row for row in values["summary"] if row["visibility"] == "retrieve"]
    assert [row["policy"] for row in steered] == ["static"] and steered[0]["looked_up"] == 1


def test_gold_is_found_by_the_names_that_episodes_have(tmp_path):
    from dhlens.cli import fitted

    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "p/0", "title": "Mill", "text": "A mill."}))
    (tmp_path / "gold.jsonl").write_text(json.dumps({"question_id": "a/b 0", "gold": ["p/0"]}))
    given = {"corpus": tmp_path / "corpus.jsonl", "gold": tmp_path / "gold.jsonl", "broken": "raise"}
    assert fitted.corpus(given)[1] == {"a_b_0": frozenset({"p/0"})}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--visibilities", "retrieve"], "--visibilities retrieve and --corpus go together"),
        (["--corpus", "x.jsonl"], "--visibilities retrieve and --corpus go together"),
        (["--n", "0"], "--n must be at least 1, got 0"),
        (["--k", "0"], "--k must be at least 1, got 0"),
        (["--fit", "0"], "--fit must be at least 3 questions, or a finished scan of such, got 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--gold", "x.jsonl"], "--gold says which passages of a corpus answer a question"),
        (["--budget", "0"], "budget must be at least 1: with 0 nothing would be shown"),
        (["--policies", "best"], "--policies must be one of predicted, static"),
        (["--triggers", "never"], "--triggers must be one of rind"),
        (["--threshold", "-1"], "a threshold must be a number, 0 or more, got -1.0"),
        (["--fit", "nowhere"], "nowhere is no dhlens run"),
        (["--visibilities", "retrieve", "--corpus", "nowhere.jsonl"], "'nowhere.jsonl' is not there"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dhlens", "rag", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and said.count("\n") == 1
