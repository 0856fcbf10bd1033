"""The policies of the standard ablation, from observations of other haystack windows.

    fit = dh.observe(model, fit_episodes, capture=Capture(z=True))
    result = dh.recipes.ablate(model, episodes, standard_policies(fit, seed=0), edit=dh.zero())

What each control answers: is it the number of heads (`static`, `random`), their layers (`random by layer`), that static
heads are among them (`tail`, `common`), or that they were chosen because they had just copied this very token (`other
step`, `other episode`)?
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dhlens.heads import HeadSet
from dhlens.policies import Dynamic, OtherEpisode, OtherStep, Policy, RandomLike, Static, StaticLike
from dhlens.scores import copy_paste, copy_rank
from dhlens.trace import Trace

POLICIES = (
    "none",
    "random",
    "random by layer",
    "static",
    "static 20",
    "dynamic",
    "tail",
    "common",
    "other step",
    "other episode",
)
"""Names of the standard policies."""
STATIC = 20
"""Size of the static set, the paper's."""


def standard_policies(fit: Trace, *, seed: int, span: str = "needle") -> dict[str, Policy | None]:
    """None, random, static, dynamic and the controls.

    At each step random, random by layer and static take as many heads as dynamic; tail and common share its heads;
    static 20 takes all 20; other step and other episode take what was active there, none at the first step of an
    answer. Heads that are active now may be among those of the other policies, but for `random`.

    `random` draws among heads that are neither static nor ever active in `fit` (all but the static ones, where few are
    left).

    Raises:
        ValueError: no episode of `fit` was answered, or it lacks the span.
    """
    ranking, top = static_ranking(fit, span), static_set(fit, span)
    ever = HeadSet.from_mask(copy_paste(fit, span).heads().any(0)) | top
    spared = ever if len(ever) <= ranking.numel() // 2 else top
    dynamic = Dynamic(span)
    return {
        "none": None,
        "random": RandomLike(dynamic, seed=seed, exclude=spared),
        "random by layer": RandomLike(dynamic, seed=seed, by_layer=True),
        "static": StaticLike(dynamic, ranking),
        "static 20": Static(top),
        "dynamic": dynamic,
        "tail": dynamic - Static(top),
        "common": dynamic & Static(top),
        "other step": OtherStep(span, seed=seed),
        "other episode": OtherEpisode(fit, span, seed=seed),
    }


def sized_policies(
    fit: Trace, ks: Sequence[int], *, seed: int, span: str = "needle"
) -> dict[str, dict[int | None, Policy | None]]:
    """Dynamic, static and random heads, k of them at every step, for each k.

    Dynamic heads are taken in the order of `copy_rank`, static ones by mean score in `fit`; random ones are drawn once
    per episode, from all heads.

    Raises:
        ValueError: a size is below 1 or more than the model has heads; no episode of `fit` was answered.
    """
    ranking = static_ranking(fit, span)
    if not ks or min(ks) < 1 or max(ks) > ranking.numel():
        raise ValueError(f"k must lie within 1..{ranking.numel()}, the heads of the model, got {list(ks)}")
    static = {k: Static(HeadSet.top_k(ranking, k)) for k in ks}
    return {
        "dynamic": {k: Dynamic(span, score=lambda trace: copy_rank(trace, span), top_k=k) for k in ks},
        "static": {k: static[k] for k in ks},
        "random": {k: RandomLike(static[k], seed=seed, redraw=False) for k in ks},
    }


def static_set(fit: Trace, span: str = "needle") -> HeadSet:
    """The heads of highest mean score in `fit`, 20 of them, as in the paper; all, where the model has fewer.

    Raises:
        ValueError: see `static_ranking`.
    """
    ranking = static_ranking(fit, span)
    return HeadSet.top_k(ranking, min(STATIC, ranking.numel()))


def static_ranking(fit: Trace, span: str = "needle") -> Float[Tensor, "layer head"]:
    """Each head's mean copy-paste score over the answered episodes of `fit`.

    Raises:
        ValueError: none was answered, or `fit` lacks the span.
    """
    return copy_paste(fit, span).mean().to(torch.float64)
