"""Whose attention chooses: the list of each step, and the policies that are compared, by name."""

import numpy as np
import pytest
import tiny
from toy_tokenizers import byte_level
from toy_traces import toy_trace

import dhlens as dh
from dhlens.choosers import CHOOSERS, by_step, reasoning_policies
from dhlens.policies import StepView
from dhlens.tasks.hotpot import episodes


def at(step, shape=(2, 3)):
    return StepView(episode=tiny.episode(40), step=step, fed=1, shape=shape, read=None)


def test_by_step_names_the_heads_of_its_own_step():
    """Head 0.s is on at step s of every answer; step 3 is reached by two answers of six only."""
    active = np.zeros((6, 4, 2, 3), dtype=bool)
    for step in range(3):
        active[:, step, 0, step] = True
    active[:, 3, 1, 2] = True
    trace = toy_trace(active, groups=[f"g{i}" for i in range(6)], stop_token=False)
    score = dh.copy_paste(trace)
    score = score.select((trace.step < 3) | (trace.episode < 2))
    policy = by_step(score, 1)
    assert [str(policy(at(s), None)) for s in range(5)] == ["{L0H0}", "{L0H1}", "{L0H2}", "{L0H2}", "{L0H2}"]
    # too few answers for any list of a step: the heads of all steps
    alone = by_step(score.select(trace.episode[(trace.step < 3) | (trace.episode < 2)] < 3), 2)
    assert len({str(alone(at(s), None)) for s in range(4)}) == 1
    with pytest.raises(ValueError, match=r"must be of the model's shape \(9, 9\)"):
        policy.check(trace.card, (9, 9))


def test_all_policies_name_k_heads_but_the_one_of_all():
    model = dh.load(tiny.reader(), tokenizer=byte_level(), check=False)
    asked = episodes(model.tokenizer, n=6, length=1200, seed=0)
    fit = dh.observe(model, asked, max_new_tokens=4, progress=False)
    policies = reasoning_policies(fit, k=2, seed=0)
    assert tuple(policies) == CHOOSERS
    runs = dh.decode(model, asked[:1], dict(policies), max_new_tokens=2, progress=False)
    sizes = {name: {int(n) for n in trace.heads_used.flatten(1).sum(1)} for name, trace in runs.items()}
    assert sizes == {name: {8 if name == "all heads" else 2} for name in CHOOSERS}
    for k in (0, 9):
        with pytest.raises(ValueError, match=rf"k must lie within 1..8, the heads of the model, got {k}"):
            reasoning_policies(fit, k=k, seed=0)
