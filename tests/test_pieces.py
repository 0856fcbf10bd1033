"""Contexts laid from pieces: borders between tokens, spans that are exact, answers as whole words."""

import numpy as np
import pytest
from toy_tokenizers import byte_level, lower_case, metaspace

from dhlens.tasks.pieces import Draft, answer_span, cut, drawn, finished, lay, standing
from dhlens.tasks.prompts import Prompt

BOTH = pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte", "metaspace"])
TEXTS = ["[1] Heron\n", "The heron watched the river.", " It was old!", "", "\n\n", "Why not?"]


def prompt_of(tokenizer):
    return Prompt.of(tokenizer, "plain", "What did the heron do?")


@BOTH
def test_neighbours_are_tokenised_as_one_where_no_token_crosses(tokenizer):
    pieces = cut(tokenizer, TEXTS)
    joined = [token for piece in pieces for token in piece.tokens]
    text = "".join(TEXTS)
    assert [p.text for p in pieces] == TEXTS and len(pieces[3]) == 0
    assert tokenizer.decode(joined).strip() == text
    for piece in pieces:
        assert len(piece.offsets) == len(piece)
        covered = {i for a, b in piece.offsets for i in range(a, b)}
        assert covered <= set(range(len(piece.text))) and len(covered) == len(piece.text)


def test_where_a_token_would_cross_each_text_stands_by_itself():
    tokenizer = byte_level()
    assert len(tokenizer(" heron").input_ids) == 1
    pieces = cut(tokenizer, ["The he", "ron slept."], after="\n")
    assert [tokenizer.decode(p.tokens) for p in pieces] == ["The he", "ron slept."]
    whole = cut(tokenizer, ["The", " heron slept."], after="\n")
    assert [t for p in whole for t in p.tokens] == tokenizer("The heron slept.").input_ids


@BOTH
def test_spans_are_exact_and_begin_with_their_first_word(tokenizer):
    title, *rest = cut(tokenizer, TEXTS[:3])
    pieces = [title.named("doc_0"), *(piece.named("doc_0", f"fact_{i}") for i, piece in enumerate(rest))]
    gap, late = cut(tokenizer, ["\n\n"], after=".")[0], cut(tokenizer, ["\n", "\nThe end."], after=".")
    tokens, spans = lay(tokenizer, prompt_of(tokenizer), [*pieces, gap, *(p.named("fact_2") for p in late)])
    said = {s.name: tokenizer.decode(tokens[s.start : s.stop]) for s in spans}
    assert list(said) == ["doc_0", "fact_0", "fact_1", "fact_2", "context", "question"]
    assert said["fact_0"] == TEXTS[1] and said["fact_1"].strip() == TEXTS[2].strip() and said["fact_2"] == "The end."
    assert said["doc_0"] == "".join(TEXTS[:3]) and said["context"].strip() == "".join(TEXTS[:3]) + "\n\n\n\nThe end."
    assert "What did the heron do?" in said["question"]


def test_lost_characters_are_named():
    pieces = [piece.named("fact_0") for piece in cut(lower_case(), ["The heron."])]
    with pytest.raises(ValueError, match=r"give the fact 0 back as it is: 'The heron\.' came back as 'the heron\.'"):
        lay(lower_case(), Prompt.of(lower_case(), "plain", "what?"), pieces)


@pytest.mark.parametrize(
    ("text", "phrase", "at"),
    [("In 1942, and 194.", "194", 13), ("no one said no.", "no", 0), ("Nothing.", "not", None), ("a (b) c", "(b)", 2)],
)
def test_an_answer_stands_as_whole_words(text, phrase, at):
    match = standing(text, phrase)
    assert (None if match is None else match.start()) == at


@BOTH
def test_the_answer_is_found_in_the_first_fact_by_number_that_says_it(tokenizer):
    texts = ["The heron slept. ", "  The miller saw 42 boats.", " So 42 it was."]
    names = ["fact_2", "fact_1", "fact_0"]
    pieces = [p.named(n) for p, n in zip(cut(tokenizer, texts), names, strict=True)]
    tokens, spans = lay(tokenizer, prompt_of(tokenizer), pieces)
    for answer, fact in (("42", "fact_0"), ("miller", "fact_1"), ("heron slept", "fact_2")):
        (span,) = answer_span(tokenizer, pieces, spans, answer)
        inside = next(s for s in spans if s.name == fact)
        assert inside.start <= span.start < span.stop <= inside.stop
        assert answer in tokenizer.decode(tokens[span.start : span.stop])
        assert answer not in tokenizer.decode(tokens[span.start + 1 : span.stop])
        assert answer not in tokenizer.decode(tokens[span.start : span.stop - 1])
    assert answer_span(tokenizer, pieces, spans, "boat") == ()


def test_the_draw_of_fewer_is_the_beginning_of_the_draw_of_more():
    assert drawn(50, 3, seed=1) == drawn(50, 30, seed=1) != drawn(50, 30, seed=2)
    assert sorted(drawn(50, 3, seed=1)) == list(range(50)) == drawn(50, None, seed=1)


def test_what_does_not_fit_is_passed_over_counted_and_said():
    tokenizer = byte_level()
    pieces = [piece.named("fact_0") for piece in cut(tokenizer, ["The heron."])]

    def draft(i):
        return None if i % 2 else Draft(f"q/{i}", "heron", prompt_of(tokenizer), pieces, {"answer_text": "heron"})

    made = finished(tokenizer, range(9), draft, n=3, max_positions=None)
    assert [e.id for e in made] == ["q_0", "q_2", "q_4"] and {e.meta["left_out"] for e in made} == {2}
    assert tokenizer.decode(made[0].answer).strip() == "heron" and made[0].judge("a heron")
    assert made[0].meta["length"] == len(made[0].tokens)
    assert len(finished(tokenizer, range(9), draft, n=None, max_positions=None)) == 5
    with pytest.raises(ValueError, match=r"6 questions .* the source has 9, and the evidence of 4 does not fit"):
        finished(tokenizer, range(9), draft, n=6, max_positions=None)
    with pytest.raises(ValueError, match="beyond the model's 9 positions; length=9 drops"):
        finished(tokenizer, range(9), draft, n=1, max_positions=9)
    assert np.all([len(e.tokens) > 9 for e in made])
