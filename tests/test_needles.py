"""Needles: the built-in ones, what one's own must be, and the answer's place in the tokens."""

import random
import re
import uuid

import pytest
from toy_tokenizers import byte_level, lower_case, metaspace

from dhlens.tasks.needles import NEEDLES, Needle, Placed, needle_called
from dhlens.tasks.prompts import encode

BOTH = pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte", "metaspace"])


def draw(kind: str, seed: int) -> str:
    return NEEDLES[kind].answer(random.Random(seed))


def test_uuids_are_of_version_4():
    answers = {draw("uuid", seed) for seed in range(50)}
    assert len(answers) == 50 and {uuid.UUID(a).version for a in answers} == {4}
    assert all(str(uuid.UUID(a)) == a for a in answers)


def test_numbers_have_seven_digits_and_words_are_four():
    assert all(re.fullmatch(r"[1-9]\d{6}", draw("number", seed)) for seed in range(200))
    assert all(re.fullmatch(r"[a-z]+( [a-z]+){3}", draw("words", seed)) for seed in range(50))
    assert all(len(set(draw("words", seed).split())) == 4 for seed in range(50))


def test_needles_are_called_by_name():
    own = Needle("It rains.", "What is the weather?")
    assert needle_called(own) is own
    assert {needle_called(kind).kind for kind in NEEDLES} == set(NEEDLES) == {"uuid", "number", "words"}
    with pytest.raises(ValueError, match="uuid, number, words, or a Needle, got 'uid'"):
        needle_called("uid")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sentence": "", "answer": None}, "sentence must be text"),
        ({"question": " "}, "question must be text"),
        ({"sentence": " It is {answer}."}, "without white space"),
        ({"sentence": "It is 7."}, "with an answer must hold {answer} 1 times"),
        ({"sentence": "{answer} {answer}"}, "with an answer must hold {answer} 1 times"),
        ({"answer": None}, "without an answer must hold {answer} 0 times"),
        ({"sentence": "It is 7.", "answer": None, "reply": "{answer}"}, "in its reply"),
    ],
)
def test_unclear_needles_are_refused(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Needle(**{"sentence": "It is {answer}.", "question": "What is it?", "answer": "7", **fields})


@BOTH
@pytest.mark.parametrize("kind", NEEDLES)
@pytest.mark.parametrize("opens", [True, False])
def test_the_answer_is_the_tight_run_of_tokens(tokenizer, kind, opens):
    for seed in range(20):
        answer = draw(kind, seed)
        placed = Placed.of(tokenizer, NEEDLES[kind].sentence, answer, opens=opens)
        assert placed.text == NEEDLES[kind].sentence.replace("{answer}", answer)
        assert tokenizer.decode(placed.tokens).strip() == placed.text
        start, stop = placed.answer_at
        assert answer in tokenizer.decode(placed.tokens[start:stop])
        assert answer not in tokenizer.decode(placed.tokens[start + 1 : stop])
        assert answer not in tokenizer.decode(placed.tokens[start : stop - 1])
        needle, inner = placed.spans(100)
        assert (needle.start, needle.stop) == (100, 100 + len(placed.tokens))
        assert (inner.start, inner.stop) == (100 + start, 100 + stop)


@BOTH
def test_one_space_parts_it_from_the_sentence_before(tokenizer):
    for before, opens in (("A walk.", False), ("Context:\n", True)):
        placed = Placed.of(tokenizer, "The {answer}.", "heron", opens=opens)
        ids, _ = encode(tokenizer, before)
        assert tokenizer.decode(ids + placed.tokens) == before + ("The heron." if opens else " The heron.")


def test_an_answer_in_shared_tokens_is_covered_whole():
    placed = Placed.of(byte_level(), "The h{answer}n.", "ero", opens=False)
    start, stop = placed.answer_at
    assert byte_level().decode(placed.tokens[start:stop]) == " heron"


def test_the_answer_is_found_by_place_not_by_search():
    placed = Placed.of(byte_level(), "Not a 7 or 7 but {answer}, not 7.", "7", opens=False)
    start, stop = placed.answer_at
    assert byte_level().decode(placed.tokens[:start]) == " Not a 7 or 7 but"
    assert byte_level().decode(placed.tokens[stop:]) == ", not 7."


def test_without_an_answer_there_is_no_answer_span():
    placed = Placed.of(byte_level(), "It rains in the garden.", None, opens=False)
    assert placed.answer_at is None and [s.name for s in placed.spans(3)] == ["needle"]


def test_lost_and_empty_answers_are_refused():
    with pytest.raises(ValueError, match="give the needle back"):
        Placed.of(lower_case(), "the word is {answer}.", "Heron", opens=False)
    with pytest.raises(ValueError, match="give the answer back"):
        Placed.of(metaspace(), "The{answer}.", " heron", opens=False)
    with pytest.raises(ValueError, match="must hold some text"):
        Placed.of(byte_level(), "The word is {answer}.", " ", opens=False)
