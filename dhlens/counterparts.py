"""What was said to a prompt, beside what its counterfactual twin would have had said.

    found = answers_of(trace, [niah.twin(tokenizer, e, seed=0) for e in trace.episodes])

What the model said is kept, and its counterpart is the same words with the twin's answer in place of the needle's. At
the steps where the two differ there is a difference to explain, and where a head is dynamic someone to explain it by:
these are the steps that `dhlens.dissection` takes apart. Cost: none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dhlens.episode import Episode, Outcome
from dhlens.heads import HeadSet
from dhlens.scores import copy_paste
from dhlens.trace import Trace


@dataclass(frozen=True, eq=False)
class Answer:
    """What was said to a prompt, beside what its twin would have had said."""

    episode: Episode
    twin: Episode
    said: Int[Tensor, " step"]
    """Int[step]: without the stop token."""
    other: Int[Tensor, " step"]
    """Int[step]: the same with the twin's answer."""
    heads: Mapping[int, HeadSet]
    """The dynamic heads of each step; steps without one are left out."""

    @classmethod
    def of(
        cls, episode: Episode, twin: Episode, outcome: Outcome, active: Bool[Tensor, "step layer head"]
    ) -> "Answer | None":
        """None where the reply does not hold the answer as the needle spells it: then no step has a counterpart."""
        end = len(outcome.tokens) - (outcome.stopped == "stop_token")
        pair = _counterparts(episode, twin, outcome.tokens[:end])
        if pair is None:
            return None
        heads = {s: HeadSet.from_mask(on) for s, on in enumerate(active[: len(pair[0])]) if on.any()}
        return cls(episode, twin, *pair, heads)

    @property
    def differs(self) -> list[int]:
        """The steps at which the two differ."""
        return (self.said != self.other).nonzero().flatten().tolist()

    @property
    def steps(self) -> list[int]:
        """Those of them at which a head is dynamic."""
        return [s for s in self.differs if s in self.heads]


def check_twins(episodes: Sequence[Episode], twins: Sequence[Episode]) -> None:
    """Refuse what has no counterfactual, before any pass.

    Raises:
        ValueError: a needle is missing or ends with the prompt; a twin has another length, says the same in the needle,
            or something else outside.
    """
    for e, twin in zip(episodes, twins, strict=True):
        if e.span("needle").stop > len(e.tokens) - 1:
            raise ValueError(f"episode {e.id!r}: the needle must end before the prompt's last token")
        if len(e.tokens) != len(twin.tokens):
            sizes = f"{len(e.tokens)} and {len(twin.tokens)} tokens"
            raise ValueError(f"episode {e.id!r} and its twin must be of equal length, got {sizes}")
        differs = e.tokens != twin.tokens
        inside = differs[e.span("needle").start : e.span("needle").stop]
        if not inside.any() or differs.sum() > inside.sum():
            raise ValueError(
                f"episode {e.id!r} and its twin must differ in the needle and nowhere else, got "
                f"{int(inside.sum())} tokens there and {int(differs.sum() - inside.sum())} elsewhere"
            )


def answers_of(trace: Trace, twins: Sequence[Episode], most: int | None = None) -> dict[str, Answer]:
    """What can be taken apart of `most` answered episodes, by id; `twins` has one for each episode.

    Groups take turns, each at another of its episodes, so that few answers come from many windows and depths. Left out
    are answers that spell the needle in other tokens.

    Raises:
        ValueError: no episode was answered, or no answer has a step to be taken apart.
    """
    right = _in_turns(trace)[:most]
    if not right:
        raise ValueError(f"none of {len(trace.outcomes)} episodes was answered: there is no step to take apart")
    active, found = copy_paste(trace, span="needle").heads(), {}
    for i in right:
        rows = (trace.episode == i) & (trace.step >= 0)
        answer = Answer.of(trace.episodes[i], twins[i], trace.outcomes[i], active[rows])
        if answer is not None:
            found[trace.episodes[i].id] = answer
    if not any(answer.steps for answer in found.values()):
        raise ValueError(
            f"none of {len(right)} answers has a step at which its twin says something else and a head is dynamic"
        )
    return found


def _in_turns(trace: Trace) -> list[int]:
    """The answered episodes, one of each group after the other."""
    groups: dict[str, list[int]] = {}
    for i, (e, o) in enumerate(zip(trace.episodes, trace.outcomes, strict=True)):
        if o.correct:
            groups.setdefault(e.group, []).append(i)
    turned = [of[j % len(of) :] + of[: j % len(of)] for j, of in enumerate(groups.values())]
    return [i for turn in zip_longest(*turned) for i in turn if i is not None]


def _counterparts(episode: Episode, twin: Episode, said: Tensor) -> tuple[Tensor, Tensor] | None:
    """The reply that the task knows, or any that holds the needle's answer token by token, and its counterpart."""
    n = min(len(episode.answer), len(twin.answer))
    if n and said[:n].equal(episode.answer[:n]):
        return said[:n], twin.answer[:n]
    if not episode.has("answer"):
        return None
    span = episode.span("answer")
    right, wrong = (e.tokens[span.start : span.stop] for e in (episode, twin))
    starts = [i for i in range(len(said) - len(right) + 1) if said[i : i + len(right)].equal(right)]
    if not starts:
        return None
    end = starts[0] + len(right)
    return said[:end], torch.cat([said[: starts[0]], wrong])
