import numpy as np
import pytest

from dhlens.stats import (
    bootstrap_ratio,
    exact_match,
    grouped_difference,
    grouped_mean,
    holm,
    jackknife,
    mcnemar,
    paired_mean,
    rouge1_recall,
    rouge_l,
    token_f1,
)


@pytest.mark.parametrize(
    ("prediction", "gold", "em", "f1"),
    [
        ("The Phantom Hour.", "phantom hour", True, 1.0),
        ("yes", "no", False, 0.0),
        ("yes it is", "yes", False, 0.0),
        ("Yes.", "yes", True, 1.0),
        ("an  apple\n pie", "Apple-pie", False, 0.0),
        ("U.S.A.", "usa", True, 1.0),
        ("new york city", "New York", False, 0.8),
        ("york york", "York", False, 2 / 3),
        ("theatre", "atre", False, 0.0),
        ("", "", True, 0.0),
    ],
)
def test_answers_are_compared_as_hotpotqa_does(prediction, gold, em, f1):
    assert exact_match(prediction, gold) == em
    assert token_f1(prediction, gold) == pytest.approx(f1)


def test_rouge_stems_and_recalls_the_reference():
    assert rouge1_recall("eat sandwiches", "he eats a sandwich in the park") == 1.0
    assert rouge1_recall("one two three four", "two") == 0.25
    assert rouge_l("a b c d", "a c d b") == pytest.approx(0.75)


def test_the_interval_resamples_groups_not_rows():
    """Each group's rows are equal: a bootstrap over the 400 rows would be ten times narrower."""
    rng = np.random.default_rng(0)
    values, groups = np.repeat(rng.normal(size=4), 100), np.repeat([f"g{i}" for i in range(4)], 100)
    by_group = grouped_mean(values, groups, seed=0)
    by_row = grouped_mean(values, np.arange(400), seed=0)
    assert by_group.value == pytest.approx(values.mean()) == by_row.value
    assert by_group.high - by_group.low > 5 * (by_row.high - by_row.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [bootstrap_ratio(rng.normal(3, 1, 40), np.ones(40), seed=i, n_boot=300) for i in range(200)]
    assert 0.88 <= np.mean([low <= 3 <= high for _, low, high in found]) <= 0.99


def test_a_ratio_is_of_sums_and_weighs_groups_by_their_rows():
    assert bootstrap_ratio(np.array([1.0, 9.0]), np.array([1, 3]), seed=0).value == 2.5
    assert grouped_mean(np.array([1.0, np.nan, 3, 3, 3]), np.array(list("aabbb")), seed=0).value == 2.5


@pytest.mark.parametrize(("values", "value"), [([], np.nan), ([np.nan], np.nan), ([2.0, 4.0], 3.0)])
def test_without_two_groups_there_is_no_interval(values, value):
    found = grouped_mean(np.array(values, dtype=float), np.array(["a"] * len(values)), seed=0)
    assert found == pytest.approx((value, np.nan, np.nan), nan_ok=True)


def test_data_without_spread_has_an_interval_of_a_point():
    assert grouped_mean(np.ones(6), np.array(list("aabbcc")), seed=0) == (1, 1, 1)


def test_the_seed_decides_the_interval():
    values, groups = np.random.default_rng(0).normal(size=30), np.arange(30)
    assert grouped_mean(values, groups, seed=1) == grouped_mean(values, groups, seed=1)
    assert grouped_mean(values, groups, seed=1) != grouped_mean(values, groups, seed=2)


def test_pairing_removes_what_the_items_share():
    rng = np.random.default_rng(0)
    ease = rng.normal(size=50) * 10
    found = grouped_difference(ease + 1, ease + rng.normal(size=50) * 0.1, np.arange(50), seed=0)
    assert 0.9 < found.low < found.high < 1.1
    assert grouped_difference(np.array([True, False]), np.array([False, False]), np.arange(2), seed=0).value == 0.5


def test_the_jackknife_of_a_mean_is_the_textbook_one():
    x = np.random.default_rng(0).normal(size=12)
    records = np.stack([x, np.ones(12)], axis=1)
    estimate, error = jackknife(lambda sums: sums[..., 0] / sums[..., 1], records)
    assert estimate == pytest.approx(x.mean())
    assert error == pytest.approx(x.std(ddof=1) / np.sqrt(12))


def test_the_jackknife_of_kinds_seen_adds_those_of_one_group():
    """Burnham and Overton: kinds seen + (kinds seen in one group only) * (n - 1) / n."""
    records = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]])
    estimate, _ = jackknife(lambda sums: (sums > 0).sum(-1), records)
    assert estimate == pytest.approx(3 + 1 * 2 / 3)
    assert np.isnan(jackknife(lambda sums: sums.sum(-1), records[:1])).all()


def test_mcnemar_counts_the_items_that_differ():
    a = np.array([True] * 8 + [False] * 2 + [True] * 5)
    b = np.array([False] * 8 + [True] * 2 + [True] * 5)
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar(a, a) == 1.0


def test_holm_worked_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.6, 0.9])).tolist() == [1.0, 1.0]


def test_pairs_of_groups_are_resampled_by_both():
    """Values that are sums of what each of two windows has: the interval holds the truth, rows taken alone do not."""
    rng = np.random.default_rng(0)
    inside, narrow = 0, 0
    for world in range(60):
        window = rng.normal(0, 1, 12)
        i, j = np.triu_indices(12, 1)
        found = paired_mean(window[i] + window[j], i.astype(str), j.astype(str), seed=world)
        alone = grouped_mean(window[i] + window[j], np.arange(len(i)).astype(str), seed=world)
        inside += found.low <= 0 <= found.high
        narrow += alone.low <= 0 <= alone.high
    assert inside >= 50 > narrow
    same = np.array(list("aabb"))
    apart = paired_mean(np.array([1.0, 1, 5, 5]), same, same, seed=0)
    assert (apart.value, apart.low, apart.high) == (3, 1, 5)
    lone = paired_mean(np.array([1.0, np.nan, 2]), np.array(list("aba")), np.array(list("aaa")), seed=0)
    assert lone.value == 1.5 and np.isnan(lone.low)
