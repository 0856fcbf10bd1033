"""Where weights go: hooks on the device of their layer, models that accelerate spread, fewer bits, and refusals."""

import sys
from types import ModuleType

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from tiny import build, episode, tokenizer
from torch import nn
from toy_traces import toy_trace

from dhlens import devices, edits, reads
from dhlens.devices import find_device, memory_of, placement, read_size, refuse_offloaded
from dhlens.engine import observe
from dhlens.heads import HeadSet
from dhlens.model import load
from dhlens.shadow import effects

PARTS = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", *(f"model.layers.{i}" for i in range(3)))


def spread(name="llama"):
    """A model that accelerate has dispatched part by part, its hooks on every module."""
    return dispatch_model(build(name), dict.fromkeys(PARTS, "cpu"), force_hooks=True)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_spread_model_gives_the_same_trace_and_effects(name):
    dispatched = spread(name)
    assert hasattr(dispatched.model.layers[1].mlp, "_hf_hook")
    model, plain = (load(hf, tokenizer=tokenizer()) for hf in (dispatched, build(name)))
    assert hasattr(model.twin.model.layers[1], "_hf_hook"), "the copies are spread too"
    e = episode()
    a, b = (observe(m, [e], max_new_tokens=6, progress=False) for m in (model, plain))
    assert torch.equal(a.next_token, b.next_token) and torch.equal(a.mass, b.mass)
    answer, heads = b.outcomes[0].tokens, HeadSet([(0, 1), (2, 3)], plain.shape)
    found = [effects(m, e, answer, [(1, heads)]).table for m in (model, plain)]
    assert found[0].equals(found[1])


def test_copies_of_a_spread_model_run_their_own_modules():
    """What accelerate puts around a forward pass must be the copy's, or hooks would sit on one and work on another."""
    dispatched = spread()
    model = load(dispatched, tokenizer=tokenizer())
    with torch.no_grad():
        before = dispatched(episode().tokens[None]).logits
        model.twin.model.layers[0].mlp = nn.Identity()
        assert torch.equal(dispatched(episode().tokens[None]).logits, before)


META = torch.device("meta")
PATTERN = torch.empty(1, 2, 3, 9, device=META)
Z = torch.empty(1, 3, 2, 4, device=META)


def test_reads_run_where_their_layer_is():
    """Meta tensors refuse to meet others, as two accelerators would."""
    out: reads.Readings = {}
    hooks = [
        *reads.mass(out, n_layers=1, spans=[(0, 3)], keys=9),
        *reads.focus(out, n_layers=1, at=torch.tensor([1, 2]), keys=9),
        *reads.rows(out, n_layers=1, keys=9),
    ]
    for _, hook in hooks:
        hook(PATTERN, None)
    assert {v[0].device for v in out.values()} == {META} and set(out) == {"mass", "mass_core", "focus", "rows"}


@pytest.mark.parametrize("name", ["zero", "mean", "patch", "uniform"])
def test_edits_run_where_their_layer_is(name):
    trace = toy_trace(torch.zeros(1, 3, 1, 2, dtype=torch.bool))
    object.__setattr__(trace, "z", torch.ones(len(trace), 1, 2, 4))
    edit = {"zero": edits.zero, "uniform": edits.uniform}.get(name, lambda: getattr(edits, name)(trace))()
    ((_, hook),) = edit(HeadSet([(0, 1)], (1, 2)), rows=None, steps=[0, 1, 2], keys=9)
    given = PATTERN if name == "uniform" else Z
    assert hook(given, None).device == META


def test_auto_on_a_machine_without_accelerators_is_the_cpu(tmp_path):
    build("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load(str(tmp_path), device="auto")
    assert model.device.type == "cpu" and "quantize" not in model.card.settings and model.named


def test_weights_that_lie_elsewhere_are_refused():
    with pytest.raises(
        ValueError, match=r"weights must lie on the devices that compute; model\.embed_tokens.*dhlens plan"
    ):
        load(cpu_offload(build("llama"), execution_device="cpu"), tokenizer=tokenizer())
    hf = build("llama")
    for places, part in (({"model": 0, "lm_head": "cpu"}, "lm_head"), ({"model": "cpu", "lm_head": "disk"}, "lm_head")):
        hf.hf_device_map = places
        with pytest.raises(ValueError, match=f"compute; {part} would"):
            refuse_offloaded(hf)
    hf.hf_device_map = {"model": 0, "lm_head": 1}
    refuse_offloaded(hf)


def test_missing_packages_are_named_before_any_work(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    monkeypatch.setattr("dhlens.model.resolve", lambda name: pytest.fail("said before any work"))
    with pytest.raises(
        ModuleNotFoundError, match=r"quantize='4bit' needs the package bitsandbytes: pip .*dhlens\[big\]"
    ):
        load("qwen3-8b", quantize="4bit")
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="spreading a model over devices needs the package accelerate"):
        load("qwen3-8b", device="auto")
    with pytest.raises(ValueError, match="quantize must be one of 8bit, 4bit, got '3bit'"):
        load("qwen3-8b", quantize="3bit")
    with pytest.raises(ValueError, match="object is taken as it is"):
        load(build("llama"), tokenizer=tokenizer(), quantize="8bit")


def test_what_is_asked_of_transformers(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: object())
    monkeypatch.setattr(devices, "BitsAndBytesConfig", lambda **given: given)
    assert placement("cpu", None, torch.float32) == (torch.device("cpu"), {})
    assert placement("auto", None, torch.float32) == (None, {"device_map": "auto"})
    _, eight = placement("cpu", "8bit", torch.bfloat16)
    assert eight == {"quantization_config": {"load_in_8bit": True}, "device_map": {"": torch.device("cpu")}}
    _, four = placement("auto", "4bit", torch.bfloat16)
    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    assert four == {"quantization_config": bits, "device_map": "auto"}


class EightBit(nn.Linear):
    """Keeps its scales as bitsandbytes does: in the weight until its first pass, then in a state."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        scale = plain.weight.abs().amax(1, keepdim=True)
        self.weight = nn.Parameter(plain.weight / scale, requires_grad=False)
        self.weight.scale = scale.detach()
        self.state = ModuleType("state")
        self.state.scale = None

    def init_8bit_state(self):
        self.state.scale, self.weight.scale = self.weight.scale, None

    def forward(self, x):
        if self.weight.scale is not None:
            self.init_8bit_state()
        scale = 1 if self.state.scale is None else self.state.scale[:, 0]
        return nn.functional.linear(x, self.weight) * scale


def test_copies_share_the_scales_of_eight_bit_layers():
    """Else the copy that runs second finds none, and the self-check refuses the model."""
    hf = build("llama").requires_grad_(False)
    for layer in hf.model.layers:
        layer.mlp.down_proj = EightBit(layer.mlp.down_proj)
    model = load(hf, tokenizer=tokenizer())
    a, b = (
        observe(m, [episode()], max_new_tokens=6, progress=False)
        for m in (model, load(build("llama"), tokenizer=tokenizer()))
    )
    assert torch.equal(a.next_token, b.next_token)
    torch.testing.assert_close(a.mass, b.mass, atol=1e-5, rtol=0)


@pytest.mark.skipif(
    "bitsandbytes" not in sys.modules and devices.find_spec("bitsandbytes") is None, reason="bitsandbytes"
)
@pytest.mark.parametrize("bits", devices.QUANTIZED)
@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
def test_a_model_in_fewer_bits_is_proven_and_says_so(tmp_path, bits):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=97, eos_token_id=1, **shape)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load(str(tmp_path), device="cpu", quantize=bits, dtype=torch.bfloat16)
    trace = observe(model, [episode()], max_new_tokens=4, progress=False)
    assert trace.card.settings["quantize"] == bits and not model.named and model.dtype == torch.bfloat16
    assert type(model.twin.model.layers[0].mlp.up_proj).__name__ == {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[bits]


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("1.5g", 15 * 10**8), ("512MiB", 2**29), (1000, 1000), ("7", 7)],
)
def test_sizes(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "80 XB", 0, "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="a memory size reads like 80GB"):
        read_size(text)


def test_devices_that_are_there():
    assert find_device("cpu") == torch.device("cpu") and memory_of("cpu") > 2**28
    with pytest.raises(ValueError, match="device cuda:77 is not there; usable here: cpu"):
        find_device("cuda:77")
