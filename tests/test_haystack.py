"""Haystacks: what is read, and the laws of windows."""

import hashlib
import re
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from toy_tokenizers import byte_level, metaspace, prose

from dhlens.tasks.haystack import Haystack, read_haystack, windows
from dhlens.tasks.prompts import encode

PROSE = Haystack((("one", prose(300, seed=1)), ("two", prose(300, seed=2)), ("three", prose(40, seed=3))))


def test_default_is_running_prose():
    haystack = read_haystack()
    (name, text), *others = haystack.texts
    paragraphs = text.split("\n\n")
    assert name == "python-docs" and not others
    assert len(text) > 60_000
    assert len(set(paragraphs)) == len(paragraphs)
    for paragraph in paragraphs:
        assert re.match(r"[“\"(]?[A-Z]", paragraph) and re.search(r"[.!?][)”\"’']*$", paragraph), paragraph
        assert not re.search(r"::=|>>>|^ |\n|\*\*\*|====|----| \[\d\]", paragraph), paragraph
        assert not re.match("Changed in|New in|Added in", paragraph)


def test_what_counts_as_prose_by_hand(monkeypatch):
    kept = (
        "The pass statement does nothing at all when it is executed, useful when a\nstate-\nment is *required by "
        "the rules* but no code\nneeds to be run [3]."
    )
    indented = "   This paragraph stands under a name in a list, so that it would make little sense when read alone."
    page = [
        'The "pass" statement\n********************',
        kept,
        indented,
        '   pass_stmt ::= "pass"',
        "Changed in version 3.9: This paragraph tells what was new in an old version, which is no running prose.",
        "A paragraph that ends with a colon announces the block of code that was left out behind it, as here:",
        "With x[i:j] = y[k:l], z[m:n] == {1: 2, 3: 4} and (a, b) != (c, d) it has too few letters to read as text.",
        "Too short to keep.",
        kept,
    ]
    monkeypatch.setattr("pydoc_data.topics.topics", {"pass": "\n\n".join(page), "more": kept})
    assert read_haystack().texts[0][1] == (
        "The pass statement does nothing at all when it is executed, useful when a state-ment is required by "
        "the rules but no code needs to be run."
    )


def test_a_file_is_read_with_the_hash_of_the_file(tmp_path):
    path = tmp_path / "walk.txt"
    path.write_text("A – walk. Home.\n", encoding="utf-8")
    haystack = read_haystack(path)
    assert haystack.texts == (("walk.txt", "A – walk. Home.\n"),)
    assert haystack.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_haystack(str(path)).sha256 == haystack.sha256
    assert read_haystack(haystack) is haystack


def test_a_folder_is_read_in_order_without_other_files(tmp_path):
    for name, text in (("b.md", "B."), ("a.txt", "A."), ("c.csv", "1,2"), ("d.txt", " \n")):
        (tmp_path / name).write_text(text)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "e.txt").write_text("E.")
    assert read_haystack(tmp_path).texts == (("a.txt", "A."), ("b.md", "B."), ("deep/e.txt", "E."))


def test_the_hash_tells_texts_and_their_borders_apart():
    texts = [(("x", "ab"), ("y", "c")), (("x", "a"), ("y", "bc")), (("x", "abc"),), (("x", "c"), ("y", "ab"))]
    assert len({Haystack(t).sha256 for t in texts}) == len(texts)


@pytest.mark.parametrize("make", ["missing", "empty", "folder", "binary"])
def test_bad_sources_are_refused(tmp_path, make):
    path = tmp_path / make
    words = {"missing": "is not there", "empty": "is empty", "folder": "is empty", "binary": "UTF-8"}[make]
    if make == "folder":
        path.mkdir()
    elif make != "missing":
        path.write_bytes(b"\xff\xfe\x00" if make == "binary" else b" \n")
    with pytest.raises(ValueError, match=words):
        read_haystack(path)


class _Rows:
    column_names = ("text", "title")

    def __getitem__(self, column):
        return [f"{column} one.", f"{column} two."]


def test_a_hub_data_set_is_read_through_datasets(monkeypatch):
    asked = []
    module = ModuleType("datasets")
    monkeypatch.setattr(
        module, "load_dataset", lambda name, split: asked.append((name, split)) or _Rows(), raising=False
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_haystack("hub:me/books").texts == (("me/books", "text one.\n\ntext two."),)
    assert read_haystack("hub:me/books:test[10:20]:title").texts == (("me/books", "title one.\n\ntitle two."),)
    assert asked == [("me/books", "train"), ("me/books", "test[10:20]")]
    with pytest.raises(ValueError, match="no column 'body'; it has: text, title"):
        read_haystack("hub:me/books:train:body")
    with pytest.raises(ValueError, match="hub:owner/name"):
        read_haystack("hub:me/books::")


def test_without_datasets_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_haystack("hub:me/books")


@pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte", "metaspace"])
@pytest.mark.parametrize("seed", range(4))
def test_windows_do_not_overlap_and_begin_at_sentences(tokenizer, seed):
    found = windows(tokenizer, PROSE, n=14, width=300, seed=seed)
    assert len({w.id for w in found}) == len(found) == 14
    texts = dict(PROSE.texts)
    ends: dict[str, int] = {}
    for window in found:
        name, _, offset = window.id.partition("@")
        before, behind = texts[name][: int(offset)], texts[name][int(offset) :]
        words = tokenizer.decode(window.tokens).strip("� \n")
        at = behind.index(words[:-20])
        assert at <= 2 and not behind[:at].strip()
        assert window.group == window.id and len(window.tokens) == 300
        assert not before.strip() or before.rstrip()[-1] in '.!?"'
        assert int(offset) >= ends.get(name, 0)
        ends[name] = int(offset) + at + len(words) - 20


@pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte", "metaspace"])
def test_breaks_are_the_sentence_ends_that_tokens_respect(tokenizer):
    (window,) = windows(tokenizer, PROSE, n=1, width=400, seed=5)
    judged = [0]
    for i in range(1, 400):
        before, behind = tokenizer.decode(window.tokens[:i]), tokenizer.decode(window.tokens[i - 1 : i + 4])
        behind = behind[len(tokenizer.decode(window.tokens[i - 1 : i])) :]
        if re.search(r"[.!?][\"”]?\Z", before) and re.match(r"\s", behind):
            judged.append(i)
    assert window.breaks.tolist()[: len(judged)] == judged
    assert len(judged) > 5 and set(window.breaks.tolist()[len(judged) :]) <= {400}


def greedy_room(tokenizer, text: str, width: int) -> int:
    """The slow judge: fill from the left, always at the first sentence beginning that is free."""
    (whole,) = windows(tokenizer, Haystack((("t", text),)), n=1, width=len(tokenizer("\n" + text).input_ids), seed=0)
    count, free = 0, 0
    for start in whole.breaks:
        if start >= free and start + width <= len(whole.tokens):
            count, free = count + 1, start + width
    return count


@pytest.mark.parametrize("width", [60, 97, 150, 333])
def test_as_many_windows_fit_as_greedy_filling_finds(width):
    text = prose(60, seed=width)
    haystack = Haystack((("t", text),))
    room = greedy_room(byte_level(), text, width)
    assert room > 1
    _, offsets = encode(byte_level(), text)
    for n in range(1, room + 1):
        for seed in range(4):
            found = windows(byte_level(), haystack, n=n, width=width, seed=seed)
            starts = np.searchsorted(offsets[:, 0], [int(w.id.partition("@")[2]) for w in found])
            assert len(found) == n and (np.diff(starts) >= width).all()
    with pytest.raises(
        ValueError, match=rf"need {(room + 1) * width} tokens .* room for {room} window\(s\).*repeat=True"
    ):
        windows(byte_level(), haystack, n=room + 1, width=width, seed=0)


def test_windows_are_spread_evenly_and_full_files_are_passed_over():
    names = [w.id.partition("@")[0] for w in windows(byte_level(), PROSE, n=9, width=400, seed=0)]
    assert sorted(names) == ["one"] * 4 + ["three"] + ["two"] * 4
    first = {windows(byte_level(), PROSE, n=1, width=300, seed=s)[0].id for s in range(12)}
    assert len({i.partition("@")[0] for i in first}) == 3 and len(first) > 6


def test_the_seed_fixes_the_windows():
    ids = [[w.id for w in windows(byte_level(), PROSE, n=6, width=300, seed=s)] for s in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_files_that_are_not_needed_are_not_tokenised():
    class Counting:
        calls = 0

        def __call__(self, text, **kwargs):
            self.calls += 1
            return byte_level()(text, **kwargs)

        def decode(self, token_ids, **kwargs):
            raise AssertionError("windows decode nothing")

        apply_chat_template = decode

    tokenizer = Counting()
    windows(tokenizer, PROSE, n=2, width=200, seed=0)
    assert tokenizer.calls == 2


def test_repeat_fills_up_and_makes_one_group():
    short = Haystack((("small.txt", prose(9)),))
    with pytest.raises(ValueError, match="too short"):
        windows(byte_level(), short, n=3, width=500, seed=0)
    found = windows(byte_level(), short, n=3, width=500, seed=0, repeat=True)
    assert {w.group for w in found} == {"small.txt"} and len({w.id for w in found}) == 3
    assert all(len(w.tokens) == 500 for w in found)
    assert torch.equal(
        windows(byte_level(), PROSE, n=1, width=300, seed=0, repeat=True)[0].tokens,
        windows(byte_level(), PROSE, n=1, width=300, seed=0)[0].tokens,
    )


def test_text_without_sentences_is_refused():
    words = Haystack((("list", "heron river miller " * 200),))
    with pytest.raises(ValueError, match="no sentence end"):
        windows(byte_level(), words, n=3, width=200, seed=0, repeat=True)
