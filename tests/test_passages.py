"""Passages read through heads, against the plain model's attention; the visibility "retrieve"."""

import dataclasses

import pytest
import tiny
import torch
from toy_passages import HEADS, PASSAGES, QUESTION
from toy_tokenizers import byte_level

import dhlens as dh
from dhlens.recipes import passages, rag
from dhlens.recipes.passages import CorpusLookup, passage_prompts, read_passages
from dhlens.tasks.corpus import Index, Passage
from dhlens.tasks.hotpot import episodes, over_documents
from dhlens.tasks.questions import Document, Question
from dhlens.triggers import every_sentence
from dhlens.windows import Windows


@pytest.fixture(scope="module")
def plain():
    return tiny.reader()


@pytest.fixture(scope="module")
def model(plain):
    return dh.load(plain, tokenizer=byte_level(), check=False)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return Index.of(PASSAGES, tmp_path_factory.mktemp("bm25") / "index")


def test_a_passage_is_worth_the_attention_from_the_question_less_that_of_one_that_asks_for_nothing(model, plain):
    policies = {"static": dh.Static(HEADS), "nobody": dh.Static(dh.HeadSet([], model.shape))}
    found = read_passages(model, QUESTION, PASSAGES, policies)
    judge = []
    looks = []
    for question in (QUESTION, "N/A"):
        episode = over_documents(model.tokenizer, QUESTION, [p.document for p in PASSAGES], id="judge")
        asked = episode.span("question")
        null = torch.tensor(model.tokenizer("N/A", add_special_tokens=False)["input_ids"])
        if question == "N/A":
            tokens = torch.cat([episode.tokens[: asked.start], null, episode.tokens[asked.stop :]])
        else:
            tokens = episode.tokens
        _, patterns, _ = tiny.eager(plain, tokens)
        looks.append(patterns[:, :, asked.start :].mean(2))
    for i in range(3):
        span = episode.span(f"doc_{i}")
        look = looks[0][..., span.start : span.stop] - looks[1][..., span.start : span.stop]
        floor = look.mean(-1, keepdim=True) - 2 * look.std(-1, keepdim=True)
        kept = (look * (look >= floor)).sum(-1)
        judge.append(float(torch.stack([kept[layer, head] for layer, head in HEADS]).mean()))
    assert found["static"].tolist() == pytest.approx(judge, abs=2e-3)
    assert found["nobody"].tolist() == [0, 0, 0]


def test_parts_of_the_candidates_are_read_by_themselves(model):
    policy = {"static": dh.Static(HEADS)}
    parts = [read_passages(model, QUESTION, PASSAGES[at : at + 2], policy)["static"] for at in (0, 2)]
    whole = read_passages(model, QUESTION, PASSAGES, policy, per_prompt=2)["static"]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_dynamic_retrieval_shows_the_passages_that_heads_rank_first(model, index):
    documents = tuple(Document(p.title, (p.text,)) for p in PASSAGES[:2])
    asked = episodes(model.tokenizer, [Question("q0", QUESTION, "garden", documents, ((0, 0),))], seed=0)
    policies = {"static": dh.Static(HEADS), "oracle": dh.Dynamic(score=dh.reasoning_mass, top_k=1)}
    corpus = CorpusLookup(index, {"q0": frozenset({"p0", "p2"})}, candidates=3, shown=1)
    found = rag(
        model,
        asked,
        policies,
        triggers={"every": every_sentence},
        visibilities=("retrieve",),
        windows=Windows(budget=16),
        primary=("static", "oracle"),
        corpus=corpus,
        max_new_tokens=4,
        leaks=0,
        progress=False,
    )
    steered = found.answers.query("visibility == 'retrieve'")
    assert set(steered["policy"]) == {"static"} and set(found.answers["visibility"]) == {"retrieve", "concat"}
    candidates = [p for p, _ in index.search(QUESTION, 3)]
    best = candidates[
        int(read_passages(model, QUESTION, candidates, {"static": policies["static"]})["static"].argmax())
    ]
    event = found.events.query("visibility == 'retrieve' and kind == 'looked up'").iloc[0]
    assert event["passages"] == [best.id] and event["facts"] == (0.5 if best.id in ("p0", "p2") else 0)


def test_passages_that_no_prompt_holds_are_named_before_any_pass(model, monkeypatch):
    monkeypatch.setattr(passages, "observe", lambda *args, **options: pytest.fail("a pass was made"))
    tome = Passage("tome", "The garden lies by the river. " * 900, "It is long.")
    said = r"4,096 positions, and one with 1 of the passages has 1\d,\d+ tokens, 1\d,\d+ of them .* 'tome': leave that"
    with pytest.raises(ValueError, match=said):
        read_passages(model, QUESTION, [*PASSAGES, tome], {"static": dh.Static(HEADS)}, per_prompt=1)
    with pytest.raises(ValueError, match="for the longest, 'p2'"):
        read_passages(model, "Why? " * 900, PASSAGES[2:], {})
    prompts = passage_prompts(model, QUESTION, PASSAGES, per_prompt=2)
    assert [sum(s.name.startswith("doc_") for s in e.spans) for e in prompts] == [2, 1]


def test_the_question_that_asks_for_nothing_has_room_as_well(model):
    size = len(passage_prompts(model, "?", PASSAGES)[0].tokens)
    with pytest.raises(ValueError, match="must fit the model's"):
        passage_prompts(dataclasses.replace(model, max_positions=size), "?", PASSAGES)
    assert passage_prompts(dataclasses.replace(model, max_positions=size + len("N/A") - 1), "?", PASSAGES)


def test_a_prompt_holds_at_least_one_passage(model):
    with pytest.raises(ValueError, match="there must be passages, and at least 1 a prompt, got 3 and 0"):
        read_passages(model, QUESTION, PASSAGES, {}, per_prompt=0)
