"""Clusters against planted ones, their nulls, and their stability."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import toy_crowds as toy
from sklearn.metrics import adjusted_rand_score

from dhlens.coactivation import coactivation
from dhlens.crowds import across, clusters, halves


def found(score, **options):
    return clusters(coactivation(score, draws=20, n_boot=2), draws=options.pop("draws", 60), **options)


@pytest.fixture(scope="module")
def planted():
    return found(toy.crowds(0))


@pytest.mark.parametrize("on", ["within", "phi"])
def test_planted_clusters_are_found(on):
    crowds = found(toy.crowds(7), on=on)
    assert adjusted_rand_score(toy.PLANTED, crowds.labels) == 1 and crowds.n_clusters == 3
    assert (crowds.labels == -1).tolist() == (toy.PLANTED == -1).tolist()
    assert crowds.p == 1 / 61 and set(crowds.cluster_p) == {1 / 61}
    assert [len(m) for m in crowds.members] == [4, 3, 2] and str(crowds.members[2]) == "{L0H3, L1H3}"


def test_the_table_says_what_a_cluster_is(planted):
    table = planted.table
    assert table["heads"].tolist() == ["L0H0 L0H2 L1H1 L2H1", "L0H1 L1H0 L2H0", "L0H3 L1H3"]
    active = planted.crowd.active
    for k, row in table.iterrows():
        inside = np.flatnonzero(planted.labels == k)
        within = [planted.crowd.within[i, j] for i in inside for j in inside if i < j]
        assert row["within"] == pytest.approx(np.mean(within)) and row["within"] > 0.5 > abs(row["within_out"])
        assert row["any"] == active[:, inside].any(1).mean() and row["all"] == active[:, inside].all(1).mean()
    order = planted.labels[planted.order]
    assert sum(a != b for a, b in pairwise(order) if max(a, b) >= 0) <= 6
    best = planted.curve.loc[(planted.curve["silhouette"] - planted.curve["null"]).idxmax()]
    assert best["n_clusters"] == 6 and best["silhouette"] > best["null_high"]


def test_heads_alone_make_no_clusters():
    """At a twentieth of the seeds they may."""
    some = [found(toy.alone(seed), draws=40).n_clusters > 0 for seed in range(16)]
    assert sum(some) <= 3


def test_a_clock_makes_no_clusters():
    assert not any(found(toy.clockwork(seed)).n_clusters for seed in range(3))


def test_a_cluster_that_does_not_hold_is_none():
    """One pair keeps company; whatever else the tree joins is noise."""
    active = toy.runs(np.random.default_rng(1), 36, 24, 12)
    active[..., 7] = active[..., 2] ^ (np.random.default_rng(2).random((36, 24)) < 0.05)
    crowds = found(toy.score_of(active))
    assert [str(m) for m in crowds.members] == ["{L0H2, L1H3}"] and (crowds.labels >= 0).sum() == 2


def test_the_number_may_be_given(planted):
    crowds = clusters(coactivation(toy.crowds(0), draws=5, n_boot=2), n_clusters=2, draws=20)
    assert int(crowds.cut.max()) == 1 and crowds.curve["n_clusters"].tolist() == [2]
    for wrong in (1, 12):
        with pytest.raises(ValueError, match=f"must lie within 2..11 for 12 heads, got {wrong}"):
            clusters(coactivation(toy.crowds(0), draws=5, n_boot=2), n_clusters=wrong)


def test_halves_agree_where_there_is_something_to_agree_on(planted):
    table = halves(planted, splits=20).set_index(["measure", "cluster"])
    assert table.loc[("ari", -1), "value"] == 1 and table.loc[("ari", -1), "null_high"] < 0.6
    assert table.loc[("phi_r", -1), "value"] > 0.5 > table.loc[("phi_r", -1), "null_high"]
    each = table.loc["jaccard"]
    assert len(each) == planted.n_clusters and (each["value"] == 1).all() and (each["p"] == 1 / 21).all()
    assert (each["null"] < 0.8).all() and (table["groups"] == toy.GROUPS).all()


def test_runs_are_compared_over_the_heads_that_both_have(planted):
    other = found(toy.crowds(5))
    stranger = found(toy.alone(3))
    table = across({"a": planted, "b": other, "c": stranger}, draws=40).set_index(["a", "b", "measure"])
    assert table.loc[("a", "b", "ari"), "value"] == 1 and table.loc[("a", "b", "ari"), "p"] == 1 / 41
    assert table.loc[("a", "b", "phi_r"), "value"] > 0.5
    assert table.loc[("a", "c", "ari"), "p"] > 0.05 and table.loc[("a", "c", "phi_r"), "p"] > 0.05
    assert (table["heads"] == 12).all() and len(table) == 6


def test_bad_input(planted):
    with pytest.raises(ValueError, match="on must be 'within' or 'phi', got 'psi'"):
        clusters(coactivation(toy.crowds(0), draws=5, n_boot=2), on="psi")
    with pytest.raises(ValueError, match=r"at least 2 runs, clustered on one thing, got a on within$"):
        across({"a": planted})
    with pytest.raises(ValueError, match="got a on within, b on phi"):
        across({"a": planted, "b": dataclasses.replace(planted, on="phi")})
    few = dataclasses.replace(planted.crowd, group=np.full(len(planted.crowd.rows), "w"))
    with pytest.raises(ValueError, match=r"halves need 4 groups \(haystack windows\) at least, got 1"):
        halves(dataclasses.replace(planted, crowd=few))
    none = dataclasses.replace(
        planted.crowd, heads=((8, 0), (8, 1), (8, 2), *planted.crowd.heads[:2], *((9, i) for i in range(7)))
    )
    with pytest.raises(ValueError, match="a and b must share 3 kept heads at least to be compared, got 2"):
        across({"a": planted, "b": dataclasses.replace(planted, crowd=none)})
