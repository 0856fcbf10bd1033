"""Small random models from real config classes, a word-level tokenizer, and the brute-force judge."""

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dhlens.episode import Episode, Span

VOCAB = 97
WINDOW = 16
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**_SHAPE))


def qwen3() -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**_SHAPE))


def mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=WINDOW))


def gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**_SHAPE, sliding_window=WINDOW, layer_types=kinds))


def phi_longrope(original: int = 64) -> Any:
    half = 4
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * half, "long_factor": [4.0] * half}
    shape = {k: v for k, v in _SHAPE.items() if k != "head_dim"}
    rope["original_max_position_embeddings"] = original
    return Phi3ForCausalLM(Phi3Config(**shape, rope_parameters=rope, original_max_position_embeddings=original))


MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "qwen3": qwen3, "mistral": mistral, "gemma3": gemma3}


def build(name: str) -> Any:
    """A seeded random model whose attention and logits are sharp enough that argmaxes are not ties."""
    hf = MODELS[name]().eval() if name in MODELS else phi_longrope().eval()
    return _sharp(hf)


def reader() -> Any:
    """A small model with room for prompts of text, for the tokenizers of `toy_tokenizers`."""
    shape = {"vocab_size": 512, "hidden_size": 48, "intermediate_size": 64, "max_position_embeddings": 4096}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return _sharp(LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval())


def _sharp(hf: Any) -> Any:
    """The model with seeded weights that make no ties."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.12, generator=generator)
    return hf


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w1", bos_token="w2", pad_token="w0")


def episode(n: int = 40, *, name: str = "e0", seed: int = 0, answer: int = 5, prefix: Tensor | None = None) -> Episode:
    """A random prompt with a needle, an answer inside it and a question."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (n,), generator=generator)
    if prefix is not None:
        tokens[: len(prefix)] = prefix
    spans = (
        Span("needle", n // 3, n // 3 + answer + 2),
        Span("answer", n // 3 + 1, n // 3 + 1 + answer),
        Span("question", n - 6, n),
    )
    return Episode(name, tokens, tokens[n // 3 + 1 : n // 3 + 1 + answer], spans, {"group": f"g{seed}"})


def eager(hf: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The judge, one uncached eager pass: logits [row, vocab], patterns [layer, head, row, key], hidden [row, d]."""
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        out = hf(tokens[None], output_attentions=True, output_hidden_states=True, use_cache=False)
    return out.logits[0], torch.cat(out.attentions), out.hidden_states[-1][0]
