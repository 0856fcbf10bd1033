import dataclasses

import pytest
import torch
from toy_traces import FIRST, toy_trace

from dhlens.episode import Span
from dhlens.scores import Score, copy_paste, reasoning_mass
from dhlens.trace import Trace


def raster(*shape, seed=0, rate=0.4):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rate


def answer(trace, score):
    """Values at the answer steps, [episode step layer head]."""
    return score.values[trace.answer_rows()].unflatten(0, (len(trace.episodes), -1))


def test_copy_paste_finds_exactly_the_planted_heads():
    active = raster(3, 6, 2, 4)
    trace = toy_trace(active)
    assert torch.equal(answer(trace, copy_paste(trace)).bool(), active)
    assert copy_paste(trace).values.sum() == active.sum()


def test_a_copy_needs_both_the_span_and_the_token():
    trace = toy_trace(torch.ones(1, 4, 1, 1, dtype=torch.bool))
    assert copy_paste(trace, "tail").values.sum() == 0
    assert copy_paste(trace, labels=trace.next_token + 1).values.sum() == 0
    assert copy_paste(trace, "prompt").values.sum() == 4


@pytest.mark.parametrize(("key", "inside"), [(2, False), (3, True), (6, True), (7, False)])
def test_span_edges(key, inside):
    """The needle fills positions 3..6; every key holds the right token, so only the span decides."""
    trace = toy_trace(torch.zeros(1, 4, 1, 1, dtype=torch.bool))
    peaks = torch.full_like(trace.peak_key, key)
    trace = dataclasses.replace(
        trace, peak_key=peaks, peak_token=trace.next_token[:, None, None, None].expand_as(peaks)
    )
    assert copy_paste(trace).values[trace.step >= 0].bool().all() == inside
    assert copy_paste(trace).values[trace.step < 0].sum() == 0


def test_rows_of_an_episode_without_the_span_score_zero():
    trace = toy_trace(torch.ones(2, 3, 1, 1, dtype=torch.bool))
    bare = dataclasses.replace(trace.episodes[1], spans=())
    trace = dataclasses.replace(trace, episodes=(trace.episodes[0], bare))
    assert answer(trace, copy_paste(trace)).flatten(1).sum(1).tolist() == [3, 0]
    with pytest.raises(ValueError, match="no span 'fact'"):
        copy_paste(trace, "fact")


def test_soft_copy_is_the_attention_on_every_matching_token():
    """Needle a b a; each head looks at one key with 0.5, and the focus holds 0.125 for the others."""
    trace = toy_trace(torch.ones(1, 3, 1, 1, dtype=torch.bool), needle=[FIRST, FIRST + 1, FIRST], stop_token=False)
    trace = dataclasses.replace(trace, focus=trace.focus.clamp(min=0.125))
    score = copy_paste(trace, soft=True)
    assert score.values.flatten().tolist() == [0, 0.625, 0.5, 0.625]
    assert not score.binary


def test_soft_copy_counts_only_the_span_and_never_the_prompt_rows():
    """The focus holds the whole needle a b a; "answer" is its last token."""
    trace = toy_trace(torch.ones(1, 3, 1, 1, dtype=torch.bool), needle=[FIRST, FIRST + 1, FIRST], stop_token=False)
    spans = (*trace.episodes[0].spans, Span("answer", 5, 6))
    trace = dataclasses.replace(
        trace, episodes=(dataclasses.replace(trace.episodes[0], spans=spans),), focus=trace.focus.clamp(min=0.125)
    )
    trace = dataclasses.replace(trace, span_names=("answer", *trace.span_names))
    always = torch.full_like(trace.step, FIRST)
    assert copy_paste(trace, "answer", soft=True, labels=always).values.flatten().tolist() == [0, 0.125, 0.125, 0.5]


def test_soft_copy_ignores_padding():
    long = toy_trace(torch.ones(1, 5, 1, 2, dtype=torch.bool))
    short = toy_trace(torch.ones(1, 2, 1, 2, dtype=torch.bool))
    both = copy_paste(Trace.cat([long, short]), soft=True).values
    assert torch.equal(both, torch.cat([copy_paste(t, soft=True).values for t in (long, short)]))
    assert both.sum() == 0.5 * 7 * 2


def test_soft_copy_names_the_missing_capture():
    trace = toy_trace(torch.ones(1, 3, 1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"Capture\(focus=\('needle',\)\)"):
        copy_paste(dataclasses.replace(trace, focus=None, focus_key=None), soft=True)
    with pytest.raises(ValueError, match="not for each token of span 'tail'"):
        copy_paste(trace, "tail", soft=True)


def test_labels_must_fit_the_trace():
    with pytest.raises(ValueError, match=r"one token per row of the trace \(5\), got 1"):
        copy_paste(toy_trace(torch.ones(1, 3, 1, 1, dtype=torch.bool)), labels=torch.tensor([1]))


def test_mean_leaves_out_the_prompt_the_stop_and_the_failed():
    active = torch.ones(3, 4, 1, 2, dtype=torch.bool)
    active[1] = False
    assert copy_paste(toy_trace(active, correct=[True, False, None])).mean().tolist() == [[1, 1]]
    assert copy_paste(toy_trace(active, correct=[False, True, True])).mean().tolist() == [[0.5, 0.5]]
    assert copy_paste(toy_trace(active, correct=None)).mean()[0, 0] == pytest.approx(2 / 3)
    score = copy_paste(toy_trace(active, correct=False))
    with pytest.raises(ValueError, match="none of 3 episodes was answered correctly"):
        score.mean()
    assert score.answer_rows(answered=False).sum() == 12


def test_selecting_keeps_all_parts_in_step():
    trace = toy_trace(raster(4, 5, 2, 3), correct=[True, False, True, False], groups=["a", "b", "a", "c"])
    kept = copy_paste(trace).answered()
    assert kept.trace is not None and kept.labels is not None
    assert len(kept.values) == len(kept.trace) == len(kept.labels) == 10
    assert torch.equal(copy_paste(kept.trace).values, kept.values)
    assert kept.row_groups.tolist() == ["a"] * 10
    grouped = Score("s", torch.rand(3, 1, 1), False, "test", groups=("x", "y", "x"))
    assert grouped.select(torch.tensor([True, False, True])).groups == ("x", "x")


def test_a_score_without_trace_has_its_rows_as_groups():
    score = Score("s", torch.tensor([[[1.0, 0.2]], [[0.0, 0.4]]]), False, "test")
    assert score.shape == (1, 2)
    assert score.row_groups.tolist() == ["0", "1"]
    assert score.mean().tolist() == [[0.5, pytest.approx(0.3)]]
    assert score.heads(0.3).tolist() == [[[True, False]], [[False, True]]]
    with pytest.raises(ValueError, match="one number of rows"):
        Score("s", torch.rand(2, 1, 1), False, "test", groups=("a",))


def with_mass(trace, values):
    """`mass_core` from {span: number}; a span left out is absent."""
    names = ("fact_0", "fact_1", "prompt", "all")
    mass = torch.stack([torch.full_like(trace.mass[:, 0], values.get(name, torch.nan)) for name in names], dim=1)
    return dataclasses.replace(trace, span_names=names, mass=mass, mass_core=mass)


@pytest.mark.parametrize(
    ("mass", "expected"),
    [
        ({"fact_0": 0.1, "fact_1": 0.2, "all": 0.6}, 0.5),
        ({"fact_0": 0.3, "all": 0.6}, 0.5),
        ({"fact_0": 0.0, "fact_1": 0.0, "all": 0.6}, 0.0),
        ({"fact_0": 1e-7, "fact_1": 0.0, "all": 5e-7}, 0.0),
    ],
)
def test_reasoning_mass_worked_by_hand(mass, expected):
    trace = with_mass(toy_trace(torch.ones(1, 2, 1, 1, dtype=torch.bool)), mass)
    score = reasoning_mass(trace, "fact_*")
    assert score.values.flatten().tolist() == pytest.approx([expected] * len(trace))
    assert torch.equal(reasoning_mass(trace, ["fact_0", "fact_1"]).values, score.values)


def test_reasoning_mass_wants_its_spans():
    trace = with_mass(toy_trace(torch.ones(1, 2, 1, 1, dtype=torch.bool)), {"all": 0.6})
    with pytest.raises(ValueError, match=r"called doc_\*; it has: fact_0"):
        reasoning_mass(trace, "doc_*")
    with pytest.raises(ValueError, match="1 episodes have none of the spans fact_0, fact_1, first: toy-0"):
        reasoning_mass(trace, "fact_*")
