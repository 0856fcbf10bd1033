"""The first experiment: find the dynamic retrieval heads of a model and say how dynamic they are.

    result = dh.recipes.scan(model, niah.episodes(model.tokenizer))
    print(result.summary())
    result.report().save("report.html")

With `out=` the run is a folder: one shard per episode, written as it is done, so that a killed run goes on where it
stopped and ends with the same numbers. About the time of plain generation (`benchmarks/observe.py`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from dhlens.card import RunCard
from dhlens.dynamics import Dynamics, dynamics
from dhlens.engine import check_episodes, observation_card, observe_each, warn_mismatch
from dhlens.episode import Episode
from dhlens.executor import Executor, serial
from dhlens.heads import HeadSet
from dhlens.model import Model, load
from dhlens.paper import beside_the_paper, in_words
from dhlens.reads import Capture
from dhlens.render import Report, figures, report
from dhlens.scores import Score, copy_paste
from dhlens.store import Run, load_trace
from dhlens.trace import Trace


@dataclass(frozen=True)
class Observation:
    """How a scan observes; everything here decides numbers and stands in the card."""

    max_new_tokens: int = 48
    draft: bool | str = True
    capture: Capture = Capture()
    share: bool = True


@dataclass(frozen=True, eq=False)
class Scan:
    """What a scan found. Everything follows from the trace and the settings."""

    trace: Trace
    static_from: float = 0.5
    """Share of the haystack windows on which the static heads are fitted; the others are measured."""
    seed: int = 0
    """Of the split, the bootstrap and the nulls."""
    folder: Path | None = None
    """Where the run lies, if on disk."""

    @cached_property
    def score(self) -> Score:
        """Eq. 1 on the needle."""
        return copy_paste(self.trace, span="needle")

    @cached_property
    def dynamics(self) -> Dynamics:
        """Table 1 with intervals and nulls."""
        return dynamics(self.score, static_from=self.static_from, seed=self.seed)

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Tidy tables: dynamics, paper, outcomes, heads, static, lags, accumulation, episodes."""
        d = self.dynamics
        return {
            "dynamics": d.table,
            "paper": beside_the_paper(self.trace.card.model, d),
            "outcomes": outcomes(self.trace),
            "heads": d.heads,
            "static": d.static,
            "lags": d.lags,
            "accumulation": d.accumulation,
            "episodes": d.episodes,
        }

    def summary(self) -> str:
        """The table beside the paper's and what it says, as text."""
        correct = [o.correct for o in self.trace.outcomes]
        windows = len({e.group for e in self.trace.episodes})
        head = f"{sum(map(bool, correct))} of {len(correct)} episodes answered, {windows} haystack windows"
        parts = [head, str(self.dynamics), _aligned(self.tables["paper"]), *in_words(self.dynamics)]
        return "\n\n".join(parts)

    def figures(self) -> dict[str, tuple[Figure, str]]:
        """The pictures of the report, each with its caption."""
        d, t = self.dynamics, self.tables
        right = [i for i, o in enumerate(self.trace.outcomes) if o.correct]
        static = HeadSet(d.heads.loc[d.heads.in_static_20, ["layer", "head"]].to_numpy().tolist(), self.trace.shape)
        example = right[len(right) // 2]
        return {
            "One episode": (
                figures.raster(self.score, example, static=static),
                f"Heads that copy the next token, at each step of {self.trace.episodes[example].id}.",
            ),
            "How often each head fires": (figures.head_map(d.heads), "Share of the steps at which a head is active."),
            "The long tail": (figures.long_tail(d.heads), "Heads by activity; the static top 20 set apart."),
            "Similarity over time": (
                figures.lag_curve(d.lags),
                "Mean Jaccard of the active heads of two steps; the null puts each episode's steps in random order.",
            ),
            "Against static sets": (
                figures.static_curve(d.static),
                "Static heads are fitted on other haystack windows; the cap is what the sizes of the two sets allow.",
            ),
            "Accuracy": (figures.accuracy_grid(t["outcomes"]), "Share of answers that contain the whole answer."),
            "What more episodes would show": (
                figures.accumulation(d.accumulation),
                "Heads ever active and entropy grow with the number of episodes drawn.",
            ),
        }

    def report(self) -> Report:
        """One self-contained HTML page."""
        shown = {name: self.tables[name] for name in ("paper", "dynamics", "heads", "outcomes")}
        shown["heads"] = shown["heads"].head(40)
        return report(
            f"Dynamic retrieval heads of {self.trace.card.model}",
            tables=shown,
            figures=self.figures(),
            card=self.trace.card,
            notes=in_words(self.dynamics),
        )

    @classmethod
    def load(cls, folder: str | Path) -> "Scan":
        """A finished scan from its folder.

        Raises:
            ValueError: no run there, or not finished.
        """
        run = Run.read(folder)
        if not run.finished:
            raise ValueError(f"{folder} is not finished; the command that began it goes on where it stopped")
        settings = run.card.settings
        return cls(
            load_trace(run.folder / "trace.safetensors"), settings["static_from"], settings["stats_seed"], run.folder
        )


def scan(
    model: Model,
    episodes: Sequence[Episode],
    *,
    out: str | Path | None = None,
    observation: Observation = Observation(),
    static_from: float = 0.5,
    seed: int = 0,
    executor: Executor = serial,
    progress: bool = True,
) -> Scan:
    """Let the model answer every episode, observe each step, and measure the dynamics of its copying heads.

    Args:
        model: a loaded model.
        episodes: needle episodes (`dhlens.tasks.niah`) of at least two haystack windows.
        out: folder of the run; begun, resumed or, if finished with the same settings, read.
        observation: how to generate and what to keep.
        static_from: share of the windows on which static heads are fitted.
        seed: of everything drawn after the episodes.
        executor: who runs the episodes; `Processes(n)` needs `out` and a model loaded by name.
        progress: show a bar.

    Raises:
        ValueError: see `engine.check_episodes` and `store.Run.open`; an episode lacks the span "needle".
    """
    check_episodes(model, episodes, max_new_tokens=observation.max_new_tokens)
    for e in episodes:
        e.span("needle")
    card = _card(model, episodes, observation, static_from=static_from, seed=seed)
    if out is None:
        if executor is not serial:
            raise ValueError("several processes meet on disk: give out=, the folder of the run")
        done = observe_each(model, episodes, **vars(observation))
        found = dict(tqdm(done, total=len(episodes), desc="scan", unit="episode", disable=not progress))
        trace = Trace.cat([found[i] for i in range(len(episodes))])
        return Scan(
            dataclasses.replace(trace, card=dataclasses.replace(card, counts=trace.card.counts)), static_from, seed
        )
    run = Run.open(out, card)
    if run.finished:
        return Scan.load(out)
    left = [i for i, e in enumerate(episodes) if not run.done(e.id)]
    job = ScanJob(model, episodes, observation, run)
    with tqdm(
        total=len(episodes), initial=len(episodes) - len(left), desc="scan", unit="episode", disable=not progress
    ) as bar:
        for n in executor(job, _families(episodes, left)):
            bar.update(n)
    trace = run.load_shards([e.id for e in episodes])
    warn_mismatch(trace.card)
    result = Scan(trace, static_from, seed, run.folder)
    run.finish(result.tables, trace=trace, texts={"report.html": result.report().html, "summary.txt": result.summary()})
    return result


@dataclass
class ScanJob:
    """Observes episodes and saves their shards; sent to another process it loads its model anew by name."""

    model: Model | None
    episodes: Sequence[Episode]
    observation: Observation
    run: Run

    def __call__(self, indices: Sequence[int]) -> Iterator[int]:
        """Yield each index once its shard is saved."""
        if self.model is None:
            card = self.run.card
            self.model = load(card.model, dtype=getattr(torch, card.dtype), revision=card.revision)
        for i, trace in observe_each(self.model, self.episodes, **vars(self.observation), only=indices):
            card = dataclasses.replace(self.run.card, counts=trace.card.counts)
            self.run.save_shard(dataclasses.replace(trace, card=card))
            yield i

    def __getstate__(self) -> dict[str, Any]:
        if self.model is not None and self.model.card.weights_sha256 is None and self.model.card.revision is None:
            raise ValueError(
                "other processes load the model by its name: load it from a name or a folder, not an object"
            )
        return {**self.__dict__, "model": None}


def outcomes(trace: Trace) -> pd.DataFrame:
    """One row per episode: id, group, length, depth, answer, text, correct, stopped, steps."""
    rows = [
        {
            "episode": e.id,
            "group": e.group,
            "length": e.meta.get("length", len(e.tokens)),
            "depth": e.meta.get("depth"),
            "answer": e.meta.get("answer_text"),
            "text": o.text,
            "correct": o.correct,
            "stopped": o.stopped,
            "steps": len(o.tokens),
        }
        for e, o in zip(trace.episodes, trace.outcomes, strict=True)
    ]
    return pd.DataFrame(rows)


def _card(model: Model, episodes: Sequence[Episode], observation: Observation, **settings: Any) -> RunCard:
    first = episodes[0].meta
    card = observation_card(model, **{**vars(observation), "rows": None})
    # the settings name what was asked for; the hash holds every token and span to it
    content = hashlib.sha256()
    for e in episodes:
        content.update(
            json.dumps([e.id, e.tokens.tolist(), e.answer.tolist(), [str(s) for s in e.spans], dict(e.meta)]).encode()
        )
    return dataclasses.replace(
        card.with_settings(
            episodes=len(episodes),
            episodes_sha256=content.hexdigest(),
            template=first.get("template"),
            needle=first.get("needle"),
            static_from=settings["static_from"],
            stats_seed=settings["seed"],
        ),
        seed=first.get("seed"),
        haystack_sha256=first.get("haystack_sha256"),
    )


def _families(episodes: Sequence[Episode], indices: Sequence[int]) -> list[list[int]]:
    by_group: dict[str, list[int]] = {}
    for i in indices:
        by_group.setdefault(episodes[i].group, []).append(i)
    return list(by_group.values())


def _aligned(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format=lambda x: f"{x:.3f}", na_rep="-")
