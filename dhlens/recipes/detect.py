"""The first experiment: find the dynamic retrieval heads of a model and say how dynamic they are.

    result = dh.recipes.scan(model, niah.episodes(model.tokenizer))
    print(result.summary())
    result.report().save("report.html")

With `out=` the run is a folder: one shard per episode, written as it is done, so that a killed run goes on where it
stopped and ends with the same numbers. About the time of plain generation (`benchmarks/observe.py`).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dhlens.card import RunCard
from dhlens.dynamics import Dynamics, dynamics
from dhlens.engine import observation_card
from dhlens.episode import Episode
from dhlens.executor import Executor, serial
from dhlens.limits import at_least_one, check_episodes
from dhlens.model import Model
from dhlens.observation import Observation, gathered
from dhlens.paper import beside_the_paper, in_words
from dhlens.render import Report, report
from dhlens.render.scan import scan_pictures
from dhlens.scores import Score, copy_paste
from dhlens.store import Run, load_trace
from dhlens.tables import outcomes
from dhlens.trace import Trace


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

    @property
    def card(self) -> RunCard:
        """Where the numbers come from."""
        return self.trace.card

    @cached_property
    def score(self) -> Score:
        """Eq. 1 on the needle."""
        return copy_paste(self.trace, span="needle")

    @cached_property
    def dynamics(self) -> Dynamics:
        """Table 1 with intervals and nulls."""
        return dynamics(self.score, static_from=self.static_from, seed=self.seed)

    @cached_property
    def problem(self) -> str | None:
        """Why there are no dynamics to speak of, such as no right answer; None where there are."""
        try:
            _ = self.dynamics
        except ValueError as error:
            return str(error)
        return None

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Tidy tables: dynamics, paper, outcomes, heads, static, lags, accumulation, episodes; or outcomes alone."""
        if self.problem:
            return {"outcomes": outcomes(self.trace)}
        d = self.dynamics
        return {
            "dynamics": d.table,
            "paper": beside_the_paper(self.card.model, d),
            "outcomes": outcomes(self.trace),
            "heads": d.heads,
            "static": d.static,
            "lags": d.lags,
            "accumulation": d.accumulation,
            "episodes": d.episodes,
        }

    def notes(self) -> list[str]:
        """What was scanned, and what the measures say, in sentences."""
        right = sum(bool(o.correct) for o in self.trace.outcomes)
        windows = len({e.group for e in self.trace.episodes})
        head = f"{right} of {len(self.trace.outcomes)} episodes answered, {windows} haystack windows."
        return [head, f"No dynamics: {self.problem}."] if self.problem else [head, *in_words(self.dynamics)]

    def summary(self) -> str:
        """The notes, the measures and the paper's table, as text."""
        tables = [] if self.problem else [str(self.dynamics), _aligned(self.tables["paper"])]
        return "\n\n".join([*self.notes(), *tables])

    def measures(self) -> pd.DataFrame:
        """What two scans are compared by: value, low and high by metric.

        Raises:
            ValueError: there are no dynamics.
        """
        return self.dynamics.table.set_index("metric").loc[:, ["value", "low", "high"]]

    def values(self) -> dict[str, Any]:
        """What was measured, as JSON values; measures without a value (too few groups or heads) are left out."""
        if self.problem:
            return {"problem": self.problem}
        known = self.measures().dropna(subset="value")
        intervals = known.dropna(subset="low")[["low", "high"]].T.to_dict("list")
        return {**known["value"].to_dict(), "intervals": intervals}

    def figures(self) -> dict[str, tuple[Figure, str]]:
        """The pictures of the report, each with its caption; those that have nothing to show are left out."""
        return scan_pictures(self.score, None if self.problem else self.dynamics, self.tables["outcomes"])

    def report(self) -> Report:
        """One self-contained HTML page."""
        shown = {name: self.tables[name] for name in (("outcomes",) if self.problem else ("paper", "dynamics"))}
        return report(
            f"Dynamic retrieval heads of {self.card.model}",
            tables=shown,
            figures=self.figures(),
            card=self.card,
            notes=self.notes(),
            max_rows=100,
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
        ValueError: see `limits.check_episodes` and `store.Run.open`; an episode lacks the span "needle", the episodes
            come from one window, or another process works on the folder.
    """
    check_episodes(model, episodes, max_new_tokens=observation.max_new_tokens)
    at_least_one(observation.max_new_tokens)
    for e in episodes:
        e.span("needle")
    if len({e.group for e in episodes}) < 2:
        raise ValueError(
            "a scan fits static heads on some haystack windows and measures the others: it needs at least 2, got 1 "
            "(a file that is repeated counts as one window)"
        )
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    card = _card(model, episodes, observation, static_from=static_from, seed=seed)
    run = None if out is None else Run.open(out, card)
    if run is not None and run.finished:
        return Scan.load(run.folder)
    with run.alone() if run else nullcontext():
        trace = gathered(model, episodes, observation, card, run=run, executor=executor, progress=progress)
        result = Scan(trace, static_from, seed, run.folder if run else None)
        if run:
            texts = {"report.html": result.report().html, "summary.txt": result.summary()}
            run.finish(result.tables, trace=trace, texts=texts)
    return result


def _card(model: Model, episodes: Sequence[Episode], observation: Observation, **settings: Any) -> RunCard:
    card = observation_card(model, **{**vars(observation), "rows": None}).with_episodes(episodes)
    return card.with_settings(static_from=settings["static_from"], stats_seed=settings["seed"])


def _aligned(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format=lambda x: f"{x:.3f}", na_rep="-")
