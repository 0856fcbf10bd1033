"""Sentences, words and triggers of hand-made drafts; RIND worked by hand in both forms."""

import itertools
import math

import numpy as np
import pytest
import torch

from dhlens.triggers import RIND, Draft, MeanEntropy, check_trigger, every_sentence, is_content, never, reading

PIECES = ("The", " capital", " is", " Par", "is", ".", " It", " lies", " on", " the", " Seine", ".")
"""Two sentences; "Paris" in two tokens."""


def draft(pieces=PIECES, entropy=None, **fields):
    starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    nats = torch.full((len(pieces),), 1.0) if entropy is None else torch.tensor(entropy)
    return Draft(tuple(range(len(pieces))), "".join(pieces), tuple(starts), nats, True, **fields)


def test_sentences_are_runs_of_tokens_that_cover_the_draft():
    assert draft().sentences() == [(0, 6), (6, 12)]
    assert draft(("Yes", ".", "\n\n", "No", ".")).sentences() == [(0, 2), (2, 5)]
    assert draft(("Dr", ".", " Ann", " left", ".")).sentences() == [(0, 5)]
    assert draft((" ", "  ")).sentences() == [(0, 2)]
    assert draft(()).sentences() == []


@pytest.mark.parametrize("text", ["Ça va? 東京です。Yes.\n\n\nThe U.S. army. ", "\n\n a. b", "One"])
def test_sentences_part_any_text_without_gap(text):
    runs = draft(tuple(text)).sentences()
    assert runs[0][0] == 0 and runs[-1][1] == len(text)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(runs)) and all(a < b for a, b in runs)


def test_words_hold_the_tokens_that_start_in_them():
    words = draft().words()
    assert [word for word, _ in words] == ["The", "capital", "is", "Paris.", "It", "lies", "on", "the", "Seine."]
    assert [inside for _, inside in words][3] == [3, 4, 5]


WORDS = {"the": False, "The,": False, "Paris.": True, "--": False, "7": True}


@pytest.mark.parametrize(("word", "content"), WORDS.items())
def test_content_words(word, content):
    assert is_content(word) is content


def test_rind_as_published_is_entropy_times_later_attention_times_content():
    weights = torch.zeros(12, 12)
    weights[3, 1], weights[5, 1], weights[1, 1] = 0.2, 0.4, 0.9  # a token's look at itself does not count
    weights[9, 8] = 0.8  # "on" is a stop word
    one = draft(entropy=[1.0, 3.0, *[1.0] * 10], attention=weights)
    values = RIND(form="published").values(one)
    expected = torch.zeros(12)
    expected[1] = 3.0 * 0.4
    torch.testing.assert_close(values, expected)
    assert RIND(1.19, "published")(one) == 0 and RIND(1.21, "published")(one) is None


def test_rind_as_coded_scales_a_sentence_to_a_mean_of_one():
    alone = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 1.0, *[1.0] * 6])
    entropy = [1.0, 2.0, 1.0, 3.0, 1.0, 2.0, *[0.1] * 6]
    values = RIND().values(draft(entropy=entropy, alone=alone))
    # weights of the words: The 1, capital 2, is 1, Paris. 4; four words, sum 8
    assert values[1] == pytest.approx(2 / 8 * 4 * 2.0)
    assert values[3:6].tolist() == pytest.approx([4 / 8 * 4 * 2.0] * 3)  # mean entropy of its three tokens: 2
    assert values[0] == values[2] == 0


def test_rind_goes_back_to_the_sentence_of_the_first_hit():
    alone = torch.ones(12)
    entropy = [0.1] * 6 + [0.1, 5.0, 0.1, 0.1, 5.0, 0.1]
    assert RIND(1.0)(draft(entropy=entropy, alone=alone)) == 6
    assert RIND(50.0)(draft(entropy=entropy, alone=alone)) is None


def test_a_sentence_of_stop_words_never_triggers():
    one = draft(("It", " is", " not", " the", "."), [9.0] * 5, alone=torch.ones(5))
    assert RIND(0.01)(one) is None


def test_mean_entropy_asks_for_the_mean_of_a_sentence():
    one = draft(entropy=[0.0, 6.0, 0, 0, 0, 0, *[2.0] * 6])
    assert MeanEntropy().values(one).tolist() == [1.0] * 6 + [2.0] * 6
    assert MeanEntropy(1.5)(one) == 6 and MeanEntropy(0.9)(one) == 0 and MeanEntropy(2.1)(one) is None


def test_every_and_never():
    assert every_sentence(draft()) == 0 and never(draft()) is None and every_sentence(draft(())) is None


def test_empty_drafts_trigger_nothing():
    empty = draft((), [], attention=torch.zeros(0, 0), alone=torch.zeros(0))
    assert all(trigger(empty) is None for trigger in (RIND(), RIND(form="published"), MeanEntropy()))


class Own:
    """A trigger of the user's own."""

    def __init__(self, values, threshold=1.0):
        self.values, self.threshold = values, threshold

    def __call__(self, draft):
        return None


def test_what_a_trigger_reads_is_numbers_or_nothing():
    one = draft(alone=torch.ones(12))
    values, threshold = reading(RIND(0.5), one)
    assert values == RIND(0.5).values(one).tolist() and threshold == 0.5
    for silent in (never, Own({"a": 1}), Own(None)):
        assert reading(silent, one)[0] == [] and math.isnan(reading(silent, one)[1])
    assert reading(Own(lambda d: [2] * len(d.tokens), np.float32(0.5)), one) == ([2.0] * 12, 0.5)
    for wrong in (lambda d: [1.0], lambda d: [[1.0] * 12], lambda d: [math.inf] * 12, lambda d: ["a"] * 12):
        with pytest.raises(ValueError, match="of the trigger"):
            reading(Own(wrong), one)
    with pytest.raises(ValueError, match="must be numbers"):
        check_trigger(Own(lambda d: [1.0] * len(d.tokens), threshold=print))


def test_what_a_trigger_cannot_take_is_refused():
    with pytest.raises(ValueError, match="'published' or as 'coded', got 'paper'"):
        RIND(form="paper")
    with pytest.raises(ValueError, match="a threshold must be a number, 0 or more, got nan"):
        MeanEntropy(float("nan"))
    with pytest.raises(ValueError, match="RIND as coded needs the draft's attention"):
        RIND()(draft())


def test_rind_as_published_counts_no_full_stop_of_a_word():
    attention = torch.zeros(12, 12)
    attention[8, 3:6] = torch.tensor([0.5, 0.8, 0.9])
    values = RIND(0.1, "published").values(draft(attention=attention))
    assert values[3:6].tolist() == pytest.approx([0.5, 0.8, 0.0])
