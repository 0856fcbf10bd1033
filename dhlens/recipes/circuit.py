"""The fifth experiment: are the dynamic heads of a step a loose crowd, or parts of circuits?

    found = dh.recipes.circuit(model, niah.episodes(model.tokenizer), n_graphs=10, out="runs/circuit")
    found.notes(), found.tables["clusters"], found.graphs()

1. Every episode is observed. Heads that are on together beyond the clock of the answer are clusters (`dhlens.crowds`),
   with what they bind to (`dhlens.bindings`).
2. Some steps of the answered episodes are taken apart against a counterfactual twin (`dhlens.dissection`): the graph of
   the step by attribution, its strongest edges patched exactly, the graph run without the rest, what the dynamic heads
   write straight to the logits, and who feeds them.
3. Graphs are set beside each other, next step, same answer, another answer (`dhlens.findings`), and each cluster is
   tested for being a circuit (`dhlens.ties`).

With `out=` the run is a folder that is resumed after a kill, one file per episode. The needle is the span "needle".
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dhlens import findings, ties
from dhlens.bindings import row_classes
from dhlens.card import RunCard, digest
from dhlens.counterparts import Answer, answers_of, check_twins
from dhlens.crowds import Clusters
from dhlens.dissection import TABLES, Asked, taken_apart, unpacked
from dhlens.engine import observation_card
from dhlens.episode import Episode
from dhlens.graphs import Graph
from dhlens.heads import HeadSet
from dhlens.limits import at_least_one, check_episodes
from dhlens.model import Model
from dhlens.nodes import Wiring
from dhlens.observation import Observation, gathered
from dhlens.opened import check_model, wiring_of
from dhlens.reads import Capture
from dhlens.render import Report, report
from dhlens.render.circuit import circuit_pictures
from dhlens.render.lapse import Lapse, films, lapse
from dhlens.render.texts import token_texts
from dhlens.scores import Score, copy_paste
from dhlens.store import Run, load_trace
from dhlens.tables import compact, outcomes
from dhlens.tasks import niah
from dhlens.trace import Trace

_SHOWN = ("clusters", "overlaps", "agreement", "frequent")
_MOST = 20
"""Rows of a table that are shown."""


@dataclass(frozen=True, eq=False)
class Circuit:
    """What was found of circuits. All tables follow from the trace and those of its answers."""

    trace: Trace
    classes: pd.DataFrame
    """Per row of the trace: class of the copied and of the fed token, place, depth, length (`row_classes`)."""
    answers: pd.DataFrame
    """One row per answer that could be taken apart: episode, group, pieces (texts of what was said), differs (steps at
    which the twin says something else), silent (those of them without a dynamic head)."""
    steps: pd.DataFrame
    """One row per step taken apart: token, twin_token, heads (dynamic), metric_clean and metric_twin (logits)."""
    edges: pd.DataFrame
    """One row per edge of a step's graph: sender, receiver, at, score, exact (NaN: not patched); control: drawn at
    random to be patched, and no part of the graph."""
    feeders: pd.DataFrame
    """What enters the dynamic heads of a step: side (q, k, v), at, kind and layer of the sender (-1: embedding), share
    of all that enters, by the size of edges; share_others: the same of the other heads of their layers."""
    ties: pd.DataFrame
    """Each two dynamic heads of a step, taken apart or one of `Asked.more`: a, b, feeds (share of what enters b that is
    a's; NaN in one layer), alike (cosine of the sizes of what their queries receive). Heads of one key/value group
    share their key and value terms, so that `feeds` into both counts these twice; what a puts out at the needle's rows
    counts, although a is "on" at the step's row."""
    faithfulness: pd.DataFrame
    """See `dhlens.faithfulness`: per step, ranking, rest and size."""
    areas: pd.DataFrame
    """The areas under these curves."""
    direct: pd.DataFrame
    """Logit difference of a step, straight from: dynamic (heads, n of them), matched (as many others of their layers),
    heads (all), mlps, embed, bias; logit is their sum."""
    folder: Path | None = None
    """Where the run lies, if on disk."""

    @property
    def card(self) -> RunCard:
        """Where the numbers come from."""
        return self.trace.card

    @property
    def seed(self) -> int:
        """Of all draws."""
        return int(self.card.settings["stats_seed"])

    @cached_property
    def score(self) -> Score:
        """Eq. 1 on the needle."""
        return copy_paste(self.trace, span="needle")

    @cached_property
    def crowds(self) -> Clusters | str:
        """Heads that are on together beyond the clock; or why none can be sought."""
        return ties.crowds(self.score, seed=self.seed, **self._shuffles())

    def _shuffles(self) -> dict[str, int]:
        return {name: int(self.card.settings[name]) for name in ("draws", "min_steps")}

    def graphs(self) -> dict[tuple[str, int], Graph]:
        """The graph of each step, by episode and step."""
        return findings.graphs(self.edges, Wiring(**self.card.settings["wiring"]))

    @property
    def heads(self) -> dict[tuple[str, int], HeadSet]:
        """The dynamic heads of each step taken apart."""
        each = self.steps[["episode", "step", "heads"]].itertuples(index=False, name=None)
        return {(episode, step): HeadSet(names, self.trace.shape) for episode, step, names in each}

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """By name; empty ones are left out.

        Those above, and: outcomes; clusters (`ties.tested`), pairs, halves, bindings; agreement, alignment
        (`findings.jaccards`), overlaps, frequent, curves (`findings`).
        """
        found = {name: getattr(self, name) for name in ("classes", "answers", *TABLES)}
        alignment = findings.jaccards(self.graphs(), self.heads, dict(self.steps[["episode", "group"]].to_numpy()))
        found |= {
            "outcomes": outcomes(self.trace),
            "agreement": findings.agreement(self.edges),
            "alignment": alignment,
            "overlaps": findings.overlaps(alignment, seed=self.seed),
            "frequent": findings.frequent(self.edges),
            "curves": findings.curves(self.faithfulness, seed=self.seed),
        }
        if not isinstance(self.crowds, str):
            found |= ties.cluster_tables(self.crowds, self.classes, self.ties, seed=self.seed, **self._shuffles())
        return {name: table for name, table in found.items() if len(table)}

    def notes(self) -> list[str]:
        """What was asked and what came out, in sentences."""
        right = sum(bool(o.correct) for o in self.trace.outcomes)
        windows = len({e.group for e in self.trace.episodes})
        answers = len(self.answers)
        silent = sum(map(len, self.answers["silent"]))
        said = [f"{right} of {len(self.trace.outcomes)} episodes answered, {windows} haystack windows."]
        said.append(
            f"Steps taken apart: {len(self.steps)}, of {answers} of the answers. Left out, where the twin differs but "
            f"no head is dynamic: {silent}."
        )
        return [*said, *findings.in_words(self.tables, seed=self.seed), *ties.in_words(self.crowds, self.tables)]

    def summary(self) -> str:
        """The notes and the tables, as text."""
        return "\n\n".join([*self.notes(), *(t.head(_MOST).to_string(index=False) for t in self._shown().values())])

    def measures(self) -> pd.DataFrame:
        """What two runs are compared by: mean Jaccard by what is shared and by which steps."""
        return self.tables["overlaps"].set_index(["of", "pair"]).loc[:, ["value", "low", "high"]]

    def values(self) -> dict[str, Any]:
        """The tables of the summary as JSON values, and the notes."""
        names = [name for name in ("clusters", "overlaps", "agreement", "curves") if name in self.tables]
        texts = {name: self.tables[name].to_json(orient="records") for name in names}
        return {"notes": self.notes(), **{name: json.loads(text or "[]") for name, text in texts.items()}}

    def figures(self) -> dict[str, tuple[Figure, str]]:
        """The pictures of the report, each with its caption; those that have nothing to show are left out."""
        crowds = None if isinstance(self.crowds, str) else self.crowds
        return circuit_pictures(self.tables, self.graphs(), self.heads, crowds)

    def lapse(self) -> Lapse:
        """The graphs of successive steps as one page to step through."""
        return lapse(f"Circuits of {self.card.model}, step by step", films(self.answers, self.graphs(), self.heads))

    def report(self) -> Report:
        """One self-contained HTML page."""
        shown = {"tables": self._shown(), "figures": self.figures(), "notes": self.notes()}
        return report(f"Circuits of {self.card.model}", **shown, card=self.card, max_rows=_MOST)

    def _shown(self) -> dict[str, pd.DataFrame]:
        shown = {name: compact(self.tables[name]) for name in _SHOWN if name in self.tables}
        return {**shown, **findings.side_by_side(self.tables["curves"])}

    @classmethod
    def load(cls, folder: str | Path) -> "Circuit":
        """A finished run from its folder.

        Raises:
            ValueError: no run there, not finished, or one of another command.
        """
        run = Run.read(folder)
        tables = run.tables()
        if run.card.settings.get("recipe") != "circuit":
            raise ValueError(f"{folder} is no run of circuits: it holds {', '.join(tables)}")
        kept = {name: tables.get(name, pd.DataFrame()) for name in ("classes", "answers", *TABLES)}
        found = cls(load_trace(run.folder / "trace.safetensors"), **kept, folder=run.folder)
        vars(found)["tables"] = tables  # they need not be made again
        return found


def circuit(
    model: Model,
    episodes: Sequence[Episode],
    *,
    n_graphs: int | None = None,
    steps: int = 6,
    asked: Asked = Asked(),
    min_steps: int = 20,
    draws: int = 500,
    twin: Callable[[Episode], Episode] | None = None,
    max_new_tokens: int = 48,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Circuit:
    """Observe every episode, take steps of some answers apart, and say what is a circuit.

    Args:
        model: a loaded model that `opened.check_model` lets pass.
        episodes: needle episodes (`dhlens.tasks.niah`): all for who works together.
        n_graphs: of how many answered episodes, windows taking turns, steps are taken apart; default all.
        steps: most steps of each, in neighbouring pairs spread over the answer, of those at which the twin says
            something else and a head is dynamic.
        asked: edges of a graph, how many are patched exactly, sizes and rests of the faithfulness curves.
        min_steps: steps at which a head must be dynamic to be looked at for company.
        draws: shuffles of the clusters' nulls.
        twin: makes the counterfactual of an episode, of equal length; default `niah.twin` with this seed.
        max_new_tokens: most tokens of an answer.
        seed: of every draw.
        out: folder of the run; begun, resumed or, if finished with the same settings, read.
        progress: show bars.

    Raises:
        ValueError: before any pass: see `limits.check_episodes`, `opened.check_model`, `counterparts.check_twins`,
            `niah.twin` and `store.Run.open`; a count below 1. Later: see `counterparts.answers_of`.
    """
    at_least_one(max_new_tokens)
    _check(model, episodes, max_new_tokens, steps=steps, n_graphs=n_graphs, min_steps=min_steps, draws=draws, seed=seed)
    twins = [niah.twin(model.tokenizer, e, seed=seed) if twin is None else twin(e) for e in episodes]
    check_twins(episodes, twins)
    observation = Observation(max_new_tokens=max_new_tokens, capture=Capture(focus=(), hidden=()))
    card = observation_card(model, **{**vars(observation), "rows": None}).with_episodes(episodes)
    counts = {"n_graphs": n_graphs, "steps": steps, "min_steps": min_steps, "draws": draws, "stats_seed": seed}
    wiring, drawn = asdict(wiring_of(model)), digest(*(t.tokens for t in twins))
    card = card.with_settings(recipe="circuit", asked=asdict(asked), wiring=wiring, twins=drawn, **counts)
    run = None if out is None else Run.open(out, card)
    if run is not None and run.finished:
        return Circuit.load(run.folder)
    with run.alone() if run else nullcontext():
        trace = gathered(model, episodes, observation, card, run=run, progress=progress)
        answers = answers_of(trace, twins, n_graphs)
        parts = list(taken_apart(model, answers, asked, steps, run=run, progress=progress))
        result = _result(model, trace, answers, parts, run)
        if run:
            run.finish(result.tables, trace=trace, texts=_texts(result))
    return result


def _check(model: Model, episodes: Sequence[Episode], max_new_tokens: int, **numbers: int | None) -> None:
    check_model(model)
    check_episodes(model, episodes, max_new_tokens=max_new_tokens)
    for name, value in numbers.items():
        if value is not None and value < (0 if name == "seed" else 1):
            raise ValueError(f"{name} must be at least {0 if name == 'seed' else 1}, got {value}")


def _result(
    model: Model, trace: Trace, answers: dict[str, Answer], parts: Sequence[pd.DataFrame], run: Run | None
) -> Circuit:
    said = [
        {
            "episode": name,
            "group": a.episode.group,
            "pieces": token_texts(model.tokenizer, a.said),
            "twin_pieces": token_texts(model.tokenizer, a.other),
            "differs": a.differs,
            "silent": sorted(set(a.differs) - set(a.steps)),
        }
        for name, a in answers.items()
    ]
    classes = row_classes(copy_paste(trace, span="needle"), model.tokenizer)
    return Circuit(trace, classes, pd.DataFrame(said), **unpacked(parts), folder=run.folder if run else None)


def _texts(result: Circuit) -> dict[str, str]:
    graphs = [{"episode": episode, **graph.to_json()} for (episode, _), graph in result.graphs().items()]
    pages = {"report.html": result.report().html, "lapse.html": result.lapse().html}
    return {**pages, "summary.txt": result.summary(), "graphs.json": json.dumps(graphs)}
