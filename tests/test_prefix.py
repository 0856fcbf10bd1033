"""Shared beginnings: computed once, equal to an own prefill, and the same after a resume."""

import pytest
import torch
from tiny import build, episode, tokenizer

import dhlens.prefix
from dhlens.engine import observe, observe_each
from dhlens.model import load
from dhlens.prefix import prefill, straddles


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request):
    return load(build(request.param), tokenizer=tokenizer())


@pytest.fixture
def family(monkeypatch):
    """Two windows of three episodes; within a window they share 30, two of them 45 tokens."""
    monkeypatch.setattr(dhlens.prefix, "SHORTEST_SHARE", 8)
    episodes = []
    for window in range(2):
        base = episode(80, seed=window).tokens
        episodes += [
            episode(60, name=f"w{window}a", seed=10 + window, prefix=base[:45]),
            episode(70, name=f"w{window}b", seed=20 + window, prefix=base[:45]),
            episode(64, name=f"w{window}c", seed=30 + window, prefix=base[:30]),
        ]
    return episodes


def fed_tokens(model, episodes, **options):
    """Tokens that ran through the model while all streams were made."""
    count = [0]
    handle = model.twin.get_input_embeddings().register_forward_hook(
        lambda module, args, out: count.__setitem__(0, count[0] + args[0].shape[1])
    )
    streams = dict(prefill(model, episodes, **options))
    handle.remove()
    return count[0], streams


def test_a_shared_beginning_is_fed_once(model, family):
    shared, streams = fed_tokens(model, family)
    alone, _ = fed_tokens(model, family, share=False)
    assert alone == sum(len(e.tokens) - 1 for e in family)
    # per window: 30 together, 15 more for two of them, then each its rest
    assert shared == 2 * (30 + 15 + (59 - 45) + (69 - 45) + (63 - 30))
    assert {i: s.length for i, s in streams.items()} == {i: len(e.tokens) - 1 for i, e in enumerate(family)}


def test_shared_equals_own_prefill(model, family):
    shared = observe(model, family, max_new_tokens=6, progress=False)
    own = observe(model, family, max_new_tokens=6, share=False, progress=False)
    assert torch.equal(shared.next_token, own.next_token)
    torch.testing.assert_close(shared.mass, own.mass, atol=1e-5, rtol=0)
    torch.testing.assert_close(shared.hidden["final"], own.hidden["final"], atol=1e-4, rtol=0)


def test_a_resumed_part_is_bitwise_the_same(model, family):
    whole = dict(observe_each(model, family, max_new_tokens=6))
    rest = dict(observe_each(model, family, max_new_tokens=6, only=[1, 5]))
    assert sorted(rest) == [1, 5]
    for i, trace in rest.items():
        assert torch.equal(trace.mass, whole[i].mass) and torch.equal(trace.logprob, whole[i].logprob)


def test_one_prompt_that_begins_another(model, monkeypatch):
    monkeypatch.setattr(dhlens.prefix, "SHORTEST_SHARE", 8)
    long = episode(60, name="long")
    short = episode(40, name="short", prefix=long.tokens[:40])
    shared = observe(model, [short, long], max_new_tokens=4, progress=False)
    own = observe(model, [short, long], max_new_tokens=4, share=False, progress=False)
    torch.testing.assert_close(shared.mass, own.mass, atol=1e-5, rtol=0)


def test_no_shared_run_crosses_a_rope_break(monkeypatch):
    monkeypatch.setattr(dhlens.prefix, "SHORTEST_SHARE", 8)
    model = load(build("phi"), tokenizer=tokenizer())
    base = episode(100).tokens
    long = [episode(100, name=f"e{i}", seed=i, prefix=base[:40]) for i in range(2)]
    fed, _ = fed_tokens(model, long)
    assert fed == 2 * 99
    short = [episode(50, name=f"e{i}", seed=i, prefix=base[:40]) for i in range(2)]
    fed, _ = fed_tokens(model, short)
    assert fed == 40 + 2 * 9
    assert straddles((64,), 64, 65) and not straddles((64,), 65, 99) and not straddles((64,), 10, 64)
