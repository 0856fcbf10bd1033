"""Rasters with a planted truth: heads that share an event, a clock, a class of token, or nothing.

Every head is active in runs (a step repeats the one before it with probability `STAY`), so that a null which breaks
runs takes chance for company.
"""

import numpy as np
import torch
from toy_traces import toy_trace

from dhlens.scores import Score, copy_paste

STAY = 0.8
SHAPE = (3, 4)
GROUPS = 6


def runs(rng: np.random.Generator, episodes: int, steps: int, n: int, rate: float = 0.3) -> np.ndarray:
    """Bool[episode step n]: independent two-state chains."""
    out = np.empty((episodes, steps, n), dtype=bool)
    out[:, 0] = rng.random((episodes, n)) < rate
    for s in range(1, steps):
        fresh = rng.random((episodes, n)) < rate
        out[:, s] = np.where(rng.random((episodes, n)) < STAY, out[:, s - 1], fresh)
    return out


def score_of(active: np.ndarray, lengths: np.ndarray | None = None) -> Score:
    """A score of this raster, bool [episode step 12]; `lengths` cuts episodes."""
    episodes, steps, _ = active.shape
    groups = [f"window{i % GROUPS}" for i in range(episodes)]
    trace = toy_trace(active.reshape(episodes, steps, *SHAPE), groups=groups, stop_token=False)
    score = copy_paste(trace)
    return score if lengths is None else score.select(trace.step < torch.as_tensor(lengths)[trace.episode])


def alone(seed: int, episodes: int = 36, steps: int = 24) -> Score:
    """Independent heads, answers of different lengths."""
    rng = np.random.default_rng(seed)
    return score_of(runs(rng, episodes, steps, 12), rng.integers(steps // 2, steps + 1, episodes))


def clockwork(seed: int, episodes: int = 36, steps: int = 24) -> Score:
    """All heads follow one clock, and nothing else."""
    rng = np.random.default_rng(seed)
    rate = np.where(np.arange(steps) % 4 == 0, 0.9, 0.05)
    return score_of(rng.random((episodes, steps, 12)) < rate[None, :, None])


PLANTED = np.array([0, 1, 0, 2, 1, 0, -1, 2, 1, 0, -1, -1])
"""Cluster of each head."""


def crowds(seed: int, *, noise: float = 0.05, episodes: int = 36, steps: int = 24) -> Score:
    """Heads of a cluster share an event, but for `noise`; three stand alone."""
    rng = np.random.default_rng(seed)
    active = runs(rng, episodes, steps, 12)
    for k in range(3):
        active[..., k == PLANTED] = runs(rng, episodes, steps, 1)
    flip = rng.random(active.shape) < noise
    return score_of(active ^ (flip & (PLANTED >= 0)))
