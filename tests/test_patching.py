"""Patching against TransformerLens, which runs the whole sequence for every patch; laws, refusals, a real needle."""

import dataclasses

import pandas as pd
import pytest
import torch
from tiny import MODELS, VOCAB, build, episode, tokenizer
from transformer_lens import patching as lens

import dhlens.patching
import dhlens.transplant
from dhlens.model import load
from dhlens.patching import SITES, patch_effects
from dhlens.stream import HFStream

HELPERS = {
    "z": lens.get_act_patch_attn_head_out_by_pos,
    "q": lens.get_act_patch_attn_head_q_by_pos,
    "k": lens.get_act_patch_attn_head_k_by_pos,
    "v": lens.get_act_patch_attn_head_v_by_pos,
    "resid_pre": lens.get_act_patch_resid_pre,
}
LENGTHS = {**dict.fromkeys(MODELS, 40), "phi": 40, "phi past its break": 70}
STEPS = (0, 1, 3)


@pytest.fixture(scope="module", params=sorted(LENGTHS))
def case(request):
    """A model, its prompt, the counterfactual, and answers that agree at step 2 only."""
    model = load(build(request.param.split()[0]), tokenizer=tokenizer())
    clean, twin = twins(LENGTHS[request.param])
    return model, clean, twin, opposed(model, clean, twin)


def twins(n):
    clean = episode(n, name="clean")
    tokens, span = clean.tokens.clone(), clean.span("answer")
    tokens[span.start : span.stop] = torch.randint(3, VOCAB, (len(span),), generator=torch.Generator().manual_seed(7))
    return clean, dataclasses.replace(clean, id="twin", tokens=tokens)


def opposed(model, clean, twin):
    """Answers that the runs favour most against each other, so that the scale of the metric is wide."""
    y, other = clean.tokens, twin.tokens
    for step in range(4):
        gap = model.hooked(y[None])[0, -1] - model.hooked(other[None])[0, -1]
        ends = (gap.argmax(), gap.argmin()) if step != 2 else (torch.tensor(42),) * 2
        y, other = (torch.cat([t, end[None]]) for t, end in zip((y, other), ends, strict=True))
    return y[len(clean.tokens) :], other[len(clean.tokens) :]


def run(case, **options):
    model, clean, twin, answers = case
    return patch_effects(model, clean, twin, answers=answers, progress=False, **options)


def both(case):
    """What each run is fed."""
    _, clean, twin, answers = case
    return [torch.cat([e.tokens, y[: max(STEPS)]]) for e, y in zip((clean, twin), answers, strict=True)]


def metrics(case):
    """TransformerLens' metrics: logits of the whole sequence to the logit difference of each step."""
    _, clean, _, (y, other) = case

    def at(step):
        row = len(clean.tokens) - 1 + step
        return lambda logits: logits[0, row, y[step]] - logits[0, row, other[step]]

    return {str(step): at(step) for step in STEPS}


def by_transformer_lens(case, site, positions, direction="denoise"):
    """[step position layer head] of its own function, and the metric of the clean and the twin's run."""
    hooked = case[0].hooked
    tokens, found = both(case), metrics(case)
    ends = [torch.stack([m(hooked(t[None])) for m in found.values()]) for t in tokens]
    source, target = tokens if direction == "denoise" else tokens[::-1]
    _, cache = hooked.run_with_cache(source[None])
    heads = [None] if site == "resid_pre" else range(2 if site in "kv" else 6)
    index = [(layer, p, h) for p in positions for layer in range(3) for h in heads]
    table = pd.DataFrame(index, columns=["layer", "pos", "head_index"]).dropna(axis=1)
    result = HELPERS[site](hooked, target[None], cache, found, index_axis_names=None, index_df=table)
    return result.values.reshape(len(STEPS), len(positions), 3, len(heads)), *ends


def scaled(patched, clean, twin):
    twin, clean = twin[:, None, None, None], clean[:, None, None, None]
    return (patched - twin) / (clean - twin)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_any_position_equals_transformer_lens(case, site, direction):
    """Of the needle, beyond every window, and the last of the prompt."""
    needle = case[1].span("answer").start
    positions = [needle + 1, len(case[1].tokens) - 1, needle]
    got = run(case, site=site, positions=positions, direction=direction)
    patched, clean, twin = by_transformer_lens(case, site, positions, direction)
    assert got.step.tolist() == list(STEPS) and got.position[0, :, 0].tolist() == positions
    torch.testing.assert_close(got.metric_clean, clean, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.metric_twin, twin, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.metric, patched, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.values, scaled(patched, clean, twin), atol=1e-4, rtol=0)
    assert ((got.values - (direction == "noise") * 1.0).abs() > 1e-3).any()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("path", ["shadow rows", "lanes"])
def test_own_rows_equal_transformer_lens(case, site, path, monkeypatch):
    """Every step's own row, in either way."""
    if path == "lanes":
        monkeypatch.setitem(case[0].limits, "shadow_rows", "for the judge's sake")
        monkeypatch.setattr(dhlens.patching, "by_shadows", None)
    else:
        monkeypatch.setattr(dhlens.patching, "by_lanes", None)
    own = [len(case[1].tokens) - 1 + step for step in STEPS]
    got = run(case, site=site, rows=11)
    patched, clean, twin = by_transformer_lens(case, site, own)
    want = torch.stack([patched[i, i : i + 1] for i in range(len(STEPS))])
    assert got.position.flatten().tolist() == own and got.metric.shape == want.shape
    shuffled = run(case, site=site, rows=11, steps=[3, 0, 1])
    torch.testing.assert_close(shuffled.metric, got.metric[[2, 0, 1]], atol=1e-4, rtol=0)
    torch.testing.assert_close(got.metric, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.values, scaled(want, clean, twin), atol=1e-4, rtol=0)


@pytest.mark.parametrize("site", SITES)
def test_together_equals_one_whole_pass(case, site, monkeypatch):
    """Scattered positions at once, in blocks and lanes so small that each spans several."""
    monkeypatch.setattr(dhlens.transplant, "CHUNK", 8)
    model = case[0]
    positions = [5, 38, 14, 15, 16]
    got = run(case, site=site, positions=positions, together=True, rows=20)
    source, target = both(case)
    for layer, head in ((0, 0), (1, got.metric.shape[3] - 1), (2, 0)):
        name = SITES[site](layer)
        _, cache = model.hooked.run_with_cache(source[None])

        def put(x, hook, name=name, cache=cache, head=head):
            x = x.clone()
            at = (slice(None), positions) if site == "resid_pre" else (slice(None), positions, head)
            x[at] = cache[name][at]
            return x

        logits = model.hooked.run_with_hooks(target[None], fwd_hooks=[(name, put)])
        want = torch.stack([m(logits) for m in metrics(case).values()])
        torch.testing.assert_close(got.metric[:, 0, layer, head], want, atol=1e-4, rtol=0)
    assert got.position.shape == (len(STEPS), 1, 5) and set(got.table["patched"]) == {5}


@pytest.mark.parametrize(("direction", "want"), [("denoise", 1.0), ("noise", 0.0)])
def test_all_that_differs_is_the_other_run(case, direction, want):
    """The embeddings of every position at which the runs differ make the one the other."""
    clean, twin = both(case)
    for step in STEPS:
        differing = (clean != twin).nonzero().flatten()
        differing = differing[differing < len(case[1].tokens) + step].tolist()
        options = {"site": "resid_pre", "steps": [step], "direction": direction}
        got = run(case, positions=differing, together=True, **options)
        assert got.values[0, 0, 0, 0].item() == pytest.approx(want, abs=1e-4)
        assert got.values[0, 0, 2, 0].item() != pytest.approx(want, abs=1e-3)  # too late: attention has looked already


@pytest.mark.parametrize("positions", [None, [14, 39]])
@pytest.mark.parametrize("site", SITES)
def test_a_patch_from_the_same_run_changes_nothing(case, site, positions):
    model, clean, _, (y, other) = case
    again = dataclasses.replace(clean, id="again")
    answers = (y, torch.cat([y[:3], other[3:]]))
    got = patch_effects(model, clean, again, answers=answers, site=site, positions=positions, progress=False)
    assert got.step.tolist() == [3] and torch.allclose(got.metric_clean, got.metric_twin, atol=1e-4)
    torch.testing.assert_close(got.metric, got.metric_clean.expand_as(got.metric), atol=1e-4, rtol=0)


def test_sites_have_their_own_heads(case):
    heads = {site: run(case, site=site, steps=[1]).metric.shape[1:] for site in SITES}
    assert heads == {"z": (1, 3, 6), "q": (1, 3, 6), "k": (1, 3, 2), "v": (1, 3, 2), "resid_pre": (1, 3, 1)}


def test_the_table_is_the_tensors(case):
    got = run(case, positions="question", steps=[3, 0], site="v", direction="noise")
    span = case[1].span("question")
    table = got.table.set_index(["step", "position", "layer", "head"])
    assert len(table) == 2 * len(span) * 3 * 2 and table.index.is_unique and set(table["direction"]) == {"noise"}
    row = table.loc[(0, span.start + 2, 1, 1)]
    assert row["metric"] == got.metric[1, 2, 1, 1].item() and row["value"] == got.values[1, 2, 1, 1].item()
    assert row["metric_clean"] == got.metric_clean[1].item() and row["site"] == "v"
    in_order = run(case, positions="question", steps=[0, 3], site="v", direction="noise")
    torch.testing.assert_close(got.metric.flip(0), in_order.metric, atol=1e-5, rtol=0)


def test_the_answers_of_the_episodes_are_the_default(case):
    model, clean, twin, (y, other) = case
    knowing = [dataclasses.replace(e, answer=a) for e, a in ((clean, y), (twin, other))]
    got = patch_effects(model, *knowing, progress=False)
    assert torch.equal(got.metric, run(case).metric)


def test_nothing_before_a_patch_is_run_again(case, monkeypatch):
    """Rows of all passes: both prefixes, both plain runs, the way between the places, and the lanes from each place."""
    model, first, second = case[0], 10, len(case[1].tokens) - 1
    if model.rope_breaks:
        pytest.skip("past a break of position factors every lane starts at 0")
    fed, feed = [], HFStream.feed
    monkeypatch.setattr(
        HFStream, "feed", lambda self, tokens, **kw: fed.append(tokens.numel()) or feed(self, tokens, **kw)
    )
    run(case, positions=[second, first])
    from_first, from_second = (second + max(STEPS) + 1 - place for place in (first, second))
    assert sum(fed) == 2 * first + 2 * from_first + (second - first) + 18 * (from_first + from_second)


def test_bad_input_before_any_pass(case, monkeypatch):
    model, clean, twin, (y, other) = case
    monkeypatch.setattr(type(model), "stream", lambda self: pytest.fail("a forward pass began"))
    row = len(clean.tokens) - 1
    for options, message in [
        ({"site": "mlp"}, "one of z, q, k, v, resid_pre, got 'mlp'"),
        ({"direction": "both"}, "'denoise' or 'noise', got 'both'"),
        ({"rows": 0}, "at least 1 per pass, got 0"),
        ({"steps": [0, 4]}, r"both answers, 0\.\.3, got 4"),
        ({"steps": [2]}, "got 42 'w42' and 42 'w42' at step 2"),
        ({"positions": [3, row + 1]}, rf"within 0\.\.{row}, the row of the earliest step, got 3\.\.{row + 1}"),
        ({"positions": [-1]}, r"got -1\.\.-1"),
        ({"positions": []}, "got none"),
        ({"positions": "haystack"}, "has no span 'haystack'"),
        ({"answers": (y, y)}, "differ, got none in 4 tokens"),
        ({"answers": (y, other + VOCAB)}, r"token ids within 0\.\.96"),
        ({"answers": (y.repeat(200), other.repeat(200))}, "512 positions"),
    ]:
        with pytest.raises(ValueError, match=message):
            patch_effects(model, clean, twin, **{"answers": (y, other), "progress": False, **options})
    with pytest.raises(ValueError, match=f"equal length, got {row + 1} and {row} tokens"):
        patch_effects(model, clean, dataclasses.replace(twin, tokens=twin.tokens[1:], spans=()), answers=(y, other))
    monkeypatch.setitem(SITES, "q", lambda layer: f"blocks.{layer}.attn.hook_nothing")
    with pytest.raises(ValueError, match=r"has no hook 'blocks\.0\.attn\.hook_nothing'"):
        run(case, site="q")


def test_a_site_that_never_fires_is_refused(case, monkeypatch):
    monkeypatch.setitem(SITES, "q", lambda layer: f"blocks.{layer}.attn.hook_result")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.hook_result does not fire"):
        run(case, site="q")


def test_a_hooked_transformer_is_patched_alike():
    """TransformerLens 3.9: no masks of its own, so its own rows are lanes too."""
    from test_hooked_transformer import pair_of

    hf = build("llama")
    hf.set_attn_implementation("eager")
    bridge, hooked = pair_of(hf, tokenizer())
    clean, twin = twins(40)
    answers = opposed(bridge, clean, twin)
    for site in SITES:
        for options in ({}, {"positions": [14, 39]}, {"positions": "needle", "together": True}):
            a, b = (run((model, clean, twin, answers), site=site, rows=16, **options) for model in (bridge, hooked))
            torch.testing.assert_close(a.metric, b.metric, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_smollm2_restores_the_clean_answer_through_retrieval_heads(smollm2):
    """What the heads that copy at a step put out brings the clean token back into the twin's run."""
    from scipy.stats import mannwhitneyu

    from dhlens.engine import generate, observe
    from dhlens.scores import copy_paste
    from dhlens.tasks import niah

    episodes = niah.episodes(smollm2.tokenizer, lengths=(300,), depths=(0.8,), n=3, seed=0)
    trace = observe(smollm2, episodes, progress=False)
    i = next(i for i, o in enumerate(trace.outcomes) if o.correct)
    clean, said = episodes[i], trace.outcomes[i].tokens
    twin = niah.twin(smollm2.tokenizer, clean, seed=0)
    active = copy_paste(trace.pick([i])).heads()
    other = generate(smollm2, [twin], progress=False)[0].tokens
    steps = [s for s in range(min(len(said), len(other))) if said[s] != other[s]][:4]
    got = patch_effects(smollm2, clean, twin, answers=(said, other), steps=steps, progress=False).values[:, 0]
    copying = active[steps]
    assert got[copying].mean() > 5 * got[~copying].mean().abs()
    assert mannwhitneyu(got[copying].numpy(), got[~copying].numpy(), alternative="greater").pvalue < 1e-3
