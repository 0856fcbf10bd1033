"""Loading: what is accepted and refused, what is shared, and a self-check that can fail."""

import copy

import pytest
import torch
import zoo
from tiny import build, episode, tokenizer
from torch import nn

import dhlens.check
from dhlens.check import check
from dhlens.engine import observe
from dhlens.heads import HeadSet
from dhlens.lanes import decode
from dhlens.model import load
from dhlens.policies import Static


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


def test_a_bridge_of_the_callers_gives_the_same_trace(model):
    e = episode()
    alone = load(model.hooked, tokenizer=model.tokenizer)
    a = observe(model, [e], max_new_tokens=6, progress=False)
    b = observe(alone, [e], max_new_tokens=6, progress=False)
    torch.testing.assert_close(a.mass, b.mass, atol=1e-5, rtol=0)
    assert torch.equal(a.next_token, b.next_token) and b.card.settings["twin"] is False


def test_a_callers_bridge_keeps_its_hooks_and_its_state():
    bridge, calls = load(build("llama"), tokenizer=tokenizer()).hooked, []
    point = bridge.blocks[1].attn.hook_pattern
    point.add_hook(lambda pattern, hook: calls.append(pattern.shape))
    bridge.train()
    before = {name: p.clone() for name, p in bridge.named_parameters()}
    hooks = [len(p.fwd_hooks) for p in bridge.hook_dict.values()]
    kept = (bridge.tokenizer, copy.deepcopy(bridge.cfg.to_dict()), hooks)
    grads = [p.requires_grad for p in bridge.parameters()]
    loaded = load(bridge)
    observe(loaded, [episode()], max_new_tokens=3, progress=False)
    decode(loaded, [episode()], {"a": Static(HeadSet(["L1H2"], loaded.shape))}, max_new_tokens=3, progress=False)
    assert loaded.hooked is bridge and calls, "the caller's own hook fires all the while"
    after = (bridge.tokenizer, bridge.cfg.to_dict(), [len(p.fwd_hooks) for p in bridge.hook_dict.values()])
    assert after[0] is kept[0] and after[1:] == kept[1:] and bridge.training
    assert grads == [p.requires_grad for p in bridge.parameters()]
    assert all(torch.equal(before[name], p) for name, p in bridge.named_parameters())


def test_a_bridge_whose_weights_were_folded_says_so():
    bridge = load(zoo.build("llama-3.1"), tokenizer=tokenizer()).hooked
    raw = observe(load(bridge), [episode()], max_new_tokens=4, progress=False)
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.warns(UserWarning, match="folded weights: the hidden site 'final' lacks the last norm's weight"):
        folded = load(bridge)
    seen = observe(folded, [episode()], max_new_tokens=4, progress=False)
    torch.testing.assert_close(raw.mass, seen.mass, atol=1e-4, rtol=0)
    torch.testing.assert_close(raw.logprob, seen.logprob, atol=1e-4, rtol=0)
    assert not torch.allclose(raw.hidden["final"], seen.hidden["final"], atol=1e-2)


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


def test_a_failed_shadow_pass_limits_but_does_not_refuse(model, monkeypatch):
    monkeypatch.setattr(dhlens.check, "shadow_positions", lambda *args: torch.arange(7)[None])
    check(model)
    assert "shadow rows" in model.limits["shadow_rows"]
