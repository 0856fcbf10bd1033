"""Where things happen: TransformerLens hook names, as functions of the layer.

A `Hook` is the ordinary TransformerLens pair `(name, fn)` with `fn(tensor, hook) -> tensor | None`; every read and
every edit of dhlens is a list of them and works alone in `model.hooked.hooks(fwd_hooks=[...])`. Close over the layer
and never read `hook.name`: under TransformerBridge it is not the name that was asked for.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

HookFn = Callable[[Tensor, Any], Tensor | None]
Hook = tuple[str, HookFn]


def pattern(layer: int) -> str:
    """Attention weights after the softmax, [batch, query head, query, key]."""
    return f"blocks.{layer}.attn.hook_pattern"


def scores(layer: int) -> str:
    """Masked attention scores before the softmax, [batch, query head, query, key]."""
    return f"blocks.{layer}.attn.hook_attn_scores"


def z(layer: int) -> str:
    """Head outputs before the output projection, [batch, query, query head, d_head]."""
    return f"blocks.{layer}.attn.hook_z"


def q(layer: int) -> str:
    """Queries as projected, before any norm or rotation, [batch, query, query head, d_head]."""
    return f"blocks.{layer}.attn.hook_q"


def k(layer: int) -> str:
    """Keys of this pass as projected, before any norm or rotation, [batch, query, key/value head, d_head]."""
    return f"blocks.{layer}.attn.hook_k"


def v(layer: int) -> str:
    """Values of this pass, [batch, query, key/value head, d_head]."""
    return f"blocks.{layer}.attn.hook_v"


def resid_pre(layer: int) -> str:
    """Residual stream before the layer, [batch, query, d_model]."""
    return f"blocks.{layer}.hook_resid_pre"


def resid(layer: int) -> str:
    """Residual stream after the layer, [batch, query, d_model]."""
    return f"blocks.{layer}.hook_resid_post"


def final() -> str:
    """The final norm's output with its weight applied, [batch, query, d_model]: what the unembedding reads.

    Hugging Face's last hidden state. A HookedTransformer has it at `unembed.hook_in`; see `Model.hidden_site`.
    """
    return "ln_final.hook_out"


def first_key(keys: int, width: int) -> int:
    """The absolute position of column 0 of a pattern that is `width` columns wide after `keys` positions were fed.

    Full-attention layers are as wide as the sequence (0); the cache of a sliding-window layer holds the last columns
    only.
    """
    return keys - width
