"""A Stream: one growing key/value cache of one model, with marks to return to and cheap forks.

`feed` runs tokens behind what was fed before, on the fused-attention twin (`hooks=None`) or on the hooked model.
`mark` and `rewind` undo feeding, `fork` branches it; neither copies keys of full-attention layers. Two backends keep
one behaviour: the Hugging Face cache (bridge and twin), here, and that of a HookedTransformer (`hooked_stream`).
Columns of a sliding-window layer are not positions; `dhlens.hooks.first_key` is the one place that maps them.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from dhlens.hooks import Hook
from dhlens.masks import LayerMasks

CHUNK = 256
"""Rows per pass where a long feed has to go through the hooked model, whose attention is not fused."""


@dataclass(frozen=True)
class Mark:
    """A place in a stream to return to."""

    length: int
    layers: tuple[Any, ...]
    """Shallow copies of what a crop cannot restore (sliding layers), else None."""


@runtime_checkable
class Stream(Protocol):
    """Tokens fed so far, their cache, and what can be done next."""

    length: int
    """Positions fed."""
    reach: int | None
    """Longest block of which `rewind(mark, keep=...)` can keep a part; None: any."""

    def feed(
        self,
        tokens: Int[Tensor, "batch new"],
        *,
        hooks: Sequence[Hook] | None = None,
        keep: int = 1,
        positions: Int[Tensor, "#batch new"] | None = None,
        mask: LayerMasks | None = None,
    ) -> Float[Tensor, "batch keep vocab"]:
        """Run `tokens`, return the logits of the last `keep` rows; with `hooks` through the hooked model."""
        ...

    def mark(self) -> Mark:
        """Remember this place."""
        ...

    def rewind(self, mark: Mark, keep: int = 0) -> None:
        """Forget what was fed since `mark`, but for its first `keep` tokens."""
        ...

    def fork(self, lanes: int = 1) -> "Stream":
        """An independent stream that goes on from here; with `lanes`, a batch of that many copies of this one."""
        ...

    def select(self, lanes: Sequence[int]) -> None:
        """Keep only these lanes of the batch; marks set before no longer hold."""
        ...


@contextmanager
def attached(hooked: Any, hooks: Sequence[Hook]) -> Iterator[None]:
    """Attach hooks to the model's hook points and remove exactly these on the way out, whatever happens.

    Unlike `model.hooks(...)` this builds no table of all hook names, which matters once per decoded token.

    Raises:
        ValueError: the model has no such hook.
    """
    points = [(_point(hooked, name), fn) for name, fn in hooks]
    added: list[tuple[Any, Any]] = []
    try:
        for point, fn in points:
            point.add_hook(fn)
            added.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


def _point(hooked: Any, name: str) -> Any:
    point = hooked
    for part in name.split("."):
        point = point[int(part)] if part.isdigit() else getattr(point, part, None)
        if point is None:
            raise ValueError(f"{type(hooked).__name__} has no hook {name!r}")
    return point


def feed_ahead(stream: Stream, tokens: Tensor, keep: int, chunk: int | None) -> Tensor:
    """Feed all but the last chunk through the hooked model; what is left ends the pass and holds the kept rows."""
    while chunk and tokens.shape[1] > max(chunk, keep):
        n = min(chunk, tokens.shape[1] - keep)
        stream.feed(tokens[:, :n], hooks=())
        tokens = tokens[:, n:]
    return tokens


class HFStream:
    """A Stream on the Hugging Face cache: the twin and the bridge take turns on it."""

    def __init__(self, hooked: Any, twin: Any, *, chunk: int | None = CHUNK) -> None:
        self._hooked, self._twin, self._chunk = hooked, twin, chunk
        self._cache = DynamicCache(config=hooked.original_model.config)
        windows = [w for w in map(layer_window, self._cache.layers) if w is not None]
        self.length = 0
        self.reach = min(windows) - 1 if windows else None

    @torch.no_grad()
    def feed(
        self,
        tokens: Int[Tensor, "batch new"],
        *,
        hooks: Sequence[Hook] | None = None,
        keep: int = 1,
        positions: Int[Tensor, "#batch new"] | None = None,
        mask: LayerMasks | None = None,
    ) -> Float[Tensor, "batch keep vocab"]:
        """See `Stream.feed`."""
        device = self._hooked.original_model.get_input_embeddings().weight.device
        tokens = tokens.to(device)
        if hooks is None and self._twin is None:
            tokens = feed_ahead(self, tokens, keep, self._chunk)
        extra: dict[str, Any] = {"past_key_values": self._cache, "use_cache": True, "logits_to_keep": keep}
        if positions is not None:
            extra["position_ids"] = positions.to(device)
        if mask is not None:
            extra["attention_mask"] = (
                {k: m.to(device) for k, m in mask.items()} if isinstance(mask, dict) else mask.to(device)
            )
        if hooks is None and self._twin is not None:
            logits = self._twin(input_ids=tokens, **extra).logits
        else:
            with attached(self._hooked, hooks or ()):
                logits, _ = self._hooked(tokens, return_type="logits_and_cache", **extra)
        self.length += tokens.shape[1]
        return logits[:, -keep:]

    def mark(self) -> Mark:
        """See `Stream.mark`."""
        saved = tuple(copy.copy(layer) if layer_window(layer) else None for layer in self._cache.layers)
        return Mark(self.length, saved)

    def rewind(self, mark: Mark, keep: int = 0) -> None:
        """See `Stream.rewind`."""
        fed = self.length - mark.length
        assert 0 <= keep <= fed, (keep, fed)
        if keep == fed:
            return
        assert self.reach is None or keep == 0 or fed <= self.reach, "a block wider than the window keeps no part"
        layers: list[Any] = self._cache.layers
        for i, layer in enumerate(layers):
            saved = mark.layers[i] if i < len(mark.layers) else None
            if saved is None:
                layer.crop(-(fed - keep))
            else:
                layers[i] = _restore(saved, layer, fed, keep)
        self.length = mark.length + keep

    def fork(self, lanes: int = 1) -> "HFStream":
        """See `Stream.fork`."""
        branch = copy.copy(self)
        branch._cache = copy.copy(self._cache)
        branch._cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        if lanes > 1:
            branch.select([0] * lanes)
        return branch

    def select(self, lanes: Sequence[int]) -> None:
        """See `Stream.select`."""
        layers: list[Any] = self._cache.layers
        for layer in layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[list(lanes)], layer.values[list(lanes)]

    def columns(self, kept: Int[Tensor, " column"]) -> "HFStream":
        """A branch that holds these columns alone, ascending; what is fed then needs positions. Full attention only."""
        assert self.reach is None and kept.numel(), "columns are positions in layers of full attention"
        branch = self.fork()
        layers: list[Any] = branch._cache.layers if len(kept) < self.length else []
        for layer in layers:
            layer.keys, layer.values = (x.index_select(-2, kept.to(x.device)) for x in (layer.keys, layer.values))
        branch.length = len(kept)
        return branch

    @classmethod
    def join(cls, streams: "Sequence[HFStream]") -> "HFStream":
        """Streams of different lengths as one batch, shorter ones filled up at the end.

        What is fed then needs positions and a mask that hides the filling. For full attention only.
        """
        assert all(stream.reach is None and stream.length for stream in streams), "filled streams of full attention"
        batch = streams[0].fork()
        batch.length = max(stream.length for stream in streams)
        layers: list[Any] = batch._cache.layers
        for i, layer in enumerate(layers):
            parts: list[Any] = [stream._cache.layers[i] for stream in streams]
            layer.keys = _filled([part.keys for part in parts], batch.length)
            layer.values = _filled([part.values for part in parts], batch.length)
        return batch


def _filled(states: Sequence[Tensor], length: int) -> Tensor:
    """Keys or values, [batch, head, column, d_head], each filled up to `length` columns, as one batch."""
    return torch.cat([torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[-2])) for x in states])


def layer_window(layer: Any) -> int | None:
    """The sliding window of a cache layer; None for full attention."""
    return layer.sliding_window if getattr(layer, "is_sliding", False) else None


def _restore(saved: Any, layer: Any, fed: int, keep: int) -> Any:
    """The sliding layer as it was at the mark, with the first `keep` of the `fed` rows behind it."""
    out = copy.copy(saved)
    if keep:
        start = layer.keys.shape[-2] - fed
        rows = slice(start, start + keep)
        if not out.is_initialized:
            out.lazy_initialization(layer.keys, layer.values)
        out.update(layer.keys[..., rows, :], layer.values[..., rows, :])
    return out
