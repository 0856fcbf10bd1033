"""Head sets: spellings, algebra, ranking and random draws."""

import pytest
import torch

from dhlens.heads import HeadSet, parse_head

SHAPE = (4, 6)


@pytest.mark.parametrize("text", ["L3H5", "3-5", "L3-H5", "a3.h5", "A3.5", " L3H5 ", (3, 5)])
def test_every_published_spelling(text):
    assert parse_head(text) == (3, 5)
    assert str(HeadSet([text], SHAPE)) == "{L3H5}"


@pytest.mark.parametrize("text", ["", "3", "L3", "H5", "3-5-1", "-3-5", "L3H", "x3.5", "3,5"])
def test_what_is_no_head(text):
    with pytest.raises(ValueError, match="reads like L16H19"):
        parse_head(text)


def test_heads_outside_the_model():
    with pytest.raises(ValueError, match=r"4 layers x 6 heads, got L3H6, L4H0"):
        HeadSet([(4, 0), (3, 6), (1, 1)], SHAPE)


def test_algebra():
    a, b = HeadSet(["L0H0", "L1H2", "L3H5"], SHAPE), HeadSet(["L1H2", "L2H2"], SHAPE)
    assert list(a & b) == [(1, 2)] and len(a | b) == 4 and list(a - b) == [(0, 0), (3, 5)]
    assert a.jaccard(b) == 1 / 4 and a.coverage(b) == 1 / 3 and HeadSet([], SHAPE).jaccard(HeadSet([], SHAPE)) == 1
    assert a.by_layer() == {0: [0], 1: [2], 3: [5]} and "L1H2" in a and (2, 2) not in a
    assert HeadSet.from_mask(a.mask()) == a
    with pytest.raises(ValueError, match=r"one model shape, got \(4, 6\) and \(5, 6\)"):
        a | HeadSet([], (5, 6))


def test_top_k_breaks_ties_by_layer_and_head():
    scores = torch.zeros(SHAPE)
    scores[2, 1] = scores[1, 4] = 0.5
    scores[3, 3] = 0.9
    assert list(HeadSet.top_k(scores, 2)) == [(1, 4), (3, 3)]
    assert list(HeadSet.top_k(scores, 5)) == [(0, 0), (0, 1), (1, 4), (2, 1), (3, 3)]
    for k in (-1, 25):
        with pytest.raises(ValueError, match=r"0..24"):
            HeadSet.top_k(scores, k)
    scores[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        HeadSet.top_k(scores, 2)


def test_random_draws():
    a = HeadSet(["L0H0", "L0H1", "L2H2"], SHAPE)
    drawn = [a.draw_like(seed=s, exclude=a) for s in range(200)]
    assert all(len(d) == 3 and not d & a for d in drawn)
    assert a.draw_like(seed=3) == a.draw_like(seed=3) and len({str(d) for d in drawn}) > 100
    hits = sum(d.mask().double() for d in drawn)
    assert hits[0, 0] == 0 and hits[a.mask().logical_not()].min() > 8  # 600 draws over 21 heads: 29 each
    layered = a.draw_like(seed=0, by_layer=True, exclude=a)
    assert {k: len(v) for k, v in layered.by_layer().items()} == {0: 2, 2: 1}
    assert len(a.draw_like(10, seed=0)) == 10
    with pytest.raises(ValueError, match="22 heads: 21 are left in the model"):
        a.draw_like(22, seed=0, exclude=a)
    with pytest.raises(ValueError, match="leave n out"):
        a.draw_like(2, seed=0, by_layer=True)
