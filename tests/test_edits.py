"""Edits against the plain model: zeroed columns, mean of visible values, rows that sum to 1, outputs put back."""

import pytest
import torch
from tiny import MODELS, build, episode, tokenizer

from dhlens import hooks as sites
from dhlens.edits import hide, mean, patch, resample, uniform, zero
from dhlens.engine import observe, replay
from dhlens.heads import HeadSet
from dhlens.model import load
from dhlens.reads import Capture

HEADS = HeadSet(["L0H5", "L1H0", "L1H3", "L2H2"], (3, 6))


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request):
    return load(build(request.param), tokenizer=tokenizer())


@pytest.fixture(scope="module")
def tokens():
    return episode(40).tokens[None]


def run(model, tokens, hooks, read=()):
    """Logits and what was read of a whole pass, in TransformerLens' own hooks."""
    got = {}
    taps = [(name, lambda t, hook, name=name: got.__setitem__(name, t.clone())) for name in read]
    with torch.no_grad(), model.hooked.hooks(fwd_hooks=[*hooks, *taps]):
        logits = model.hooked(tokens)
    return logits, got


def test_zero_equals_zeroed_projection_columns(model, tokens):
    hf = build(type(model.hooked.original_model).__name__.lower().removesuffix("forcausallm"))
    with torch.no_grad():
        for layer, head in HEADS:
            hf.model.layers[layer].self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
        hf.set_attn_implementation("eager")
        want = hf(tokens).logits
    got, _ = run(model, tokens, zero()(HEADS))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_uniform_puts_out_the_mean_of_the_visible_values(model, tokens):
    head = HeadSet(["L0H5"], model.shape)
    _, got = run(model, tokens, uniform()(head), [sites.pattern(0), sites.z(0), "blocks.0.attn.hook_v"])
    pattern, z, v = got[sites.pattern(0)][0, 5], got[sites.z(0)][0, :, 5], got["blocks.0.attn.hook_v"][0, :, 1]
    n, window = len(pattern), model.windows[0] or 10**6
    for q in (0, 3, n - 1):
        seen = slice(max(0, q - window + 1), q + 1)
        torch.testing.assert_close(
            pattern[q, seen], torch.full((seen.stop - seen.start,), 1 / (seen.stop - seen.start))
        )
        torch.testing.assert_close(z[q], v[seen].mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(n))


def test_hide_takes_the_mass_and_leaves_rows_that_sum_to_one(model, tokens):
    last = [int(tokens.shape[1]) - 1]
    hidden = [30, 31, 33]
    _, clean = run(model, tokens, [], [sites.pattern(1)])
    _, got = run(model, tokens, hide(hidden)(HEADS, rows=last), [sites.pattern(1)])
    pattern, before = got[sites.pattern(1)][0], clean[sites.pattern(1)][0]
    for head in (0, 3):
        assert (pattern[head, -1, hidden] == 0).all()
        kept = before[head, -1].clone()
        kept[hidden] = 0
        # the scores of this layer are as before only in layer 0; here the sum is the law
        assert pattern[head, -1].sum().item() == pytest.approx(1, abs=1e-5)
    assert (pattern[1, -1, hidden] > 0).any()
    with pytest.raises(ValueError, match="leave a row without any key"):
        run(model, tokens, hide([0])(HEADS))
    with pytest.raises(ValueError, match="positions of at least 0"):
        hide([])


def test_hide_in_layer_0_renormalises_exactly(model, tokens):
    head, hidden = HeadSet(["L0H2"], model.shape), [35, 36]
    _, clean = run(model, tokens, [], [sites.pattern(0)])
    _, got = run(model, tokens, hide(hidden)(head, rows=[39]), [sites.pattern(0)])
    want = clean[sites.pattern(0)][0, 2, 39].clone()
    want[hidden] = 0
    torch.testing.assert_close(got[sites.pattern(0)][0, 2, 39], want / want.sum(), atol=1e-6, rtol=0)


def test_each_row_gets_its_own_set(model, tokens):
    sets = [HeadSet(["L1H0"], model.shape), HeadSet([], model.shape), HeadSet(["L1H3", "L1H0"], model.shape)]
    _, got = run(model, tokens, zero()(sets, rows=[3, 5, 39]), [sites.z(1)])
    dead = (got[sites.z(1)][0] == 0).all(-1)
    assert dead.nonzero().tolist() == [[3, 0], [39, 0], [39, 3]]


def test_edits_compose_in_list_order(model, tokens):
    one = HeadSet(["L2H2"], model.shape)
    source = observe(model, [episode(40)], max_new_tokens=3, draft=False, capture=Capture(z=True), progress=False)
    put = patch(source)(one, rows=[39], steps=[0])
    back, _ = run(model, tokens, zero()(one, rows=[39]) + put)
    clean, _ = run(model, tokens, [])
    dead, _ = run(model, tokens, put + zero()(one, rows=[39]))
    torch.testing.assert_close(back, clean, atol=1e-4, rtol=0)
    alone, _ = run(model, tokens, zero()(one, rows=[39]))
    torch.testing.assert_close(dead, alone, atol=1e-5, rtol=0)
    assert not torch.allclose(dead[0, -1], clean[0, -1], atol=1e-3)


def test_outputs_of_a_trace_are_put_in_exactly(model):
    answers = [torch.tensor([5, 9, 11, 4]), torch.tensor([7, 8, 20, 30])]
    episodes = [episode(40, name="a"), episode(50, name="b", seed=1)]
    source = replay(model, episodes, answers, capture=Capture(z=True), progress=False)
    tokens = episodes[0].tokens[None]
    _, got = run(model, tokens, patch(source.pick([1]))(HEADS, rows=[39], steps=[2]), [sites.z(1)])
    row = int(((source.episode == 1) & (source.step == 2)).nonzero())
    torch.testing.assert_close(got[sites.z(1)][0, 39, 3], source.z[row, 1, 3])
    _, got = run(model, tokens, mean(source)(HEADS), [sites.z(1)])
    torch.testing.assert_close(got[sites.z(1)][0, 7, 0], source.z[:, 1, 0].mean(0))
    drawn = set()
    for seed in range(16):
        _, got = run(model, tokens, resample(source, seed=seed)(HEADS, rows=[39], steps=[3]), [sites.z(1)])
        z = got[sites.z(1)][0, 39, 0]
        drawn |= {i for i in range(8) if torch.equal(z, source.z[i, 1, 0])}
    assert drawn == {3, 7}  # step 3 of either episode


def test_what_an_edit_refuses_before_any_pass(model):
    plain = observe(model, [episode()], max_new_tokens=2, progress=False)
    with_z = observe(model, [episode()], max_new_tokens=2, capture=Capture(z=True), progress=False)
    for make in (mean, patch, lambda t: resample(t, seed=0)):
        with pytest.raises(ValueError, match=r"Capture\(z=True\)"):
            make(plain)
    other = HeadSet(["L0H1"], (4, 6))
    cases = [
        (lambda: zero()([HEADS, other]), "one model shape"),
        (lambda: zero()([]), "no set"),
        (lambda: zero()([HEADS, HEADS], rows=[1]), "rows must hold 2"),
        (lambda: mean(with_z)(other), "one model shape"),
        (lambda: patch(with_z)(HEADS, rows=[3]), "say steps="),
        (lambda: patch(with_z)(HEADS, rows=[3], steps=[-1]), "no row at step -1"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert zero()(HeadSet([], model.shape)) == []


def test_a_users_own_edit(model, tokens):
    def halve():
        def edit(heads, *, rows=None, steps=None, keys=None):
            def at(layer, chosen):
                def fn(z, hook):
                    scale = torch.ones(z.shape[2])
                    scale[chosen] = 0.5
                    return z * scale[:, None]

                return sites.z(layer), fn

            return [at(layer, chosen) for layer, chosen in heads.by_layer().items()]

        return edit

    _, clean = run(model, tokens, [], [sites.z(0)])
    _, got = run(model, tokens, halve()(HEADS), [sites.z(0)])
    torch.testing.assert_close(got[sites.z(0)][:, :, 5], clean[sites.z(0)][:, :, 5] / 2)
