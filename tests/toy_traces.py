"""Synthetic Traces whose copy-paste raster the test chooses: a head that is active at a step looks at the needle token
that comes next, all others look at position 0."""

import torch

from dhlens.card import RunCard
from dhlens.episode import Episode, Outcome, Span
from dhlens.trace import Trace

SINK, STOP, FIRST = 1, 2, 100


def toy_trace(active, *, groups=None, correct=True, needle=None, stop_token=True, before=3):
    """A Trace from `active`, bool [episode step layer head]; the model copies the needle, one token a step.

    `needle`: token ids of length `step` (default: all different). With `stop_token` a last step emits it, with no head
    active. `before`: prompt tokens before the needle; one more stands behind it. Step -1 of the prompt is observed too.
    """
    active = torch.as_tensor(active)
    n_episodes, n_steps = active.shape[:2]
    needle = torch.arange(FIRST, FIRST + n_steps) if needle is None else torch.as_tensor(needle)
    prompt = torch.cat([torch.full((before,), SINK), needle, torch.tensor([SINK])])
    tokens = torch.cat([needle, torch.tensor([STOP])]) if stop_token else needle
    groups = [f"window{i}" for i in range(n_episodes)] if groups is None else groups
    verdicts = correct if isinstance(correct, list) else [correct] * n_episodes
    episodes = tuple(
        Episode(
            f"toy-{i}",
            prompt,
            needle,
            (Span("needle", before, before + n_steps), Span("tail", before + n_steps, before + n_steps + 1)),
            {"group": group, "needle_text": "the quick brown fox"},
        )
        for i, group in enumerate(groups)
    )
    outcomes = tuple(
        Outcome(tokens, "the quick brown fox", c, "stop_token" if stop_token else "max_new_tokens") for c in verdicts
    )
    parts = [_rows(i, active[i], prompt, tokens, before) for i in range(n_episodes)]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    names = ("needle", "tail", "prompt", "all")
    return Trace(episodes=episodes, outcomes=outcomes, card=RunCard("toy"), span_names=names, **columns)


def _rows(episode, active, prompt, tokens, before):
    n_steps, layers, heads = active.shape
    step = torch.arange(-1, len(tokens))
    n = len(step)
    key = torch.zeros(n, layers, heads, 2, dtype=torch.long)
    key[..., 1] = 1
    key[1 : n_steps + 1, ..., 0] = torch.where(active, before + torch.arange(n_steps)[:, None, None], 0)
    emitted = torch.cat([prompt[-1:], tokens])
    mass = torch.full((n, 4, layers, heads), 0.25)
    focus_key = torch.arange(before, before + n_steps).repeat(n, 1)
    return {
        "episode": torch.full((n,), episode),
        "step": step,
        "position": len(prompt) - 1 + step,
        "fed": torch.cat([prompt[-2:], tokens])[:n],
        "next_token": emitted,
        "argmax": emitted,
        "logprob": torch.zeros(n),
        "entropy": torch.zeros(n),
        "peak_key": key,
        "peak_token": prompt[key],
        "peak_weight": torch.full(key.shape, 0.4),
        "mass": mass,
        "mass_core": mass.clone(),
        "focus_key": focus_key,
        "focus": (key[..., :1] == focus_key[:, None, None]).half() * 0.5,
    }
