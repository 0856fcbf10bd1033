"""Traces: selections keep rows and episodes together, groups are never split, joins pad what differs in width."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import build, episode, tokenizer

from dhlens.engine import observe
from dhlens.episode import Episode, Span
from dhlens.model import load
from dhlens.reads import Capture
from dhlens.trace import Trace


@pytest.fixture(scope="module")
def model():
    return load(build("llama"), tokenizer=tokenizer())


@pytest.fixture(scope="module")
def trace(model):
    episodes = [episode(30 + 3 * i, name=f"e{i}", seed=i % 3, answer=3 + i) for i in range(6)]
    return observe(model, episodes, max_new_tokens=4, capture=Capture(rows=True), progress=False)


def rows_of(trace, i):
    return trace.select(trace.episode == i)


def test_cat_is_the_inverse_of_pick(trace):
    parts = [trace.pick([i]) for i in range(6)]
    again = Trace.cat(parts)
    for field in dataclasses.fields(Trace):
        a, b = getattr(trace, field.name), getattr(again, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field.name
    assert again.episodes == trace.episodes and torch.equal(again.hidden["final"], trace.hidden["final"])


def test_pick_keeps_rows_with_their_episode(trace):
    part = trace.pick([4, 1])
    assert [e.id for e in part.episodes] == ["e1", "e4"] and part.episode.unique().tolist() == [0, 1]
    assert torch.equal(rows_of(part, 1).mass, rows_of(trace, 4).mass)


def test_focus_is_padded_and_named(trace):
    assert trace.focus_key.shape[1] == 10
    first = rows_of(trace, 0)
    assert (first.focus_key[:, 5:] == -1).all() and (first.focus[..., 5:] == 0).all()
    assert torch.equal(first.focus_key[0, :5], torch.arange(10, 15))


def test_split_never_parts_a_group(trace):
    for seed in range(5):
        a, b = trace.split(0.34, seed=seed)
        assert {e.group for e in a.episodes}.isdisjoint({e.group for e in b.episodes})
        assert len(a.episodes) == 2 and len(a) + len(b) == len(trace)
    with pytest.raises(ValueError, match="between 0 and 1"):
        trace.split(1.0, seed=0)
    with pytest.raises(ValueError, match="at least 2 groups"):
        trace.pick([0, 3]).split(0.5, seed=0)


def test_groups_are_those_of_the_rows(trace):
    assert np.array_equal(trace.groups, [trace.episodes[i].group for i in trace.episode.tolist()])


def test_spans_an_episode_lacks(model, trace):
    bare = dataclasses.replace(episode(40, name="bare"), spans=(Span("fact_0", 3, 9),))
    both = Trace.cat([trace, observe(model, [bare], max_new_tokens=4, capture=Capture(rows=True), progress=False)])
    assert both.span_names == ("needle", "answer", "question", "fact_0", "prompt", "all")
    last = rows_of(both, 6)
    assert last.mass[:, 0].isnan().all() and last.mass[:, 3:].isfinite().all()
    assert rows_of(both, 0).mass[:, 3].isnan().all()
    start, stop = both.span_bounds("fact_0")
    assert start[-1] == 3 and stop[-1] == 9 and stop[0] == 0
    with pytest.raises(ValueError, match="no span 'facts'; it has: needle"):
        both.span_index("facts")


def test_answer_rows_end_before_the_stop_token(model):
    e = episode()
    said = observe(model, [e], max_new_tokens=6, progress=False).outcomes[0].tokens
    stopping = dataclasses.replace(model, stop_ids=(int(said[3]),))
    trace = observe(stopping, [e], max_new_tokens=6, progress=False)
    n = said.tolist().index(int(said[3]))
    assert trace.outcomes[0].stopped == "stop_token" and trace.answer_rows().sum() == n == len(trace) - 1
    prompt = observe(model, [e], rows="question", progress=False)
    assert not prompt.answer_rows().any()


def test_other_settings_are_not_joined(model, trace):
    other = observe(model, [episode(name="x")], max_new_tokens=4, capture=Capture(rows=True, sink=9), progress=False)
    with pytest.raises(ValueError, match=r"settings.capture.sink: 4 here, 9 there"):
        Trace.cat([trace, other])
    with pytest.raises(ValueError, match="at least one"):
        Trace.cat([])


def test_answered_keeps_correct_episodes(trace):
    outcomes = [dataclasses.replace(o, correct=i % 2 == 0) for i, o in enumerate(trace.outcomes)]
    judged = dataclasses.replace(trace, outcomes=tuple(outcomes))
    assert [e.id for e in judged.answered().episodes] == ["e0", "e2", "e4"]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ((Span("a", 0, 2), Span("a", 3, 4)), "doubled or reserved"),
        ((Span("all", 0, 2),), "doubled or reserved"),
        ((Span("a", 0, 99),), "ends at 99, the prompt at 5"),
    ],
)
def test_episodes_that_make_no_sense(spans, message):
    with pytest.raises(ValueError, match=message):
        Episode("e", torch.arange(5), torch.arange(0), spans)
    with pytest.raises(ValueError, match="at least one prompt token"):
        Episode("e", torch.arange(0), torch.arange(0))
    with pytest.raises(ValueError, match="0 <= start < stop"):
        Span("a", 3, 3)
