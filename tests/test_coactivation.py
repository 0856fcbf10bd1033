"""Pairs of heads against rasters with a planted truth, and the laws of the shuffle."""

import numpy as np
import pytest
import torch
import toy_crowds as toy
from sklearn.metrics import matthews_corrcoef

from dhlens.coactivation import Crowd, coactivation, family_wise
from dhlens.heads import head_name
from dhlens.scores import Score

NAMES = [head_name((i // 4, i % 4)) for i in range(12)]


def test_planted_company_is_found_and_nothing_else():
    found = coactivation(toy.crowds(0), draws=200, n_boot=200)
    want = {
        (NAMES[i], NAMES[j])
        for i in range(12)
        for j in range(i + 1, 12)
        if toy.PLANTED[i] == toy.PLANTED[j] and toy.PLANTED[i] >= 0
    }
    above = found.above()
    assert set(zip(above["a"], above["b"], strict=True)) == want and found.below().empty
    assert (above["within_low"] > 0.5).all() and (above["phi_low"] > above["phi_null_high"]).all()
    assert above["within"].is_monotonic_decreasing and (above["p"] == 1 / 201).all()


def test_numbers_of_a_pair_are_those_of_the_books():
    score = toy.crowds(1)
    found = coactivation(score, draws=20, n_boot=200)
    active = score.heads().flatten(1).numpy()[score.answer_rows().numpy()]
    for row in found.pairs.itertuples():
        a, b = (active[:, NAMES.index(name)] for name in (row.a, row.b))
        assert row.phi == pytest.approx(matthews_corrcoef(a, b)) and row.n_both == (a & b).sum()
        assert row.lift == pytest.approx((a & b).mean() / (a.mean() * b.mean()))
        assert row.phi_low <= row.phi <= row.phi_high and row.lift_low <= row.lift <= row.lift_high
    assert len(found.pairs) == 66


def test_intervals_resample_groups():
    """Heads 0 and 1 go together in one of six windows: sure of it by steps, not by windows."""
    rng = np.random.default_rng(0)
    active = toy.runs(rng, 36, 24, 12)
    active[::6, :, 1] = active[::6, :, 0]
    row = coactivation(toy.score_of(active), draws=20).pairs.iloc[0]
    assert row["phi"] > 0.1 and row["phi_low"] < 0.03
    one = toy.alone(0)
    one = Score(one.name, one.values, True, "", one.trace, groups=("all",) * len(one.values))
    assert coactivation(one, draws=2).pairs[["phi_low", "within_high", "lift_low"]].isna().all(axis=None)


def test_independent_heads_are_rarely_taken_for_company():
    """A null that breaks the runs would find company in most seeds."""
    found = [coactivation(toy.alone(seed), draws=100, n_boot=2).pairs["p"].min() <= 0.05 for seed in range(50)]
    assert sum(found) <= 7


def test_a_shared_clock_is_no_company():
    found = coactivation(toy.clockwork(0), draws=200, n_boot=50)
    assert (found.pairs["phi"] > 0.6).all() and (found.pairs["lift_low"] > 1.5).all()
    assert found.above().empty and found.below().empty
    assert found.pairs["phi_null"].to_numpy() == pytest.approx(found.pairs["phi"].to_numpy(), abs=0.06)
    assert found.pairs["within"].abs().max() < 0.15


def test_a_clock_that_leaves_nothing_open_is_no_company():
    active = np.zeros((20, 24, 12), dtype=bool)
    active[:, ::2] = True
    found = coactivation(toy.score_of(active), draws=20, n_boot=20)
    assert (found.pairs["phi"] > 0.99).all() and (found.pairs[["within", "z"]] == 0).all(axis=None)
    assert (found.pairs["p"] == 1).all()


def test_what_is_given_is_kept_by_the_null():
    """Heads bound to one class of token keep company, until the class is given."""
    rng = np.random.default_rng(3)
    kind = rng.random((36, 24)) < 0.5
    active = rng.random((36, 24, 12)) < np.where(kind, 0.6, 0.1)[..., None]
    score = toy.score_of(active)
    classes = np.full(len(score.values), "none", dtype=object)
    classes[score.trace.step.numpy() >= 0] = kind.ravel().astype(str)
    free, given = coactivation(score, draws=100), coactivation(score, given=[classes], draws=100)
    assert len(free.above()) == 66 and given.above().empty
    assert given.pairs["phi"].tolist() == free.pairs["phi"].tolist()


def test_heads_that_shun_each_other_are_below():
    rng = np.random.default_rng(4)
    active = toy.runs(rng, 36, 24, 12)
    active[..., 5] &= ~active[..., 4]
    found = coactivation(toy.score_of(active), draws=100, n_boot=50)
    below = found.below()
    assert list(zip(below["a"], below["b"], strict=True)) == [("L1H0", "L1H1")] and below["lift"].item() == 0


def test_a_shuffle_keeps_steps_and_runs_and_moves_heads_apart():
    score = toy.crowds(2)
    crowd = Crowd.of(score)
    (moved,) = crowd.shuffles(1, seed=0)
    step = score.trace.step.numpy()[crowd.rows]
    for s in range(24):
        assert (moved.active[step == s].sum(0) == crowd.active[step == s].sum(0)).all()
    for h in range(12):
        was, now = (x.active[:, h].reshape(36, 24) for x in (crowd, moved))
        assert sorted(map(tuple, was)) == sorted(map(tuple, now)) and (was != now).any()
    same = [(a == b).all() for a, b in zip(moved.active.T, moved.active.T[[2, 4, 5, 7]], strict=False)]
    assert not any(same)
    again = next(iter(crowd.shuffles(1, seed=0)))
    assert (again.active == moved.active).all()


def test_rare_heads_are_left_out_and_counted():
    rng = np.random.default_rng(5)
    active = toy.runs(rng, 36, 24, 12)
    active[..., 0] = False
    active[..., 1] = False
    active[:19, 0, 1] = True
    active[..., 2] = True
    crowd = Crowd.of(toy.score_of(active), min_steps=20)
    assert crowd.left_out == 2 and [head_name(h) for h in crowd.heads] == NAMES[3:]


def test_samples_without_steps_have_no_clock():
    active = toy.runs(np.random.default_rng(6), 200, 1, 12).reshape(200, 3, 4)
    active[:, 0, 1] = active[:, 0, 0]
    found = coactivation(Score("wu", torch.from_numpy(active).float(), True, "file"), draws=50)
    assert found.above()[["a", "b"]].to_numpy().tolist() == [["L0H0", "L0H1"]] and found.above()["phi"].item() == 1


def test_family_wise_counts_draws_whose_largest_is_as_large():
    null = np.array([[-1.0, 0.0, 5.0], [1.0, 0.0, 5.0], [-1.0, 9.0, 5.0], [1.0, -9.0, 5.0]])
    z, p = family_wise(np.array([4.0, 0.0, 5.0]), null)
    assert z.tolist() == [4.0, 0.0, 0.0] and p.tolist() == [0.2, 1.0, 1.0]
    # as one of five draws, 3 lies 1.69 from their mean; the four largest of the others lie .79, .35, 1.58 and 1.58 off
    assert family_wise(np.array([3.0, 0.0, 5.0]), null)[1].tolist() == [0.2, 1.0, 1.0]
    assert family_wise(np.array([-2.0, 0.0, 5.0]), null)[1].tolist() == [0.6, 1.0, 1.0]


def test_bad_input():
    score = toy.alone(0)
    with pytest.raises(ValueError, match="needs 3 heads that are active at 500 steps"):
        coactivation(score, min_steps=500)
    with pytest.raises(ValueError, match=f"label the score's {len(score.values)} rows, got 3 labels"):
        coactivation(score, given=[np.array(["a", "b", "c"])])
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        coactivation(score, draws=0)
