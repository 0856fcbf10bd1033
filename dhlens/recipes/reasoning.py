"""Reasoning heads: which heads look at the supporting facts while the model answers, and are they those that copy?

    niah = dh.recipes.Scan.load("runs/walden").trace
    result = dh.recipes.reason(model, hotpot.episodes(model.tokenizer, "hotpot.json", n=100, length=1500), niah=niah)
    print(result.summary())
    result.report().save("report.html")

For questions over documents (`dhlens.tasks.hotpot`) and for located evidence (`dhlens.tasks.evidence`). With `out=` the
run is a folder that is resumed after a kill: a shard per answer, and one per question for QRHead's score. About twice
the time of plain generation; without `query` once.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from dhlens.card import RunCard
from dhlens.compare import compare
from dhlens.detectors import NULL, qr_score, query_episodes
from dhlens.dynamics import Dynamics, dynamics
from dhlens.engine import observation_card, observe
from dhlens.episode import Episode
from dhlens.executor import Executor, serial
from dhlens.heads import HeadSet
from dhlens.limits import at_least_one, check_episodes
from dhlens.model import Model
from dhlens.observation import Observation, gathered
from dhlens.probe import same_model
from dhlens.reads import Capture
from dhlens.reasoning import TOP, beside_needles, facts_table, heads_table, mass_by_step, needle_size, samples
from dhlens.render import Report, report
from dhlens.render.reasoning import in_words, reasoning_pictures, side_by_side
from dhlens.scores import Score, copy_paste, reasoning_mass
from dhlens.store import Run, load_trace
from dhlens.tables import compact
from dhlens.trace import Trace

ANSWERS = Observation(max_new_tokens=32, capture=Capture(focus=()))
"""How answers over documents are observed by default."""


@dataclass(frozen=True, eq=False)
class Reasoning:
    """What was found of reasoning heads."""

    tables: Mapping[str, pd.DataFrame]
    """By name: dynamics (`dhlens.reasoning.beside_needles`); heads (layer, head, mean reasoning mass, rate above the
    threshold, static_rank, in_static_20, and the means of the other scores: attention on the facts as a share of all,
    copying on needles, QRHead's); methods, overlap and ranks (`dhlens.compare` of these scores); outcomes
    (`dhlens.reasoning.facts_table`, one row per question); steps (mass by step)."""
    trace: Trace
    """The observed answers."""
    threshold: float
    """From this mass on a head counts as reasoning: as many a step as copy on needles."""
    folder: Path | None = None
    """Where the run lies, if on disk."""

    @property
    def card(self) -> RunCard:
        """Where the numbers come from."""
        return self.trace.card

    @cached_property
    def score(self) -> Score:
        """Eq. 2 on the supporting facts."""
        return reasoning_mass(self.trace)

    def notes(self) -> list[str]:
        """What was asked, and what came out, in sentences."""
        return in_words(self.tables, self.threshold)

    def summary(self) -> str:
        """Notes and main tables, as text."""
        shown = self._shown().items()
        return "\n\n".join([*self.notes(), *(f"{name}\n{t.to_string(index=False)}" for name, t in shown)])

    def measures(self) -> pd.DataFrame:
        """What two runs are compared by: value, low and high by set of heads and metric."""
        return self.tables["dynamics"].set_index(["heads", "metric"]).loc[:, ["value", "low", "high"]]

    def values(self) -> dict[str, Any]:
        """The threshold, and dynamics, overlap and ranks as JSON values."""
        known = {name: self.tables[name].to_json(orient="records") for name in ("dynamics", "overlap", "ranks")}
        return {"threshold": self.threshold, **{name: json.loads(text or "[]") for name, text in known.items()}}

    def figures(self) -> dict[str, tuple[Figure, str]]:
        """The pictures of the report, each with its caption; those that have nothing to show are left out."""
        return reasoning_pictures(self.tables, self.score, self.threshold)

    def report(self) -> Report:
        """One self-contained HTML page."""
        shown = {"tables": self._shown(), "figures": self.figures(), "notes": self.notes()}
        return report(f"Reasoning heads of {self.card.model}", **shown, card=self.card, max_rows=100)

    def _shown(self) -> dict[str, pd.DataFrame]:
        found = {"dynamics": side_by_side(self.tables["dynamics"])}
        overlap = self.tables["overlap"]
        once = overlap.loc[overlap["a"] < overlap["b"]]
        return found | {"overlap": compact(once), "ranks": compact(self.tables["ranks"])}

    @classmethod
    def load(cls, folder: str | Path) -> "Reasoning":
        """A finished run from its folder.

        Raises:
            ValueError: no run there, not finished, or one of another command.
        """
        run = Run.read(folder)
        tables = run.tables()
        if run.card.settings.get("recipe") != "reason":
            raise ValueError(f"{folder} is no run over supporting facts: it holds {', '.join(tables)}")
        return cls(tables, load_trace(run.folder / "trace.safetensors"), _threshold(tables), run.folder)


def reason(
    model: Model,
    episodes: Sequence[Episode],
    *,
    niah: Trace | None = None,
    size: float | None = None,
    query: bool = True,
    out: str | Path | None = None,
    observation: Observation = ANSWERS,
    fit_from: float = 0.5,
    seed: int = 0,
    executor: Executor = serial,
    progress: bool = True,
) -> Reasoning:
    """Let the model answer every question, and measure the heads that look at the supporting facts.

    Args:
        model: a loaded model.
        episodes: questions with the spans "fact_0" on, of at least two groups.
        niah: an observed needle scan of the same model, to set its copying heads beside.
        size: heads at a step that the threshold is to give; default that of `niah`, else 20.
        query: also take QRHead's score, from the rows of the question.
        out: folder of the run; begun, resumed or, if finished with the same settings, read.
        observation: how to generate and what to keep; sink and local window of Eq. 2 stand in its capture.
        fit_from: share of the groups on which threshold and static heads are fitted; the others are measured.
        seed: of everything drawn after the episodes.
        executor: who runs the answers; `Processes(n)` needs `out` and a model loaded by name.
        progress: show a bar.

    Raises:
        ValueError: see `limits.check_episodes`, `store.Run.open` and `reasoning.calibrated`; an episode without facts
            (or, with `query`, without a question behind them), fewer than two groups, a scan of another model.

    Source: arXiv 2602.11162, eq. 2 and its HotpotQA analysis. Calibration, nulls and the set beside it are ours.
    """
    check_episodes(model, episodes, max_new_tokens=observation.max_new_tokens)
    at_least_one(observation.max_new_tokens)
    _check(episodes, query=query, fit_from=fit_from, seed=seed)
    needles = None
    if niah is not None:
        same_model(model.card, model.shape, niah.card, niah.shape)
        needles = dynamics(copy_paste(niah), seed=seed)
    wanted = needle_size(niah, model.shape) if size is None else size
    card = observation_card(model, **{**vars(observation), "rows": None}).with_episodes(episodes)
    of = None if niah is None else niah.card.fingerprint()
    card = card.with_settings(recipe="reason", niah=of, size=wanted, query=query, fit_from=fit_from, stats_seed=seed)
    run = None if out is None else Run.open(out, card)
    if run is not None and run.finished:
        return Reasoning.load(run.folder)
    with run.alone() if run else nullcontext():
        trace = gathered(model, episodes, observation, card, run=run, executor=executor, progress=progress)
        asked = query_scores(model, episodes, run, progress=progress) if query else None
        tables, tau = _tables(trace, niah, needles, asked, size=wanted, fit_from=fit_from, seed=seed)
        result = Reasoning(tables, trace, tau, run.folder if run else None)
        if run:
            texts = {"report.html": result.report().html, "summary.txt": result.summary()}
            run.finish(result.tables, trace=trace, texts=texts)
    return result


def _check(episodes: Sequence[Episode], *, query: bool, fit_from: float, seed: int) -> None:
    for e in episodes:
        last = e.span("fact_0").stop
        if query and e.span("question").start < last:
            raise ValueError(f"episode {e.id!r}: the question must stand behind the facts for QRHead's score")
    if len({e.group for e in episodes}) < 2:
        raise ValueError("thresholds are fitted on some groups of questions and measured on others: at least 2, got 1")
    if not 0 < fit_from < 1 or seed < 0:
        raise ValueError(f"fit_from must lie between 0 and 1 and seed be at least 0, got {fit_from} and {seed}")


def query_scores(model: Model, episodes: Sequence[Episode], run: Run | None = None, *, progress: bool = True) -> Score:
    """QRHead's score of each question (`detectors.qr_score`, facts as gold): read where the run has it, else made."""
    null = torch.tensor(model.tokenizer(NULL, add_special_tokens=False)["input_ids"])
    values = []
    for e in tqdm(episodes, desc="query", unit="episode", disable=not progress):
        name = f"{e.id}=query"
        if run and run.done(name):
            found = torch.from_numpy(run.load_part(name)["value"].to_numpy().copy())
        else:
            found = _query_score(model, e, null).flatten().double()
            if run:
                run.save_part(name, pd.DataFrame({"value": found.numpy()}))
        values.append(found.unflatten(0, model.shape))
    groups = tuple(e.group for e in episodes)
    return Score("qr_score", torch.stack(values), False, f"qr_score, less the question {NULL!r}", groups=groups)


def _query_score(model: Model, episode: Episode, null: torch.Tensor) -> torch.Tensor:
    """One prefill for both questions, which share the prompt up to there."""
    asked, calm = (query_episodes([episode], null=n)[0] for n in (None, null))
    facts = tuple(s.name for s in episode.spans if s.name.startswith("fact_"))
    pair = [asked, dataclasses.replace(calm, id=f"{episode.id}=null")]
    seen = observe(model, pair, rows="query", capture=Capture(focus=facts, hidden=()), progress=False)
    return qr_score(seen.pick([0]), seen.pick([1]), facts).values[0]


def _tables(
    trace: Trace,
    niah: Trace | None,
    needles: Dynamics | None,
    asked: Score | None,
    *,
    size: float,
    fit_from: float,
    seed: int,
) -> tuple[dict[str, pd.DataFrame], float]:
    tau, found = beside_needles(trace, needles, size=size, fit_from=fit_from, seed=seed)
    mass = samples(reasoning_mass(trace))
    scores = {"reasoning": mass, "attention": samples(reasoning_mass(trace, whole=True))}
    scores |= {} if niah is None else {"copying": samples(copy_paste(niah).answered())}
    scores |= {} if asked is None else {"query": asked}
    fit, _ = trace.split(fit_from, seed=seed)
    static = HeadSet.top_k(samples(reasoning_mass(fit)).mean(), min(TOP, trace.shape[0] * trace.shape[1]))
    tables = {"dynamics": found, "heads": heads_table(scores, mass.heads(tau), fit)}
    both = compare(scores, len(static), seed=seed)
    tables |= {"methods": both.methods, "overlap": both.overlap, "ranks": both.ranks}
    tables["outcomes"] = facts_table(trace, static, fitted={e.id for e in fit.episodes})
    tables["steps"] = mass_by_step(trace, static, seed=seed)
    return tables, tau


def _threshold(tables: Mapping[str, pd.DataFrame]) -> float:
    found = tables["dynamics"]
    return float(found.loc[found["heads"] == "reasoning", "threshold"].iloc[0])
