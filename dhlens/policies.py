"""Policies: which heads, now.

A policy looks at the clean read of one step and at the steps before it, and names heads. Policies compose like sets:
`Dynamic() - Static(top20)` is the long tail alone, `Dynamic() & Static(top20)` the common part. Your own is a function:

    loudest = dh.Policy(lambda now, past: dh.HeadSet.top_k(now.mass[0].double(), 5), name="loudest")

`Dynamic` chooses on the outcome: what it names has just copied the token that was to come. Judge it beside `StaticLike`
and `RandomLike` (of equal size at every step, so that the number of heads is no excuse), `OtherStep` and `OtherEpisode`
(heads that are dynamic elsewhere).
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from dhlens.card import digest
from dhlens.episode import Episode
from dhlens.heads import HeadSet
from dhlens.scores import Score, copy_paste
from dhlens.trace import Trace


@dataclass(frozen=True, eq=False)
class StepView:
    """One step as a policy sees it.

    Fields of the clean read go by their Trace names, without the row axis: `now.peak_key` [layer head k], `now.mass`
    [span layer head], `now.argmax`, `now.entropy`, `now.hidden["final"]`.
    """

    episode: Episode
    step: int
    """Generation step, from 0."""
    fed: int
    """Id of the token that this step feeds."""
    shape: tuple[int, int]
    """(n_layers, n_heads) of the model."""
    read: Trace | None
    """The clean read as a Trace of one row; None for a policy that needs none."""

    def __getattr__(self, name: str) -> Any:
        """A field of the clean read.

        Raises:
            AttributeError: no such field, or the step was not read.
        """
        if name.startswith("_") or name not in Trace.__dataclass_fields__:
            raise AttributeError(f"a step has no {name!r}")
        if self.read is None:
            raise AttributeError(f"{name!r} needs the clean read, and this policy said needs_read=False")
        field = getattr(self.read, name)
        if name == "hidden":
            return {site: rows[0] for site, rows in field.items()}
        return field if name in ("card", "span_names") or field is None else field[0]


Choose = Callable[[StepView, Trace | None], HeadSet]
"""From this step and the clean reads of the steps before it (None where there are none) to heads."""
Scoring = Callable[[Trace], Score]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Policy:
    """Heads as a function of the step, with set algebra."""

    choose: Choose
    """The function."""
    needs_read: bool = True
    """Whether the step must be read clean first; False spares that pass."""
    needs_past: bool = True
    """Whether it looks at the steps before; False spares putting them together."""
    name: str = "own"
    """As it stands in tables."""
    key: str = ""
    """What tells it from others of its name (heads, seed, threshold): a run's card holds it."""
    check: Callable[[Shape], None] = lambda shape: None
    """Refuses a model's (layers, heads), by ValueError, before any pass."""

    def __call__(self, now: StepView, past: Trace | None) -> HeadSet:
        """The heads of this step.

        Raises:
            TypeError: the function returned something else than a HeadSet.
            ValueError: it returned heads of another model shape.
        """
        heads = self.choose(now, past)
        if not isinstance(heads, HeadSet):
            raise TypeError(f"policy {self.name!r} must return a HeadSet, got {type(heads).__name__}")
        if heads.shape != now.shape:
            raise ValueError(f"policy {self.name!r} must name heads of {now.shape} (layers, heads), got {heads.shape}")
        return heads

    def __or__(self, other: "Policy") -> "Policy":
        return self._join(other, "|", HeadSet.__or__)

    def __and__(self, other: "Policy") -> "Policy":
        return self._join(other, "&", HeadSet.__and__)

    def __sub__(self, other: "Policy") -> "Policy":
        return self._join(other, "-", HeadSet.__sub__)

    def _join(self, other: "Policy", sign: str, join: Callable[[HeadSet, HeadSet], HeadSet]) -> "Policy":
        def choose(now: StepView, past: Trace | None) -> HeadSet:
            return join(self(now, past), other(now, past))

        return _like((self, other), choose, f"({self.name} {sign} {other.name})")


def Dynamic(  # noqa: N802 - policies are nouns
    span: str = "needle", *, score: Scoring | None = None, threshold: float = 0.0, top_k: int | None = None
) -> Policy:
    """The heads that are active at this very step, by its clean read.

    Args:
        span: where to copy from, for the default score (Eq. 1).
        score: another score, as a function of a Trace.
        threshold: active is a score above this.
        top_k: instead, the k heads of highest score.

    Raises:
        ValueError: before any pass: k is more than the model has heads; at the step: the trace lacks the span.

    Source: arXiv 2602.11162, section 4 (its masking in two passes).
    """
    scoring: Scoring = score or (lambda trace: copy_paste(trace, span))

    def choose(now: StepView, past: Trace | None) -> HeadSet:
        assert now.read is not None
        values = scoring(now.read).values[0]
        return HeadSet.from_mask(values > threshold) if top_k is None else HeadSet.top_k(values, top_k)

    def check(shape: Shape) -> None:
        if top_k is not None and not 0 <= top_k <= shape[0] * shape[1]:
            raise ValueError(f"top_k must lie within 0..{shape[0] * shape[1]} (the model's heads), got {top_k}")

    name = "dynamic" if top_k is None else f"dynamic top {top_k}"
    key = f"{span}, above {threshold}, {'own score' if score else 'copy-paste'}"
    return Policy(choose, needs_past=False, name=name, key=key, check=check)


def Static(heads: HeadSet) -> Policy:  # noqa: N802
    """The same heads at every step."""
    check = _of_shape("heads", heads.shape)
    key = digest(heads)
    return Policy(lambda now, past: heads, needs_read=False, needs_past=False, name="static", key=key, check=check)


def StaticLike(policy: Policy, ranking: Float[Tensor, "layer head"]) -> Policy:  # noqa: N802
    """At every step the heads of highest `ranking`, as many as `policy` names there: the size-matched static control.

    Raises:
        ValueError: before any pass: the ranking is of another model shape.
    """

    def choose(now: StepView, past: Trace | None) -> HeadSet:
        return HeadSet.top_k(ranking, len(policy(now, past)))

    of_ranking = _of_shape("the static ranking", tuple(ranking.shape))
    return _like((policy,), choose, f"static like {policy.name}", of_ranking, key=digest(ranking))


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

    of_excluded = [] if exclude is None else [_of_shape("excluded heads", exclude.shape)]
    key = f"seed {seed}, by layer {by_layer}, redraw {redraw}, without {digest(exclude)}"
    return _like((policy,), choose, f"random like {policy.name}", *of_excluded, key=key)


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

    return Policy(choose, name="other step", key=f"{span}, seed {seed}, {'own score' if score else 'copy-paste'}")


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

    of_source = _of_shape("the source trace", source.shape)
    key = f"seed {seed}, {digest(active, source.step, list(groups))}"
    return Policy(choose, needs_read=False, needs_past=False, name="other episode", key=key, check=of_source)


def _of_shape(what: str, mine: tuple[int, ...]) -> Callable[[Shape], None]:
    def check(shape: Shape) -> None:
        if mine != shape:
            raise ValueError(f"{what} must be of the model's shape {shape} (layers, heads), got {mine}")

    return check


def _like(
    policies: Sequence[Policy], choose: Choose, name: str, *checks: Callable[[Shape], None], key: str = ""
) -> Policy:
    """A policy that calls others and needs what they need."""

    def check(shape: Shape) -> None:
        for one in (*(p.check for p in policies), *checks):
            one(shape)

    reads, past = any(p.needs_read for p in policies), any(p.needs_past for p in policies)
    whole = "; ".join([key, *(p.key for p in policies)])
    return Policy(choose, needs_read=reads, needs_past=past, name=name, key=whole, check=check)


def along(policy: Policy | None, trace: Trace) -> list[HeadSet]:
    """The heads that `policy` names at each row of the clean trace of one episode's answer; None names none.

    Raises:
        ValueError: the trace holds several episodes, or rows that are no generation steps in order.
    """
    if len(trace.episodes) != 1 or trace.step.tolist() != list(range(len(trace))):
        raise ValueError("a policy goes along the whole answer of one episode: trace.pick([i]) without prompt rows")
    if policy is None:
        return [HeadSet([], trace.shape)] * len(trace)
    found: list[HeadSet] = []
    for i in range(len(trace)):
        read = trace.select(trace.step == i) if policy.needs_read else None
        past = trace.select(trace.step < i) if i and policy.needs_past else None
        found.append(policy(StepView(trace.episodes[0], i, int(trace.fed[i]), trace.shape, read), past))
    return found


def _seed(now: StepView, seed: int, step: int) -> int:
    """A seed of the draw's own, so that neither the order of episodes nor their number changes it."""
    return int(np.random.SeedSequence([seed, zlib.crc32(now.episode.id.encode()), step]).generate_state(1)[0])


def _draw(rows: list[int], now: StepView, seed: int) -> int:
    return int(np.random.default_rng(_seed(now, seed, now.step)).choice(rows))
