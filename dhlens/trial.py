"""One episode under many conditions: its clean answer, the effect on each of its tokens, and the edited answers.

What `dhlens.recipes.ablate` does for every episode, as one table; the columns stand there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from dhlens.card import RunCard
from dhlens.contrasts import CONDITION
from dhlens.drafts import guesser
from dhlens.edits import Edit
from dhlens.engine import observe_on
from dhlens.episode import Episode
from dhlens.heads import HeadSet
from dhlens.lanes import Lane, checked_lanes, decode_on
from dhlens.limits import at_least_one, check_edit_on, check_episodes
from dhlens.model import Model
from dhlens.policies import Policy, along, sites_of
from dhlens.reads import Capture
from dhlens.scores import Scoring, copy_paste
from dhlens.shadow import effects_on
from dhlens.stats import rouge_l
from dhlens.stream import Stream
from dhlens.tables import depth, marks
from dhlens.trace import Trace

PER_STEP = ["step", "step_heads", "step_active", "logit_change", "prob", "prob_clean", "kl", "kept"]
"""List columns of an episode's file: one entry per step of the clean answer."""


@dataclass(frozen=True)
class PerEpisode:
    """An edit that is another one for every episode, such as a patch from its own counterfactual twin."""

    make: Callable[[Episode], Edit]
    """Builds the edit when the episode's turn comes."""
    key: str = ""
    """What tells it from others of its name: the run's card holds it."""


@dataclass(frozen=True)
class Condition:
    """Which heads, and what is done to them."""

    policy: str
    """Name of the policy; "none" for the untouched model."""
    k: int | None
    """Its size, for a policy that is run at several."""
    edit: str
    """Name of the edit."""
    chosen: Policy | None
    """The policy."""

    @property
    def key(self) -> str:
        """The condition as one text."""
        return f"{self.policy}, k={self.k}, {self.edit}"


@dataclass(frozen=True)
class Plan:
    """What is done to every episode; the fields are arguments of `dhlens.recipes.ablate`."""

    conditions: Sequence[Condition]
    edits: Mapping[str, Edit | PerEpisode]
    commits: Sequence[str]
    static: HeadSet | None
    span: str
    prompt: bool
    max_new_tokens: int
    batch: int
    score: Scoring | None = None
    """Which heads are active, where it is not those that copy from `span`."""

    def active(self, trace: Trace) -> Bool[Tensor, "n layer head"]:
        """The active heads at each row."""
        return (copy_paste(trace, self.span) if self.score is None else self.score(trace)).heads()

    @property
    def capture(self) -> Capture:
        """What is kept of every step: the default without hidden states, but for those that a policy looks at."""
        return Capture(hidden=sites_of(c.chosen for c in self.conditions))


def conditions_of(policies: Mapping[str, Any], edits: Mapping[str, Any]) -> list[Condition]:
    """The conditions of `dhlens.recipes.ablate`, each policy under each edit.

    Raises:
        ValueError: "none" and the untouched model are not the same.
        TypeError: a policy is something else.
    """
    found: list[Condition] = []
    for name, given in policies.items():
        for k, policy in given.items() if isinstance(given, Mapping) else [(None, given)]:
            if (policy is None) != (name == "none"):
                raise ValueError(
                    f'"none" is the untouched model, policy None, and nothing else; got {name!r}: {policy}'
                )
            if policy is not None and not isinstance(policy, Policy):
                kind = type(policy).__name__
                raise TypeError(f"policy {name!r} must be a Policy (dh.Static(heads), dh.Policy(function)), got {kind}")
            found += [Condition(name, k, edit, policy) for edit in (edits if policy else ["none"])]
    return found


def check_plan(model: Model, episodes: Sequence[Episode], plan: Plan) -> None:
    """Refuse what cannot be run, before any pass; the errors are those of `dhlens.recipes.ablate`."""
    if not plan.commits or not plan.edits or not plan.conditions:
        raise ValueError("an ablation needs at least one policy, one edit and one commit")
    if len(set(plan.commits)) < len(plan.commits):
        raise ValueError(f"each commit is run once, got {', '.join(plan.commits)}")
    if "none" in plan.edits:
        raise ValueError('"none" names the untouched model, give the edit another name')
    lanes = {c.key: c.chosen for c in plan.conditions}
    for commit in plan.commits:
        checked_lanes(lanes, model, commit=commit, prompt=plan.prompt, batch=plan.batch)
    for edit in plan.edits.values():
        if not isinstance(edit, PerEpisode):
            check_edit_on(model, edit)
    if plan.static is not None and plan.static.shape != model.shape:
        raise ValueError(f"static heads must be of the model's shape {model.shape}, got {plan.static.shape}")
    at_least_one(plan.max_new_tokens)
    check_episodes(model, episodes, max_new_tokens=plan.max_new_tokens)
    for e in episodes:
        e.span(plan.span)
        if e.judge("") is None:
            raise ValueError(f"answers are judged by meta['answer_text'], and episode {e.id!r} has none")


def trial(model: Model, stream: Stream, episode: Episode, plan: Plan, card: RunCard) -> pd.DataFrame:
    """One row per condition; what was measured at each step as lists."""
    guess = guesser(True, episode, model.stop_ids)
    clean = observe_on(model, stream.fork(), episode, guess, plan.max_new_tokens, capture=plan.capture, card=card)
    edits = {n: e.make(episode) if isinstance(e, PerEpisode) else e for n, e in plan.edits.items()}
    for made in edits.values():
        check_edit_on(model, made)
    one_step = _one_step(model, stream, episode, clean, plan, edits)
    touched = [c for c in plan.conditions if c.chosen is not None]
    # the clean answer is the untouched model's
    rows = [_row(c, "none", clean, plan) | one_step[c.key] for c in plan.conditions if c.chosen is None]
    for commit in plan.commits if touched else ():
        runs = decode_on(
            model,
            None if plan.prompt else stream.fork(),
            episode,
            {c.key: Lane(c.chosen, edits[c.edit]) for c in touched},
            commit=commit,
            max_new_tokens=plan.max_new_tokens,
            batch=plan.batch,
            capture=plan.capture,
            card=card,
        )
        rows += [_row(c, commit, runs[c.key], plan) | one_step[c.key] for c in touched]
    table = pd.DataFrame(rows).astype({"k": float})
    meta = {"length": episode.meta.get("length", len(episode.tokens)), "depth": depth(episode)}
    known = {"episode": episode.id, "group": episode.group, **meta, "answered": bool(clean.outcomes[0].correct)}
    return table.assign(**known)


def parted(whole: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Answers and steps, from rows of `trial` that hold both."""
    keys = ["episode", "group", "length", "depth", "answered", *CONDITION]
    answers = whole.drop(columns=PER_STEP)
    # one-step effects do not depend on the commit: the first one's rows hold them all
    once = whole.drop_duplicates(["episode", "policy", "k", "edit"])
    steps = once.loc[:, [k for k in keys if k != "commit"] + PER_STEP].explode(PER_STEP).dropna(subset=["step"])
    kinds = {name: float for name in PER_STEP} | {"step": int, "step_heads": int, "step_active": int, "kept": bool}
    names = {"step_heads": "heads", "step_active": "active"}
    steps = steps.astype(kinds).rename(columns=names).reset_index(drop=True)
    return answers.loc[:, [*keys, *(c for c in answers if c not in keys)]], steps


def _one_step(
    model: Model, stream: Stream, episode: Episode, clean: Trace, plan: Plan, edits: Mapping[str, Edit]
) -> dict[str, dict[str, Any]]:
    """Per condition the effect of its heads at each step of the clean answer, by itself; the prompt stays clean."""
    clean = clean.select(clean.answer_rows())
    said, steps = clean.next_token, clean.step.tolist()
    p = clean.logprob.exp().tolist()
    zeros, yes = [0.0] * len(steps), [True] * len(steps)
    none = [0] * len(steps)
    untouched = {"step": steps, "step_heads": none, "logit_change": zeros, "prob": p, "prob_clean": p}
    found = {c.key: {**untouched, "step_active": none, "kl": zeros, "kept": yes} for c in plan.conditions}
    sets = {c.key: along(c.chosen, clean) for c in plan.conditions}
    for name, edit in edits.items():
        now = [c for c in plan.conditions if c.edit == name]
        asked = [(step, heads) for c in now for step, heads in zip(steps, sets[c.key], strict=True)]
        if not asked:  # the model stopped at once
            continue
        table = effects_on(model, stream.fork(), episode, said, asked, edit=edit).table
        active = plan.active(clean)
        shared = [int(active[step][heads.mask()].sum()) for step, heads in asked]
        table = table.rename(columns={"size": "step_heads"}).assign(step_active=shared)[PER_STEP]
        for at, c in enumerate(now):
            part = table.iloc[at * len(steps) : (at + 1) * len(steps)]
            found[c.key] = {column: part[column].tolist() for column in PER_STEP}
    return found


def _row(condition: Condition, commit: str, run: Trace, plan: Plan) -> dict[str, Any]:
    """What became of the answer under a condition."""
    outcome, episode = run.outcomes[0], run.episodes[0]
    reference = episode.meta.get("needle_text") or episode.meta["answer_text"]
    rows = run.answer_rows()
    used = torch.zeros(len(run), *run.shape, dtype=torch.bool) if run.heads_used is None else run.heads_used
    heads = used[rows].flatten(1).sum(1).double()
    return {
        "policy": condition.policy,
        "k": condition.k,
        "edit": condition.edit,
        "commit": commit,
        "text": outcome.text,
        "correct": bool(outcome.correct),
        "rouge_l": rouge_l(reference, outcome.text),
        **marks(episode, outcome.text),
        "steps": len(heads),
        "heads": float(heads.mean()) if len(heads) else 0.0,
        **_compensation(run, used, plan),
    }


def _compensation(run: Trace, used: Bool[Tensor, "n layer head"], plan: Plan) -> dict[str, float]:
    """Static heads that become active when others are taken away, at a step: most, mean, share of steps with any.

    None does where nothing is taken away. NaN without static heads, or where no policy read the clean step.

    Source: arXiv 2602.11162, A.2. Heads that are edited at the step do not count, which the paper leaves open; each
    pass is scored by the token that it predicts.
    """
    names = ("comp_max", "comp_mean", "comp_steps")
    if plan.static is None or (run.clean is None and run.heads_used is not None):
        return dict.fromkeys(names, np.nan)
    before, after = (plan.active(trace) for trace in (run.clean or run, run))
    new = (after & ~before & ~used & plan.static.mask()).flatten(1).sum(1)[run.answer_rows()].double()
    if not len(new):
        return dict.fromkeys(names, 0.0)
    return dict(zip(names, (float(new.max()), float(new.mean()), float((new > 0).double().mean())), strict=True))
