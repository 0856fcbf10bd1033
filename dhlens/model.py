"""Load a model: one object that holds the TransformerLens model, its fast twin, the tokenizer and what limits them.

`load` takes a name of ours, a Hub id, a folder of safetensors, a `.gguf` file, a Hugging Face model, a
TransformerBridge or (TransformerLens 3.9) a HookedTransformer. A Hugging Face model is never changed: the bridge and
the twin are built on copies of its modules that share its tensors, so no weight is held twice (but for projections
that the bridge must split, such as Pythia's). The twin runs fused attention (SDPA) and does the long work; the hooked
model looks. Every load ends with `dhlens.check.check`, a proof on a few tokens that the hooks mean what they say on
this architecture.
"""

import copy
import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from dhlens import hooks as sites
from dhlens.card import RunCard
from dhlens.check import check as prove
from dhlens.devices import placement, refuse_offloaded
from dhlens.hooked_stream import TLStream
from dhlens.stream import HFStream, Stream, layer_window
from dhlens.weights import Source, load_tokenizer, resolve


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model. `.hooked` is the ordinary TransformerLens object; everything else is derived from it."""

    hooked: Any = field(repr=False)
    """TransformerBridge or HookedTransformer."""
    twin: Any = field(repr=False)
    """The plain Hugging Face model with SDPA attention on the same tensors; None where there is none to be had."""
    tokenizer: Any = field(repr=False)
    """The Hugging Face tokenizer."""
    path: Path | None
    """Folder of the safetensors, where the model came from one."""
    card: RunCard
    """Model, revision, weights hash, dtype and versions."""
    n_layers: int
    n_heads: int
    """Query heads per layer."""
    n_kv_heads: int
    d_model: int
    max_positions: int
    """Longest sequence the model was made for."""
    stop_ids: tuple[int, ...]
    """Tokens that end a reply, from the generation config."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer; None for full attention."""
    rope_breaks: tuple[int, ...] = ()
    """Lengths at which position factors change (longrope, dynamic NTK); no pass may straddle one."""
    named: bool = False
    """Whether it was loaded by a name or path, so that another process can load the same."""
    limits: dict[str, str] = field(default_factory=dict)
    """What this model cannot do, and why: capability to reason."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n_layers, n_heads)."""
        return (self.n_layers, self.n_heads)

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        return next(self.hooked.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Parameter dtype."""
        return next(self.hooked.parameters()).dtype

    @property
    def tie(self) -> float:
        """Top-2 logit margin under which a prediction counts as a tie between two kernels of this dtype."""
        return 1e-3 if self.dtype == torch.float32 else 0.05

    def stream(self) -> Stream:
        """A new, empty stream."""
        if not isinstance(self.hooked, TransformerBridge):
            return TLStream(self.hooked)
        return HFStream(self.hooked, self.twin, **({"chunk": None} if self.rope_breaks else {}))

    def hidden_site(self, name: str) -> str:
        """Hook name of a hidden site.

        Raises:
            ValueError: neither "final" nor "resid_<layer>" of this model.
        """
        if name == "final":
            return sites.final() if isinstance(self.hooked, TransformerBridge) else "unembed.hook_in"
        layer = name.removeprefix("resid_")
        if not name.startswith("resid_") or not layer.isdigit() or int(layer) >= self.n_layers:
            raise ValueError(f"a hidden site is 'final' or 'resid_0'..'resid_{self.n_layers - 1}', got {name!r}")
        return sites.resid(int(layer))


def load(
    source: Any,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    quantize: str | None = None,
    check: bool = True,
) -> Model:
    """Load a model and prove its hooks.

    Args:
        source: "smollm2-135m" (embedded), another short name, a Hub id, a folder, a .gguf file, a PreTrainedModel, a
            TransformerBridge or a HookedTransformer.
        tokenizer: needed with a model object that carries none.
        dtype: float32 by default. This and the next three are for names and files; a model object is taken as it is.
        device: "cpu", "cuda", "mps"; by default the best one that is there; "auto" spreads the layers over all.
        revision: Hub revision.
        quantize: "8bit" or "4bit": weights of linear layers in fewer bits, by bitsandbytes.
        check: run the self-check.

    Raises:
        ValueError: unknown name, no such device, an architecture without usable hooks, or a failed self-check.
        TypeError: an object of another kind.
        ModuleNotFoundError: the package that `device` or `quantize` needs.
    """
    if isinstance(source, str | Path):
        dtype = dtype or torch.float32
        placed = placement(device, quantize, dtype)
        model = _from_files(resolve(source), dtype, placed, revision, tokenizer)
        if quantize:
            model = dataclasses.replace(model, card=model.card.with_settings(quantize=quantize), named=False)
    elif (dtype, device, quantize, revision) != (None,) * 4:
        raise ValueError("dtype, device, quantize and revision go with a name or a path; an object is taken as it is")
    elif isinstance(source, PreTrainedModel):
        refuse_offloaded(source)
        model = _from_hf(source, tokenizer, card=_card(type(source).__name__, source))
    elif isinstance(source, TransformerBridge) or type(source).__name__ == "HookedTransformer":
        model = _wrap(source, None, tokenizer or source.tokenizer, card=_card(str(source.cfg.model_name), source))
    else:
        raise TypeError(
            "a model is a name, a path, a PreTrainedModel, a TransformerBridge or a HookedTransformer, "
            f"got {type(source).__name__}"
        )
    if check:
        prove(model)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar for the second that weights on disk take; downloads keep theirs."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _from_files(
    source: Source,
    dtype: torch.dtype,
    placed: tuple[torch.device | None, dict[str, Any]],
    revision: str | None,
    tokenizer: Any,
) -> Model:
    where = str(source.folder or source.hub_id)
    hub = {"revision": revision} if source.folder is None else {}
    with _quiet() if source.folder else nullcontext():
        hf: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, use_safetensors=True, **hub, **placed[1])
    hf = (hf if placed[0] is None else hf.to(placed[0])).eval()
    refuse_offloaded(hf)
    card = dataclasses.replace(
        _card(source.name, hf),
        revision=revision if source.folder else getattr(hf.config, "_commit_hash", None) or revision,
    )
    if source.sha256:
        card = dataclasses.replace(card, weights_sha256=source.sha256)
    model = _from_hf(hf, tokenizer or load_tokenizer(source, revision=revision), card=card, path=source.folder)
    return dataclasses.replace(model, named=True)


def _from_hf(hf: PreTrainedModel, tokenizer: Any, *, card: RunCard, path: Path | None = None) -> Model:
    if tokenizer is None:
        raise ValueError("a PreTrainedModel carries no tokenizer: pass tokenizer=")
    inner, twin = _same_tensors(hf), _same_tensors(hf)
    inner.set_attn_implementation("eager")
    try:
        twin.set_attn_implementation("sdpa")
    except ValueError:  # an architecture without fused attention has no twin
        twin = None
    # TransformerLens loads the tokenizer again by its name; one made in memory has none and is handed over afterwards
    named = tokenizer if tokenizer.name_or_path else None
    try:
        bridge = build_bridge_from_module(
            inner, type(hf).__name__, hf_config=inner.config, tokenizer=named, model_name=card.model
        )
    except NotImplementedError as error:  # a fused projection in fewer bits cannot be split into heads
        raise ValueError(f"{card.model} ({type(hf).__name__}) cannot be hooked as it was loaded: {error}") from error
    if named is None:
        bridge.tokenizer = tokenizer
    return _wrap(bridge, twin, tokenizer, card=card, path=path)


def _same_tensors(hf: PreTrainedModel) -> Any:
    """The same parameters and buffers in new modules: wrapping or switching these leaves the caller's model alone."""
    # an 8-bit layer moves its scales from the shared weight into its state in its first pass, so states are shared too
    states = [m.state for m in hf.modules() if hasattr(m, "init_8bit_state")]
    copied = copy.deepcopy(hf, {id(t): t for t in [*hf.parameters(), *hf.buffers(), *states]})
    return copied.eval().requires_grad_(False) if not any(p.requires_grad for p in hf.parameters()) else copied.eval()


def _wrap(hooked: Any, twin: Any, tokenizer: Any, *, card: RunCard, path: Path | None = None) -> Model:
    cfg = hooked.cfg
    if getattr(cfg, "ungroup_grouped_query_attention", False):
        raise ValueError(
            f"{card.model} repeats keys and values for every query head, which its own cache does not hold: "
            "set_ungroup_grouped_query_attention(False) before loading"
        )
    hf = getattr(hooked, "original_model", None)
    blocks = getattr(hooked, "blocks", None)
    attention = getattr(blocks[0], "attn", None) if blocks else None
    missing = [n for n in ("hook_pattern", "hook_z", "hook_attn_scores") if not hasattr(attention, n)]
    if missing:
        kind = type(hooked if hf is None else hf).__name__
        raise ValueError(f"{card.model} ({kind}) has no usable attention hooks: missing {', '.join(missing)}")
    return Model(
        hooked=hooked,
        twin=twin,
        tokenizer=tokenizer,
        path=path,
        card=card,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_model=cfg.d_model,
        max_positions=getattr(_text_config(hf), "max_position_embeddings", cfg.n_ctx) if hf else cfg.n_ctx,
        stop_ids=_stop_ids(hf, tokenizer),
        windows=_windows(hf, cfg),
        rope_breaks=rope_breaks_of(hf),
    )


def _text_config(hf: Any) -> Any:
    return hf.config.get_text_config()


def _card(name: str, model: Any) -> RunCard:
    """A card that tells two models apart: the hash samples every parameter, so that it is quick at any size."""
    weights = hashlib.sha256()
    for parameter_name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 1024)].float().cpu()
        weights.update(f"{parameter_name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return RunCard(name, weights_sha256=weights.hexdigest(), dtype=dtype)


def _stop_ids(hf: Any, tokenizer: Any) -> tuple[int, ...]:
    generation = getattr(hf, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(tokenizer, "eos_token_id", None)
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (int(ids),)


def _windows(hf: Any, cfg: Any) -> tuple[int | None, ...]:
    if hf is None:
        kinds = cfg.attn_types or ["global"] * cfg.n_layers
        return tuple(cfg.window_size if kind == "local" else None for kind in kinds)
    layers = DynamicCache(config=hf.config).layers
    other = {type(layer).__name__ for layer in layers if not isinstance(layer, DynamicLayer)}
    if other:
        raise ValueError(f"layers must be full or sliding-window attention, got {', '.join(sorted(other))}")
    return tuple(map(layer_window, layers)) or (None,) * cfg.n_layers


def rope_breaks_of(hf: Any) -> tuple[int, ...]:
    """Lengths at which position factors of a Hugging Face model change; none of a HookedTransformer (None)."""
    if hf is None:
        return ()
    config = _text_config(hf)
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        return (int(original),)
    return (int(config.max_position_embeddings),) if kind == "dynamic" else ()
