"""Policies: which heads, now.

A policy looks at the clean read of one step and at the steps before it, and names heads. Policies compose like sets:
`Dynamic() - Static(top20)` is the long tail alone, `Dynamic() & Static(top20)` the common part. Your own is a function:

    loudest = dh.Policy(lambda now, past: dh.HeadSet.top_k(now.mass[0].double(), 5), name="loudest")

`Dynamic` chooses on the outcome: what it names has just copied the token that was to come. Judge it beside its controls
in `dhlens.controls`; `dhlens.Predicted` names heads before anything is known of the step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from dhlens.card import RunCard, digest
from dhlens.episode import Episode
from dhlens.heads import HeadSet
from dhlens.scores import Scoring, copy_paste
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
    states: Mapping[str, Float[Tensor, "step d_model"]] = field(default_factory=dict)
    """Hidden site to the states of the steps before this one, as the model had them: behind edits, edited ones. Of
    `Policy.sites` alone."""

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
Shape = tuple[int, int]
Check = Callable[[RunCard, Shape], None]


@dataclass(frozen=True)
class Policy:
    """Heads as a function of the step, with set algebra."""

    choose: Choose
    """The function."""
    needs_read: bool = True
    """Whether the step must be read clean first; False spares that pass."""
    needs_past: bool = True
    """Whether it looks at the clean reads of the steps before; False spares putting them together."""
    sites: tuple[str, ...] = ()
    """Hidden sites that it looks at: captured for it, and given in `StepView.states`."""
    name: str = "own"
    """As it stands in tables."""
    key: str = ""
    """What tells it from others of its name (heads, seed, threshold): a run's card holds it."""
    check: Check = lambda card, shape: None
    """Refuses a model, by its card and its (layers, heads), with a ValueError before any pass."""

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

        return combined((self, other), choose, f"({self.name} {sign} {other.name})")


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

    def check(card: RunCard, shape: Shape) -> None:
        if top_k is not None and not 0 <= top_k <= shape[0] * shape[1]:
            raise ValueError(f"top_k must lie within 0..{shape[0] * shape[1]} (the model's heads), got {top_k}")

    name = "dynamic" if top_k is None else f"dynamic top {top_k}"
    key = f"{span}, above {threshold}, {score_key(score)}"
    return Policy(choose, needs_past=False, name=name, key=key, check=check)


def Static(heads: HeadSet) -> Policy:  # noqa: N802
    """The same heads at every step."""
    check = of_shape("heads", heads.shape)
    key = digest(heads)
    return Policy(lambda now, past: heads, needs_read=False, needs_past=False, name="static", key=key, check=check)


def score_key(score: Scoring | None) -> str:
    """What tells a policy's score from others, as far as it says so by a `key`."""
    return "copy-paste" if score is None else str(getattr(score, "key", "own score"))


def of_shape(what: str, mine: tuple[int, ...]) -> Check:
    """Refuses models of another shape than `mine`, which `what` has."""

    def check(card: RunCard, shape: Shape) -> None:
        if mine != shape:
            raise ValueError(f"{what} must be of the model's shape {shape} (layers, heads), got {mine}")

    return check


def combined(policies: Sequence[Policy], choose: Choose, name: str, *checks: Check, key: str = "") -> Policy:
    """A policy that calls others and needs what they need."""

    def check(card: RunCard, shape: Shape) -> None:
        for one in (*(p.check for p in policies), *checks):
            one(card, shape)

    reads, past = any(p.needs_read for p in policies), any(p.needs_past for p in policies)
    whole = "; ".join([key, *(p.key for p in policies)])
    sites = sites_of(policies)
    return Policy(choose, needs_read=reads, needs_past=past, sites=sites, name=name, key=whole, check=check)


def sites_of(policies: Iterable[Policy | None]) -> tuple[str, ...]:
    """The hidden sites that any of these policies looks at."""
    return tuple(dict.fromkeys(site for policy in policies if policy for site in policy.sites))


def along(policy: Policy | None, trace: Trace) -> list[HeadSet]:
    """The heads that `policy` names at each row of the clean trace of one episode's answer; None names none.

    Raises:
        ValueError: the trace holds several episodes, or rows that are no generation steps in order.
    """
    if len(trace.episodes) != 1 or trace.step.tolist() != list(range(len(trace))):
        raise ValueError("a policy goes along the whole answer of one episode: trace.pick([i]) without prompt rows")
    return [at_row(policy, trace, i) for i in range(len(trace))]


def at_row(policy: Policy | None, trace: Trace, i: int) -> HeadSet:
    """The heads that `policy` names at row i of the clean trace of one episode's answer, from its first step on."""
    if policy is None:
        return HeadSet([], trace.shape)
    read = trace.select(trace.step == i) if policy.needs_read else None
    past = trace.select(trace.step < i) if i and policy.needs_past else None
    states = {site: trace.hidden[site][:i] for site in policy.sites}
    return policy(StepView(trace.episodes[0], i, int(trace.fed[i]), trace.shape, read, states), past)
