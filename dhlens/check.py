"""The self-check: on a few tokens, do the hooks of this model mean what they say?

Run by `dhlens.load`. It costs a handful of short passes. Each line of `check` is one property that the engine relies
on. One that observing needs raises; one that only some edits need is kept in `model.limits`. Either way the message
names the hook site, the architecture and what is refused because of it.
"""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dhlens import hooks as sites
from dhlens.masks import shadow_masks, shadow_positions

if TYPE_CHECKING:
    from dhlens.model import Model

_TOKENS = 24
_BLOCK = 4
_LONGEST = 2048
"""A window longer than this is not walked past: the pass would cost more than loading."""


def check(model: "Model") -> None:
    """Prove the model's hooks.

    Raises:
        ValueError: a property that observing needs fails; the message says which and where.
    """
    window = min((w for w in model.windows if w is not None and w < _LONGEST), default=0)
    n = max(_TOKENS, window + _TOKENS if window else 0)
    vocabulary = model.hooked.cfg.d_vocab
    tokens = torch.randint(min(100, vocabulary // 2), vocabulary, (1, n), generator=torch.Generator().manual_seed(0))
    tol = 1e-2 if model.dtype == torch.float32 else 1.0
    whole = _feed(model, tokens, keep=_BLOCK)
    if not bool(whole.isfinite().all()):
        raise ValueError(
            f"{_who(model)}: the logits are not finite (NaN or inf); nothing can be observed in {model.dtype}"
        )
    _patterns(model, tokens)
    _head_output(model, tokens, whole)
    _head_scores(model, tokens)
    stream = model.stream()
    stream.feed(tokens[:, :-_BLOCK])
    mark = stream.mark()
    _equal(model, stream.feed(tokens[:, -_BLOCK:], hooks=(), keep=_BLOCK), whole, tol, "a block on the cache", "replay")
    stream.rewind(mark)
    steps = torch.cat([stream.feed(tokens[:, i : i + 1]) for i in range(n - _BLOCK, n)], dim=1)
    _equal(model, steps, whole, tol, "plain decoding (the twin)", "observe")
    stream.rewind(mark)
    if hasattr(model.hooked, "original_model"):
        _shadows(model, stream, tokens, whole, tol)
    else:
        model.limits["shadow_rows"] = "a HookedTransformer takes no 4-D mask"
    _folded(model)


def _feed(model: "Model", tokens: Tensor, hooks: Any = (), keep: int = 1) -> Float[Tensor, "1 keep vocab"]:
    return model.stream().feed(tokens, hooks=hooks, keep=keep)


def _who(model: "Model") -> str:
    hf = getattr(model.hooked, "original_model", None)
    return f"{model.card.model} ({type(hf if hf is not None else model.hooked).__name__})"


def _patterns(model: "Model", tokens: Tensor) -> None:
    sums: dict[int, Tensor] = {}

    def read(layer: int) -> Any:
        return lambda pattern, hook: sums.__setitem__(layer, pattern[0].float().sum(-1))

    _feed(model, tokens, [(sites.pattern(layer), read(layer)) for layer in range(model.n_layers)])
    for layer in range(model.n_layers):
        if layer not in sums or sums[layer].shape[0] != model.n_heads:
            raise ValueError(
                f"{_who(model)}: {sites.pattern(layer)} does not fire for {model.n_heads} heads; observe is refused"
            )
        if not torch.allclose(sums[layer], torch.ones_like(sums[layer]), atol=2e-2):
            raise ValueError(f"{_who(model)}: rows of {sites.pattern(layer)} do not sum to 1; observe is refused")


def _head_output(model: "Model", tokens: Tensor, whole: Tensor) -> None:
    def zero(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, -1, 0] = 0
        return z

    for layer in {0, model.n_layers - 1}:
        moved = _feed(model, tokens, [(sites.z(layer), zero)], keep=_BLOCK)
        if torch.equal(moved[:, -1], whole[:, -1]):
            raise ValueError(f"{_who(model)}: an edit of {sites.z(layer)} does not reach the logits; edits are refused")


def _head_scores(model: "Model", tokens: Tensor) -> None:
    left: list[float] = []

    def hide(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        scores[..., -2] = float("-inf")
        return scores

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TransformerLens may warn of the very thing that is tested
        _feed(model, tokens, [
            (sites.scores(0), hide),
            (sites.pattern(0), lambda pattern, hook: left.append(float(pattern[:, :, -1, -2].max()))),
        ])  # fmt: skip
    if left != [0.0]:
        found = f"leaves mass {left[0]:.2f}" if left else "does nothing"
        model.limits["hide"] = (
            f"{_who(model)}: -inf in {sites.scores(0)} {found}; edits of scores (hide, uniform) are refused"
        )


def _folded(model: "Model") -> None:
    """Warn where TransformerLens has folded weights into others, and say what differs; measured on 3.9.0."""
    hooked = model.hooked
    layer_norm, folded = str(hooked.cfg.normalization_type).startswith("LN"), _norm_folded(hooked)
    lost = ["the hidden site 'final' lacks the last norm's weight and bias"] if folded else []
    if layer_norm and (folded or _centred(hooked)):
        lost.append("the residual stream may lack its mean")
    if not _biases(hooked, "b_V") and ((folded and layer_norm) or _biases(hooked, "b_Q")):
        lost.append("a zeroed head leaves its value bias behind, which now sits in the layer's output bias")
    if not lost:
        return
    model.limits["raw_weights"] = (
        f"{_who(model)} has folded weights: {'; '.join(lost)}. Attention, log-probabilities and other edits are those "
        "of the raw weights, which from_pretrained_no_processing and enable_compatibility_mode(no_processing=True) keep"
    )
    warnings.warn(model.limits["raw_weights"], stacklevel=4)


def _norm_folded(hooked: Any) -> bool:
    """Whether the last norm's weight sits in the unembedding: a bridge then has ones in its place."""
    weight = getattr(hooked.ln_final, "weight", None)
    emptied = getattr(hooked, "compatibility_mode", False) and weight is not None and bool((weight == 1).all())
    return emptied or str(hooked.cfg.normalization_type).endswith("Pre")


def _centred(hooked: Any) -> bool:
    """Whether what is written to the residual stream has a mean of zero."""
    embedding = getattr(hooked, "W_E", None)
    return embedding is not None and bool(embedding.mean(-1).abs().max() < 1e-5 * embedding.abs().max())


def _biases(hooked: Any, name: str) -> bool:
    """Whether any layer has such a bias other than zero."""
    found = [getattr(block.attn, name, None) for block in hooked.blocks]
    return any(bias is not None and bool(bias.any()) for bias in found)


def _equal(model: "Model", got: Tensor, want: Tensor, tol: float, what: str, refused: str) -> None:
    gap = float((got.float() - want.float()).abs().max())
    if not gap <= tol:
        raise ValueError(
            f"{_who(model)}: logits of {what} differ from one whole pass by {gap:.2g}; {refused} is refused"
        )


def _shadows(model: "Model", stream: Any, tokens: Tensor, whole: Tensor, tol: float) -> None:
    sources = [0, 1, _BLOCK - 1]
    block = tokens[:, -_BLOCK:]
    try:
        logits = stream.feed(
            torch.cat([block, block[:, sources]], dim=1),
            hooks=(),
            keep=_BLOCK + len(sources),
            positions=shadow_positions(stream.length, _BLOCK, sources),
            mask=shadow_masks(stream.length, _BLOCK, sources, windows=model.windows, dtype=model.dtype),
        )
        _equal(model, logits, torch.cat([whole, whole[:, sources]], dim=1), tol, "shadow rows", "effects in one pass")
    except (ValueError, TypeError, RuntimeError) as error:
        # observing does not need them; what does asks `limits`
        model.limits["shadow_rows"] = f"{_who(model)}: shadow rows cannot be fed, effects go row by row ({error})"
