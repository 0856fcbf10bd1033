"""Windows of text from attention, worked by hand, and what they hold of the facts."""

import itertools

import pytest
import torch

from dhlens.episode import Span
from dhlens.windows import Windows, fact_recall, runs

CONTEXT = Span("context", 2, 22)


def attention(**weights):
    found = torch.zeros(25)
    for at, weight in weights.items():
        found[int(at[1:])] = weight
    return found


def test_the_strongest_positions_open_windows_and_neighbours_join_their_cluster():
    weights = attention(p10=0.5, p11=0.4, p18=0.3)
    shown = Windows(reach=1, budget=None, peaks=3, gap=2)(weights, CONTEXT)
    assert runs(shown) == [(9, 12), (17, 20)]


@pytest.mark.parametrize(("gap", "expected"), [(1, [(10, 11), (12, 13)]), (2, [(10, 11)])])
def test_a_cluster_reaches_as_far_as_the_gap_and_no_further(gap, expected):
    shown = Windows(reach=0, budget=None, peaks=2, gap=gap)(attention(p10=0.9, p12=0.8), CONTEXT)
    assert runs(shown) == expected


def test_overlapping_windows_merge():
    shown = Windows(reach=2, budget=None, peaks=2, gap=1)(attention(p8=0.5, p11=0.4), CONTEXT)
    assert runs(shown) == [(6, 14)]


def test_keys_outside_the_context_open_no_window():
    shown = Windows(reach=1, budget=None, peaks=1)(attention(p0=0.9, p23=0.8, p5=0.1), CONTEXT)
    assert runs(shown) == [(4, 7)]


def test_windows_end_at_the_context():
    shown = Windows(reach=4, budget=None, peaks=2, gap=0)(attention(p2=0.9, p21=0.8), CONTEXT)
    assert runs(shown) == [(2, 7), (17, 22)]


@pytest.mark.parametrize("budget", [1, 2, 5, 9, 20, 40])
@pytest.mark.parametrize("gap", [0, 3, 30])
def test_a_budget_without_a_limit_of_peaks_is_filled_exactly(budget, gap):
    weights = torch.rand(25, generator=torch.Generator().manual_seed(budget))
    shown = Windows(reach=2, budget=budget, gap=gap)(weights, CONTEXT)
    assert int(shown.sum()) == min(budget, len(CONTEXT))


def test_a_larger_budget_shows_all_that_a_smaller_one_does():
    weights = torch.rand(25, generator=torch.Generator().manual_seed(0))
    shown = [Windows(reach=2, budget=budget)(weights, CONTEXT) for budget in range(1, 21)]
    assert all(bool((more | ~fewer).all()) for fewer, more in itertools.pairwise(shown))


def test_the_last_window_is_cut_to_the_budget_around_its_peak():
    shown = Windows(reach=3, budget=9, gap=2)(attention(p6=0.9, p16=0.5), CONTEXT)
    assert runs(shown) == [(3, 10), (15, 17)]


def test_equal_weights_go_by_position():
    shown = Windows(reach=0, budget=3, gap=0)(torch.zeros(25), CONTEXT)
    assert runs(shown) == [(2, 5)]


def test_recall_counts_whole_facts_and_their_tokens():
    shown = torch.zeros(25, dtype=torch.bool)
    shown[4:10] = True
    spans = [Span("fact_0", 5, 9), Span("fact_1", 8, 12), Span("doc_0", 0, 25)]
    assert fact_recall(shown, spans) == (0.5, 6 / 8)
    assert fact_recall(torch.ones(25, dtype=torch.bool), spans) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be at least 1: with 0 nothing would be shown"),
        ({"peaks": 0}, "peaks must be at least 1"),
        ({"budget": None}, "give a budget, peaks, or both"),
        ({"reach": -1}, "reach and gap must be at least 0"),
    ],
)
def test_sizes_that_show_nothing_or_everything_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Windows(**options)


def test_attention_must_reach_the_context_and_facts_must_be_there():
    with pytest.raises(ValueError, match="ends at 22, the attention at 10"):
        Windows()(torch.zeros(10), CONTEXT)
    with pytest.raises(ValueError, match="without supporting facts"):
        fact_recall(torch.zeros(25, dtype=torch.bool), [CONTEXT])
