"""Every kind of model that dhlens takes, as a small random one from its real config class with its real head topology.

`tiny.py` has the four that most tests use; these are the rows of `test_matrix.py` and of `docs/supported-models.md`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as t
from tiny import VOCAB, WINDOW

from dhlens.heads import HeadSet

PADDING = 31
"""Rows of the embedding beyond the tokenizer's vocabulary, in the padded one."""
BREAK = 64
_IDS = {"vocab_size": VOCAB, "bos_token_id": 2, "eos_token_id": 1}
_SHAPE: dict[str, Any] = {
    **_IDS,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
_WIDE = {"hidden_size": 64, "num_attention_heads": 8}


def _llama(rope: dict[str, Any] | None = None, **changes: Any) -> Any:
    return t.LlamaForCausalLM(t.LlamaConfig(**{**_SHAPE, **changes}, rope_parameters=rope))


def _llama3(factor: float, **changes: Any) -> Any:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "original_max_position_embeddings": 32}
    return _llama({**rope, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, **changes)


def _qwen3() -> Any:
    return t.Qwen3ForCausalLM(t.Qwen3Config(**{**_SHAPE, **_WIDE}, head_dim=8))


def _phi4(original: int) -> Any:
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    rope |= {"short_factor": [1.0, 1.1, 1.3], "long_factor": [4.0, 5.0, 7.0], "factor": 512 / original}
    rope["original_max_position_embeddings"] = original
    config = t.Phi3Config(
        **_SHAPE, rope_parameters=rope, original_max_position_embeddings=original, tie_word_embeddings=True
    )
    return t.Phi3ForCausalLM(config)


def _gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = {**_SHAPE, "num_attention_heads": 4, "num_key_value_heads": 1}
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**shape, head_dim=16, sliding_window=WINDOW, layer_types=kinds))


def _gpt2() -> Any:
    return t.GPT2LMHeadModel(t.GPT2Config(**_IDS, n_embd=48, n_layer=3, n_head=6, n_positions=256))


def _neox() -> Any:
    shape = {k: v for k, v in _SHAPE.items() if k not in ("num_key_value_heads", "pad_token_id")}
    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**shape))


def _bigcode() -> Any:
    return t.GPTBigCodeForCausalLM(t.GPTBigCodeConfig(**_IDS, n_embd=48, n_layer=3, n_head=6, n_positions=256))


def _mistral() -> Any:
    return t.MistralForCausalLM(t.MistralConfig(**_SHAPE, sliding_window=WINDOW))


def _padded() -> Any:
    return t.Qwen2ForCausalLM(t.Qwen2Config(**{**_SHAPE, "vocab_size": VOCAB + PADDING}))


@dataclass(frozen=True)
class Kind:
    """A row of the matrix."""

    title: str
    build: Callable[[], Any]
    limits: str
    """What it cannot do, for the page; "" for nothing known."""


_PHI = (
    "fused query, key and value: no `hook_rot_q`, `hook_rot_k`. Position factors change at 4,096 tokens: prompts are "
    "prefilled in one piece, prompt and answer stay on one side, and no shared beginning crosses it"
)
KINDS = {
    "llama-3.1": Kind(
        "Llama-3.1-8B-Instruct (`llama-3.1-8b`): grouped queries 4:1, llama3 rope scaling",
        lambda: _llama3(8.0, **_WIDE),
        "",
    ),
    "llama-3.2": Kind(
        "Llama-3.2-3B-Instruct (`llama-3.2-3b`): grouped 3:1, tied embeddings, llama3 rope scaling",
        lambda: _llama3(32.0, tie_word_embeddings=True),
        "its template writes today's date into the prompt unless `template_kwargs={'date_string': ...}` fixes it",
    ),
    "qwen3": Kind(
        "Qwen3-8B (`qwen3-8b`): grouped 4:1, queries and keys normed",
        _qwen3,
        "thinks before it answers unless told otherwise: `template_kwargs={'enable_thinking': False}`",
    ),
    "llama-2": Kind(
        "Llama-2-13b-chat (`llama-2-13b`): as many keys as queries",
        lambda: _llama(hidden_size=80, num_attention_heads=10, num_key_value_heads=10, max_position_embeddings=4096),
        "4,096 positions, prompt and answer together: longer ones are refused",
    ),
    "phi-4-mini": Kind(
        "Phi-4-mini-instruct (`phi-4-mini`): grouped 3:1, tied, longrope on three quarters of each head, fused "
        "projection; below its rope break",
        lambda: _phi4(BREAK),
        _PHI,
    ),
    "phi-4-mini, long": Kind("the same, beyond its rope break", lambda: _phi4(16), ""),
    "gemma-3": Kind(
        "Gemma 3 (text): sliding windows beside full attention, one key/value head",
        _gemma3,
        "sliding layers see their window alone; a drafted block is at most a window less one token long",
    ),
    "mistral": Kind(
        "Mistral-7B v0.1: sliding windows in every layer", _mistral, "no layer sees further back than its window"
    ),
    "gpt-2": Kind(
        "GPT-2: learned positions, fused projection (Conv1D), LayerNorm",
        _gpt2,
        "1,024 positions; no chat template: `template='plain'`",
    ),
    "pythia": Kind(
        "Pythia (GPT-NeoX): rope on a quarter of each head, parallel blocks",
        _neox,
        "no `hook_rot_q`, `hook_rot_k` (fused projection); 2,048 positions; no chat template: `template='plain'`",
    ),
    "starcoder": Kind(
        "StarCoder (GPT-BigCode): one key/value head for all queries", _bigcode, "no chat template: `template='plain'`"
    ),
    "padded": Kind(
        "Qwen2.5: biased projections, an embedding with more rows than the tokenizer has tokens",
        _padded,
        "ids beyond the tokenizer decode to nothing",
    ),
}


def _falling_short() -> dict[str, Callable[[], Any]]:
    base = {k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": WINDOW, "head_dim": 8}
    short = {**_IDS, "n_embd": 48, "n_layer": 3, "n_head": 6}
    opt = {k: v for k, v in base.items() if k != "intermediate_size"} | {"ffn_dim": 64, "word_embed_proj_dim": 48}
    return {
        "OPT": lambda: t.OPTForCausalLM(t.OPTConfig(**opt)),
        "GPT-J": lambda: t.GPTJForCausalLM(t.GPTJConfig(**short, rotary_dim=4)),
        "Bloom": lambda: t.BloomForCausalLM(t.BloomConfig(**_IDS, hidden_size=48, n_layer=3, n_head=6)),
        "Gemma 2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_SHAPE, head_dim=8, sliding_window=WINDOW)),
        "gpt-oss": lambda: t.GptOssForCausalLM(t.GptOssConfig(**_SHAPE, **experts)),
        "Mamba": lambda: t.MambaForCausalLM(t.MambaConfig(**_IDS, hidden_size=48, num_hidden_layers=2)),
    }


FALLING_SHORT = _falling_short()
"""Kinds that load with limits, or not at all: what `load` says of each stands on the page."""


def build(name: str) -> Any:
    """A seeded random model of a kind, biases and norms drawn too, sharp enough that argmaxes are no ties."""
    hf = (KINDS[name].build if name in KINDS else FALLING_SHORT[name])().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for label, parameter in hf.named_parameters():
            if parameter.ndim == 2:
                head = label.startswith(("lm_head", "embed_out"))
                parameter.normal_(0, 0.6 if head else 0.15, generator=generator)
            elif label.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    if name in KINDS:
        hf.set_attn_implementation("eager")
    return hf


def without(name: str, heads: HeadSet) -> Any:
    """The model of a kind whose output projections take nothing from `heads`."""
    dead = build(name)
    for layer, head in heads:
        _silence(dead, layer, head, heads.shape[1])
    return dead


def _silence(hf: Any, layer: int, head: int, n_heads: int) -> None:
    paths = ("model.layers.{}.self_attn.o_proj", "transformer.h.{}.attn.c_proj", "gpt_neox.layers.{}.attention.dense")
    modules = dict(hf.named_modules())
    projection = next(modules[p.format(layer)] for p in paths if p.format(layer) in modules)
    weight = projection.weight
    if type(projection).__name__ == "Conv1D":  # GPT-2 keeps its weights input first
        weight = weight.T
    width = weight.shape[1] // n_heads
    with torch.no_grad():
        weight[:, head * width : (head + 1) * width] = 0
