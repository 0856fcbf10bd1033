"""A model without its weights: built from its config on torch's meta device, and run there to see what passes cost.

Tensors on the meta device have a shape and no data, so the real model class builds in a second at any size and the
real cache fills; nothing is computed. `Meter` counts what a pass would do: operations, and the bytes that live at once.
`dhlens.plan` puts this into a table.
"""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from dhlens.model import rope_breaks_of
from dhlens.stream import CHUNK, layer_window

_PARTS = (("attention", re.compile(r"attn|attention")), ("mlp", re.compile(r"mlp|feed_forward|experts|moe")))


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A causal language model on the meta device."""

    twin: Any
    """With fused attention (SDPA), for long passes; where the architecture has none, not fused either."""
    fused: bool
    """Whether the twin is fused; without, a stream feeds prompts in chunks."""
    eager: Any
    """With attention patterns in reach, as the hooked model has them."""
    parameters: dict[str, int]
    """Numbers by part: embedding, attention, mlp, other, head; a tied head counts as embedding."""
    linear: int
    """Of these, weights of linear layers but the head: what quantisation makes smaller."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer; None for full attention."""
    rope_breaks: tuple[int, ...]
    """Lengths at which position factors change."""
    n_kv_heads: int
    """Heads that the cache holds."""
    limits: tuple[str, ...]
    """What `dhlens.load` refuses or does otherwise, as far as a config tells."""

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.parameters["head"] == 0

    @property
    def config(self) -> Any:
        """The config of the language model proper."""
        return self.twin.config.get_text_config()

    def cache(self) -> DynamicCache:
        """An empty cache, as a stream has it."""
        return DynamicCache(config=self.twin.config)

    def feed(self, n: int, cache: DynamicCache, *, keep: int | None = None) -> Tensor:
        """Run `n` tokens behind the cache: through the twin, or, to `keep` the logits of some, through the other."""
        tokens = torch.zeros(1, n, dtype=torch.long, device="meta")
        model = self.twin if keep is None else self.eager
        with torch.no_grad(), torch.device("meta"):
            return model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=keep or 1).logits


def is_config(given: Any) -> bool:
    """Whether this is a transformers config."""
    return isinstance(given, PreTrainedConfig)


def skeleton(config: Any, dtype: torch.dtype) -> Skeleton:
    """Build the model that a config describes, without weights.

    Raises:
        ValueError: the config is not that of a causal language model whose layers all have attention caches.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{type(config).__name__} is not the config of a causal language model")
    if config.get_text_config().num_hidden_layers < 1:
        raise ValueError("a model needs at least 1 layer, got num_hidden_layers=0")
    plain, fused = _build(config, dtype, "sdpa")
    breaks = rope_breaks_of(plain)
    if breaks:  # factors that hang on the length read numbers, which meta tensors do not have
        config = copy.deepcopy(config)
        text = config.get_text_config()
        kept = {k: v for k, v in text.rope_parameters.items() if k in ("rope_theta", "partial_rotary_factor")}
        text.rope_parameters = kept | {"rope_type": "default"}
        plain, fused = _build(config, dtype, "sdpa")
    return Skeleton(
        twin=plain,
        fused=fused,
        eager=_build(config, dtype, "eager")[0],
        parameters=_parts(plain),
        linear=_linear(plain),
        windows=tuple(map(layer_window, DynamicCache(config=config).layers)),
        rope_breaks=breaks,
        n_kv_heads=_cached_heads(plain),
        limits=tuple(_limits(plain, fused, bool(breaks))),
    )


def prefill(bones: Skeleton, n: int, cache: DynamicCache, meter: "Meter") -> tuple[int, int, int]:
    """Operations, peak bytes and number of passes of feeding a prompt as a stream does: at once or in chunks.

    Work grows evenly from one chunk to the next but where a window fills, so that only chunks around such places are
    run and the rest lie between.
    """
    whole = bones.fused or bones.rope_breaks
    ends = [n] if whole else [*range(CHUNK, n, CHUNK), n]
    bends = {0, len(ends) - 2, len(ends) - 1} | {w // CHUNK + i for w in bones.windows if w for i in (0, 1)}
    work, peak, fed = {}, 0, 0
    for i in sorted(bends & set(range(len(ends)))):
        start = ends[i - 1] if i else 0
        if start > fed:
            with meter:
                bones.feed(start - fed, cache)
        with meter:
            bones.feed(ends[i] - start, cache)
        work[i], peak, fed = meter.flops, max(peak, meter.peak), ends[i]
    return round(np.interp(range(len(ends)), list(work), list(work.values())).sum()), peak, len(ends)


def _build(config: Any, dtype: torch.dtype, attention: str) -> tuple[Any, bool]:
    """The model, and whether its attention is fused: SDPA is asked for and is there."""
    with torch.device("meta"):
        try:
            hf: Any = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=attention
            )
        except ValueError:
            if attention == "eager":
                raise
            return _build(config, dtype, "eager")
    return hf.eval(), attention == "sdpa"


def _cached_heads(hf: Any) -> int:
    """KV heads of a cache that two tokens have filled; configs name them in many ways.

    Raises:
        ValueError: attention is not causal, or layers have caches of another kind or none.
    """
    if any(getattr(module, "is_causal", True) is False for module in hf.modules()):
        raise ValueError(f"{type(hf).__name__} as it is configured is no causal language model")
    cache = DynamicCache(config=hf.config)
    other = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, DynamicLayer)}
    if other:
        raise ValueError(f"layers must be full or sliding-window attention, got {', '.join(sorted(other))}")
    with torch.no_grad(), torch.device("meta"):
        hf(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    if not layers or not all(layer.is_initialized for layer in layers):
        raise ValueError(f"{type(hf).__name__} fills no cache of keys and values")
    return layers[0].keys.shape[1]


def _limits(hf: Any, fused: bool, breaks: bool) -> Iterator[str]:
    kind = type(hf).__name__
    if kind not in SUPPORTED_ARCHITECTURES:
        yield f"TransformerLens has no hooks for {kind}: dhlens.load refuses it"
    if any(name.endswith("sinks") for name, _ in hf.named_parameters()):
        yield "attention sinks take a share of every row, so that rows do not sum to 1: dhlens.load refuses the model"
    if not fused:
        how = "in one pass that holds whole patterns" if breaks else f"in chunks of {CHUNK} tokens"
        yield f"{kind} has no fused attention, so no twin: prompts go through the hooked model {how}"


def _parts(hf: Any) -> dict[str, int]:
    embedding, head = hf.get_input_embeddings().weight, hf.get_output_embeddings().weight
    found = {"embedding": 0, "attention": 0, "mlp": 0, "other": 0, "head": 0}
    for name, parameter in hf.named_parameters():
        inside = next((p for p, pattern in _PARTS if pattern.search(name) and "norm" not in name), "other")
        part = "embedding" if parameter is embedding else "head" if parameter is head else inside
        found[part] += parameter.numel()
    return found


def _linear(hf: Any) -> int:
    head = hf.get_output_embeddings()
    return sum(m.weight.numel() for m in hf.modules() if isinstance(m, nn.Linear) and m is not head)


class Meter(TorchDispatchMode):
    """What happens inside `with`: `flops`, and the bytes of tensors made there, `now` alive and at their `peak`.

    It may be entered again; what is alive then still counts. Fused attention makes no pattern, and where it is causal
    only keys that are seen count as work.
    """

    at_pattern: Callable[[Tensor], None] | None = None
    """Called with each pattern where attention is not fused."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._alive: dict[int, int] = {}
        self._counter = FlopCounterMode(display=False)
        self._fused = _Attention()

    def __enter__(self) -> "Meter":
        self.peak = self.now
        self._fused.flops, self._fused.at_pattern = 0, self.at_pattern
        self._fused.__enter__()
        self._counter.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._counter.__exit__(*error)
        self._fused.__exit__(*error)
        self.flops = self._counter.get_total_flops() + self._fused.flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the storage of whatever an operation makes."""
        before = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and id_of(t) not in before and id_of(t) not in self._alive:
                storage = t.untyped_storage()
                self._alive[id_of(t)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                finalize(storage, self._gone, id_of(t))
        return out

    def _gone(self, storage: int) -> None:
        self.now -= self._alive.pop(storage)


def id_of(tensor: Tensor) -> int:
    """What views of one storage share."""
    return tensor.untyped_storage()._cdata


class _Attention(TorchFunctionMode):
    """Fused attention as the fused kernels do it, and a look at each pattern where attention is not fused."""

    at_pattern: Callable[[Tensor], None] | None = None
    flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Meta tensors would take the kernel that writes the whole pattern."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            query, key, value = args[:3]
            n, width = query.shape[-2], key.shape[-2]
            seen = n * width - (n * (n - 1) // 2 if kwargs.get("is_causal") else 0)
            self.flops += 2 * query.shape[:-2].numel() * seen * (query.shape[-1] + value.shape[-1])
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        out = func(*args, **kwargs)
        if func is softmax and out.ndim == 4 and self.at_pattern is not None:
            self.at_pattern(out.to(args[0].dtype))
        return out
