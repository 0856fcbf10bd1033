"""Contracts, meetings and code: evidence at its place and whole under every length, and broken records named."""

import gzip
import json
from itertools import pairwise

import pytest
import torch
from toy_tokenizers import byte_level, metaspace

from dhlens.tasks import evidence
from dhlens.tasks.evidence import read_located
from dhlens.tasks.located import Located
from dhlens.tasks.questions import Document
from dhlens.weights import load_tokenizer, resolve

BOTH = pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte", "metaspace"])

TEXT = "AGREEMENT\n1. Keep it secret. Tell no one.\n2. It ends in May. \n3. Return all copies.\n"
SPANS = [[0, 9], [10, 28], [28, 41], [42, 60], [62, 83]]
CONTRACT = {
    "id": "c1",
    "text": TEXT,
    "spans": SPANS,
    "qa": [
        {"id": "c1-a", "hypothesis": "It is secret.", "answer": "Entailment", "evidence": [[62, 83], [10, 28]]},
        {"id": "c1-b", "hypothesis": "It never ends.", "answer": "Contradiction", "evidence": [[45, 50]]},
        {"id": "c1-c", "hypothesis": "It rains.", "answer": "NotMentioned", "evidence": []},
    ],
}
MEETING = {
    "id": "m1",
    "turns": [["Ann", f"Point {i} is clear ."] for i in range(9)],
    "qa": [
        {"id": "m1-0", "question": "What is clear?", "answer": "Points.", "evidence_turns": [[5, 6], [2, 3], [3, 4]]}
    ],
}
FILES = [
    {"repo": "r", "path": "a.py", "text": "import os\n\n\ndef one():\n    return 1\n"},
    {"repo": "r", "path": "b.py", "text": "x = 1\ny = 2\nz = 3"},
]
CODE = {
    "id": "s1",
    "repo": "r",
    "question": "What does one return?",
    "answer": "It returns 1.",
    "evidence": [
        {"path": "b.py", "start_line": 2, "end_line": 3},
        {"path": "a.py", "start_line": 4, "end_line": 5},
        {"path": "b.py", "start_line": 3, "end_line": 3},
    ],
}
FACTS = {
    "contracts": ["1. Keep it secret.", "3. Return all copies."],
    "meetings": [
        "Ann: Point 2 is clear .\nAnn: Point 3 is clear .\nAnn: Point 4 is clear .",
        "Ann: Point 5 is clear .\nAnn: Point 6 is clear .",
    ],
    "code": ["y = 2\nz = 3", "def one():\n    return 1"],
}
RECORDS = {"contracts": [CONTRACT], "meetings": [MEETING], "code": [*FILES, CODE]}
KINDS = pytest.mark.parametrize("kind", list(FACTS))


def written(folder, records, name="data.jsonl"):
    (folder / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return folder


def text_of(tokenizer, episode, name):
    span = episode.span(name)
    return tokenizer.decode(episode.tokens[span.start : span.stop])


@KINDS
@BOTH
def test_evidence_by_hand(tmp_path, tokenizer, kind):
    episode = evidence.episodes(tokenizer, written(tmp_path, RECORDS[kind]), kind=kind)[0]
    facts = [s for s in episode.spans if s.name.startswith("fact_")]
    assert sorted(s.name for s in facts) == ["fact_0", "fact_1"]
    for i, said in enumerate(FACTS[kind]):
        assert text_of(tokenizer, episode, f"fact_{i}").strip() == said
        fact = episode.span(f"fact_{i}")
        assert said not in tokenizer.decode(episode.tokens[fact.start + 1 : fact.stop])
        assert said not in tokenizer.decode(episode.tokens[fact.start : fact.stop - 1])
    assert episode.meta["question"] in text_of(tokenizer, episode, "question")
    assert episode.meta["units_left_out"] == 0 == episode.meta["left_out"] and episode.meta["kind"] == kind
    assert json.loads(json.dumps(dict(episode.meta))) == episode.meta
    context = text_of(tokenizer, episode, "context").strip()
    if kind == "contracts":
        assert context == TEXT.strip() and "[...]" not in context
    if kind == "meetings":
        assert context == "\n".join(f"Ann: Point {i} is clear ." for i in range(9))
    if kind == "code":
        titles = episode.meta["titles"]
        texts = {f["path"]: f["text"] for f in FILES}
        assert sorted(titles) == ["a.py", "b.py"]
        for i, title in enumerate(titles):
            assert text_of(tokenizer, episode, f"doc_{i}").strip() == f"[{i + 1}] {title}\n{texts[title]}".strip()
        assert [titles[d] for d in episode.meta["fact_documents"]] == ["b.py", "a.py"]


def test_what_is_asked_and_judged(tmp_path):
    tokenizer = byte_level()
    first, second = evidence.episodes(tokenizer, written(tmp_path, [CONTRACT]), kind="contracts")
    assert first.meta["question"].endswith("by the contract? It is secret.") and first.judge("entailed.")
    assert second.meta["answer_text"] == "contradicted" and not second.judge("entailed")
    assert text_of(tokenizer, second, "fact_0").strip() == "2. It ends in May.", "a clause is kept whole"
    assert first.group == second.group == "c1-a"
    (tmp_path / "m").mkdir()
    (open_,) = evidence.episodes(tokenizer, written(tmp_path / "m", [MEETING]), kind="meetings")
    assert open_.judge("Points.") is None and open_.meta["reference"] == "Points."
    assert tokenizer.decode(open_.answer).strip() == "Points."


def talk(n=60, runs=((0, 30, 31),), name="t", mark=""):
    turns = tuple(("\n" if i else "") + f"Ann: {mark}Turn {i} of many is said here." for i in range(n))
    return Located(name, "What is said?", "Much.", (Document("", turns),), runs)


@BOTH
def test_a_length_keeps_evidence_and_grows_whole_units_around_it(tokenizer):
    question = talk(runs=((0, 5, 5), (0, 30, 31)))
    turns = [s.strip() for s in question.documents[0].sentences]
    before = set()
    for length in (330, 420, 700):
        for seed in range(6):
            (episode,) = evidence.episodes(tokenizer, [question], kind="meetings", length=length, seed=seed)
            assert len(episode.tokens) <= length
            assert text_of(tokenizer, episode, "fact_0").strip() == turns[5]
            assert text_of(tokenizer, episode, "fact_1").strip() == "\n".join(turns[30:32])
            lines = [line for line in text_of(tokenizer, episode, "context").split("\n") if line]
            kept = [turns.index(line) for line in lines if line != "[...]"]
            assert kept == sorted(set(kept)) and episode.meta["units_left_out"] == len(turns) - len(kept)
            gaps = sum(b > a + 1 for a, b in pairwise(kept))
            assert lines.count("[...]") == gaps <= 1
            assert len(episode.tokens) > length - 80, "the room is used"
            before.add((length, kept.index(5)))
    assert len(before) > 8, "the seed moves the evidence"


def test_units_that_do_not_fit_end_the_growth_on_their_side():
    tokenizer = byte_level()
    turns = ["Ann: a.", "\nAnn: " + "long and longer " * 60, "\nAnn: here.", "\nAnn: b.", "\nAnn: c."]
    question = Located("t", "Where?", "Here.", (Document("", tuple(turns)),), ((0, 2, 2),))
    (episode,) = evidence.episodes(tokenizer, [question], kind="meetings", length=360)
    assert text_of(tokenizer, episode, "context").strip() == "Ann: here.\nAnn: b.\nAnn: c."


def test_evidence_too_long_is_left_out_and_counted():
    tokenizer = byte_level()
    wide = talk(runs=((0, 0, 59),), name="wide")
    made = evidence.episodes(tokenizer, [wide, talk()], kind="meetings", length=400)
    assert [e.id for e in made] == ["t"] and made[0].meta["left_out"] == 1
    with pytest.raises(ValueError, match="the evidence of 1 does not fit the length"):
        evidence.episodes(tokenizer, [wide], kind="meetings", length=400)
    with pytest.raises(ValueError, match="beyond the model's 512 positions; length=512 drops"):
        evidence.episodes(tokenizer, [wide], kind="meetings", max_positions=512)


def test_groups_seed_and_draw():
    tokenizer = byte_level()
    pool = [talk(name=f"t{i}", mark="ab"[i % 2], runs=((0, 3 * i, 3 * i),)) for i in range(12)]
    given = {"kind": "meetings", "length": 420}
    first, again, other = (evidence.episodes(tokenizer, pool, n=4, seed=s, **given) for s in (0, 0, 1))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert [e.id for e in first] != [e.id for e in other]
    more = evidence.episodes(tokenizer, pool, n=9, seed=0, **given)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, more, strict=False))
    assert {e.group for e in evidence.episodes(tokenizer, pool, **given)} == {"t0", "t1"}


def nested(record, *path, value):
    """A deep copy with one field changed."""
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("kind", "record", "said"),
    [
        ("contracts", nested(CONTRACT, "qa", 0, "evidence", value=[[70, 90]]), "evidence 70..90 is outside the spans"),
        ("contracts", nested(CONTRACT, "qa", 0, "evidence", value=[[9, 9]]), "must hold 0 <= start < end, got 9..9"),
        ("contracts", nested(CONTRACT, "qa", 0, "evidence", value=[]), "'c1-a' must have evidence, found none"),
        ("contracts", nested(CONTRACT, "qa", 0, "answer", value="Maybe"), "got 'Maybe'"),
        ("contracts", nested(CONTRACT, "spans", value=[[0, 900]]), "within the 84 characters"),
        ("contracts", nested(CONTRACT, "spans", value=[]), "must have spans"),
        ("contracts", nested(CONTRACT, "spans", value=[[False, 11]]), "must be pairs of numbers"),
        ("contracts", nested(CONTRACT, "text", value="\udc00"), "text must be text of whole characters"),
        ("contracts", nested(CONTRACT, "spans", value=[["a", 3]]), "must be pairs of numbers"),
        ("meetings", nested(MEETING, "qa", 0, "evidence_turns", value=[[7, 9]]), "got 7..9 of the 9"),
        ("meetings", nested(MEETING, "qa", 0, "evidence_turns", value=[]), "'m1-0' must have evidence"),
        ("meetings", nested(MEETING, "turns", value=[["Ann"]]), "turns must be pairs"),
        ("meetings", nested(MEETING, "qa", 0, "question", value=None), "question must be text, got None"),
        ("meetings", nested(MEETING, "qa", value=[3]), "qa must be objects with fields, got 3"),
        ("code", nested(CODE, "evidence", 0, "path", value="c.py"), "in 'c.py' of 'r', and no such file"),
        ("code", nested(CODE, "evidence", 0, "end_line", value=4), "of the 3 .* in b.py"),
        ("code", nested(CODE, "evidence", 0, "start_line", value=0), "must be units with text"),
        ("code", nested(CODE, "evidence", 1, "start_line", value="4"), "must be pairs of numbers"),
        (
            "code",
            nested(CODE, "evidence", 1, value={"path": "a.py", "start_line": 2, "end_line": 3}),
            "units with text",
        ),
        ("code", {"id": "s"}, "repo must be text"),
        ("code", "{", "broken JSON"),
    ],
)
def test_broken_records_are_named_or_left_out(tmp_path, kind, record, said):
    good = json.loads(json.dumps(RECORDS[kind]).replace("c1", "z").replace("m1", "z").replace("s1", "z"))
    path = written(tmp_path, [record, *good])
    with pytest.raises(ValueError, match=rf"^data\.jsonl line 1: .*{said}"):
        read_located(path, kind=kind)
    with pytest.warns(UserWarning, match=rf"1 broken records left out: data\.jsonl line 1: .*{said}"):
        assert {q.id[0] for q in read_located(path, kind=kind, on_error="skip")} == {"z"}


def test_refusals(tmp_path):
    written(tmp_path, [CONTRACT])
    with pytest.raises(ValueError, match="kind must be one of contracts, meetings, code, got 'poems'"):
        read_located(tmp_path, kind="poems")
    with pytest.raises(ValueError, match="length 600 is beyond the model's 512"):
        evidence.episodes(byte_level(), tmp_path, kind="contracts", length=600, max_positions=512)
    with pytest.raises(ValueError, match="is not there"):
        read_located(tmp_path / "no", kind="code")


@pytest.mark.parametrize(
    ("kind", "folder", "n", "fitting"),
    [("contracts", "contract_nli", 1802, 1802), ("meetings", "qmsum", 481, 375), ("code", "code_qa_swe", 100, 98)],
)
def test_the_evidence_of_every_public_question(data, smollm2_package, kind, folder, n, fitting):
    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    found = {q.id: q for q in read_located(data / folder, kind=kind)}
    made = evidence.episodes(tokenizer, list(found.values()), kind=kind, length=2000)
    assert len(found) == n and len(made) == fitting and made[0].meta["left_out"] == n - fitting
    for episode in made:
        assert len(episode.tokens) <= 2000
        question = found[episode.id]
        for i, (d, first, last) in enumerate(question.runs):
            said = "".join(question.documents[d].sentences[first : last + 1]).strip()
            assert text_of(tokenizer, episode, f"fact_{i}").strip() == said


def test_evidence_is_what_the_files_say_it_is(data):
    """Character offsets of the data sets, which the readers do not use for code, give the same text."""
    with gzip.open(data / "code_qa_swe/questions.jsonl.gz", "rt", encoding="utf-8") as file:
        asked = {q["id"]: q for q in map(json.loads, file)}
    with gzip.open(data / "code_qa_swe/files.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = {(f["repo"], f["path"]): f["text"] for f in map(json.loads, file)}
    for question in read_located(data / "code_qa_swe", kind="code"):
        record = asked[question.id]
        said = ["".join(question.documents[d].sentences[a : b + 1]).strip("\n") for d, a, b in question.runs]
        for place in record["evidence"]:
            quoted = texts[record["repo"], place["path"]][place["start"] : place["end"]].strip("\n")
            assert any(quoted in s for s in said)
    with gzip.open(data / "contract_nli/contracts.jsonl.gz", "rt", encoding="utf-8") as file:
        contracts = [json.loads(line) for line in file]
    quoted = {q["id"]: sorted(c["text"][a:b].strip() for a, b in q["evidence"]) for c in contracts for q in c["qa"]}
    for question in read_located(data / "contract_nli", kind="contracts"):
        units = question.documents[0].sentences
        assert sorted(units[a].strip() for _, a, b in question.runs for a in range(a, b + 1)) == quoted[question.id]
