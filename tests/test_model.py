"""Loading: what is accepted and refused, what is shared, and a self-check that can fail."""

from typing import Any

import pytest
import torch
from tiny import VOCAB, build, eager, episode, tokenizer
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import dhlens.check
from dhlens.check import check
from dhlens.engine import observe
from dhlens.model import load


@pytest.fixture
def model():
    return load(build("llama"), tokenizer=tokenizer())


def test_the_callers_model_is_left_alone_and_weights_are_shared():
    hf = build("llama")
    hf.set_attn_implementation("eager")
    kinds = [type(m) for m in hf.modules()]
    model = load(hf, tokenizer=tokenizer())
    assert [type(m) for m in hf.modules()] == kinds
    assert hf.config._attn_implementation == "eager" and model.twin.config._attn_implementation == "sdpa"
    weight = hf.model.layers[0].self_attn.q_proj.weight
    assert model.twin.model.layers[0].self_attn.q_proj.weight is weight
    assert model.hooked.original_model.state_dict()  # the bridge still exports
    assert any(p is weight for p in model.hooked.parameters())


def test_zeroed_head_equals_zeroed_projection_columns(model):
    hf = build("llama")
    tokens = episode().tokens
    with torch.no_grad():
        hf.model.layers[1].self_attn.o_proj.weight[:, 8 * 4 : 8 * 5] = 0
        want = hf(tokens[None]).logits

    def zero(z, hook):
        z = z.clone()
        z[:, :, 4] = 0
        return z

    got = model.stream().feed(tokens[None], hooks=[("blocks.1.attn.hook_z", zero)], keep=len(tokens))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_a_bridge_of_the_callers_gives_the_same_trace(model):
    e = episode()
    alone = load(model.hooked, tokenizer=model.tokenizer)
    a = observe(model, [e], max_new_tokens=6, progress=False)
    b = observe(alone, [e], max_new_tokens=6, progress=False)
    torch.testing.assert_close(a.mass, b.mass, atol=1e-5, rtol=0)
    assert torch.equal(a.next_token, b.next_token) and b.card.settings["twin"] is False


def test_bfloat16_is_observed_in_float32_sums():
    model = load(build("llama").bfloat16(), tokenizer=tokenizer())
    trace = observe(model, [episode()], max_new_tokens=6, progress=False)
    assert model.card.dtype == "bfloat16" and trace.mass.dtype == torch.float32
    torch.testing.assert_close(trace.mass[:, -1], torch.ones_like(trace.mass[:, -1]), atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("smollm2-135", ValueError, "smollm2-135m"),
        (3, TypeError, "TransformerBridge"),
        (nn.Linear(2, 2), TypeError, "Linear"),
    ],
)
def test_what_is_no_model(source, error, message):
    with pytest.raises(error, match=message):
        load(source)


def test_devices_that_are_not_there(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device cuda is not there; usable here: cpu"):
        load(tmp_path, device="cuda", tokenizer=tokenizer())
    with pytest.raises(ValueError, match="no tokenizer"):
        load(build("llama"))


def test_a_folder_loads_and_names_its_weights(tmp_path):
    build("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu")
    assert model.path == tmp_path and len(model.card.weights_sha256) == 64
    assert model.stop_ids == (1,) and model.shape == (3, 6) and model.n_kv_heads == 2


def test_several_stop_ids_come_from_the_generation_config():
    hf = build("llama")
    hf.generation_config.eos_token_id = [1, 7]
    assert load(hf, tokenizer=tokenizer()).stop_ids == (1, 7)


class Scaled(nn.Module):
    """A hook point's worth of damage: multiplies what passes."""

    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.inner(x) * self.factor


def test_the_self_check_can_fail(model):
    attention = model.hooked.blocks[1].attn
    cases = [
        ("hook_pattern", 0.5, "rows of blocks.1.attn.hook_pattern do not sum to 1; observe is refused"),
        ("hook_pattern", float("nan"), "not finite"),
    ]
    for name, factor, message in cases:
        point = getattr(attention, name)
        handle = point.register_forward_hook(lambda module, args, out, factor=factor: out * factor)
        with pytest.raises(ValueError, match=message):
            check(model)
        handle.remove()
    last = model.hooked.blocks[2].attn
    handle = last.o.original_component.register_forward_hook(lambda module, args, out: out * 0)
    with pytest.raises(ValueError, match=r"blocks.2.attn.hook_z does not reach the logits; edits are refused"):
        check(model)
    handle.remove()
    with torch.no_grad():
        model.twin.lm_head.weight = nn.Parameter(model.twin.lm_head.weight * 1.5)
    with pytest.raises(ValueError, match=r"plain decoding .the twin. differ .* observe is refused"):
        check(model)


def test_architectures_that_are_refused_or_limited():
    base = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
    sinks = GptOssForCausalLM(
        GptOssConfig(**base, **heads, num_local_experts=2, num_experts_per_tok=2, sliding_window=16)
    ).eval()
    with pytest.raises(ValueError, match=r"GptOssForCausalLM.: rows of blocks.0.* do not sum to 1; observe is refused"):
        load(sinks, tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"MambaForCausalLM. has no usable attention hooks"):
        load(
            MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2)), tokenizer=tokenizer()
        )
    shape = {"num_attention_heads": 6, "ffn_dim": 64, "word_embed_proj_dim": 48}
    opt = load(OPTForCausalLM(OPTConfig(**base, **shape)).eval(), tokenizer=tokenizer())
    assert "blocks.0.attn.hook_attn_scores" in opt.limits["hide"]


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_learned_and_partial_positions(kind):
    shape = {"vocab_size": VOCAB, "bos_token_id": 2, "eos_token_id": 1}
    hf: Any = (
        GPT2LMHeadModel(GPT2Config(**shape, n_embd=48, n_layer=3, n_head=6, n_positions=256))
        if kind == "gpt2"
        else GPTNeoXForCausalLM(GPTNeoXConfig(**shape, hidden_size=48, num_hidden_layers=3, num_attention_heads=6))
    )
    hf.eval().set_attn_implementation("eager")
    model, e = load(hf, tokenizer=tokenizer()), episode()
    trace = observe(model, [e], max_new_tokens=4, progress=False)
    _, pattern, _ = eager(hf, torch.cat([e.tokens, trace.next_token[:-1]]))
    torch.testing.assert_close(
        trace.peak_weight[..., 0], pattern[:, :, -4:].amax(-1).permute(2, 0, 1), atol=1e-5, rtol=0
    )


def test_a_failed_shadow_pass_limits_but_does_not_refuse(model, monkeypatch):
    monkeypatch.setattr(dhlens.check, "shadow_positions", lambda *args: torch.arange(7)[None])
    check(model)
    assert "shadow rows" in model.limits["shadow_rows"]
