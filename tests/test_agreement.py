import inspect

import numpy as np
import pandas as pd
import pytest
import torch

from dhlens.agreement import rank_agreement

MEASURES = ["auroc", "average_precision", "precision_at_active"]


def step(*values: float) -> torch.Tensor:
    """One step of a model of 2 layers x 3 heads."""
    return torch.tensor(values).reshape(1, 2, 3)


CAUSAL = step(0.6, 0.1, 0.3, 0.0, 0.5, 0.2)
ACTIVE = step(1, 0, 0, 0, 1, 0).bool()


def random_step(seed: int, shape=(5, 4, 8)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    causal, attention = torch.rand(2, *shape, generator=generator)
    return causal, attention, torch.rand(shape, generator=generator) < 0.2


def test_a_perfect_order_and_its_reverse():
    same = rank_agreement(CAUSAL, CAUSAL**2, ACTIVE).iloc[0]
    assert same["spearman"] == pytest.approx(1) and same[MEASURES].tolist() == [1, 1, 1]
    away = rank_agreement(-CAUSAL, CAUSAL, ACTIVE).iloc[0]
    assert away["spearman"] == pytest.approx(-1) and away[["auroc", "precision_at_active"]].tolist() == [0, 0]
    assert away["average_precision"] == pytest.approx((1 / 5 + 2 / 6) / 2)
    assert away["n_active"] == 2 and away["chance"] == pytest.approx(2 / 6)


def test_a_toy_worked_by_hand():
    active = step(1, 0, 0, 0, 0, 1).bool()
    row = rank_agreement(CAUSAL, step(0.9, 0.0, 0.1, 0.2, 0.3, 0.8), active).iloc[0]
    # causal order: heads 0 4 2 5 1 3, so the active ones are 1st and 4th of 6
    assert row["auroc"] == pytest.approx(6 / 8) and row["average_precision"] == pytest.approx((1 + 2 / 4) / 2)
    assert row["precision_at_active"] == 0.5
    # ranks 6 2 4 1 5 3 against 6 1 2 3 4 5: squared differences 0 1 4 4 1 4
    assert row["spearman"] == pytest.approx(1 - 6 * 14 / (6 * 35))


def test_equal_effects_are_in_random_order():
    row = rank_agreement(torch.zeros(1, 2, 3), CAUSAL, ACTIVE).iloc[0]
    assert np.isnan(row["spearman"]) and row["auroc"] == 0.5
    assert row[["average_precision", "precision_at_active"]].tolist() == pytest.approx([row["chance"]] * 2)
    # one head is stronger, two of the next three equal ones take the second place, one of them active
    tied = step(0.9, 0.5, 0.5, 0.5, 0.1, 0.0)
    row = rank_agreement(tied, CAUSAL, step(0, 1, 0, 0, 0, 1).bool()).iloc[0]
    assert row["precision_at_active"] == pytest.approx((1 / 3) / 2)


def test_equal_attention_ranks_nothing():
    assert np.isnan(rank_agreement(CAUSAL, torch.ones(1, 2, 3), ACTIVE)["spearman"].iloc[0])


def test_a_step_without_active_heads_has_no_answer_and_spoils_no_other():
    both = rank_agreement(CAUSAL.repeat(2, 1, 1), CAUSAL.repeat(2, 1, 1), torch.cat([ACTIVE & False, ACTIVE]))
    assert both.loc[0, MEASURES].isna().all() and both.loc[0, ["n_active", "chance"]].tolist() == [0, 0]
    assert both.loc[0, "spearman"] == pytest.approx(1) and both.loc[1, MEASURES].tolist() == [1, 1, 1]
    assert both["step"].tolist() == [0, 1]


def test_a_step_of_active_heads_only():
    row = rank_agreement(CAUSAL, CAUSAL, ACTIVE | True).iloc[0]
    assert np.isnan(row["auroc"]) and row[["average_precision", "precision_at_active", "chance"]].tolist() == [1, 1, 1]


def test_measures_follow_ranks_alone():
    causal, attention, active = random_step(0)
    squeezed = rank_agreement(causal.exp(), attention**3, active)
    pd.testing.assert_frame_equal(rank_agreement(causal, attention, active), squeezed)


def test_random_rankings_reach_chance():
    found = pd.concat([rank_agreement(*random_step(seed)) for seed in range(60)])
    assert found["auroc"].mean() == pytest.approx(0.5, abs=0.03)
    assert found["spearman"].mean() == pytest.approx(0, abs=0.03)
    assert found["precision_at_active"].mean() == pytest.approx(found["chance"].mean(), abs=0.03)


def test_no_step_is_an_empty_table():
    none = torch.zeros(0, 2, 3)
    assert rank_agreement(none, none, none.bool()).empty
    assert list(rank_agreement(none, none, none.bool())) == list(rank_agreement(CAUSAL, CAUSAL, ACTIVE))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((CAUSAL, CAUSAL[:, :1], ACTIVE), "attention and active must both be .* got \\(1, 1, 3\\) and \\(1, 2, 3\\)"),
        ((CAUSAL[:, :0], CAUSAL[:, :0], ACTIVE[:, :0]), "causal and active must both be"),
        ((CAUSAL.log(), CAUSAL * torch.nan, ACTIVE), "attention must be numbers to rank heads, got NaN"),
    ],
)
def test_refuses(arrays, message):
    # without the shape checks of the test run, as users call it
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(rank_agreement)(*arrays)
