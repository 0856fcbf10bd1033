"""Composition: how strongly the output of one head can enter the query, key or value of another, by weights alone.

    composition(model, {"digits": crowds.members[1], "letters": crowds.members[0]})

The score of a pair is ||W_OV W||_F / (||W_OV||_F ||W||_F), with W the later head's QK circuit ("Q"), its transpose
("K") or its OV circuit ("V"), as in TransformerLens's `all_composition_scores`. Three things to know:

- Under grouped queries the key and value weights of a group serve all its query heads: TransformerLens expands them, so
  that K and V scores of heads of one group differ by their queries and output projections alone.
- The norm's weight between the two stands in the way of raw weights. It is folded in here (`fold=False`: raw, equal to
  `all_composition_scores`); its scale drops out. Rotations and norms of queries and keys are left out in either.
- Neighbouring layers compose more than distant ones whatever the heads do. The baseline therefore draws as many heads
  from the same layers.

Cost: seconds for 30 heads of SmolLM2; every pair of heads of the layers concerned, once. Weights say what is possible:
what flows at a step is in `dhlens.attribution`.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from dhlens.frozen import FrozenNorm
from dhlens.heads import HeadSet
from dhlens.model import Model
from dhlens.stats import holm

Mode = Literal["Q", "K", "V"]


def composition(
    model: Model,
    sets: Mapping[str, HeadSet],
    *,
    fold: bool = True,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean composition score from each set of heads into each, over pairs of an earlier and a later head.

    Args:
        model: a loaded model.
        sets: clusters, or single heads, by name.
        fold: take in the weight of the norm before the later head.
        draws: random sets of the same sizes layer by layer, for the baseline.
        seed: of the draws.

    Returns:
        One row per ordered pair of sets and mode that has a pair of heads: sender, receiver, mode, pairs, score, null
        (mean of the draws) with its 95 % range, p (share of draws at least as large) and p_holm (over the table).

    Raises:
        ValueError: no sets, sets of another shape, or no draws.
    """
    if not sets or draws < 1:
        raise ValueError(f"there must be at least one set of heads and one draw, got {len(sets)} and {draws}")
    for name, heads in sets.items():
        if heads.shape != model.shape:
            raise ValueError(f"heads must be of the model's shape {model.shape}, got {heads.shape} for {name}")
    layers = {layer for heads in sets.values() for layer, _ in heads}
    scores = {mode: composition_scores(model, mode, layers=layers, fold=fold) for mode in get_args(Mode)}
    rng = np.random.default_rng(seed)
    drawn = {name: _masks(heads, draws, rng) for name, heads in sets.items()}
    rows = []
    for sender, a in sets.items():
        for receiver, b in sets.items():
            n_pairs = sum(m < n for m, _ in a for n, _ in b)
            for mode, table in scores.items():
                if not n_pairs:
                    continue
                flat = table.flatten(2).flatten(0, 1).double()
                masks = (
                    torch.cat([h.mask().flatten()[None], drawn[k]]).double() for k, h in ((sender, a), (receiver, b))
                )
                x, y = masks
                value, *null = (((x @ flat) * y).sum(1) / n_pairs).tolist()
                low, high = np.quantile(null, (0.025, 0.975))
                p = (1 + int((np.array(null) >= value - 1e-12).sum())) / (1 + draws)
                rows.append((sender, receiver, mode, n_pairs, value, float(np.mean(null)), low, high, p))
    columns = ["sender", "receiver", "mode", "pairs", "score", "null", "null_low", "null_high", "p"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_holm=holm(table["p"].to_numpy(dtype=float)))


@torch.no_grad()
def composition_scores(
    model: Model, mode: Mode, *, layers: Collection[int] | None = None, fold: bool = True
) -> Float32[Tensor, "sender_layer sender_head layer head"]:
    """Scores of all pairs of heads of these layers (default all); 0 where the receiver is not later.

    Raises:
        ValueError: another mode.

    Source: Elhage et al. 2021, and TransformerLens's `all_composition_scores`, which takes raw weights and all layers
        at once (gigabytes at a thousand heads).
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be 'Q', 'K' or 'V', got {mode!r}")
    chosen = sorted(range(model.n_layers) if layers is None else layers)
    out = torch.zeros(*model.shape, *model.shape)
    ov: Any = model.hooked.OV
    circuits: Any = ov if mode == "V" else model.hooked.QK
    near = {m: ov[m].collapse_l().detach().float() for m in chosen[:-1]}
    for n in chosen[1:]:
        far = _receiver(model, circuits[n], n, mode, fold=fold)
        for m in [m for m in chosen if m < n]:
            # factors alone, [head d_head d_model] and [head d_model d_head], have the norms of the whole
            both = torch.einsum("hdm,gme->hgde", near[m], far).norm(dim=(-2, -1))
            size = near[m].norm(dim=(-2, -1))[:, None] * far.norm(dim=(-2, -1))
            out[m, :, n] = (both / size).cpu()
    return out


def _receiver(model: Model, found: Any, layer: int, mode: Mode, *, fold: bool) -> Float[Tensor, "head d_model d_head"]:
    """What a layer's heads do with the residual stream, without what follows."""
    if fold:
        norm = FrozenNorm.of(model.hooked.blocks[layer].ln1, torch.ones(1, model.d_model).to(found.A))
        b = found.B.float() if mode == "V" else norm.fold(found.B.transpose(-2, -1)).transpose(-2, -1)
        found = type(found)(norm.fold(found.A), b)
    return (found.T if mode == "K" else found).collapse_r().detach().float()


def _masks(heads: HeadSet, draws: int, rng: np.random.Generator) -> Tensor:
    """Random sets with as many heads in each layer, Bool[draw head], heads flattened."""
    size = heads.mask().sum(1).numpy()[None, :, None]
    place = rng.random((draws, *heads.shape)).argsort(-1).argsort(-1)
    return torch.from_numpy(place < size).flatten(1)
