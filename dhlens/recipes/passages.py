"""Passages of a corpus, read through heads: found by words, ranked again by where a model's heads look.

    values = read_passages(model, "Which county is Van Hook in?", passages, policies)
    best = values["predicted"].argsort(descending=True)
    table = rerank(model, questions, gold, index, policies)

BM25 finds candidates (`dhlens.tasks.corpus`); they are put into prompts of a few passages each, and a passage's value
is the attention that the chosen heads pay its tokens from the prompt's last token. `query_heads` are read as QRHead
does: from the rows of the question, less what the question "N/A" gets. `CorpusLookup` is the visibility "retrieve" of
dynamic retrieval; `rerank` measures how many gold passages each ranking puts first. Cost: one prefill for every
`per_prompt` passages, whatever the number of policies.

Source: for the query heads arXiv 2506.09944; that dynamic heads rank passages is ours, arXiv 2602.11162 names it as
future work.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dhlens.card import digest
from dhlens.detectors import NULL, document_value, query_episodes
from dhlens.engine import observe
from dhlens.episode import Episode
from dhlens.heads import HeadSet
from dhlens.lookup import Found, Lookup
from dhlens.model import Model
from dhlens.policies import Policy, at_row, sites_of
from dhlens.reads import Capture
from dhlens.store import Run
from dhlens.tasks.corpus import Index, Passage
from dhlens.tasks.hotpot import over_documents
from dhlens.trace import Trace
from dhlens.triggers import Draft, is_content
from dhlens.views import prompt_view


def read_passages(
    model: Model,
    question: str,
    passages: Sequence[Passage],
    policies: Mapping[str, Policy],
    *,
    query_heads: Mapping[str, HeadSet] | None = None,
    per_prompt: int = 10,
) -> dict[str, Float[Tensor, " passage"]]:
    """The value of every passage under every policy, and under every set of query heads.

    Raises:
        ValueError: no passage, `per_prompt` below 1, or a prompt beyond the model.
    """
    if not passages or per_prompt < 1:
        raise ValueError(f"there must be passages, and at least 1 a prompt, got {len(passages)} and {per_prompt}")
    names = [*policies, *(query_heads or {})]
    found: dict[str, list[float]] = {name: [] for name in names}
    for at in range(0, len(passages), per_prompt):
        part = passages[at : at + per_prompt]
        asked, null = _observed(model, question, part, policies, calibrated=bool(query_heads))
        spans = [span for span in asked.episodes[0].spans if span.name.startswith("doc_")]
        for name, policy in policies.items():
            heads = at_row(policy, asked, 0)
            found[name] += [_attention(asked, heads, span.start, span.stop) for span in spans]
        for name, heads in (query_heads or {}).items():
            values = [document_value(asked, null, 0, span) for span in spans]
            found[name] += [float(value[heads.mask()].mean()) for value in values]
    return {name: torch.tensor(values) for name, values in found.items()}


def _observed(
    model: Model, question: str, passages: Sequence[Passage], policies: Mapping[str, Policy], *, calibrated: bool
) -> tuple[Trace, Trace | None]:
    """The rows from the question on, of the question and of the one that asks for nothing."""
    documents = [passage.document for passage in passages]
    episode = over_documents(model.tokenizer, question, documents, id="passages")
    asked = query_episodes([episode])
    if calibrated:
        null = torch.tensor(model.tokenizer(NULL, add_special_tokens=False)["input_ids"])
        asked += [dataclasses.replace(query_episodes([episode], null=null)[0], id="null")]
    focus = tuple(span.name for span in episode.spans if span.name.startswith("doc_"))
    capture = Capture(focus=focus, hidden=sites_of(policies.values()))
    trace = observe(model, asked, rows="query", capture=capture, progress=False)
    return trace.pick([0]), trace.pick([1]) if calibrated else None


def _attention(trace: Trace, heads: HeadSet, start: int, stop: int) -> float:
    """Mean over heads of the attention from the last row on a run of keys; 0 without heads."""
    assert trace.focus is not None and trace.focus_key is not None
    inside = (trace.focus_key[-1] >= start) & (trace.focus_key[-1] < stop)
    return float(trace.focus[-1][heads.mask()][:, inside].float().sum()) / max(len(heads), 1)


@dataclass(frozen=True, eq=False)
class CorpusLookup:
    """Where dynamic retrieval looks up passages instead of windows; `rag(corpus=...)`."""

    index: Index
    """The corpus."""
    gold: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    """Question (episode id) to the passages that answer it, for recall; without them recall is not known."""
    candidates: int = 20
    """Passages that BM25 finds."""
    shown: int = 3
    """Passages that the heads keep."""
    per_prompt: int = 10
    """Candidates in one prompt."""
    without: tuple[str, ...] = ("oracle",)
    """Policies that need supporting facts, which candidates have not."""

    @property
    def key(self) -> str:
        """What tells it from others: the run's card holds it."""
        return f"{self.index.sha256[:12]}, {self.candidates} to {self.shown}, {self.per_prompt} a prompt"

    def __call__(self, model: Model, episode: Episode, policies: Mapping[str, Policy]) -> Lookup:
        """Looking up for one question.

        The query is the question and the content words of what is kept of the answer; what is in doubt is left out.
        DRAGIN keeps the 25 or 35 words of most attention, which is all of them for questions of this length.
        """
        chosen = {name: policy for name, policy in policies.items() if name not in self.without}
        question = str(episode.meta["question"])
        read: dict[str, tuple[list[Passage], dict[str, Tensor]]] = {}

        def lookup(policy: str, said: Sequence[int], draft: Draft, at: int) -> Found:
            kept = model.tokenizer.decode(list(said)).split()
            query = " ".join([question, *filter(is_content, kept)])
            if query not in read:
                found = [passage for passage, _ in self.index.search(query, self.candidates)]
                values = read_passages(model, question, found, chosen, per_prompt=self.per_prompt) if found else {}
                read[query] = found, values
            found, values = read[query]
            order = values[policy].argsort(descending=True, stable=True)[: self.shown].tolist() if found else []
            return self._shown(model, episode, question, [found[i] for i in order])

        return lookup

    def _shown(self, model: Model, episode: Episode, question: str, passages: Sequence[Passage]) -> Found:
        gold = self.gold.get(episode.id)
        ids = tuple(passage.id for passage in passages)
        recall = float("nan") if gold is None else len(gold & set(ids)) / len(gold)
        context = episode.span("context")
        tokens, visible = torch.cat([episode.tokens[: context.start], episode.tokens[context.stop :]]), 0
        if passages:
            documents = [passage.document for passage in passages]
            prompt = over_documents(model.tokenizer, question, documents, id="shown")
            tokens, visible = prompt.tokens, len(prompt.span("context"))
        return Found(
            view=prompt_view(model, tokens.tolist()),
            heads=HeadSet([], model.shape),
            visible=visible,
            facts=recall,
            fact_tokens=recall,
            passages=ids,
        )


RANKS = (2, 5, 10, 20)
"""Where recall is measured."""


def rerank(
    model: Model,
    questions: Mapping[str, str],
    gold: Mapping[str, frozenset[str]],
    index: Index,
    policies: Mapping[str, Policy],
    *,
    query_heads: Mapping[str, HeadSet] | None = None,
    candidates: int = 40,
    per_prompt: int = 10,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """How BM25 and every policy rank the candidates of every question.

    Args:
        model: a loaded model.
        questions: id to text.
        gold: id to the passages that answer it.
        index: the corpus.
        policies: who chooses heads; none that needs supporting facts.
        query_heads: sets of heads to be read as QRHead does.
        candidates: passages that BM25 finds, which are ranked again.
        per_prompt: candidates in one prompt.
        out: folder of the run; begun, resumed or read.
        progress: show a bar.

    Returns:
        One row per question and ranking ("bm25" is the one they came in): found (share of the gold passages among the
        candidates) and recall at each of `RANKS`.

    Raises:
        ValueError: a question has no gold passages, or see `read_passages` and `store.Run.open`.
    """
    missing = [name for name in questions if not gold.get(name)]
    if missing:
        raise ValueError(f"every question needs gold passages, {missing[0]!r} has none")
    card = model.card.with_settings(
        recipe="rerank",
        questions=digest(*questions, *questions.values()),
        corpus=index.sha256,
        policies={name: f"{policy.name} ({policy.key})" for name, policy in policies.items()},
        query_heads={name: digest(heads) for name, heads in (query_heads or {}).items()},
        candidates=candidates,
        per_prompt=per_prompt,
    )
    run = None if out is None else Run.open(out, card)
    if run is not None and run.finished:
        return run.tables()["recall"]
    parts = []
    with run.alone() if run else nullcontext():
        for name, question in tqdm(questions.items(), desc="rerank", unit="question", disable=not progress):
            if run and run.done(name):
                parts.append(run.load_part(name))
                continue
            found = [passage for passage, _ in index.search(question, candidates)]
            values = {"bm25": -torch.arange(len(found)).float()}
            if found:
                values |= read_passages(
                    model, question, found, policies, query_heads=query_heads, per_prompt=per_prompt
                )
            parts.append(_recalls(name, gold[name], found, values))
            if run:
                run.save_part(name, parts[-1])
        table = pd.concat(parts, ignore_index=True)
        if run:
            run.finish({"recall": table})
    return table


def _recalls(
    question: str, gold: frozenset[str], passages: Sequence[Passage], values: Mapping[str, Tensor]
) -> pd.DataFrame:
    right = np.array([passage.id in gold for passage in passages], dtype=bool)
    rows = []
    for name, value in values.items():
        ranked = right[value.argsort(descending=True, stable=True).numpy()]
        recall = {f"recall_{k}": ranked[:k].sum() / len(gold) for k in RANKS}
        rows.append({"question": question, "ranking": name, "found": right.sum() / len(gold), **recall})
    return pd.DataFrame(rows)
