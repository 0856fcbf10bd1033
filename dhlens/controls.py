"""Controls: policies to judge `Dynamic` beside, and the set of all that the standard ablation runs.

    fit = dh.observe(model, fit_episodes, capture=Capture(z=True))
    result = dh.recipes.ablate(model, episodes, standard_policies(fit, seed=0), edit=dh.zero())

What each answers: is it the number of heads (`StaticLike`, `RandomLike`: of equal size at every step), their layers
(`RandomLike` by layer), that static heads are among them (tail, common), or that they were chosen because they had just
copied this very token (`OtherStep`, `OtherEpisode`: heads that are dynamic elsewhere)?
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dhlens.card import digest
from dhlens.heads import HeadSet
from dhlens.policies import Dynamic, Policy, Static, StepView, combined, of_shape, score_key
from dhlens.scores import Scoring, copy_paste, copy_rank
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


def StaticLike(policy: Policy, ranking: Float[Tensor, "layer head"]) -> Policy:  # noqa: N802
    """At every step the heads of highest `ranking`, as many as `policy` names there: the size-matched static control.

    Raises:
        ValueError: before any pass: the ranking is of another model shape.
    """

    def choose(now: StepView, past: Trace | None) -> HeadSet:
        return HeadSet.top_k(ranking, len(policy(now, past)))

    of_ranking = of_shape("the static ranking", tuple(ranking.shape))
    return combined((policy,), choose, f"static like {policy.name}", of_ranking, key=digest(ranking))


def RandomLike(  # noqa: N802
    policy: Policy, *, seed: int, by_layer: bool = False, redraw: bool = True, exclude: HeadSet | None = None
) -> Policy:
    """At every step as many random heads as `policy` names there.

    Args:
        policy: whose number of heads to match.
        seed: with the episode's id and the step it decides the draw, whatever the order of episodes.
        by_layer: match the number in every layer.
        redraw: draw anew at every step; False orders the heads once per episode and takes the first ones.
        exclude: heads that are never drawn. The heads of `policy` itself may be.

    Raises:
        ValueError: at the step: fewer heads are left than must be drawn; `by_layer` with `redraw=False`.
    """
    if by_layer and not redraw:
        raise ValueError("by_layer draws layer by layer at every step: leave redraw on")

    def choose(now: StepView, past: Trace | None) -> HeadSet:
        like = policy(now, past)
        if redraw:
            return like.draw_like(seed=_seed(now, seed, now.step), exclude=exclude, by_layer=by_layer)
        free = HeadSet([], now.shape) if exclude is None else exclude
        pool = [(layer, h) for layer in range(now.shape[0]) for h in range(now.shape[1]) if (layer, h) not in free]
        if len(like) > len(pool):
            raise ValueError(f"cannot draw {len(like)} heads: {len(pool)} are left in the model")
        order = np.random.default_rng(_seed(now, seed, 0)).permutation(len(pool))
        return HeadSet([pool[i] for i in order[: len(like)]], now.shape)

    of_excluded = [] if exclude is None else [of_shape("excluded heads", exclude.shape)]
    key = f"seed {seed}, by layer {by_layer}, redraw {redraw}, without {digest(exclude)}"
    return combined((policy,), choose, f"random like {policy.name}", *of_excluded, key=key)


def OtherStep(span: str = "needle", *, seed: int, score: Scoring | None = None) -> Policy:  # noqa: N802
    """Heads that were active at an earlier step of the same answer, drawn per step; none where there was none.

    They may be active now, too, and be more or fewer than now: see how many each policy takes.
    """
    scoring: Scoring = score or (lambda trace: copy_paste(trace, span))

    def choose(now: StepView, past: Trace | None) -> HeadSet:
        if past is None:
            return HeadSet([], now.shape)
        active = scoring(past).heads()
        rows = active.flatten(1).any(1).nonzero().flatten().tolist()
        return HeadSet.from_mask(active[_draw(rows, now, seed)]) if rows else HeadSet([], now.shape)

    return Policy(choose, name="other step", key=f"{span}, seed {seed}, {score_key(score)}")


def OtherEpisode(source: Trace, span: str = "needle", *, seed: int, score: Scoring | None = None) -> Policy:  # noqa: N802
    """Heads that are active at the same step in another haystack window's episode of `source`, drawn per step.

    Past the end of every answer there, those of a last step.

    Raises:
        ValueError: at the step: `source` has no generation step of another window.
    """
    active = (score or (lambda trace: copy_paste(trace, span)))(source).heads()
    groups, steps = source.groups, source.step.numpy()

    def choose(now: StepView, past: Trace | None) -> HeadSet:
        others = (groups != now.episode.group) & (steps >= 0)
        if not others.any():
            raise ValueError(f"the source trace has no episode of another haystack window than {now.episode.group!r}")
        rows = np.flatnonzero(others & (steps == min(now.step, steps[others].max()))).tolist()
        return HeadSet.from_mask(active[_draw(rows, now, seed)])

    of_source = of_shape("the source trace", source.shape)
    key = f"seed {seed}, {digest(active, source.step, list(groups))}"
    return Policy(choose, needs_read=False, needs_past=False, name="other episode", key=key, check=of_source)


def standard_policies(
    fit: Trace, *, seed: int, span: str = "needle", score: Scoring | None = None
) -> dict[str, Policy | None]:
    """None, random, static, dynamic and the controls.

    At each step random, random by layer and static take as many heads as dynamic; tail and common share its heads;
    static 20 takes all 20; other step and other episode take what was active there, none at the first step of an
    answer. Heads that are active now may be among those of the other policies, but for `random`.

    `random` draws among heads that are neither static nor ever active in `fit`; where few are left, among all but the
    static ones, and where these are fewer than twice the most at a step, among all.

    Args:
        fit: observed answers that static heads are fitted on.
        seed: of the draws.
        span: where active heads copy from.
        score: another score of yes and no that says which heads are active, such as
            `dhlens.reasoning.ReasoningHeads`; all answers of `fit` count then, right or wrong.

    Raises:
        ValueError: no episode of `fit` was answered, or it lacks the span.
    """
    ranking, top = static_ranking(fit, span, score), static_set(fit, span, score)
    active = (score or (lambda trace: copy_paste(trace, span)))(fit).heads()
    ever = HeadSet.from_mask(active[fit.step >= 0].any(0)) | top
    spared = ever if len(ever) <= ranking.numel() // 2 else top
    if ranking.numel() - len(spared) < 2 * int(active.flatten(1).sum(1).max()):
        spared = HeadSet([], fit.shape)
    dynamic = Dynamic(span, score=score)
    return {
        "none": None,
        "random": RandomLike(dynamic, seed=seed, exclude=spared),
        "random by layer": RandomLike(dynamic, seed=seed, by_layer=True),
        "static": StaticLike(dynamic, ranking),
        "static 20": Static(top),
        "dynamic": dynamic,
        "tail": dynamic - Static(top),
        "common": dynamic & Static(top),
        "other step": OtherStep(span, seed=seed, score=score),
        "other episode": OtherEpisode(fit, span, seed=seed, score=score),
    }


def sized_policies(
    fit: Trace, ks: Sequence[int], *, seed: int, span: str = "needle", score: Scoring | None = None
) -> dict[str, dict[int | None, Policy | None]]:
    """Dynamic, static and random heads, k of them at every step, for each k.

    Dynamic heads are taken in the order of `copy_rank`, or of another `score`, static ones by its mean in `fit` (that
    of copy-paste; of another score over all answers, right or wrong); random ones are drawn once per episode, from all
    heads.

    Raises:
        ValueError: a size is below 1 or more than the model has heads; no episode of `fit` was answered.
    """
    ranking, order = static_ranking(fit, span, score), score or (lambda trace: copy_rank(trace, span))
    if not ks or min(ks) < 1 or max(ks) > ranking.numel():
        raise ValueError(f"k must lie within 1..{ranking.numel()}, the heads of the model, got {list(ks)}")
    static = {k: Static(HeadSet.top_k(ranking, k)) for k in ks}
    return {
        "dynamic": {k: Dynamic(span, score=order, top_k=k) for k in ks},
        "static": {k: static[k] for k in ks},
        "random": {k: RandomLike(static[k], seed=seed, redraw=False) for k in ks},
    }


def static_set(fit: Trace, span: str = "needle", score: Scoring | None = None) -> HeadSet:
    """The heads of highest mean score in `fit`, 20 of them, as in the paper; all, where the model has fewer.

    Raises:
        ValueError: see `static_ranking`.
    """
    ranking = static_ranking(fit, span, score)
    return HeadSet.top_k(ranking, min(STATIC, ranking.numel()))


def static_ranking(fit: Trace, span: str = "needle", score: Scoring | None = None) -> Float[Tensor, "layer head"]:
    """Each head's mean copy-paste score over the answered episodes of `fit`; that of another score over all.

    Raises:
        ValueError: none was answered, or `fit` lacks the span.
    """
    if score is not None:
        found = score(fit)
        return found.values[found.answer_rows(answered=False)].mean(0, dtype=torch.float64)
    return copy_paste(fit, span).mean().to(torch.float64)


def _seed(now: StepView, seed: int, step: int) -> int:
    """A seed of the draw's own, so that neither the order of episodes nor their number changes it."""
    return int(np.random.SeedSequence([seed, zlib.crc32(now.episode.id.encode()), step]).generate_state(1)[0])


def _draw(rows: list[int], now: StepView, seed: int) -> int:
    return int(np.random.default_rng(_seed(now, seed, now.step)).choice(rows))
