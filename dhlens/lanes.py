"""Decode while heads are changed: one policy and one edit per lane, all lanes of an episode in one batch.

    runs = dh.decode(model, episodes, {"dynamic": dh.Dynamic(), "static": dh.Static(top20), "none": None})
    runs["dynamic"].outcomes[0].text, runs["dynamic"].heads_used, runs["dynamic"].clean

At each step, for all lanes at once: (1) where a policy asks for it, feed the token clean, read it, and take it back;
(2) each lane's policy names heads; (3) feed the token with each lane's edit of its heads, reading again; (4) the greedy
token of THESE logits goes on. A lane's result equals that of its run alone.

`commit` says which keys and values later steps see of this one. "edited" (default): those of the edited pass, so that
the model lives with what was taken away, as a model without these heads would. "clean": the step is fed once more
unchanged, so that every step is an experiment of its own on an unharmed past, and only the words carry the effect on.

The prompt stays clean unless `prompt=True`, which edits its rows as well and needs policies that read nothing (Static,
RandomLike of it): "take away while answering" and "take away throughout" are different experiments.
Cost: one hooked pass of one row per lane and step, two where any lane reads, three with commit="clean".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dhlens.card import RunCard
from dhlens.edits import Edit, zero
from dhlens.engine import observation_card
from dhlens.episode import Episode
from dhlens.heads import HeadSet
from dhlens.hooks import Hook
from dhlens.limits import at_least_one, check_edit_on, check_episodes
from dhlens.model import Model
from dhlens.policies import Policy, StepView, sites_of
from dhlens.prefix import prefill
from dhlens.reads import Capture
from dhlens.record import Block, outcome_of, read_block, record
from dhlens.stream import CHUNK, Stream
from dhlens.trace import Trace


@dataclass(frozen=True)
class Lane:
    """A policy and what is done to the heads it names; `edit` None stands for `zero()`."""

    policy: Policy | None
    """None leaves the model alone."""
    edit: Edit | None = None


@dataclass
class _Run:
    """One lane of one episode while it is decoded."""

    name: str
    policy: Policy | None
    edit: Edit
    tokens: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    clean: list[Block] = field(default_factory=list)
    used: list[HeadSet] = field(default_factory=list)


def decode(
    model: Model,
    episodes: Sequence[Episode],
    lanes: Mapping[str, Lane | Policy | None],
    *,
    commit: str = "edited",
    prompt: bool = False,
    max_new_tokens: int = 48,
    batch: int = 16,
    capture: Capture = Capture(),
    progress: bool = True,
) -> dict[str, Trace]:
    """Greedy answers under every lane, and what was read meanwhile.

    Args:
        model: a loaded model.
        episodes: prompts.
        lanes: name to policy (with zeroing), `Lane(policy, edit)`, or None for the model as it is.
        commit: whose keys and values stay, see above.
        prompt: edit the prompt's rows too.
        max_new_tokens: most answer tokens.
        batch: most lanes that run at once; each holds a copy of the prompt's keys and values.
        capture: what to keep of every row.
        progress: show a bar.

    Returns:
        Name to Trace, with `heads_used`, and `clean`, the clean read of each step, where any lane's policy reads.

    Raises:
        ValueError: see `limits.check_episodes`; no lane, an unknown commit, `prompt=True` with a policy that reads.
        TypeError: a lane is something else.

    Source: arXiv 2602.11162, section 4 (two passes per step). It does not say whose keys and values stay.
    """
    chosen = checked_lanes(lanes, model, commit=commit, prompt=prompt, batch=batch)
    at_least_one(max_new_tokens)
    check_episodes(model, episodes, max_new_tokens=max_new_tokens)
    capture = capture.seeing(sites_of(lane.policy for lane in chosen.values()))
    card = observation_card(model, capture=capture, max_new_tokens=max_new_tokens, commit=commit, edit_prompt=prompt)
    found: dict[str, dict[int, Trace]] = {name: {} for name in chosen}
    streams = enumerate([None] * len(episodes)) if prompt else prefill(model, episodes)
    for i, stream in tqdm(streams, total=len(episodes), desc="decode", unit="episode", disable=not progress):
        done = decode_on(
            model,
            stream,
            episodes[i],
            chosen,
            commit=commit,
            max_new_tokens=max_new_tokens,
            batch=batch,
            capture=capture,
            card=card,
        )
        for name, trace in done.items():
            found[name][i] = trace
    return {name: Trace.cat([by[i] for i in range(len(episodes))]) for name, by in found.items()}


def decode_on(
    model: Model,
    stream: Stream | None,
    episode: Episode,
    lanes: Mapping[str, Lane],
    *,
    commit: str,
    max_new_tokens: int,
    batch: int = 16,
    capture: Capture = Capture(),
    card: RunCard,
) -> dict[str, Trace]:
    """`decode` one episode on its prefilled stream, which is left as it was. Arguments are not checked again.

    Without a stream each lane's prompt is fed here, under the lane's edit.
    """
    found: dict[str, Trace] = {}
    # one lane that reads makes all of them read, to their end: clean reads are aligned with the rows of each trace
    reading = any(lane.policy is not None and lane.policy.needs_read for lane in lanes.values())
    size = batch if stream is not None else 1
    for names in (list(lanes)[at : at + size] for at in range(0, len(lanes), size)):
        branch = _edited_prompt(model, episode, lanes[names[0]]) if stream is None else stream.fork(len(names))
        runs = [_Run(name, lanes[name].policy, lanes[name].edit or zero()) for name in names]
        _decode_lanes(model, branch, episode, runs, card, commit, max_new_tokens, capture, reading=reading)
        found |= {run.name: _trace(model, episode, run, card) for run in runs}
    return found


def checked_lanes(
    lanes: Mapping[str, Lane | Policy | None],
    model: Model,
    *,
    commit: str,
    prompt: bool = False,
    batch: int = 16,
) -> dict[str, Lane]:
    """The lanes as `Lane`s, fit for this model.

    Raises:
        ValueError, TypeError: see `decode`.
    """
    chosen = {name: lane if isinstance(lane, Lane) else Lane(lane) for name, lane in lanes.items()}
    _check(chosen, commit, prompt, batch)
    for lane in chosen.values():
        if lane.policy is not None:
            lane.policy.check(model.card, model.shape)
        if lane.edit is not None:
            check_edit_on(model, lane.edit)
    return chosen


def _check(lanes: Mapping[str, Lane], commit: str, prompt: bool, batch: int) -> None:
    if not lanes or batch < 1:
        raise ValueError(f"decode needs at least one lane and one at once, got {len(lanes)} and {batch}")
    if commit not in ("edited", "clean"):
        raise ValueError(f"commit must be 'edited' or 'clean', got {commit!r}")
    for name, lane in lanes.items():
        if lane.policy is not None and not isinstance(lane.policy, Policy):
            raise TypeError(
                f"lane {name!r} must hold a Policy (wrap a function: dh.Policy(fn)), got {type(lane.policy).__name__}"
            )
        policy = lane.policy
        if prompt and policy is not None and (policy.needs_read or policy.needs_past or policy.sites):
            raise ValueError(f"prompt=True edits rows before any step is read: lane {name!r} must not need a read")


def _edited_prompt(model: Model, episode: Episode, lane: Lane) -> Stream:
    stream = model.stream()
    tokens = episode.tokens[:-1]
    if lane.policy is None:
        stream.feed(tokens[None])
        return stream
    heads = lane.policy(StepView(episode, 0, int(episode.tokens[-1]), model.shape, None), None)
    for part in tokens.split(len(tokens) if model.rope_breaks else CHUNK):
        keys = stream.length + len(part)
        stream.feed(part[None], hooks=(lane.edit or zero())(heads, steps=[0] * len(part), keys=keys))
    return stream


def _decode_lanes(
    model: Model,
    stream: Stream,
    episode: Episode,
    runs: list[_Run],
    card: RunCard,
    commit: str,
    room: int,
    capture: Capture,
    *,
    reading: bool,
) -> None:
    alive = list(runs)
    for step in range(room):
        fed = torch.tensor([[run.tokens[-1] if run.tokens else int(episode.tokens[-1])] for run in alive])
        here = stream.mark()
        if reading:
            read = read_block(model, stream, fed, episode, capture)
            stream.rewind(here)
            for lane, run in enumerate(alive):
                run.clean.append(read.rows(slice(lane, lane + 1)))
        for run in alive:
            run.used.append(_heads(model, episode, run, card, step))
        block = read_block(model, stream, fed, episode, capture, edits=_hooks(alive, step, stream.length + 1))
        if commit == "clean":
            stream.rewind(here)
            stream.feed(fed)
        for lane, run in enumerate(alive):
            run.blocks.append(block.rows(slice(lane, lane + 1)))
            run.tokens.append(int(block.logits[lane].argmax()))
        going = [lane for lane, run in enumerate(alive) if run.tokens[-1] not in model.stop_ids]
        if not going:
            return
        if len(going) < len(alive):
            stream.select(going)
            alive = [alive[lane] for lane in going]


def _heads(model: Model, episode: Episode, run: _Run, card: RunCard, step: int) -> HeadSet:
    policy = run.policy
    if policy is None:
        return HeadSet([], model.shape)
    fed = run.tokens[-1] if run.tokens else int(episode.tokens[-1])
    first = len(episode.tokens) - 1
    now = _seen(model, episode, run, card, run.clean[-1:], first=first + step) if policy.needs_read else None
    past = None
    if step and policy.needs_read and policy.needs_past:
        past = _seen(model, episode, run, card, run.clean[:-1], first=first)
    states = {site: _states(model, run, site) for site in policy.sites}
    return policy(StepView(episode, step, fed, model.shape, now, states), past)


def _states(model: Model, run: _Run, site: str) -> Float[Tensor, "step d_model"]:
    return torch.cat([torch.zeros(0, model.hooked.cfg.d_model), *(block.fields[site] for block in run.blocks)])


def _seen(model: Model, episode: Episode, run: _Run, card: RunCard, blocks: list[Block], *, first: int) -> Trace:
    """The clean reads of some steps; what follows each is its own prediction, whatever the edited model said."""
    outcome = outcome_of(model, episode, run.tokens, given=True)
    predicted = [int(b.logits[-1].argmax()) for b in blocks]
    return record(episode, outcome, card, blocks, next_tokens=predicted, first=first)


def _hooks(runs: Sequence[_Run], step: int, keys: int) -> list[Hook]:
    """Each lane's edit of its own heads in its own row of the batch."""
    hooks: list[Hook] = []
    by_edit: dict[int, list[int]] = {}
    for lane, run in enumerate(runs):
        if len(run.used[-1]):
            by_edit.setdefault(id(run.edit), []).append(lane)
    for lanes in by_edit.values():
        sets = [runs[lane].used[-1] for lane in lanes]
        hooks += runs[lanes[0]].edit(sets, rows=lanes, steps=[step] * len(lanes), keys=keys)
    return hooks


def _trace(model: Model, episode: Episode, run: _Run, card: RunCard) -> Trace:
    first = len(episode.tokens) - 1
    card = card.with_settings(lane=run.name, policy=run.policy.name if run.policy else None)
    outcome = outcome_of(model, episode, run.tokens)
    trace = record(episode, outcome, card, run.blocks, next_tokens=run.tokens, first=first)
    clean = _seen(model, episode, run, card, run.clean, first=first) if run.clean else None
    return dataclasses.replace(trace, heads_used=torch.stack([h.mask() for h in run.used]), clean=clean)
