"""Do heads rank passages better than the words that found them? BM25's candidates of a corpus, ranked again by heads.

    found = rerank(model, questions, gold, index, policies, out="runs/rerank")
    print(found.summary())

Every ranking orders the same candidates (`dhlens.recipes.passages`), so recall at their number is the same for all, and
what differs is how many gold passages come first. With `out=` the run is a folder that is resumed after a kill, one
file per question. Cost: one prefill for every `per_prompt` candidates.

Source: for how heads are read arXiv 2506.09944; that dynamic heads rank passages is ours, arXiv 2602.11162 names it as
future work.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, arange, empty
from tqdm.auto import tqdm

from dhlens.arms import paired
from dhlens.card import RunCard, digest
from dhlens.model import Model
from dhlens.policies import Policy
from dhlens.recipes.passages import passage_prompts, read_passages
from dhlens.render import Report, report
from dhlens.render.rag import recall_curves
from dhlens.stats import grouped_mean, holm
from dhlens.store import Run
from dhlens.tables import compact, spread
from dhlens.tasks.corpus import Index, Passage
from dhlens.tasks.questions import joined

RANKS = (1, 2, 5, 10, 20)
"""Where recall is measured."""


@dataclass(frozen=True, eq=False)
class Reranking:
    """How well each ranking puts the gold passages first."""

    recall: pd.DataFrame
    """One row per question and ranking ("bm25" is the order they came in): group (questions that share a gold passage),
    candidates (number), found (share of the gold passages among them), and recall_1, recall_2, ... (`RANKS`)."""
    card: RunCard
    """Where the numbers come from."""
    seed: int = 0
    """Of the bootstrap and the permutations."""
    folder: Path | None = None
    """Where the run lies, if on disk."""

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """By name: recall, summary and contrasts.

        summary: per ranking and number of passages, recall with low and high (95 %, over groups). contrasts: recall at
        10 of BM25 and of the first policy less every other ranking's, columns as in `dhlens.arms`.
        """
        rankings = self.recall["ranking"].unique()
        rows = []
        for name in rankings:
            part = self.recall.loc[self.recall["ranking"] == name]
            groups = part["group"].to_numpy(dtype=str)
            for k in RANKS:
                found = grouped_mean(part[f"recall_{k}"].to_numpy(dtype=float), groups, seed=self.seed)
                rows.append(
                    {"ranking": name, "passages": k, "recall": found.value, "low": found.low, "high": found.high}
                )
        named = self.recall.rename(columns={"ranking": "policy", "question": "episode"})
        pairs = [row for first in rankings[:2] for row in paired(named, first, ["recall_10"], seed=self.seed)]
        told = pd.DataFrame([row for row in pairs if (row["first"], row["second"]) != (*rankings[1::-1],)])
        if len(told):
            told["p_holm"] = holm(told["p"].to_numpy(dtype=float))
        return {"recall": self.recall, "summary": pd.DataFrame(rows), "contrasts": told}

    def notes(self) -> list[str]:
        """What came out, in sentences."""
        bm25 = self.recall.loc[self.recall["ranking"] == "bm25"]
        lines = [
            f"{len(bm25)} questions, {bm25['group'].nunique()} of them independent; {bm25['found'].mean():.1%} of "
            f"their gold passages are among the candidates ({bm25['candidates'].mean():.0f} on average)."
        ]
        recall = self.tables["summary"].pivot(index="passages", columns="ranking", values="recall")
        most = int(bm25["candidates"].max())
        if most <= 10:
            return [*lines, f"No ranking has more than {most} candidates: all are among the first 10."]
        for k in (10, 20) if most > 20 else (10,):
            ranked = recall.loc[k].sort_values(ascending=False)
            said = ", ".join(f"{name} {value:.3f}" for name, value in ranked.items())
            share = (k / bm25["candidates"].where(bm25["candidates"] > 0)).clip(upper=1)
            lines.append(f"Recall at {k}: {said}; in random order {(bm25['found'] * share).mean():.3f}.")
        for row in self.tables["contrasts"].to_dict("records"):
            low, high = f"{row['low']:+.3f}", f"{row['high']:+.3f}"
            lines.append(
                f"Recall at 10, {row['first']} less {row['second']}: {row['difference']:+.3f} (95 % {low} to {high}), "
                f"p = {row['p']:.2g}, by Holm's bound {row['p_holm']:.2g}."
            )
        return lines

    def summary(self) -> str:
        """The notes and the tables, as text."""
        return "\n\n".join([*self.notes(), *(table.to_string(index=False) for table in self._shown().values())])

    def measures(self) -> pd.DataFrame:
        """What two runs are compared by: recall by ranking and number of passages."""
        return self.tables["summary"].set_index(["ranking", "passages"]).loc[:, ["recall"]]

    def values(self) -> dict[str, Any]:
        """Summary and contrasts as JSON values."""
        return {
            name: json.loads(self.tables[name].to_json(orient="records") or "[]") for name in ("summary", "contrasts")
        }

    def figures(self) -> dict[str, tuple[Figure, str]]:
        """The picture of the report, with its caption."""
        caption = "Share of the gold passages among the first ones; bands are 95 % intervals over questions."
        return {"Who ranks gold passages first": (recall_curves(self.tables["summary"]), caption)}

    def report(self) -> Report:
        """One self-contained HTML page."""
        shown = {"tables": self._shown(), "figures": self.figures(), "notes": self.notes()}
        return report(f"Heads of {self.card.model} rank passages", **shown, card=self.card)

    def _shown(self) -> dict[str, pd.DataFrame]:
        recall = spread(self.tables["summary"].rename(columns={"recall": "value"}), "ranking", "passages")
        recall = recall.rename(columns="at {}".format).rename_axis(columns=None).reset_index()
        return {"recall": recall, "contrasts": compact(self.tables["contrasts"])}

    @classmethod
    def load(cls, folder: str | Path) -> "Reranking":
        """A finished run from its folder.

        Raises:
            ValueError: no run there, not finished, or one of another command.
        """
        run = Run.read(folder)
        if run.card.settings.get("recipe") != "rerank":
            raise ValueError(f"{folder} is no run of dhlens rerank: it holds {', '.join(run.tables())}")
        return cls(run.tables()["recall"], run.card, run.card.settings["stats_seed"], run.folder)


def rerank(
    model: Model,
    questions: Mapping[str, str],
    gold: Mapping[str, frozenset[str]],
    index: Index,
    policies: Mapping[str, Policy],
    *,
    candidates: int = 40,
    per_prompt: int = 10,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Reranking:
    """How BM25 and every policy rank the candidates of every question.

    Args:
        model: a loaded model.
        questions: id to text.
        gold: id to the passages that answer it.
        index: the corpus.
        policies: who chooses heads; none that needs supporting facts.
        candidates: passages that BM25 finds, which are ranked again.
        per_prompt: candidates in one prompt.
        seed: of the bootstrap and the permutations.
        out: folder of the run; begun, resumed or, if finished with the same settings, read.
        progress: show a bar.

    Raises:
        ValueError: no question, one without gold passages or with some that the corpus lacks, a policy of another
            model; or see `candidates_of` and `store.Run.open`.
    """
    for policy in policies.values():
        policy.check(model.card, model.shape)
    limits = {"candidates": candidates, "per_prompt": per_prompt}
    found = candidates_of(model, questions, gold, index, **limits, progress=progress)
    card = model.card.with_settings(
        recipe="rerank",
        questions=digest(*questions, *questions.values()),
        corpus=index.sha256,
        policies={name: f"{policy.name} ({policy.key})" for name, policy in policies.items()},
        **limits,
        stats_seed=seed,
    )
    run = None if out is None else Run.open(out, card)
    if run is not None and run.finished:
        return Reranking.load(run.folder)
    groups = dict(zip(questions, joined([*questions], [sorted(gold[name]) for name in questions]), strict=True))
    parts = []
    with run.alone() if run else nullcontext():
        for name, question in tqdm(questions.items(), desc="rerank", unit="question", disable=not progress):
            if run and run.done(name):
                parts.append(run.load_part(name))
                continue
            values = {"bm25": -arange(len(found[name])).float(), **{name: empty(0) for name in policies}}
            if found[name]:
                values |= read_passages(model, question, found[name], policies, per_prompt=per_prompt)
            parts.append(_recalls(gold[name], found[name], values).assign(question=name, group=groups[name]))
            if run:
                run.save_part(name, parts[-1])
        result = Reranking(pd.concat(parts, ignore_index=True), card, seed, run.folder if run else None)
        if run:
            run.finish(result.tables, texts={"report.html": result.report().html, "summary.txt": result.summary()})
    return result


def candidates_of(
    model: Model,
    questions: Mapping[str, str],
    gold: Mapping[str, frozenset[str]],
    index: Index,
    *,
    candidates: int = 40,
    per_prompt: int = 10,
    progress: bool = True,
) -> dict[str, list[Passage]]:
    """What `rerank` would rank for every question; arguments are its own. No model is run.

    Raises:
        ValueError: no question, no candidate or none of them a prompt; a question without gold passages or with some
            that the corpus lacks; candidates that a prompt has no room for, see `passage_prompts`.
    """
    if not questions or candidates < 1 or per_prompt < 1:
        raise ValueError(
            "ranking needs a question, a candidate, and at least 1 of them a prompt, got "
            f"{len(questions)}, {candidates} and {per_prompt}"
        )
    missing = [name for name in questions if not gold.get(name)]
    if missing:
        raise ValueError(f"every question needs gold passages, {missing[0]!r} has none")
    elsewhere = sorted({one for name in questions for one in gold[name]} - {passage.id for passage in index.passages})
    if elsewhere:
        raise ValueError(
            f"gold passages must be in the corpus: {len(elsewhere)} are not, {elsewhere[0]!r} among them; "
            "the gold file belongs to another corpus"
        )
    found: dict[str, list[Passage]] = {}
    for name, question in tqdm(questions.items(), desc="candidates", unit="question", disable=not progress):
        found[name] = [passage for passage, _ in index.search(question, candidates)]
        try:
            if found[name]:
                passage_prompts(model, question, found[name], per_prompt=per_prompt)
        except ValueError as error:
            raise ValueError(f"question {name!r}: {error}") from error
    return found


def _recalls(gold: frozenset[str], passages: list[Passage], values: Mapping[str, Tensor]) -> pd.DataFrame:
    right = np.array([passage.id in gold for passage in passages], dtype=bool)
    rows = []
    for name, value in values.items():
        ranked = right[value.argsort(descending=True, stable=True).numpy()]
        recall = {f"recall_{k}": ranked[:k].sum() / len(gold) for k in RANKS}
        rows.append({"ranking": name, "candidates": len(passages), "found": right.sum() / len(gold), **recall})
    return pd.DataFrame(rows)
