"""Plans from the config alone: published sizes, and what real models, caches and traces hold."""

import json
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from tiny import MODELS, WINDOW, build, episode, phi_longrope, tokenizer
from transformers import (
    BertConfig,
    BloomConfig,
    DynamicCache,
    FalconConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    T5Config,
)
from typer.testing import CliRunner

from dhlens.cli import app
from dhlens.devices import find_device
from dhlens.engine import observe
from dhlens.model import load
from dhlens.plan import FOCUS, SPANS, _check_lengths, plan, row_bytes
from dhlens.reads import Capture
from dhlens.skeleton import Meter, prefill, skeleton
from dhlens.stream import CHUNK
from dhlens.weights import EMBEDDED, Packaged, read_config

LLAMA_3_1_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
LLAMA_2_13B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    path = tmp_path_factory.mktemp("big") / "config.json"
    path.write_text(json.dumps(LLAMA_3_1_8B))
    return path


@pytest.fixture(scope="module")
def eight(big):
    return plan(big, (5000, 50000), memory="80GB")


def test_published_sizes_of_an_8b_model(eight):
    """8,030,261,248 parameters and 2 x 32 layers x 8 KV heads x 128 x 2 bytes = 131,072 bytes of cache a token."""
    assert sum(eight.parameters.values()) == 8_030_261_248
    assert eight.weights == 2 * 8_030_261_248
    assert eight.parameters["embedding"] == eight.parameters["head"] == 128256 * 4096
    assert eight.parameters["attention"] == 32 * 4096 * (4096 + 1024 + 1024 + 4096)
    assert eight.parameters["mlp"] == 32 * 3 * 4096 * 14336 and eight.parameters["other"] == 65 * 4096
    assert list(eight.table["cache"]) == [131_072 * 5000, 131_072 * 50000]
    assert eight.shape == (32, 32) and eight.n_kv_heads == 8 and not eight.warnings


def test_work_of_an_8b_model_worked_by_hand(eight):
    """Two operations per weight of a linear layer and token, 4 x d_head x heads per pair of query and seen key."""
    linear, pair, n = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336), 32 * 4 * 128 * 32, 5000
    head = 2 * 4096 * 128256
    first = eight.table.iloc[0]
    step, prefill = 2 * linear + pair * n + head, (n - 1) * 2 * linear + pair * (n - 1) * n // 2 + head
    # the hooked pass computes what its mask hides, and sums two masses over spans
    block = 48 * (2 * linear + pair * (n + 48) + head + 2 * 2 * SPANS * (n + 48) * 32 * 32)
    for name, worked in (("step", step), ("prefill", prefill), ("block", block)):
        assert first[f"{name}_flops"] == pytest.approx(worked, rel=1e-6)  # the rest are rotary angles
    read = 2 * (8_030_261_248 - 128256 * 4096)
    assert first["step_bytes"] == read + 131_072 * n and first["prefill_bytes"] == read + 131_072 * (n - 1)


def test_memory_of_an_8b_model_is_sane(eight):
    """No more than a few copies of the widest rows beyond the cache, and it grows with the prompt."""
    small, large = (eight.table.iloc[i] for i in (0, 1))
    for row in (small, large):
        n, cache = row["length"], row["cache"]
        widest = n * 14336 * 2
        assert cache + 3 * widest < row["prefill_memory"] < cache + 5 * widest
        assert cache + 2 * row["pattern"] < row["block_memory"] < cache + 8 * row["pattern"] + 2**28
        assert row["pattern"] == 48 * 32 * (n + 48) * 4
        assert row["peak"] == eight.weights + max(row["prefill_memory"], row["block_memory"])
    assert eight.table["fits"].tolist() == [True, True]


def test_what_does_not_fit_and_what_does_in_fewer_bits():
    config = build("llama").config
    whole = plan(config, (100,), memory="1MB")
    need = int(whole.table["peak"].item())
    fits = {size: plan(config, (100,), memory=size).table["fits"].item() for size in (need, 2 * need)}
    assert fits == {need: False, 2 * need: True}  # a tenth must be left
    bits = {q: plan(config, (100,), quantize=q).weights for q in ("8bit", "4bit")}
    linear = whole.parameters["attention"] + whole.parameters["mlp"]
    rest = whole.weights - 2 * linear
    assert bits == {"8bit": rest + linear, "4bit": rest + linear * 9 // 16}


def test_full_attention_of_every_head_takes_more_cache(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_2_13B))
    found = plan(tmp_path, (4090,), memory="80GB")
    assert found.table["cache"].tolist() == [819_200 * 4090]
    assert sum(found.parameters.values()) == 13_015_864_320
    assert found.warnings == ("4,090 + 48 tokens are beyond the 4,096 positions that it was made for",)


@pytest.mark.parametrize("name", [*MODELS, "phi"])
def test_a_plan_tells_what_the_real_model_has(name):
    hf = build(name)
    found = plan(hf.config, (100,), dtype=torch.float32, memory="1GB")
    assert sum(found.parameters.values()) == sum(p.numel() for p in hf.parameters())
    assert found.weights == sum(p.nbytes for p in hf.parameters())
    assert (found.parameters["head"] == 0) is bool(hf.config.tie_word_embeddings)
    cache = DynamicCache(config=hf.config)
    for n in (99, 1):
        hf(input_ids=torch.zeros(1, n, dtype=torch.long), past_key_values=cache)
    assert found.table["cache"].item() == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_what_a_plan_says_of_windows_and_breaks():
    windowed = plan(build("gemma3").config, (100, 400), memory="1GB")
    assert windowed.warnings == (f"2 of 3 layers see the last {WINDOW} tokens only and keep no more",)
    cache = windowed.table["cache"]
    full = 2 * 2 * 8 * 2 * 1  # of the one full layer, per token
    assert cache[1] - cache[0] == full * 300
    broken = plan(phi_longrope(64).config, (50, 100), steps=20, memory="1GB")
    assert broken.warnings == (
        "position factors change at 64 tokens, within the answer to 50: refused",
        "position factors change at 64 tokens: prompts are fed in one pass and share nothing across",
    )


def test_experts_are_said_not_to_be_counted():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    assert "operations of experts are not counted; bytes take all of them as read" in plan(config, (10,)).warnings


@pytest.mark.parametrize("capture", [Capture(), Capture(rows=True, z=True, k=2, hidden=("final", "resid_1")),
                                     Capture(focus=())])  # fmt: skip
def test_a_row_of_a_trace_takes_what_is_foretold(capture):
    model = load(build("llama"), tokenizer=tokenizer())
    trace = observe(model, [episode()], max_new_tokens=4, capture=capture, progress=False)
    held = [v for v in vars(trace).values() if isinstance(v, torch.Tensor)] + list(trace.hidden.values())
    keys = 0 if trace.rows is None else trace.rows.shape[-1]
    n_spans, n_focus = len(trace.span_names), 0 if trace.focus is None else trace.focus.shape[-1]
    heads = model.n_layers * model.n_heads
    foretold = row_bytes(capture, model.shape, keys=keys, d_head=8, d_model=48, dtype=torch.float32)
    foretold -= 2 * 4 * heads * (SPANS - n_spans) + (2 * heads + 8) * ((FOCUS if capture.focus else 0) - n_focus)
    assert sum(t.nbytes for t in held) == len(trace) * foretold


def test_a_meter_sees_what_lives_at_once():
    """Three tensors of 400 bytes, of which the second is gone when the third comes; a view takes nothing."""
    meter = Meter()
    with meter, torch.device("meta"):
        first = torch.empty(100)
        second = first + 1
        view = second[:50]
        del second, view
        third = first * 2
        assert meter.now == 800
    assert (meter.peak, meter.now) == (800, 800)
    del third
    assert meter.now == 400
    with meter:
        pass
    assert meter.peak == 400 and first.nbytes == 400


def test_fused_attention_is_not_taken_for_a_matrix():
    bones = skeleton(LlamaConfig(**LLAMA_3_1_8B), torch.bfloat16)
    meter = Meter()
    with meter:
        bones.feed(20000, bones.cache())
    assert meter.peak < 20000 * 20000 * 32 * 2 / 4


def test_a_gguf_and_a_folder_are_read_without_weights(tmp_path, smollm2_package, monkeypatch):
    monkeypatch.setattr("dhlens.weights._converted", lambda *a: pytest.fail("nothing was to be converted"))
    monkeypatch.setattr("dhlens.weights._file_sha256", lambda *a: pytest.fail("nothing was to be hashed"))
    found = plan("smollm2-135m", (1000,), dtype=torch.float32)
    assert sum(found.parameters.values()) == 134_515_008 and found.shape == (30, 9) and found.parameters["head"] == 0


def test_a_config_that_cannot_be_had_is_named_with_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"config\.json of some/model is neither in the cache nor .* hf auth login"):
        plan("some/model", (1000,))
    with pytest.raises(ValueError, match="no model 'smolm2-135m'; did you mean smollm2-135m"):
        plan("smolm2-135m", (1000,))
    for missing in (tmp_path, tmp_path / "other.json"):
        with pytest.raises(FileNotFoundError, match="no file"):
            read_config(missing)
    monkeypatch.setitem(EMBEDDED, "toy", Packaged("no_such_package", "w.gguf", "0", "pip install x"))
    with pytest.raises(ModuleNotFoundError, match="pip install x"):
        plan("toy", (1000,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "at least 2 tokens"),
        ({"lengths": (1,)}, "at least 2 tokens"),
        ({"steps": 0}, "at least 1 step"),
        ({"quantize": "2bit"}, "quantize must be one of 8bit, 4bit, got '2bit'"),
        ({"memory": "80 apples"}, "a memory size reads like 80GB, 24GiB or a number of bytes, got '80 apples'"),
        ({"device": "cuda:99"}, "device cuda:99 is not there"),
        ({"device": "cpu", "memory": "80GB"}, "a device or the size of one, not both; got 'cpu' and '80GB'"),
        ({"device": "gpu"}, "a device is cpu, cuda, cuda:1, mps or auto, got 'gpu'"),
    ],
)
def test_bad_plans_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(
        import_module("dhlens.plan"), "read_config", lambda *a, **k: pytest.fail("said before any work")
    )
    with pytest.raises(ValueError, match=message):
        plan("smollm2-135m", **{"lengths": (100,), **options})


def test_the_device_that_is_there_is_measured(monkeypatch):
    config = build("llama").config
    here = plan(config, (100,), device="cpu")
    assert plan(config, (100,), device="auto").device == str(find_device(None))
    assert here.device == "cpu" and here.memory > 2**28 and bool(here.table["fits"].item())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=10**6))
    assert plan(config, (100,)).memory == 10**6 and plan(config, (100,)).device == "cuda"
    assert plan(config, (100,), device="auto").memory == 2 * 10**6


def test_the_command_prints_and_speaks_json(tmp_path, eight):
    for part in ("8,030,261,248 parameters", "14.96 GiB", "625.00 MiB", "17.63 GFLOP", "5,000 tokens", "of 74.51 GiB"):
        assert part in str(eight)
    build("mistral").config.save_pretrained(tmp_path)
    command = ["plan", str(tmp_path), "--lengths", "100,200", "--device-memory", "1MB"]
    run = CliRunner().invoke
    text = run(app, command, catch_exceptions=False).stdout
    assert "100 tokens" in text and "fits" in text and "! 3 of 3 layers see the last 16 tokens only" in text
    found = json.loads(run(app, [*command, "--json"]).stdout)
    assert [row["length"] for row in found["lengths"]] == [100, 200] and found["memory"] == 10**6
    assert found["parameters"]["head"] == 97 * 48 and found["lengths"][0]["fits"] is True


SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA2 = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 600}
GPT_OSS = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(**SMALL), "MambaConfig cannot be planned: layers must be full or sliding-window attention"),
        (BertConfig(**SMALL), "BertConfig cannot be planned: BertLMHeadModel as it is configured is no causal"),
        (T5Config(), "T5Config cannot be planned: T5Config is not the config of a causal language model$"),
        (LlamaConfig(**SMALL | {"num_hidden_layers": 0}), "needs at least 1 layer, got num_hidden_layers=0"),
        (GptOssConfig(**GPT_OSS), "GptOssConfig cannot be planned: Expected inputs of BF16 type"),
        ({"model_type": "llama", **SMALL, "num_attention_heads": 7}, "size .64. is not a multiple of .* heads .7."),
        ({"model_type": "none-such"}, r"config.json cannot be planned: .* `none-such`[^\n]*$"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused_in_one_line(config, reason, tmp_path):
    if isinstance(config, dict):
        (tmp_path / "config.json").write_text(json.dumps(config))
        config = tmp_path / "config.json"
    with pytest.raises(ValueError, match=reason):
        plan(config, (600,), dtype=torch.float32, memory="1GB")


def test_what_is_no_config_or_no_length_is_refused_in_words():
    with pytest.raises(
        TypeError, match=r"^a plan takes a name, a path or a transformers config, got LlamaForCausalLM$"
    ):
        plan(build("llama"), (100,), memory="1GB")
    for lengths in (5000, (100.5,), "500"):
        with pytest.raises(TypeError, match=r"lengths are whole numbers in a list, .* got lengths="):
            _check_lengths(lengths, 4)


def test_a_model_without_fused_attention_is_planned_in_chunks():
    """The slow judge runs every chunk; a window fills on the way."""
    bones = skeleton(Gemma2Config(**GEMMA2), torch.bfloat16)
    n, slow, fast = 9 * CHUNK + 7, Meter(), Meter()
    cache, work, most, fed = bones.cache(), 0, 0, 0
    while fed < n:
        rows = min(CHUNK, n - fed)
        with slow:
            bones.feed(rows, cache)
        work, most, fed = work + slow.flops, max(most, slow.peak), fed + rows
    assert not bones.fused and prefill(bones, n, bones.cache(), fast) == (work, most, 10)
    found = plan(Gemma2Config(**GEMMA2), (n,), memory="1GB")
    assert found.table["prefill_memory"].item() < n * n * 4 * 2, "no whole pattern"
    assert found.warnings[0] == (
        "Gemma2ForCausalLM has no fused attention, so no twin: "
        "prompts go through the hooked model in chunks of 256 tokens"
    )


def test_limits_and_heads_that_only_the_model_tells():
    sinks = plan(GptOssConfig(**GPT_OSS), (300,), memory="1GB").warnings
    assert sinks[0].startswith("attention sinks take a share of every row") and "dhlens.load refuses" in sinks[0]
    falcon = FalconConfig(**SMALL, multi_query=True, new_decoder_architecture=False)
    assert plan(falcon, (100,), memory="1GB").n_kv_heads == 1
    bloom = plan(BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4), (5000,), memory="1GB")
    assert bloom.max_positions is None and " positions" not in str(bloom) and len(bloom.warnings) == 1
    mpt = plan(MptConfig(d_model=64, n_layers=2, n_heads=4, vocab_size=64, max_seq_len=512), (100,), memory="1GB")
    assert mpt.max_positions == 512
