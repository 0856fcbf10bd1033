"""A HookedTransformer (TransformerLens 3.9) is observed like the bridge of the same weights."""

import importlib.util
import warnings

import pytest
import torch
import transformer_lens
from tiny import build, episode, tokenizer

from dhlens.engine import generate, observe
from dhlens.model import load
from dhlens.reads import Capture

if not importlib.util.find_spec("transformer_lens.HookedTransformer") or not hasattr(
    transformer_lens, "HookedTransformer"
):
    pytest.skip("this TransformerLens has no HookedTransformer (3.9 is the last)", allow_module_level=True)

CAPTURE = Capture(k=3, rows=True, hidden=("final", "resid_0"))


def hooked_transformer(hf, tok):
    """The same Llama weights in a HookedTransformer, nothing folded."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    c = hf.config
    cfg = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=c.max_position_embeddings,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn="silu",
        eps=c.rms_norm_eps,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_base=int(c.rope_parameters["rope_theta"]),
        rotary_dim=c.head_dim,
        gated_mlp=True,
        final_rms=True,
        model_name="llama",
        original_architecture="LlamaForCausalLM",
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg, tokenizer=None)
    model.load_and_process_state_dict(
        convert_llama_weights(hf, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    model.tokenizer = tok
    return model.eval()


def pair_of(hf, tok):
    return load(hf, tokenizer=tok), load(hooked_transformer(hf, tok))


@pytest.fixture(scope="module")
def tiny_pair():
    hf = build("llama")
    hf.set_attn_implementation("eager")
    return pair_of(hf, tokenizer())


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


def test_smollm2(smollm2):
    from dhlens.tasks import niah

    episodes = niah.episodes(smollm2.tokenizer, lengths=(300,), depths=(0.5,), n=2, seed=0)
    hooked = load(hooked_transformer(smollm2.twin, smollm2.tokenizer))
    a = observe(smollm2, episodes, max_new_tokens=48, progress=False)
    b = observe(hooked, episodes, max_new_tokens=48, progress=False)
    assert any(o.correct for o in a.outcomes)
    same(a, b, 1e-4)
