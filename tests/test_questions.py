"""Multi-hop questions: what they must hold, how the data sets are read, and what is said of broken records."""

import dataclasses
import gzip
import json
import sys
import types

import pytest

from dhlens.tasks.multihop import read_questions
from dhlens.tasks.questions import Document, Question, groups_of, sha256_of

RECORD = {
    "_id": "a1",
    "question": "Where was the keeper of the Heron Mill born?",
    "answer": "Ostrel",
    "type": "bridge",
    "context": [
        ["Heron Mill", ["The Heron Mill stands on a hill.", " Its keeper is Ilsa Venn.", "  It is old."]],
        ["Crow Mill", ["The Crow Mill is younger."]],
        ["Ilsa Venn", [" Ilsa Venn was born in Ostrel. ", "She keeps bees."]],
    ],
    "supporting_facts": [["Ilsa Venn", 0], ["Heron Mill", 1], ["Ilsa Venn", 0]],
}
MUSIQUE = {
    "id": "2hop__1_2",
    "question": "Where was the keeper born?",
    "answer": "Ostrel",
    "answer_aliases": ["Ostrel town"],
    "answerable": True,
    "question_decomposition": [{}, {}],
    "paragraphs": [
        {"idx": 0, "title": "Mill", "paragraph_text": "A mill. It is old.", "is_supporting": False},
        {"idx": 1, "title": "Mill", "paragraph_text": "The keeper is Ilsa.", "is_supporting": True},
        {"idx": 2, "title": "None", "paragraph_text": " ", "is_supporting": False},
        {"idx": 3, "title": "Ilsa", "paragraph_text": "Ilsa is of Ostrel. She keeps bees.", "is_supporting": True},
    ],
}


def changed(**fields):
    return {**RECORD, **fields}


def written(folder, *records, name="dev.jsonl"):
    path = folder / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def test_a_record_by_hand(tmp_path):
    (question,) = read_questions(written(tmp_path, RECORD))
    assert question.id == "a1" and question.kind == "bridge" and question.source == "dev.jsonl line 1"
    assert question.documents[0].text == "The Heron Mill stands on a hill. Its keeper is Ilsa Venn. It is old."
    assert question.documents[2].sentences == ("Ilsa Venn was born in Ostrel.", " She keeps bees.")
    assert question.facts == ((2, 0), (0, 1)) and question.gold == {0, 2}


def test_sentences_without_their_spaces_get_them(tmp_path):
    """2WikiMultihopQA gives bare sentences; HotpotQA splits some where no space stood."""
    bare = [[title, [s.strip() for s in sentences]] for title, sentences in RECORD["context"]]
    split = [["Ilsa Venn", ["Ilsa Venn is of Ostrel", ".ky.", " She keeps bees.", "", " Many."]]]
    made = read_questions(
        written(tmp_path, changed(context=bare), changed(_id="a2", context=split, supporting_facts=[["Ilsa Venn", 2]]))
    )
    assert made[0].documents[2].text == "Ilsa Venn was born in Ostrel. She keeps bees."
    assert made[1].documents[0].text == "Ilsa Venn is of Ostrel.ky. She keeps bees. Many."
    assert len(made[1].documents[0].sentences) == 5


def test_musique_gives_whole_paragraphs_as_facts(tmp_path):
    (question,) = read_questions(written(tmp_path, MUSIQUE))
    assert question.facts == ((1, 0), (2, 0)) and question.kind == "2hop" and question.aliases == ("Ostrel town",)
    assert [d.title for d in question.documents] == ["Mill", "Mill", "Ilsa"], "an empty paragraph is dropped"
    assert question.documents[2].sentences == ("Ilsa is of Ostrel. She keeps bees.",)


def test_all_shapes_of_files_say_the_same(tmp_path):
    second = changed(_id="a2")
    expected = [q.id for q in read_questions(written(tmp_path, RECORD, "", second))]
    (tmp_path / "list.json").write_text(json.dumps([RECORD, second]))
    with gzip.open(tmp_path / "dev.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(f"{json.dumps(RECORD)}\n{json.dumps(second)}\n")
    for name in ("list.json", "dev.jsonl.gz"):
        made = read_questions(tmp_path / name)
        assert [q.id for q in made] == expected == ["a1", "a2"]
        assert sha256_of(made) == sha256_of(read_questions(tmp_path / "dev.jsonl"))
    assert read_questions(tmp_path / "list.json")[1].source == "list.json record 2"
    folder = tmp_path / "folder"
    folder.mkdir()
    (
        written(folder, second, name="b.jsonl"),
        written(folder, RECORD, name="c.json.txt"),
        written(folder, "x", name="n.md"),
    )
    written(folder, changed(_id="a0"), name="a.jsonl")
    assert [q.id for q in read_questions(folder)] == ["a0", "a2"]
    assert read_questions(made) == made


def test_the_hub_gives_columns(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        titles, sentences = zip(*RECORD["context"], strict=True)
        facts, numbers = zip(*RECORD["supporting_facts"], strict=True)
        columns = {"title": list(titles), "sentences": list(sentences)}
        row = {k: v for k, v in RECORD.items() if k != "_id"} | {"id": "a1", "context": columns}
        return [row | {"supporting_facts": {"title": list(facts), "sent_id": list(numbers)}}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (question,) = read_questions("hotpotqa/hotpot_qa")
    assert question.facts == ((2, 0), (0, 1)) and question.source == "hotpotqa/hotpot_qa validation record 1"
    assert read_questions("hub:hotpotqa/hotpot_qa:train[:1]")[0].documents == question.documents
    assert [(a[0][1], a[1]["split"]) for a in asked] == [("distractor", "validation"), ("distractor", "train[:1]")]


def test_without_the_package_the_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_questions("hotpotqa/hotpot_qa")


TWICE = [["Ilsa Venn", ["Another one."]], *RECORD["context"]]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (changed(supporting_facts=[]), "there must be supporting facts, found none"),
        ({k: v for k, v in RECORD.items() if k != "supporting_facts"}, "there must be supporting facts"),
        (changed(supporting_facts=[["Ilsa Venn", 2]]), "name a sentence with text, got 2 of the 2 .* in 'Ilsa Venn'"),
        (changed(supporting_facts=[["Ilsa Venn", -1]]), "name a sentence with text, got -1"),
        (changed(supporting_facts=[["Ilsa Venn", "0"]]), "by its number, got '0'"),
        (changed(supporting_facts=[["Ilsa Venn", False]]), "by its number, got False"),
        (changed(type="\udfff"), "type must be text of whole characters"),
        ("[" * 100_000, "broken JSON: maximum recursion depth"),
        (changed(answer="Os\ud800trel"), r"answer must be text of whole characters, got half of one, '.ud800'"),
        (changed(supporting_facts=[["Bo", 0]]), "names 'Bo', and no document with text"),
        (changed(supporting_facts=["Bo"]), r"supporting_facts must be a list of \[title, sent_id\]"),
        (changed(context=[["Ilsa Venn", ["", " "]]]), "names 'Ilsa Venn', and no document with text"),
        (changed(context=[["Ilsa Venn", "Born in Ostrel."]]), "sentences must be a list of texts"),
        (changed(context=[["Ilsa Venn", [3]]]), "sentence must be text, got 3"),
        (changed(context=TWICE), "name one sentence, and 2 documents called 'Ilsa Venn' have a sentence 0"),
        (changed(answer=" "), "answer must hold some text"),
        (changed(answer=None), "answer must be text, got None"),
        ({"question": "Why?"}, "must have the field context or paragraphs, it has: 'question'"),
        ([RECORD], "must be an object with fields, got list"),
        ('{"_id": "a1", ', "broken JSON"),
        ({**MUSIQUE, "answerable": False}, "must be answerable"),
        ({**MUSIQUE, "paragraphs": ["A mill."]}, "paragraphs must be objects"),
        (changed(_id="b"), "the id 'b' stands already in dev.jsonl line 1"),
    ],
)
def test_a_broken_record_is_named_or_left_out(tmp_path, record, said):
    path = written(tmp_path, changed(_id="b"), "", record, changed(_id="c"))
    with pytest.raises(ValueError, match=f"^dev.jsonl line 3: .*{said}"):
        read_questions(path)
    with pytest.warns(UserWarning, match=f"1 broken records left out: dev.jsonl line 3: .*{said}"):
        assert [q.id for q in read_questions(path, on_error="skip")] == ["b", "c"]


def test_a_line_that_is_no_utf8_is_named_or_left_out(tmp_path):
    path = written(tmp_path, RECORD, "~", changed(_id="c"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"~", b'{"_id": "Z\xfcrich"}'))
    with pytest.raises(ValueError, match=r"^dev.jsonl line 2: no UTF-8: .* 0xfc"):
        read_questions(path)
    with pytest.warns(UserWarning, match="dev.jsonl line 2: no UTF-8"):
        assert [q.id for q in read_questions(path, on_error="skip")] == ["a1", "c"]


def test_a_title_that_stands_twice_is_no_flaw_where_the_sentence_is_settled(tmp_path):
    path = written(
        tmp_path,
        changed(context=TWICE, supporting_facts=[["Ilsa Venn", 1]]),
        changed(_id="a2", context=[["Crow Mill", ["Another."]], *RECORD["context"]]),
    )
    settled, apart = read_questions(path)
    assert settled.facts == ((3, 1),) and apart.facts == ((3, 0), (1, 1))


def test_sources_that_are_not_there_or_hold_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, said in [
        (tmp_path / "no.jsonl", "is not there"),
        ("hotpotqa/other", "is not there"),
        (tmp_path / "empty", "no record found"),
        (written(tmp_path, "", name="e.jsonl"), "no record found"),
        (written(tmp_path, "[", name="e.json"), "cannot be read"),
        (written(tmp_path, "3", name="n.json"), "must hold a list of records, got int"),
        (written(tmp_path, "text", name="z.jsonl.gz"), "cannot be read"),
        (written(tmp_path, RECORD, name="e.txt"), "must end in one of .json"),
    ]:
        with pytest.raises(ValueError, match=said):
            read_questions(source)
    with pytest.raises(ValueError, match=r"no record found in the source: bad\.jsonl line 1"):
        read_questions(written(tmp_path, "{", name="bad.jsonl"), on_error="skip")


def test_what_to_do_about_a_broken_record_is_one_of_two(tmp_path):
    with pytest.raises(ValueError, match='on_error must be "raise" or "skip", got \'stop\''):
        read_questions(written(tmp_path, RECORD), on_error="stop")


def test_text_is_composed(tmp_path):
    (question,) = read_questions(written(tmp_path, changed(answer="O\u0308strel")))
    assert question.answer == "Östrel"


def asked(name, *gold):
    documents = tuple(Document(t, (f"Of {t}.",)) for t in (*gold, "far"))
    return Question(name, "?", "x", documents, tuple((i, 0) for i in range(len(gold))))


def test_questions_that_share_a_gold_document_are_one_group():
    made = [asked("a", "A", "B"), asked("b", "C"), asked("c", "D", "B"), asked("d", "D"), asked("e", "E", "C")]
    assert groups_of(made) == ["a", "b", "a", "a", "b"]
    other = dataclasses.replace(made[1], documents=(Document("C", ("Another C.",)),))
    assert groups_of([made[4], other]) == ["e", "b"], "a like-named document of other text"


def test_the_hash_is_of_what_is_said():
    one = asked("a", "A")
    assert sha256_of([one]) == sha256_of([dataclasses.replace(one, source="elsewhere")])
    assert sha256_of([one]) != sha256_of([dataclasses.replace(one, answer="y")])


@pytest.mark.parametrize("facts", [((3, 0),), ((0, 1),), ((0, 0), (0, 0)), ()])
def test_a_question_that_does_not_hold_together_cannot_be_made(facts):
    with pytest.raises(ValueError, match="supporting fact"):
        dataclasses.replace(asked("a", "A"), facts=facts)


def test_the_public_files_read_whole(data):
    for name, n in (("hotpotqa_distractor", 500), ("2wikimultihopqa", 657), ("musique", 200)):
        made = read_questions(data / name)
        assert len(made) == n and len({q.id for q in made}) == n
    with gzip.open(data / "hotpotqa_distractor/dev_distractor.jsonl.gz", "rt", encoding="utf-8") as file:
        raw = [json.loads(line) for line in file]
    for question, record in zip(read_questions(data / "hotpotqa_distractor"), raw, strict=True):
        said = {q.text for q in question.documents}
        assert len(question.documents) == len(record["context"])
        assert {" ".join("".join(s).split()) for _, s in record["context"]} == {" ".join(t.split()) for t in said}
        texts = dict(map(tuple, record["context"]))
        named = {texts[title][i].strip() for title, i in record["supporting_facts"]}
        assert {question.documents[d].sentences[i].strip() for d, i in question.facts} == named
