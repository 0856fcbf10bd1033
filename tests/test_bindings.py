"""What clusters bind to, with bindings planted against the clock."""

import numpy as np
import pandas as pd
import pytest
import torch
import toy_crowds as toy
from toy_traces import toy_trace

from dhlens.bindings import along_answers, bindings, layer_spread, row_classes, token_class, within_groups, within_steps
from dhlens.coactivation import Crowd, coactivation
from dhlens.crowds import clusters
from dhlens.scores import Score, copy_paste

KINDS = np.array(["digit", "letter", "word start"])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("7", "digit"),
        (" 12", "digit"),
        ("edd", "letter"),
        (" magic", "word start"),
        ("The", "word start"),
        (".", "punctuation"),
        (' "', "punctuation"),
        ("\n", "space"),
        (" ", "space"),
        ("", "space"),
        ("s3", "other"),
        ("ß", "letter"),
    ],
)
def test_token_classes(text, kind):
    assert token_class(text) == kind


class Spelled:
    """Even ids are digits, odd ones letters."""

    def __call__(self, text, **kwargs): ...
    def apply_chat_template(self, conversation, **kwargs): ...

    def decode(self, token_ids, **kwargs):
        return "7" if token_ids[0] % 2 == 0 else "x"


def test_rows_are_named_by_token_place_depth_and_length():
    trace = toy_trace(torch.ones(2, 8, 1, 4, dtype=torch.bool), before=3)
    rows = row_classes(copy_paste(trace), Spelled())
    first = rows[trace.episode.numpy() == 0]
    assert first["next"].tolist() == ["letter", *["digit", "letter"] * 4, "digit"]  # prompt row; 100..107; stop token
    assert first["fed"].tolist() == ["letter", "letter", *["digit", "letter"] * 4]
    assert (first["place"] == "").all(), "no span is called answer"
    assert (rows[["depth", "length"]] == "").all(axis=None)


def test_places_follow_the_reply(answered=7):
    """The reply is the needle; its answer begins at its second token."""
    import dataclasses

    from dhlens.episode import Span

    trace = toy_trace(torch.ones(2, 9, 1, 4, dtype=torch.bool), before=3)
    spans = (Span("needle", 3, 12), Span("answer", 4, 4 + answered))
    episodes = tuple(
        dataclasses.replace(e, spans=spans, meta={"depth": 0.5, "length": 300, "group": "g"}) for e in trace.episodes
    )
    other = dataclasses.replace(trace.outcomes[1], tokens=trace.outcomes[1].tokens.flip(0))
    trace = dataclasses.replace(trace, episodes=episodes, outcomes=(trace.outcomes[0], other))
    rows = row_classes(copy_paste(trace), Spelled())
    thirds = [f"{n} third" for n in ("1st", "1st", "2nd", "2nd", "3rd", "3rd")]
    assert rows["place"][:11].tolist() == ["", "before", "first", *thirds, "after", "after"]
    assert (rows["place"][11:] == "").all(), "the second reply does not hold the answer"
    assert set(rows["depth"]) == {"0.5"} and set(rows["length"]) == {"300"}


def planted(seed: int = 0) -> tuple[Score, pd.DataFrame]:
    """Cluster 0 (heads 0-3) works at digits, cluster 1 (4-6) at early steps, cluster 2 (7-8) in half the episodes."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(3, size=(36, 24))
    step, episode = np.arange(24)[None, :], np.arange(36)[:, None]
    shared = [kind == 0, (step < 8) & (kind >= 0), (episode // toy.GROUPS % 2 == 0) & (kind >= 0)]
    active = toy.runs(rng, 36, 24, 12)
    for at, event in zip((slice(0, 4), slice(4, 7), slice(7, 9)), shared, strict=True):
        joint = event & (rng.random((36, 24)) < 0.7)
        active[..., at] = joint[..., None] & (rng.random((36, 24, 1)) < 0.95)
    score = toy.score_of(active)
    rows = pd.DataFrame({"next": "", "place": "", "depth": ""}, index=range(len(score.values)))
    asked = score.trace.step.numpy() >= 0
    rows.loc[asked, "next"] = KINDS[kind].ravel()
    rows.loc[asked, "place"] = np.broadcast_to(np.where(step < 8, "1st third", "3rd third"), (36, 24)).ravel()
    rows.loc[asked, "depth"] = np.broadcast_to(np.where(episode // toy.GROUPS % 2, "0.9", "0.1"), (36, 24)).ravel()
    return score, rows


@pytest.fixture(scope="module")
def found():
    score, rows = planted()
    crowds = clusters(coactivation(score, draws=50, n_boot=2), on="phi", draws=60)
    assert [str(m) for m in crowds.members] == ["{L0H0, L0H1, L0H2, L0H3}", "{L1H0, L1H1, L1H2}", "{L1H3, L2H0}"]
    return crowds, rows


def test_planted_bindings_are_found_and_nothing_else(found):
    table = bindings(*found, draws=300, n_boot=200)
    sure = table[(table["p"] <= 0.01) & (table["z"] > 0)]
    assert sure[["cluster", "aspect", "class"]].to_numpy().tolist() == [
        [0, "next", "digit"],
        [1, "place", "1st third"],
        [2, "depth", "0.1"],
    ]
    digits = sure.iloc[0]
    assert digits["enrichment"] == pytest.approx(3, abs=0.3) and digits["low"] < digits["enrichment"] < digits["high"]
    assert table.groupby("aspect").size().to_dict() == {"depth": 6, "next": 9, "place": 6}


def test_enrichment_is_a_ratio_of_rates(found):
    crowds, rows = found
    table = bindings(crowds, rows, draws=5, n_boot=20)
    labels = rows["next"].to_numpy()[crowds.crowd.rows]
    activity = crowds.crowd.active[:, crowds.labels == 1].mean(1)
    row = table[(table["cluster"] == 1) & (table["class"] == "letter")].iloc[0]
    assert row["rate"] == pytest.approx(activity[labels == "letter"].mean())
    assert (
        row["enrichment"] == pytest.approx(row["rate"] / activity.mean()) and row["steps"] == (labels == "letter").sum()
    )


def test_the_clock_binds_no_class():
    """All heads at every fourth step, where digits stand: only the clock, in the null of `next`."""
    score = toy.clockwork(0)
    step = score.trace.step.numpy()
    rows = pd.DataFrame({"next": np.where(step % 4 == 0, "digit", "letter")})
    crowds = clusters(coactivation(score, draws=20, n_boot=2), on="phi", n_clusters=2, draws=20)
    crowds = type(crowds)(**{**crowds.__dict__, "labels": np.zeros(12, dtype=int)})
    table = bindings(crowds, rows, draws=100)
    assert table["enrichment"].max() > 3 and (table["p"] == 1).all()


def test_moves_keep_what_they_must():
    crowd = Crowd.of(toy.alone(0), min_steps=5)
    rng = np.random.default_rng(0)
    step = crowd.score.trace.step.numpy()[crowd.rows]
    moved = within_steps(crowd, rng)
    assert (
        (step[moved] == step).all()
        and sorted(moved) == list(range(len(step)))
        and (moved != np.arange(len(step))).any()
    )
    moved = along_answers(crowd, rng)
    assert (crowd.episode[moved] == crowd.episode).all() and sorted(moved) == list(range(len(step)))
    assert (np.diff(moved)[np.diff(crowd.episode) == 0] == 1).mean() > 0.9
    moved = within_groups(crowd, rng)
    assert (crowd.group[moved] == crowd.group).all() and (crowd.episode[moved] != crowd.episode).mean() > 0.5
    short = moved[crowd.episode == crowd.episode[0]]
    assert len(set(crowd.episode[short])) == 1


def test_layers_of_a_cluster(found):
    table = layer_spread(found[0], draws=200)
    assert table["layers"].tolist() == ["0 0 0 0", "1 1 1", "1 2"] and table["spread"].tolist() == [0, 0, 1]
    assert table["p"][0] < 0.05 < table["p"][2] and (table["null"] > 0.5).all()


def test_bad_input(found):
    crowds, rows = found
    with pytest.raises(ValueError, match=f"one row per row of the score \\({len(rows)}\\), got 3"):
        bindings(crowds, rows[:3])
    with pytest.raises(ValueError, match="made without steps"):
        row_classes(Score("wu", torch.ones(2, 1, 1), True, "file"), Spelled())
    none = type(crowds)(**{**crowds.__dict__, "labels": np.full(12, -1)})
    assert bindings(none, rows).empty and layer_spread(none).empty
