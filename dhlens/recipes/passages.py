"""Passages of a corpus, read through heads: found by words, ranked again by where a model's heads look.

    values = read_passages(model, "Which county is Van Hook in?", passages, policies)
    best = values["predicted"].argsort(descending=True)

BM25 finds candidates (`dhlens.tasks.corpus`); they are put into prompts of a few passages each. Whoever names the
heads, they are read as QRHead reads its own: a passage's value is the attention that its tokens get from the rows of
the question to the prompt's end, less what they get where the question is "N/A". Values of different prompts are
ranked together. `CorpusLookup` is the visibility "retrieve" of dynamic retrieval; `dhlens.recipes.rerank` measures how
many gold passages each ranking puts first. Cost: one prefill for every `per_prompt` passages, whatever the number of
policies, and the question once more.

Source: for the reading arXiv 2506.09944; that dynamic heads rank passages is ours, arXiv 2602.11162 names it as future
work.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dhlens.detectors import NULL, document_value, query_episodes
from dhlens.engine import observe
from dhlens.episode import Episode
from dhlens.heads import HeadSet
from dhlens.lookup import Found, Lookup
from dhlens.model import Model
from dhlens.policies import Policy, at_row, sites_of
from dhlens.reads import Capture
from dhlens.tasks.corpus import Index, Passage
from dhlens.tasks.hotpot import over_documents
from dhlens.trace import Trace
from dhlens.triggers import Draft, is_content
from dhlens.views import prompt_view


def passage_prompts(model: Model, question: str, passages: Sequence[Passage], *, per_prompt: int = 10) -> list[Episode]:
    """The question over the passages, a few in each prompt, in their order.

    Raises:
        ValueError: no passage, `per_prompt` below 1, or a prompt beyond the model.
    """
    if not passages or per_prompt < 1:
        raise ValueError(f"there must be passages, and at least 1 a prompt, got {len(passages)} and {per_prompt}")
    null = len(_null(model))
    prompts = []
    for at in range(0, len(passages), per_prompt):
        part = passages[at : at + per_prompt]
        prompt = over_documents(model.tokenizer, question, [passage.document for passage in part], id="passages")
        tokens = len(prompt.tokens) + max(0, null - len(prompt.span("question")))
        if tokens > model.max_positions:
            sizes = {passage.id: len(prompt.span(f"doc_{i}")) for i, passage in enumerate(part)}
            longest = max(sizes, key=lambda name: sizes[name])
            fewer = "put fewer in a prompt (per_prompt), or " if len(part) > 1 else ""
            raise ValueError(
                f"a prompt must fit the model's {model.max_positions:,} positions, and one with {len(part)} of the "
                f"passages has {tokens:,} tokens, {sizes[longest]:,} of them for the longest, {longest!r}: "
                f"{fewer}leave that one out"
            )
        prompts.append(prompt)
    return prompts


def read_passages(
    model: Model,
    question: str,
    passages: Sequence[Passage],
    policies: Mapping[str, Policy],
    *,
    per_prompt: int = 10,
) -> dict[str, Float[Tensor, " passage"]]:
    """The value of every passage under every policy: the mean over its heads, 0 where it names none.

    Raises:
        ValueError: see `passage_prompts`.
    """
    found: dict[str, list[float]] = {name: [] for name in policies}
    for prompt in passage_prompts(model, question, passages, per_prompt=per_prompt):
        asked, null = _observed(model, prompt, policies)
        spans = [span for span in asked.episodes[0].spans if span.name.startswith("doc_")]
        values = [document_value(asked, null, 0, span) for span in spans]
        for name, policy in policies.items():
            heads = at_row(policy, asked, 0)
            found[name] += [float(value[heads.mask()].sum()) / max(len(heads), 1) for value in values]
    return {name: torch.tensor(values) for name, values in found.items()}


def _observed(model: Model, episode: Episode, policies: Mapping[str, Policy]) -> tuple[Trace, Trace]:
    """The rows from the question on, of the question and of the one that asks for nothing."""
    null = dataclasses.replace(query_episodes([episode], null=_null(model))[0], id="null")
    asked = [*query_episodes([episode]), null]
    focus = tuple(span.name for span in episode.spans if span.name.startswith("doc_"))
    capture = Capture(focus=focus, hidden=sites_of(policies.values()))
    trace = observe(model, asked, rows="query", capture=capture, progress=False)
    return trace.pick([0]), trace.pick([1])


def _null(model: Model) -> Int[Tensor, " null"]:
    """The question that asks for nothing."""
    return torch.tensor(model.tokenizer(NULL, add_special_tokens=False)["input_ids"])


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
        how = f"{self.candidates} to {self.shown}, {self.per_prompt} a prompt, read from the question"
        return f"{self.index.sha256[:12]}, {how}"

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
                read[query] = found, self._values(model, episode, found, chosen) if found else {}
            found, values = read[query]
            order = values[policy].argsort(descending=True, stable=True)[: self.shown].tolist() if found else []
            return self._shown(model, episode, question, [found[i] for i in order])

        return lookup

    def _values(
        self, model: Model, episode: Episode, found: Sequence[Passage], policies: Mapping[str, Policy]
    ) -> dict[str, Tensor]:
        try:
            return read_passages(model, str(episode.meta["question"]), found, policies, per_prompt=self.per_prompt)
        except ValueError as error:
            raise ValueError(f"question {episode.id!r}: {error}") from error

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
