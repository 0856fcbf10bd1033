"""Direct effects and what heads read: exact sums, a plain model's own weights, and a circuit wired by hand."""

import pytest
import torch
import toy_circuit as toy
import zoo
from tiny import build, episode, tokenizer

from dhlens.composition import composition, composition_scores
from dhlens.direct import direct_effects
from dhlens.frozen import FrozenNorm
from dhlens.heads import HeadSet
from dhlens.model import load
from dhlens.reading import read_keys

KINDS = {"llama": build, "qwen3": build, "phi": build, "pythia": zoo.build, "gpt-2": zoo.build, "padded": zoo.build}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return load(KINDS[request.param](request.param).requires_grad_(False), tokenizer=tokenizer())


@pytest.fixture(scope="module")
def llama():
    return load(build("llama").requires_grad_(False), tokenizer=tokenizer())


@pytest.fixture(scope="module")
def circuit():
    return load(toy.build(), tokenizer=tokenizer())


def test_a_frozen_norm_is_the_norm():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, u = torch.randn(4, 5, 8, generator=generator)
    layer, rms = torch.nn.LayerNorm(8, eps=1e-3), torch.nn.RMSNorm(8, eps=1e-3)
    with torch.no_grad():
        layer.weight[:], layer.bias[:], rms.weight[:] = weight[0], bias[0], weight[1]
    for norm, centred in ((layer, True), (rms, False)):
        found = FrozenNorm.of(norm, x)
        assert found.centred is centred
        torch.testing.assert_close((found.pull(u) * x).sum(1) + u @ found.shift, (norm(x) * u).sum(1))
        matrix = u.T.contiguous()
        rows = (x @ found.fold(matrix)) * found.scale[:, None]
        torch.testing.assert_close(rows + found.shift @ matrix, norm(x) @ matrix)


@pytest.mark.parametrize("against", [None, "mean", torch.arange(10, 15)])
def test_direct_effects_add_up_to_the_logit(model, against):
    e = episode()
    found = direct_effects(model, e, against=against)
    tokens = torch.cat([e.tokens, e.answer[:-1]])
    logits = model.hooked(tokens[None])[0, -len(e.answer) :].detach()
    right = logits.gather(1, e.answer[:, None])[:, 0]
    less = {type(None): lambda: 0.0, str: lambda: logits.mean(1)}.get(
        type(against), lambda: logits.gather(1, against[:, None])[:, 0]
    )()
    torch.testing.assert_close(found.logit, right - less, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.total, right - less, atol=1e-4, rtol=0)
    table = found.table
    assert table.groupby("step")["effect"].sum().to_numpy() == pytest.approx(found.logit.numpy(), abs=1e-4)
    row = table[(table["step"] == 3) & (table["part"] == "L1H2")].iloc[0]
    assert row["effect"] == float(found.heads[3, 1, 2]) and row["kind"] == "head" and row["layer"] == 1
    some = HeadSet([(1, 2), (0, 0)], model.shape)
    torch.testing.assert_close(found.of(some), found.heads[:, 1, 2] + found.heads[:, 0, 0])


def test_a_direct_effect_is_what_the_plain_weights_say(llama):
    """One head, from Hugging Face's own modules: its values through its columns, the norm with its scale, the head."""
    hf, e = build("llama"), episode()
    tokens, seen = torch.cat([e.tokens, e.answer[:2]]), {}
    projection = hf.model.layers[1].self_attn.o_proj
    projection.register_forward_pre_hook(lambda module, args: seen.update(z=args[0][0, -1]))
    hf.model.norm.register_forward_pre_hook(lambda module, args: seen.update(x=args[0][0, -1]))
    with torch.no_grad():
        hf(tokens[None])
        part = projection.weight[:, 16:24] @ seen["z"][16:24]
        scale = (seen["x"].pow(2).mean() + hf.config.rms_norm_eps).rsqrt()
        want = (part * scale * hf.model.norm.weight) @ hf.lm_head.weight[e.answer[2]]
    assert float(direct_effects(llama, e).heads[2, 1, 2]) == pytest.approx(float(want), abs=1e-5)


def test_direct_effects_of_the_planted_circuit(circuit):
    """The induction head whose turn it is writes the token; the decoy writes where nothing reads."""
    clean, twin = toy.episodes()
    found = direct_effects(circuit, clean, against=twin.answer)
    for step in (1, 2, 3) if len(clean.answer) > 3 else (1, 2):
        if clean.answer[step] == twin.answer[step]:
            continue
        whose = (1, 0) if step % 2 == 0 else (1, 2)
        flat = found.heads[step].flatten()
        assert divmod(int(flat.argmax()), 4) == whose and flat.max() > 0.8 * found.logit[step]
        assert abs(float(found.heads[step, 1, 1])) < 0.05 * flat.max()


@pytest.mark.parametrize("contrast", [False, True])
def test_what_a_head_reads_adds_up_to_its_score(model, contrast):
    e = episode()
    heads = HeadSet([(0, 1), (1, 0), (2, 3), (2, 2)], model.shape)
    found = read_keys(model, e, 2, heads, contrast=contrast)
    seen = {}
    hooks = [
        (f"blocks.{n}.attn.hook_attn_scores", lambda x, hook, n=n: seen.update({n: x[0, :, -1]})) for n in range(3)
    ]
    with model.hooked.hooks(fwd_hooks=hooks):
        model.hooked(torch.cat([e.tokens, e.answer[:2]])[None])
    span = e.span("needle")
    for i, (layer, head) in enumerate(found.heads):
        scores = seen[layer][head, span.start : span.stop].detach()
        key = int(found.keys[i]) - span.start
        others = torch.arange(len(scores)) != key
        assert key == int(scores.argmax())
        want = scores[key] - scores[others].mean() * contrast
        torch.testing.assert_close(found.total[i], want.repeat(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(found.score[i], want, atol=1e-4, rtol=0)
    sums = found.table.groupby(["head", "side"])["effect"].sum()
    assert sums["L2H2", "key"] == pytest.approx(float(found.score[2]), abs=1e-4)
    assert not found.parts[0, :, 1:].any(), "nothing but the embedding comes before the first layer"
    assert set(found.table[found.table["head"] == "L1H0"]["part"]) == {
        "embed", "bias", "L0.mlp", *(f"L0H{h}" for h in range(model.n_heads))
    }  # fmt: skip


def test_parts_of_a_score_are_what_taking_them_away_takes(llama):
    """Query side: the layer's input at the step's row less one head's output, the norm's scale kept."""
    e, head = episode(), (1, 3)
    found = read_keys(llama, e, 0, HeadSet([head], llama.shape))
    seen, hooks = {}, []
    hooks.append(("blocks.0.attn.hook_z", lambda z, hook: seen.update(z=z[0, -1, 4].clone())))
    hooks.append(("blocks.1.ln1.hook_scale", lambda s, hook: seen.update(scale=s[0, -1])))
    hooks.append(("blocks.1.attn.hook_attn_scores", lambda x, hook: seen.update(score=x[0, 3, -1].clone())))
    with torch.no_grad(), llama.hooked.hooks(fwd_hooks=hooks):
        llama.hooked(e.tokens[None])
        part = seen["z"] @ llama.hooked.blocks[0].attn.W_O[4]
        less = part / seen["scale"] * llama.hooked.blocks[1].ln1.weight @ llama.hooked.blocks[1].attn.W_Q[3]

    def without(q, hook):
        q = q.clone()
        q[0, -1, 3] -= less
        return q

    with torch.no_grad(), llama.hooked.hooks(fwd_hooks=[("blocks.1.attn.hook_q", without), hooks[2]]):
        llama.hooked(e.tokens[None])
    key = int(found.keys[0])
    sender = [str(s) for s in found.senders].index("L0H4")
    assert float(found.parts[0, 0, sender]) == pytest.approx(float(found.score[0] - seen["score"][key]), abs=1e-5)


def test_reading_of_the_planted_circuit(circuit):
    """An induction head asks with the token that is fed, and finds what the previous-token head wrote at the key."""
    clean, _ = toy.episodes()
    for step, head, before in ((2, (1, 0), "L0H0"), (1, (1, 2), "L0H2")):
        found = read_keys(circuit, clean, step, HeadSet([head], circuit.shape), contrast=True)
        assert int(found.keys[0]) == clean.span("needle").start + step + 1
        table = found.table
        for side, part in (("query", "embed"), ("key", before)):
            effects = table[table["side"] == side].set_index("part")["effect"]
            assert effects.idxmax() == part and effects[part] > 0.8 * float(found.score[0])


def test_keys_may_be_given(llama):
    e, heads = episode(), HeadSet([(1, 0), (2, 5)], llama.shape)
    start = e.span("needle").start
    found = read_keys(llama, e, 1, heads, keys={(1, 0): start + 2, (2, 5): start})
    assert found.keys.tolist() == [start + 2, start]
    with pytest.raises(ValueError, match=r"key must lie in the span, 13..19, got .* for L2H5"):
        read_keys(llama, e, 1, heads, keys={(1, 0): start + 2, (2, 5): 0})


def test_composition_scores_are_those_of_transformerlens(model):
    for mode in ("Q", "K", "V"):
        raw = composition_scores(model, mode, fold=False)
        want = model.hooked.all_composition_scores(mode).scores.detach().float()
        torch.testing.assert_close(raw, want, atol=1e-5, rtol=1e-4)
    some = composition_scores(model, "K", layers=(0, 2), fold=False)
    assert some[0, :, 2].equal(composition_scores(model, "K", fold=False)[0, :, 2]) and not some[:, :, 1].any()


def test_folding_takes_in_the_norm(llama):
    """By hand: one pair, with the norm's weight in between."""
    hf = build("llama")
    weight = torch.linspace(0.5, 2, 48)
    with torch.no_grad():
        hf.model.layers[2].input_layernorm.weight[:] = weight
    model = load(hf.requires_grad_(False), tokenizer=tokenizer())
    blocks = model.hooked.blocks
    ov = blocks[0].attn.W_V[1] @ blocks[0].attn.W_O[4]  # head 4 of 6 reads key/value head 1 of 2
    qk = (weight[:, None] * blocks[2].attn.W_Q[0]) @ (weight[:, None] * blocks[2].attn.W_K[0]).T
    for mode, right in (("Q", qk), ("K", qk.T)):
        want = (ov @ right).norm() / ov.norm() / right.norm()
        torch.testing.assert_close(composition_scores(model, mode)[0, 4, 2, 0], want, atol=1e-5, rtol=1e-4)


def test_the_planted_pair_composes_above_random_pairs(circuit):
    sets = {"previous": HeadSet([(0, 0)], circuit.shape), "induction": HeadSet([(1, 0)], circuit.shape)}
    table = composition(circuit, sets, draws=400).set_index(["sender", "receiver", "mode"])
    assert len(table) == 3 and (table["pairs"] == 1).all()
    rows = composition_scores(circuit, "K")[0, :, 1]
    assert table.loc[("previous", "induction", "K"), "score"] == pytest.approx(float(rows[0, 0])) == float(rows.max())
    # L1H1 shares the key and all but the query's constant: two of the sixteen pairs are as large
    assert table.loc[("previous", "induction", "K"), "p"] < 0.2 and (table["p_holm"] >= table["p"]).all()
    assert table["null"].to_numpy()[1] == pytest.approx(float(rows.mean()), rel=0.2)


def test_random_sets_have_as_many_heads_in_each_layer(llama):
    """Of two whole layers there is one draw only."""
    sets = {name: HeadSet([(n, h) for h in range(6)], llama.shape) for n, name in enumerate("ab")}
    table = composition(llama, sets, draws=5)
    assert table["score"].to_numpy() == pytest.approx(table["null_low"].to_numpy(), rel=1e-6)
    assert (table["p"] == 1).all() and (table["pairs"] == 36).all() and len(table) == 3


def test_bad_input(llama):
    e, heads = episode(), HeadSet([(1, 0)], llama.shape)
    with pytest.raises(ValueError, match="must hold a token for each of the 5 steps, got 2"):
        direct_effects(llama, e, against=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="there must be a token to ask about"):
        direct_effects(llama, e, torch.empty(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \(3, 6\), got \(1, 2\)"):
        direct_effects(llama, e).of(HeadSet([], (1, 2)))
    with pytest.raises(ValueError, match=r"0..4, got 5"):
        read_keys(llama, e, 5, heads)
    with pytest.raises(ValueError, match="step 1 has no heads"):
        read_keys(llama, e, 1, HeadSet([], llama.shape))
    with pytest.raises(ValueError, match=r"shape \(3, 6\), got \(9, 9\)"):
        read_keys(llama, e, 1, HeadSet([], (9, 9)))
    with pytest.raises(ValueError, match="span 'question' must end before"):
        read_keys(llama, e, 1, heads, span="question")
    with pytest.raises(ValueError, match="at least one set of heads and one draw, got 0 and 1000"):
        composition(llama, {})
    with pytest.raises(ValueError, match=r"got \(9, 9\) for x"):
        composition(llama, {"x": HeadSet([], (9, 9))})


def test_models_whose_parts_do_not_add_up_are_refused():
    gemma = load(build("gemma3").requires_grad_(False), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="the logit must be a sum over embedding, heads and MLPs"):
        direct_effects(gemma, episode())


def test_smollm2_adds_up(smollm2):
    generator = torch.Generator().manual_seed(0)
    e = episode(60)
    e = type(e)("e", torch.randint(20, 40_000, (60,), generator=generator), e.answer + 500, e.spans, e.meta)
    found = direct_effects(smollm2, e, against="mean")
    torch.testing.assert_close(found.total, found.logit, atol=1e-4, rtol=0)
    read = read_keys(smollm2, e, 1, HeadSet(["L7H7", "L14H3", "L29H0"], smollm2.shape))
    torch.testing.assert_close(read.total, read.score[:, None].expand(-1, 2), atol=1e-4, rtol=1e-5)
