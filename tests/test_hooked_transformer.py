"""A HookedTransformer (TransformerLens 3.9) is observed like the bridge of the same weights."""

import dataclasses
import importlib.util
import re
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformer_lens
import zoo
from tiny import build, episode, tokenizer

from dhlens.edits import hide, mean, patch, resample, uniform, zero
from dhlens.engine import generate, observe
from dhlens.heads import HeadSet
from dhlens.lanes import Lane, decode
from dhlens.model import load
from dhlens.policies import Dynamic, Static
from dhlens.reads import Capture
from dhlens.recipes import Observation, scan
from dhlens.scores import reasoning_mass
from dhlens.shadow import effects

if not importlib.util.find_spec("transformer_lens.HookedTransformer") or not hasattr(
    transformer_lens, "HookedTransformer"
):
    pytest.skip("this TransformerLens has no HookedTransformer (3.9 is the last)", allow_module_level=True)

CAPTURE = Capture(k=3, rows=True, hidden=("final", "resid_0"))


def hooked_transformer(hf, tok, **processing):
    """The same weights in a HookedTransformer, nothing folded unless asked for."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights

    gpt2 = type(hf).__name__ == "GPT2LMHeadModel"
    cfg = HookedTransformerConfig(
        n_layers=hf.config.num_hidden_layers,
        d_model=hf.config.hidden_size,
        n_ctx=hf.config.max_position_embeddings,
        n_heads=hf.config.num_attention_heads,
        d_vocab=hf.config.vocab_size,
        model_name=type(hf).__name__,
        original_architecture=type(hf).__name__,
        device="cpu",
        **(_gpt2 if gpt2 else _llama)(hf.config),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg, tokenizer=None)
    names = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    weights = (convert_gpt2_weights if gpt2 else convert_llama_weights)(hf, cfg)
    model.load_and_process_state_dict(weights, **dict.fromkeys(names, False) | processing)
    model.tokenizer = tok
    return model.eval()


def _llama(c):
    return {
        "d_head": c.head_dim,
        "n_key_value_heads": c.num_key_value_heads,
        "d_mlp": c.intermediate_size,
        "act_fn": "silu",
        "eps": c.rms_norm_eps,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_base": int(c.rope_parameters["rope_theta"]),
        "rotary_dim": c.head_dim,
        "gated_mlp": True,
        "final_rms": True,
    }


def _gpt2(c):
    return {
        "d_head": c.n_embd // c.n_head,
        "d_mlp": 4 * c.n_embd,
        "act_fn": "gelu_new",
        "eps": c.layer_norm_epsilon,
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
    }


def pair_of(hf, tok):
    return load(hf, tokenizer=tok), load(hooked_transformer(hf, tok))


def normed_llama():
    """The tiny Llama with norm weights that are not all ones, so that folding them shows."""
    hf = build("llama")
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
    hf.set_attn_implementation("eager")
    return hf


@pytest.fixture(scope="module")
def tiny_pair():
    return pair_of(normed_llama(), tokenizer())


@pytest.fixture(scope="module")
def gpt2_pair():
    return pair_of(zoo.build("gpt-2"), tokenizer())


def same(a, b, atol):
    """Two traces of the same episodes agree in every number."""
    assert torch.equal(a.next_token, b.next_token) and torch.equal(a.position, b.position)
    for name in ("peak_weight", "mass", "mass_core", "logprob", "entropy"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=atol, rtol=0)
    clear = (a.peak_weight[..., :-1] - a.peak_weight[..., 1:]).amin(-1) > 10 * atol
    assert torch.equal(a.peak_key[clear][:, :2], b.peak_key[clear][:, :2])
    for site, hidden in a.hidden.items():
        torch.testing.assert_close(hidden, b.hidden[site], atol=100 * atol, rtol=0)


@pytest.mark.parametrize("draft", [True, False])
def test_tiny_llama(tiny_pair, draft):
    bridge, hooked = tiny_pair
    episodes = [episode(name="a"), episode(60, name="b", seed=1)]
    a = observe(bridge, episodes, max_new_tokens=10, draft=draft, capture=CAPTURE, progress=False)
    b = observe(hooked, episodes, max_new_tokens=10, draft=draft, capture=CAPTURE, progress=False)
    same(a, b, 1e-5)
    torch.testing.assert_close(a.rows, b.rows, atol=1e-3, rtol=0)
    assert b.card.settings["twin"] is False and "4-D mask" in hooked.limits["shadow_rows"]


def test_prompt_rows_and_generate(tiny_pair):
    bridge, hooked = tiny_pair
    a = observe(bridge, [episode()], rows="question", capture=CAPTURE, progress=False)
    b = observe(hooked, [episode()], rows="question", capture=CAPTURE, progress=False)
    same(a, b, 1e-5)
    said = [generate(m, [episode()], max_new_tokens=8, progress=False)[0].tokens.tolist() for m in tiny_pair]
    assert said[0] == said[1]


def test_hooks_are_left_as_they_were(tiny_pair):
    hooked = tiny_pair[1]
    point = hooked.hooked.blocks[0].attn.hook_pattern
    point.add_hook(lambda pattern, hook: None)
    observe(hooked, [episode()], max_new_tokens=3, progress=False)
    assert len(point.fwd_hooks) == 1
    point.remove_hooks()


@pytest.mark.parametrize("pair", ["tiny_pair", "gpt2_pair"])
def test_every_edit_decodes_alike(pair, request):
    """Lanes of all edits at once, with a policy that looks and one that does not, under either commit."""
    models = request.getfixturevalue(pair)
    e, other = episode(), episode(name="other", seed=3)
    heads = HeadSet(["L0H1", "L1H3", "L2H0", "L2H5"], models[0].shape)
    source, reference = (
        observe(models[0], [x], max_new_tokens=5, capture=Capture(z=True), progress=False) for x in (other, e)
    )
    edits = {
        "zero": zero(),
        "mean": mean(reference),
        "uniform": uniform(),
        "resample": resample(source, seed=0),
        "patch": patch(source),
        "hide": hide([14, 15]),
    }
    looking = Dynamic(score=lambda trace: reasoning_mass(trace, "question"), threshold=0.2)
    lanes = {name: Lane(Static(heads), edit) for name, edit in edits.items()} | {"dynamic": looking, "none": None}
    near = dataclasses.replace(CAPTURE, sink=1, local=2)
    for commit in ("edited", "clean"):
        a, b = (decode(m, [e], lanes, commit=commit, max_new_tokens=5, capture=near, progress=False) for m in models)
        for name in lanes:
            same(a[name], b[name], 1e-4)
            assert torch.equal(a[name].heads_used, b[name].heads_used)
        assert a["dynamic"].heads_used.any()


@pytest.mark.parametrize("pair", ["tiny_pair", "gpt2_pair"])
def test_effects_alike_row_by_row(pair, request):
    bridge, hooked = request.getfixturevalue(pair)
    said = generate(bridge, [episode()], max_new_tokens=5, progress=False)[0].tokens
    draw = torch.rand(8, *bridge.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    sets = [(i % len(said), HeadSet.from_mask(d)) for i, d in enumerate(draw)]
    for edit in (zero(), uniform(), hide([14])):
        a, b = (effects(m, episode(), said, sets, edit=edit).table for m in (bridge, hooked))
        pd.testing.assert_frame_equal(a, b, check_exact=False, atol=2e-4, rtol=1e-3)
    assert "shadow_rows" in hooked.limits and "shadow_rows" not in bridge.limits


def test_a_scan_gives_the_same_tables(tiny_pair):
    asked = [episode(60, name=f"e{i}", seed=i % 4, prefix=episode(60, seed=i % 4).tokens[: 59 - i]) for i in range(8)]
    said = generate(tiny_pair[0], asked, max_new_tokens=6, progress=False)
    told = [
        dataclasses.replace(e, meta={"group": e.group, "answer_text": o.text, "length": 60, "depth": 0.3})
        for e, o in zip(asked, said, strict=True)
    ]
    a, b = (scan(m, told, observation=Observation(6, draft=False), progress=False) for m in tiny_pair)
    assert "dynamics" in a.tables and list(a.tables) == list(b.tables)
    for name, table in a.tables.items():
        pd.testing.assert_frame_equal(table, b.tables[name], check_exact=False, rtol=1e-4, obj=name)


def test_the_final_state_has_weight_and_bias(gpt2_pair):
    """What the unembedding reads, on a LayerNorm as well, whose bias its own hook lacks."""
    a, b = (observe(m, [episode()], max_new_tokens=4, capture=CAPTURE, progress=False) for m in gpt2_pair)
    torch.testing.assert_close(a.hidden["final"], b.hidden["final"], atol=1e-4, rtol=0)


FOLDED = {"fold_ln": True, "center_writing_weights": True, "center_unembed": True, "fold_value_biases": True}


@pytest.mark.parametrize(("kind", "biased"), [("llama", False), ("gpt-2", True)])
def test_folded_weights_say_what_differs(kind, biased):
    """from_pretrained's own processing: a warning names what is not as in the raw weights; the rest is."""
    hf = zoo.build(kind) if biased else normed_llama()
    raw = load(hooked_transformer(hf, tokenizer()))
    with pytest.warns(UserWarning, match="has folded weights: the hidden site 'final' lacks") as said:
        folded = load(hooked_transformer(hf, tokenizer(), **FOLDED))
    assert "raw_weights" not in raw.limits and folded.limits["raw_weights"] == str(said[0].message)
    assert ("value bias" in folded.limits["raw_weights"]) == biased
    e, capture = episode(), dataclasses.replace(CAPTURE, hidden=("final",))
    a, b = (observe(m, [e], max_new_tokens=5, capture=capture, progress=False) for m in (raw, folded))
    assert not torch.allclose(a.hidden["final"], b.hidden["final"], atol=1e-2)
    same(dataclasses.replace(a, hidden={}), dataclasses.replace(b, hidden={}), 1e-4)
    sets = [(0, HeadSet(["L1H2"], raw.shape)), (2, HeadSet(["L0H1", "L2H3"], raw.shape))]
    for edit, alike in ((zero(), not biased), (uniform(), True), (hide([14]), True)):
        x, y = (effects(m, e, a.next_token, sets, edit=edit) for m in (raw, folded))
        torch.testing.assert_close(x.logprob_clean, y.logprob_clean, atol=1e-4, rtol=0)
        assert torch.allclose(x.logprob, y.logprob, atol=1e-4) == alike, edit.__name__


def test_the_page_runs_and_both_of_its_ways_agree(monkeypatch):
    """docs/hooked-transformer.md, on a small GPT-2 whose answer is a token of the needle."""
    import transformer_lens

    page = Path(__file__).parents[1] / "docs" / "hooked-transformer.md"
    before, after = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    small = hooked_transformer(zoo.build("gpt-2"), tokenizer())
    small.unembed.b_U.data[50] += 4  # a needle, a model that says it, and a prompt whose last row looks at it
    for seed in range(20):
        tokens = episode(16, seed=seed).tokens[None]
        tokens[0, 4:6] = 50
        cache = small.run_with_cache(tokens)[1]
        if any(
            bool(torch.isin(cache["pattern", i][0, :, -1].argmax(-1), torch.tensor([4, 5])).any()) for i in range(3)
        ):
            break
    monkeypatch.setattr(small, "to_tokens", lambda text, prepend_bos: tokens)
    monkeypatch.setattr(transformer_lens.HookedTransformer, "from_pretrained_no_processing", lambda name: small)
    names = {}
    exec(before, names)
    exec(after, names)
    assert names["said"] == 50 and names["copying"]
    assert set(names["heads"]) == set(names["copying"])
    assert names["table"]["logprob"][0] == pytest.approx(names["logprob"], abs=1e-4)
    assert names["table"]["size"][0] == len(names["copying"])


def test_smollm2(smollm2):
    from dhlens.tasks import niah

    episodes = niah.episodes(smollm2.tokenizer, lengths=(300,), depths=(0.5,), n=2, seed=0)
    hooked = load(hooked_transformer(smollm2.twin, smollm2.tokenizer))
    a = observe(smollm2, episodes, max_new_tokens=48, progress=False)
    b = observe(hooked, episodes, max_new_tokens=48, progress=False)
    assert any(o.correct for o in a.outcomes)
    same(a, b, 1e-4)


PROCESSING = {
    "center_writing_weights": "may lack its mean",
    "fold_value_biases": "leaves its value bias behind",
    "refactor_factored_attn_matrices": "leaves its value bias behind",
}


@pytest.mark.parametrize("option", PROCESSING)
def test_each_processing_by_itself_is_noticed(option):
    hf = zoo.build("gpt-2")
    with torch.no_grad():
        for block in hf.transformer.h:
            block.attn.c_attn.bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="has folded weights") as said:
        load(hooked_transformer(hf, tokenizer(), **{option: True}))
    assert PROCESSING[option] in str(said[0].message)


def test_ungrouped_keys_are_refused_with_the_way_out():
    hooked = hooked_transformer(normed_llama(), tokenizer())
    hooked.set_ungroup_grouped_query_attention(True)
    with pytest.raises(ValueError, match=r"set_ungroup_grouped_query_attention\(False\) before loading"):
        load(hooked)
