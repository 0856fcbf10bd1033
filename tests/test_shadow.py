"""Effects in one pass against the rewind loop, and the exact causal map; on full and sliding-window layers."""

import pytest
import torch
from tiny import MODELS, build, episode, tokenizer

import dhlens.shadow
from dhlens.edits import hide, patch, uniform, zero
from dhlens.engine import generate, observe
from dhlens.heads import HeadSet
from dhlens.model import load
from dhlens.reads import Capture
from dhlens.shadow import causal_map, effects


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request):
    return load(build(request.param), tokenizer=tokenizer())


@pytest.fixture(scope="module")
def said(model):
    return generate(model, [episode(50)], max_new_tokens=7, progress=False)[0].tokens


def experiments(shape, n=12):
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(n, *shape, generator=generator) < 0.2
    return [(int(torch.randint(0, 7, (1,), generator=generator)), HeadSet.from_mask(d)) for d in draw]


def edits_of(model, said):
    source = observe(model, [episode(50)], max_new_tokens=7, capture=Capture(z=True), progress=False)
    return {"zero": zero(), "uniform": uniform(), "hide": hide([20, 45]), "patch": patch(source)}


@pytest.mark.parametrize("kind", ["zero", "uniform", "hide", "patch"])
def test_shadow_rows_equal_the_rewind_loop(model, said, kind, monkeypatch):
    edit, sets = edits_of(model, said)[kind], experiments(model.shape)
    fast = effects(model, episode(50), said, sets, edit=edit, rows=5)
    monkeypatch.setitem(model.limits, "shadow_rows", "for the judge's sake")
    slow = effects(model, episode(50), said, sets, edit=edit)
    for name in ("logit", "logit_clean", "logprob", "logprob_clean", "kl"):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name), atol=2e-4, rtol=1e-4)
    assert torch.equal(fast.kept, slow.kept) and fast.step.tolist() == [s for s, _ in sets]
    assert (fast.kl > 1e-3).any() == (kind != "patch")  # a patch with itself changes nothing


def test_against_the_plain_model_with_zeroed_columns(model, said):
    """One head at the last step: feed the plain model's prompt and answer clean, the last row through dead columns."""
    head, step = HeadSet(["L2H4"], model.shape), 5
    e = effects(model, episode(50), said, [(step, head)])
    stream = model.stream()
    stream.feed(torch.cat([episode(50).tokens, said[:step]])[None, :-1], hooks=())
    hf = model.twin
    weight = hf.model.layers[2].self_attn.o_proj.weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight[:, 32:40] = 0
        want = stream.feed(said[None, step - 1 : step])[0, -1]
        weight.copy_(saved)
    assert e.logit.item() == pytest.approx(want[said[step]].item(), abs=1e-4)
    assert e.logprob.item() == pytest.approx(want.log_softmax(-1)[said[step]].item(), abs=1e-4)


def test_causal_map_is_every_head_at_every_step(model, said):
    whole = causal_map(model, episode(50), said[:3], rows=20, progress=False)
    assert whole.kl.shape == (3, *model.shape)
    for step, layer, head in ((0, 0, 0), (1, 2, 5), (2, 1, 3)):
        e = effects(model, episode(50), said[:3], [(step, HeadSet([(layer, head)], model.shape))])
        assert whole.kl[step, layer, head].item() == pytest.approx(e.kl.item(), abs=1e-5)
        change = e.logit - e.logit_clean
        assert whole.logit_change[step, layer, head].item() == pytest.approx(change.item(), abs=1e-4)


def test_an_empty_set_has_no_effect(model, said):
    e = effects(model, episode(50), said, [(0, HeadSet([], model.shape)), (6, HeadSet([], model.shape))])
    assert e.kept.all() and (e.kl < 1e-6).all() and e.size.tolist() == [0, 0]
    torch.testing.assert_close(e.logit, e.logit_clean, atol=1e-4, rtol=0)
    assert {"prob", "prob_clean", "logit_change", "kl", "kept", "step", "size"} <= set(e.table.columns)


def test_bad_input_before_any_pass(model, said, monkeypatch):
    monkeypatch.setattr(type(model), "stream", lambda self: pytest.fail("a forward pass began"))
    empty = HeadSet([], model.shape)
    for sets, options, message in [
        ([], {}, "at least one experiment"),
        ([(7, empty)], {}, r"0..6, got 7"),
        ([(0, HeadSet([], (2, 2)))], {}, "model's shape"),
        ([(0, empty)], {"rows": 0}, "one row per pass"),
    ]:
        with pytest.raises(ValueError, match=message):
            effects(model, episode(50), said, sets, **options)


@pytest.mark.slow
def test_smollm2_causal_map_finds_retrieval_heads(smollm2):
    """On a real answered episode the exact map and the attention-based heads agree far beyond chance."""
    from scipy.stats import mannwhitneyu

    from dhlens.scores import copy_paste
    from dhlens.tasks import niah

    episodes = niah.episodes(smollm2.tokenizer, lengths=(300,), depths=(0.5,), n=3, seed=0)
    trace = observe(smollm2, episodes, progress=False)
    i = next(i for i, o in enumerate(trace.outcomes) if o.correct)
    part, said = trace.pick([i]), trace.outcomes[i].tokens[5:9]
    fed = torch.cat([episodes[i].tokens, trace.outcomes[i].tokens[:5]])
    at_five = dhlens.shadow.Episode("cut", fed, said, episodes[i].spans, episodes[i].meta)
    whole = causal_map(smollm2, at_five, said, progress=False)
    active = copy_paste(part).heads()[5:9]
    assert active.any() and mannwhitneyu(whole.kl[active], whole.kl[~active], alternative="greater").pvalue < 1e-6
