"""A Stream on the TransformerLens cache, for a HookedTransformer; see `dhlens.stream` for what a stream is."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dhlens.hooks import Hook
from dhlens.masks import LayerMasks
from dhlens.stream import CHUNK, Mark, attached, feed_ahead


class TLStream:
    """One growing TransformerLens cache. There is no twin: long feeds go through in chunks."""

    reach: int | None = None

    def __init__(self, hooked: Any) -> None:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        self._hooked = hooked
        self._cache = TransformerLensKeyValueCache.init_cache(hooked.cfg, hooked.cfg.device)
        self.length = 0

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
        """See `Stream.feed`; `positions` and `mask` are beyond a HookedTransformer.

        Raises:
            ValueError: positions or a mask were given.
        """
        if positions is not None or mask is not None:
            raise ValueError("a HookedTransformer takes no positions or mask of its own: run these rows one by one")
        tokens = tokens.to(self._hooked.cfg.device)
        if hooks is None:
            tokens = feed_ahead(self, tokens, keep, CHUNK)
        with attached(self._hooked, hooks or ()):
            logits = self._hooked(tokens, past_kv_cache=self._cache, attention_mask=torch.ones_like(tokens))
        self.length += tokens.shape[1]
        return logits[:, -keep:]

    def mark(self) -> Mark:
        """See `Stream.mark`."""
        return Mark(self.length, ())

    def rewind(self, mark: Mark, keep: int = 0) -> None:
        """See `Stream.rewind`."""
        self.length = mark.length + keep
        for entry in self._cache.entries:
            entry.past_keys = entry.past_keys[:, : self.length]
            entry.past_values = entry.past_values[:, : self.length]
        self._cache.previous_attention_mask = self._cache.previous_attention_mask[:, : self.length]

    def fork(self, lanes: int = 1) -> "TLStream":
        """See `Stream.fork`."""
        branch = copy.copy(self)
        branch._cache = copy.copy(self._cache)
        branch._cache.entries = [copy.copy(entry) for entry in self._cache.entries]
        if lanes > 1:
            branch.select([0] * lanes)
        return branch

    def select(self, lanes: Sequence[int]) -> None:
        """See `Stream.select`."""
        kept = list(lanes)
        for entry in self._cache.entries:
            entry.past_keys, entry.past_values = entry.past_keys[kept], entry.past_values[kept]
        self._cache.previous_attention_mask = self._cache.previous_attention_mask[kept]
