"""Multi-hop prompts: exact spans, gold documents kept under every length, groups, seeds and refusals."""

import json

import pytest
import torch
from toy_tokenizers import byte_level, metaspace

from dhlens.tasks import hotpot
from dhlens.tasks.multihop import read_questions
from dhlens.tasks.questions import Document, Question
from dhlens.weights import load_tokenizer, resolve

BOTH = pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte", "metaspace"])


def mills(n_others=6, name="q1", answer="Ostrel"):
    others = tuple(
        Document(f"Mill {i}", (f"The mill number {i} is old.", " Nobody knows more." * i)) for i in range(n_others)
    )
    gold = (
        Document("Heron Mill", ("The Heron Mill stands on a hill.", " Its keeper is Ilsa Venn.", " It is old.")),
        Document("Ilsa Venn", ("Ilsa Venn was born in Ostrel.", "", " She keeps “bees”.")),
    )
    documents = (*others[:2], gold[0], *others[2:], gold[1])
    facts = ((len(documents) - 1, 0), (min(n_others, 2), 1))
    return Question(name, "Where was the keeper born?", answer, documents, facts, ("Ostrel town",), "bridge", "mine")


def text_of(tokenizer, episode, name):
    span = episode.span(name)
    return tokenizer.decode(episode.tokens[span.start : span.stop])


def check(tokenizer, episode, question):
    """Every span by decoding, against the question it was made of."""
    meta = episode.meta
    shown = [next(d for d in question.documents if d.title == t) for t in meta["titles"]]
    for i, document in enumerate(shown):
        assert text_of(tokenizer, episode, f"doc_{i}").strip() == f"[{i + 1}] {document.title}\n{document.text}"
    for i, (d, s) in enumerate(question.facts):
        fact, holder = episode.span(f"fact_{i}"), episode.span(f"doc_{meta['fact_documents'][i]}")
        sentence = question.documents[d].sentences[s].strip()
        assert text_of(tokenizer, episode, f"fact_{i}").strip() == sentence
        assert sentence not in tokenizer.decode(episode.tokens[fact.start + 1 : fact.stop])
        assert holder.start < fact.start < fact.stop <= holder.stop
        assert shown[meta["fact_documents"][i]] == question.documents[d]
    context = "\n\n".join(f"[{i + 1}] {d.title}\n{d.text}" for i, d in enumerate(shown))
    assert text_of(tokenizer, episode, "context").strip() == context
    assert question.question in text_of(tokenizer, episode, "question")
    if episode.has("answer"):
        inner = episode.span("answer")
        assert question.answer in text_of(tokenizer, episode, "answer")
        facts = [episode.span(f"fact_{i}") for i in range(len(question.facts))]
        assert any(f.start <= inner.start < inner.stop <= f.stop for f in facts)


@BOTH
@pytest.mark.parametrize("template", ["chat", "plain", "<s>Q: {question}\n{context}\nSo:"])
def test_spans_are_exact(tokenizer, template):
    question = mills()
    for seed in range(4):
        (episode,) = hotpot.episodes(tokenizer, [question], seed=seed, template=template)
        check(tokenizer, episode, question)
        assert text_of(tokenizer, episode, "answer").strip() == "Ostrel"
        assert tokenizer.decode(episode.answer).strip() == "Ostrel" and episode.judge("In Ostrel.")
        assert len(episode.meta["titles"]) == 8 and episode.meta["documents_left_out"] == 0
    if template == "chat":
        assert f"Instruction:\n{hotpot.INSTRUCTION}" in tokenizer.decode(episode.tokens)


@BOTH
def test_a_length_drops_distractors_and_never_gold(tokenizer):
    question = mills()
    whole = len(hotpot.episodes(tokenizer, [question])[0].tokens)
    least = len(hotpot.episodes(tokenizer, [mills(0)])[0].tokens)
    seen = set()
    for length in range(least + 8, whole + 9, 7):
        (episode,) = hotpot.episodes(tokenizer, [question], length=length)
        check(tokenizer, episode, question)
        assert len(episode.tokens) == episode.meta["length"] <= length
        left = question.documents
        dropped = [d for d in left if d.title not in episode.meta["titles"]]
        assert len(dropped) == episode.meta["documents_left_out"]
        spare = length - len(episode.tokens)
        for d in dropped:
            (alone,) = hotpot.episodes(tokenizer, [mills(0)])
            more = Question("x", "Where was the keeper born?", "Ostrel", (*mills(0).documents, d), mills(0).facts)
            (beside,) = hotpot.episodes(tokenizer, [more])
            assert len(beside.tokens) - len(alone.tokens) > spare - 12, "what is left out did not fit"
        seen.add(len(dropped))
    assert {0, 6} <= seen


def test_evidence_that_does_not_fit_is_left_out_and_counted():
    tokenizer = byte_level()
    short, long = mills(2, "short"), mills(2, "long")
    heavy = (Document("Ilsa Venn", (" Ilsa Venn was born in Ostrel." * 30,)), *long.documents[1:])
    long = Question("long", long.question, "Ostrel", heavy, ((0, 0),))
    limit = len(hotpot.episodes(tokenizer, [short])[0].tokens) + 8
    made = hotpot.episodes(tokenizer, [long, short], length=limit)
    assert [e.id for e in made] == ["short"] and made[0].meta["left_out"] == 1
    with pytest.raises(ValueError, match=r"2 questions .* the source has 2, and the evidence of 1 does not fit"):
        hotpot.episodes(tokenizer, [long, short], n=2, length=limit)
    with pytest.raises(ValueError, match="the evidence of 1 does not fit the length"):
        hotpot.episodes(tokenizer, [long], length=limit)


def test_meta_groups_and_order():
    tokenizer = byte_level()
    other = Question("q/9", "Which mill?", "yes", (Document("A", ("The mill is old.",)),), ((0, 0),))
    made = hotpot.episodes(tokenizer, [mills(name="q1"), other, mills(name="q2")])
    assert [e.id for e in made] == ["q1", "q_9", "q2"] and [e.group for e in made] == ["q1", "q/9", "q1"]
    meta = made[0].meta
    assert meta["aliases"] == ["Ostrel town"] and meta["kind"] == "bridge" and meta["answer_in_context"]
    assert not made[1].meta["answer_in_context"] and not made[1].has("answer")
    assert len({e.meta["haystack_sha256"] for e in made}) == 1 and meta["template"] == "chat"
    assert all(json.loads(json.dumps(dict(e.meta))) == e.meta for e in made)
    assert made[0].meta["titles"] != made[2].meta["titles"], "each question has an order of its own"


def test_the_seed_decides_order_and_draw():
    tokenizer = byte_level()
    pool = [mills(name=f"q{i}") for i in range(12)]
    first, again, other = (hotpot.episodes(tokenizer, pool, n=4, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert [e.id for e in first] != [e.id for e in other]
    more = hotpot.episodes(tokenizer, pool, n=7, seed=0)
    assert all(a.id == b.id and torch.equal(a.tokens, b.tokens) for a, b in zip(first, more, strict=False))
    assert {e.span("fact_0").start for e in first} != {first[0].span("fact_0").start}


def test_without_a_source_questions_are_made_up():
    tokenizer = byte_level()
    made, fewer = hotpot.episodes(tokenizer, n=6, seed=3), hotpot.episodes(tokenizer, n=2, seed=3)
    for episode, question in zip(made, read_questions(n_generated=6, seed=3), strict=True):
        check(tokenizer, episode, question)
        assert episode.meta["answer_in_context"] or question.answer in ("yes", "no")
    assert [e.id for e in made[:2]] == [e.id for e in fewer] and torch.equal(made[1].tokens, fewer[1].tokens)
    assert len({e.group for e in made}) == 6


def test_refusals():
    tokenizer = byte_level()
    for given, said in [
        ({"n": 0}, "n must be positive, got 0"),
        ({"length": 0}, "length must be positive, got 0"),
        ({"length": 600, "max_positions": 512}, "length 600 is beyond the model's 512 positions"),
        ({"max_positions": 99}, "the prompt of question 'q1' has .* beyond the model's 99 positions"),
        ({"n": 2}, "2 questions are asked for, the source has 1$"),
        ({"template": "{context}"}, "once each"),
    ]:
        with pytest.raises(ValueError, match=said):
            hotpot.episodes(tokenizer, [mills()], **given)


def test_broken_records_are_left_out_as_asked(tmp_path):
    path = tmp_path / "dev.jsonl"
    record = {"id": "a", "question": "Who?", "answer": "Bo", "context": [["A", ["It is Bo."]]]}
    path.write_text("{\n" + json.dumps({**record, "supporting_facts": [["A", 0]]}))
    with pytest.raises(ValueError, match=r"dev\.jsonl line 1: broken JSON"):
        hotpot.episodes(byte_level(), path)
    with pytest.warns(UserWarning, match="1 broken records left out"):
        assert [e.id for e in hotpot.episodes(byte_level(), path, on_error="skip")] == ["a"]


@pytest.mark.parametrize(
    ("folder", "n", "answered"),
    [("hotpotqa_distractor", 500, 477), ("2wikimultihopqa", 657, 414), ("musique", 200, 200)],
)
def test_the_spans_of_every_public_question(data, smollm2_package, folder, n, answered):
    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    questions = {q.id: q for q in read_questions(data / folder)}
    made = hotpot.episodes(tokenizer, data / folder)
    assert len(made) == n and sum(e.has("answer") for e in made) == answered
    for episode in made:
        question = questions[episode.id]
        assert sorted(episode.meta["titles"]) == sorted(d.title for d in question.documents)
        for i, (d, s) in enumerate(question.facts):
            said = text_of(tokenizer, episode, f"fact_{i}")
            assert said.strip() == question.documents[d].sentences[s].strip()
            document = text_of(tokenizer, episode, f"doc_{episode.meta['fact_documents'][i]}")
            assert document.partition("] ")[2] == f"{question.documents[d].title}\n{question.documents[d].text}"
        assert question.question in text_of(tokenizer, episode, "question")
        if episode.has("answer"):
            answer = episode.span("answer")
            assert question.answer in text_of(tokenizer, episode, "answer")
            assert question.answer not in tokenizer.decode(episode.tokens[answer.start + 1 : answer.stop])
            assert question.answer not in tokenizer.decode(episode.tokens[answer.start : answer.stop - 1])
