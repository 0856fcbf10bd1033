"""The fourth experiment: let heads choose what the model reads, and see whether dynamic heads choose better.

    fit, held = split_episodes(hotpot.episodes(model.tokenizer, "hotpot.json", n=260), 60 / 260, seed=0)
    policies = reasoning_policies(dh.observe(model, fit), seed=0)
    result = dh.recipes.rag(model, held, policies, out="runs/rag")

For every question: what each policy's heads would show at the first token of the answer under several budgets
(selection), and answers in which a trigger says when to look, heads say where, and only these windows are visible when
the sentence is written anew (`dhlens.answering`), beside answers without context, with all of it and with the
supporting facts alone. With `out=` the run is a folder that is resumed after a kill, one file per question. Cost:
half a minute for a question of 1,400 tokens in 24 arms with SmolLM2 on two cores; `benchmarks/rag.py` measures it.

Source: arXiv 2602.11162, appendix (modified DRAGIN). What it leaves open is named where it is decided: `Windows`,
`RIND`, `views`; that selection is measured by itself, and paired tests, are ours.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from dhlens import arms
from dhlens.card import RunCard
from dhlens.engine import observation_card
from dhlens.episode import Episode
from dhlens.inquiry import CONTROLS, REFERENCES, Inquiry, inquire
from dhlens.limits import at_least_one, check_episodes
from dhlens.lookup import VISIBILITIES
from dhlens.model import Model
from dhlens.policies import Policy
from dhlens.prefix import prefill
from dhlens.reads import Capture
from dhlens.render import Report, report
from dhlens.render.rag import rag_pictures
from dhlens.store import Run
from dhlens.stream import HFStream
from dhlens.tables import compact
from dhlens.triggers import RIND, Trigger, check_trigger
from dhlens.views import check_views
from dhlens.windows import Windows

TABLES = ("questions", "answers", "events", "looks", "leak")
_SHOWN = ("selection", "summary", "contrasts")


@dataclass(frozen=True, eq=False)
class Rag:
    """What a run of dynamic retrieval found. All tables follow from its first five."""

    questions: pd.DataFrame
    """One row per question: question, answer, titles, prompt (tokens), and token runs of context, documents, facts."""
    answers: pd.DataFrame
    """One row per question and arm (trigger, visibility, policy): text, answer, em, f1, contains, tokens, stopped,
    retrievals, calls (of the language model), and means over its lookups: visible (tokens), facts (share shown whole),
    fact_tokens."""
    events: pd.DataFrame
    """One row per thing written on the way: event, kind ("draft", "looked up"), step, kept (tokens), pieces and entropy
    (by token), values (of a draft's tokens, which the trigger compares with its threshold) and threshold, where it has
    them, windows (token runs of the prompt), passages, heads, facts."""
    looks: pd.DataFrame
    """One row per question, policy and budget at the answer's first token: heads, visible, facts, fact_tokens."""
    leak: pd.DataFrame
    """What is left of hidden tokens: visibility, share and number replaced, logit_change, kl (nats)."""
    card: RunCard
    """Where the numbers come from."""
    primary: tuple[str, str] = ("predicted", "static")
    """The pair whose selection was to be compared."""
    budget: int = 256
    """At this number of visible tokens."""
    seed: int = 0
    """Of the bootstrap and the permutations."""
    folder: Path | None = None
    """Where the run lies, if on disk."""

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """By name: the five, selection, summary and contrasts (`dhlens.arms`); empty ones are left out."""
        found = {name: getattr(self, name) for name in TABLES}
        found["selection"] = arms.selection(self.looks, seed=self.seed)
        found["summary"] = arms.answer_summary(self.answers, seed=self.seed)
        found["contrasts"] = arms.contrasts(
            self.answers, self.looks, primary=self.primary, budget=self.budget, seed=self.seed
        )
        return {name: table for name, table in found.items() if len(table)}

    def notes(self) -> list[str]:
        """What was asked and what came out, in sentences."""
        n, groups = self.answers["episode"].nunique(), self.answers["group"].nunique()
        said = arms.in_words(
            self.tables["selection"],
            self.tables["summary"],
            self.tables.get("contrasts", pd.DataFrame()),
            primary=self.primary,
            budget=self.budget,
        )
        return [f"{n} questions, {groups} of them independent.", *said, *self._leaked()]

    def _leaked(self) -> Iterator[str]:
        if len(self.leak):
            means: Any = self.leak.loc[self.leak["share"] == 1].groupby("visibility")["kl"].mean()
            said = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
            yield f"KL of the first token's distribution when all hidden tokens are replaced, in nats: {said}."

    def summary(self) -> str:
        """The notes and the tables, as text."""
        return "\n\n".join([*self.notes(), *(t.to_string(index=False) for t in self._shown().values())])

    def measures(self) -> pd.DataFrame:
        """What two runs are compared by: f1, em, facts, visible and retrievals by arm."""
        return self.tables["summary"].set_index(arms.ARM).loc[:, ["f1", "em", "facts", "visible", "retrievals"]]

    def values(self) -> dict[str, Any]:
        """Selection, summary and contrasts as JSON values."""
        texts = {name: self.tables[name].to_json(orient="records") for name in _SHOWN if name in self.tables}
        return {name: json.loads(text or "[]") for name, text in texts.items()}

    def figures(self) -> dict[str, tuple[Figure, str]]:
        """The pictures of the report, each with its caption; those that have nothing to show are left out."""
        return rag_pictures(self.tables, budget=self.budget)

    def report(self) -> Report:
        """One self-contained HTML page."""
        shown = {"tables": self._shown(), "figures": self.figures(), "notes": self.notes()}
        return report(f"Heads of {self.card.model} choose what it reads", **shown, card=self.card, max_rows=200)

    def _shown(self) -> dict[str, pd.DataFrame]:
        return {name: compact(self.tables[name]) for name in _SHOWN if name in self.tables}

    @classmethod
    def load(cls, folder: str | Path) -> "Rag":
        """A finished run from its folder.

        Raises:
            ValueError: no run there, not finished, or one of another command.
        """
        run = Run.read(folder)
        tables, settings = run.tables(), run.card.settings
        if settings.get("recipe") != "rag":
            raise ValueError(f"{folder} is no run of dynamic retrieval: it holds {', '.join(tables)}")
        first, second = settings["primary"]
        five = {name: tables.get(name, pd.DataFrame()) for name in TABLES}
        stated = {"primary": (first, second), "budget": settings["budget"], "seed": settings["stats_seed"]}
        return cls(**five, card=run.card, **stated, folder=run.folder)


def rag(
    model: Model,
    episodes: Sequence[Episode],
    policies: Mapping[str, Policy],
    *,
    triggers: Mapping[str, Trigger] | None = None,
    visibilities: Sequence[str] = ("mask",),
    windows: Windows = Windows(),
    budgets: Sequence[int] = (64, 128, 256, 512),
    primary: tuple[str, str] = ("predicted", "static"),
    corpus: Any = None,
    leaks: int = 10,
    max_new_tokens: int = 32,
    batch: int = 16,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Rag:
    """Answer every question under every trigger, visibility and policy, and measure what each policy selects.

    Args:
        model: a loaded model, see `views.check_views`.
        episodes: questions over a context (`dhlens.tasks.hotpot`), others than the policies were fitted on.
        policies: who chooses heads, by name; see `dhlens.choosers`.
        triggers: when to look, by name; default `RIND()`.
        visibilities: "mask", "mask_decode", "concat" (`dhlens.views`), "retrieve" (needs `corpus`).
        windows: how attention becomes windows.
        budgets: visible tokens at which selections are compared; that of `windows` is added.
        primary: the two policies whose selection is compared first, fixed beforehand.
        corpus: for "retrieve", see `dhlens.recipes.passages.CorpusLookup`.
        leaks: of how many questions, the first ones, hidden tokens are replaced to see what is left of them.
        max_new_tokens: most tokens of an answer.
        batch: lanes decoded at once.
        seed: of the controls, the bootstrap and the permutations; policies have their own.
        out: folder of the run; begun, resumed or, if finished with the same settings, read. Its card knows policies by
            what they were made of, and triggers by their text: give functions of your own telling names.
        progress: show a bar.

    Raises:
        ValueError: see `limits.check_episodes`, `views.check_views` and `store.Run.open`; an episode without context,
            facts or answer; no policy; an unknown visibility, or "retrieve" without a corpus; windows without a
            budget; a policy of another model; see `triggers.check_trigger`.
        TypeError: a policy is something else.
    """
    budgets = sorted({*budgets, *([] if windows.budget is None else [windows.budget])})
    triggers = {"rind": RIND()} if triggers is None else triggers
    joint = tuple(model.tokenizer("\n", add_special_tokens=False)["input_ids"])
    asked = Inquiry(policies, triggers, visibilities, windows, budgets, max_new_tokens, batch, seed, joint, corpus)
    _check(model, episodes, asked, leaks=leaks)
    at = windows.budget or budgets[-1]
    card = _card(model, episodes, asked, primary=list(primary), budget=at, leaks=leaks, stats_seed=seed)
    run = None if out is None else Run.open(out, card)
    if run is not None and run.finished:
        return Rag.load(run.folder)
    with run.alone() if run else nullcontext():
        parts = dict(_questions(model, episodes, asked, run, leaks=leaks, progress=progress))
        whole = pd.concat([parts[i] for i in range(len(episodes))], ignore_index=True)
        five = {name: _table(whole, name) for name in TABLES}
        folder = run.folder if run else None
        result = Rag(**five, card=card, primary=primary, budget=at, seed=seed, folder=folder)
        if run:
            run.finish(result.tables, texts={"report.html": result.report().html, "summary.txt": result.summary()})
    return result


def _check(model: Model, episodes: Sequence[Episode], asked: Inquiry, *, leaks: int) -> None:
    at_least_one(asked.max_new_tokens)
    check_views(model)
    check_episodes(model, episodes, max_new_tokens=asked.max_new_tokens)
    if not asked.policies or not asked.triggers or not asked.visibilities or asked.batch < 1 or leaks < 0:
        raise ValueError(
            "dynamic retrieval needs a policy, a trigger, a visibility, batch of at least 1 and leaks of 0"
        )
    if not asked.budgets or min(asked.budgets) < 1:
        given = ", ".join(map(str, asked.budgets)) or "none"
        raise ValueError(f"there must be a budget, and each at least 1 token, got {given}")
    unknown = [v for v in asked.visibilities if v not in (*VISIBILITIES, arms.ELSEWHERE)]
    if unknown:
        raise ValueError(f"a visibility is {', '.join((*VISIBILITIES, arms.ELSEWHERE))}, got {unknown[0]!r}")
    if arms.ELSEWHERE in asked.visibilities and asked.corpus is None:
        raise ValueError('the visibility "retrieve" looks up in a corpus: give corpus=')
    if "never" in asked.triggers:
        raise ValueError('"never" is the name of the references, which no trigger moves; call yours something else')
    for trigger in asked.triggers.values():
        check_trigger(trigger)
    for name, policy in asked.policies.items():
        if name in (*REFERENCES, *CONTROLS):
            raise ValueError(f"{name!r} stands in the tables for what no policy chooses: call yours something else")
        if not isinstance(policy, Policy):
            raise TypeError(f"policy {name!r} must be a Policy (dh.Static(heads), dh.Policy(function)), got {policy!r}")
        policy.check(model.card, model.shape)
    for e in episodes:
        for name in ("context", "fact_0"):
            e.span(name)
        if e.meta.get("answer_text") is None:
            raise ValueError(f"episode {e.id!r} must have an answer in its meta, answer_text")


def _questions(
    model: Model, episodes: Sequence[Episode], asked: Inquiry, run: Run | None, *, leaks: int, progress: bool
) -> Iterator[tuple[int, pd.DataFrame]]:
    """Each question's rows, table by table: read where the run has them, else made and kept."""
    left = []
    for i, e in enumerate(episodes):
        if run and run.done(e.id):
            yield i, run.load_part(e.id)
        else:
            left.append(i)
    done = len(episodes) - len(left)
    with tqdm(total=len(episodes), initial=done, desc="rag", unit="question", disable=not progress) as bar:
        for i, stream in prefill(model, episodes, only=left) if left else ():
            assert isinstance(stream, HFStream)
            rows = inquire(model, stream, episodes[i], asked, leaks=i < leaks)
            kept = [{"table": name, "row": json.dumps(row)} for name, of in rows.items() for row in of]
            part = pd.DataFrame(kept)
            if run:
                run.save_part(episodes[i].id, part)
            yield i, part
            bar.update()


def _table(whole: pd.DataFrame, name: str) -> pd.DataFrame:
    return pd.DataFrame([json.loads(row) for row in whole.loc[whole["table"] == name, "row"]])


def _card(model: Model, episodes: Sequence[Episode], asked: Inquiry, **settings: Any) -> RunCard:
    card = observation_card(model, capture=Capture(focus=(), rows=True), max_new_tokens=asked.max_new_tokens)
    return card.with_episodes(episodes).with_settings(
        recipe="rag",
        policies={name: f"{policy.name} ({policy.key})" for name, policy in asked.policies.items()},
        triggers={name: _described(trigger) for name, trigger in asked.triggers.items()},
        visibilities=list(asked.visibilities),
        windows=asdict(asked.windows),
        budgets=list(asked.budgets),
        corpus=getattr(asked.corpus, "key", None),
        **settings,
    )


def _described(trigger: Trigger) -> str:
    return str(trigger) if dataclasses.is_dataclass(trigger) else getattr(trigger, "__name__", type(trigger).__name__)
