"""Observing many episodes for a recipe: in memory, or shard by shard into a run that can be killed and resumed.

    trace = gathered(model, episodes, Observation(max_new_tokens=32), card, run=run)

`dhlens.observe` is the same for a session without a folder. About the time of plain generation.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from dhlens.card import RunCard
from dhlens.engine import observe_each, warn_mismatch
from dhlens.episode import Episode
from dhlens.executor import Executor, serial
from dhlens.model import Model, load
from dhlens.reads import Capture
from dhlens.store import Run
from dhlens.trace import Trace


@dataclass(frozen=True)
class Observation:
    """How a recipe observes; everything here decides numbers and stands in the card."""

    max_new_tokens: int = 48
    draft: bool | str = True
    capture: Capture = Capture()
    share: bool = True


def gathered(
    model: Model,
    episodes: Sequence[Episode],
    observation: Observation,
    card: RunCard,
    *,
    run: Run | None = None,
    executor: Executor = serial,
    progress: bool = True,
) -> Trace:
    """Every episode's answer, observed; with a run, only those that it has not, each saved as it is done.

    Raises:
        ValueError: several processes, and no run to meet in.
    """
    bar: Any = {"total": len(episodes), "desc": "scan", "unit": "episode", "disable": not progress}
    if run is None:
        if executor is not serial:
            raise ValueError("several processes meet on disk: give out=, the folder of the run")
        found = dict(tqdm(observe_each(model, episodes, **vars(observation)), **bar))
        trace = Trace.cat([found[i] for i in range(len(episodes))])
        return dataclasses.replace(trace, card=dataclasses.replace(card, counts=trace.card.counts))
    left = [i for i, e in enumerate(episodes) if not run.done(e.id)]
    job = ObservationJob(model, episodes, observation, run)
    with tqdm(initial=len(episodes) - len(left), **bar) as shown:
        for n in executor(job, _families(episodes, left)):
            shown.update(n)
    trace = run.load_shards([e.id for e in episodes])
    warn_mismatch(trace.card)
    return trace


@dataclass
class ObservationJob:
    """Observes episodes and saves their shards; sent to another process it loads its model anew by name."""

    model: Model | None
    episodes: Sequence[Episode]
    observation: Observation
    run: Run

    def __call__(self, indices: Sequence[int]) -> Iterator[int]:
        """Yield each index once its shard is saved."""
        if self.model is None:
            card = self.run.card
            dtype, device = getattr(torch, card.dtype), card.settings["device"]
            self.model = load(card.model, dtype=dtype, device=device, revision=card.revision)
        for i, trace in observe_each(self.model, self.episodes, **vars(self.observation), only=indices):
            card = dataclasses.replace(self.run.card, counts=trace.card.counts)
            self.run.save_shard(dataclasses.replace(trace, card=card))
            yield i

    def __getstate__(self) -> dict[str, Any]:
        if self.model is not None and not self.model.named:
            raise ValueError(
                "other processes load the model by its name: load it from a name or a folder, not an object"
            )
        return {**self.__dict__, "model": None}


def _families(episodes: Sequence[Episode], indices: Sequence[int]) -> list[list[int]]:
    by_group: dict[str, list[int]] = {}
    for i in indices:
        by_group.setdefault(episodes[i].group, []).append(i)
    return list(by_group.values())
