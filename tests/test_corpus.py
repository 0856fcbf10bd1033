"""The corpus and its index against BM25 worked by hand, kept and found again; broken lines; another corpus."""

import gzip
import json
import math

import pytest

from dhlens.tasks.corpus import Index, Passage, read_corpus, read_gold

PASSAGES = [
    Passage("p0", "Harbour", "The harbour of Milo lies south."),
    Passage("p1", "Lighthouse", "The old lighthouse of Milo harbour was built by Ana Tol."),
    Passage("p2", "Ana Tol", "Ana Tol was a builder; she was born in Quist."),
    Passage("p3", "Quist", "Quist is a town of weavers."),
]


@pytest.fixture
def lines(tmp_path):
    def write(*records, name="corpus.jsonl"):
        path = tmp_path / name
        text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


def test_search_ranks_as_bm25_does(tmp_path):
    found = Index.of(PASSAGES, tmp_path / "index").search("Who built the lighthouse?", 4)
    assert [passage.id for passage, _ in found] == ["p1"]
    # words of two letters or more that are no stop words: lighthouse stands twice in p1 alone, built once
    words = {"p0": 5, "p1": 8, "p2": 8, "p3": 4}
    length = 1.5 * (1 - 0.75 + 0.75 * words["p1"] / (sum(words.values()) / 4))
    idf = math.log(1 + (4 - 1 + 0.5) / (1 + 0.5))
    # no passage says "who", and "the" is a stop word
    assert found[0][1] == pytest.approx(idf * (2 / (2 + length) + 1 / (1 + length)), rel=0.02)


def test_an_index_is_built_once_and_found_again(tmp_path, monkeypatch):
    first = Index.of(PASSAGES, tmp_path / "index")
    monkeypatch.setattr("bm25s.BM25.index", lambda *a, **k: pytest.fail("indexed twice"))
    again = Index.of(PASSAGES, tmp_path / "index")
    for query in ("Ana Tol", "weavers of Quist", "harbour"):
        assert again.search(query, 3) == first.search(query, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_the_cache_directory_holds_an_index_for_each_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("DHLENS_CACHE", str(tmp_path))
    one, other = Index.of(PASSAGES), Index.of(PASSAGES[:3])
    assert one.search("weavers", 1)[0][0].id == "p3" and other.search("weavers", 1) == []
    assert len(list(tmp_path.iterdir())) == 2


def test_an_index_of_another_corpus_is_refused(tmp_path):
    Index.of(PASSAGES, tmp_path / "index")
    with pytest.raises(ValueError, match=r"holds the index of another corpus .4 passages, .*not of these 3"):
        Index.of(PASSAGES[1:], tmp_path / "index")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than an index"):
        Index.of(PASSAGES, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_queries_without_a_known_word_find_nothing(tmp_path):
    index = Index.of(PASSAGES, tmp_path / "index")
    assert index.search("the of and", 3) == [] and index.search("zebra", 3) == [] and index.search("", 3) == []
    with pytest.raises(ValueError, match="k must be at least 1"):
        index.search("Milo", 0)
    with pytest.raises(ValueError, match="at least one passage"):
        Index.of([], tmp_path / "none")


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_a_corpus_is_read_in_order(lines, name):
    path = lines(*[vars(p) for p in PASSAGES], name=name)
    assert read_corpus(path) == PASSAGES


def test_broken_lines_are_named_and_left_out_as_asked(lines):
    path = lines(
        vars(PASSAGES[0]), '{"id": "p1", "title"', {"id": "p2", "title": "t"}, vars(PASSAGES[3]), vars(PASSAGES[0])
    )
    with pytest.raises(ValueError, match=r"corpus\.jsonl line 2: broken JSON"):
        read_corpus(path)
    with pytest.warns(UserWarning, match="3 broken records left out: .*line 3: text must be text.*line 5: the id 'p0'"):
        assert read_corpus(path, on_error="skip") == [PASSAGES[0], PASSAGES[3]]


def test_gold_passages_by_question(lines):
    path = lines({"question_id": "q0", "gold": ["p1", "p2"]}, {"question_id": "q1", "gold": []}, name="qrels.jsonl")
    with pytest.raises(ValueError, match=r"qrels\.jsonl line 2: gold must be a list of passage ids, got \[\]"):
        read_gold(path)
    with pytest.warns(UserWarning, match="1 broken records left out"):
        assert read_gold(path, on_error="skip") == {"q0": frozenset({"p1", "p2"})}


def test_a_damaged_index_and_a_corpus_without_words_are_told_in_words(tmp_path):
    Index.of(PASSAGES, tmp_path / "index")
    (tmp_path / "index" / "corpus.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged, delete the folder"):
        Index.of(PASSAGES, tmp_path / "index")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file: an index needs a folder"):
        Index.of(PASSAGES, tmp_path / "file")
    with pytest.raises(ValueError, match="no stop word, and 1 passages hold none"):
        Index.of([Passage("a", "the", "of and the")], tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
