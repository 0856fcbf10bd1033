"""Contracts, meetings and code as prompts with located evidence: does what holds on needles carry over?

    episodes(tokenizer, "contract_nli/contracts.jsonl.gz", kind="contracts", n=100, length=2000, seed=0)

The spans are those of `dhlens.tasks.hotpot`: "fact_0" on (evidence), "doc_0" on (files; contracts and meetings are one
text and have none), "context" and "question". A length keeps all evidence and grows the text around it by whole
clauses, turns or lines; "[...]" stands where some are left out. Asked are a contract's verdict on a statement, in one
word; a meeting's query and a question on a repository, in a few sentences, which `judge` does not judge.
Texts are tokenised once each: a second for a hundred contracts, two for all 70 meetings.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dhlens.episode import Episode, Tokenizer
from dhlens.tasks.located import Located, Run, code, contract, meeting
from dhlens.tasks.pieces import Draft, Piece, check_sizes, cut, drawn, finished
from dhlens.tasks.prompts import Prompt, told
from dhlens.tasks.questions import Document, joined, sha256_of
from dhlens.tasks.records import collect, records_of

_INSTRUCTIONS: Mapping[str, str] = {
    "contracts": "Answer from the context in one word: entailed or contradicted.",
    "meetings": "Answer from the context in a few sentences.",
    "code": "Answer from the context in a few sentences.",
}


def read_located(source: str | Path, *, kind: str, on_error: str = "raise") -> list[Located]:
    """The questions of a file or folder, in order; code needs a folder that holds the files as well.

    Raises:
        ValueError: `kind` is not known, nothing is there, or a record is broken; its place is named.
    """
    if kind not in _INSTRUCTIONS:
        raise ValueError(f"kind must be one of {', '.join(_INSTRUCTIONS)}, got {kind!r}")
    if kind == "code":
        return code(records_of(source), on_error=on_error)
    return collect(records_of(source), contract if kind == "contracts" else meeting, on_error=on_error)


def episodes(
    tokenizer: Tokenizer,
    source: str | Path | Sequence[Located],
    *,
    kind: str,
    n: int | None = None,
    length: int | None = None,
    seed: int = 0,
    template: str = "chat",
    max_positions: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    on_error: str = "raise",
) -> list[Episode]:
    """Questions with located evidence.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        source: a file or folder in the fields that `dhlens.tasks.located` names, or what it read.
        kind: "contracts" (ContractNLI), "meetings" (QMSum) or "code" (SWE-QA).
        n: questions, drawn: those of a smaller n are the first of a larger one. None for all, in the source's order.
        length: tokens of the whole prompt at most. A question whose evidence does not fit is left out and counted in
            `meta["left_out"]`.
        seed: of the draw, of the text that is kept around the evidence and of the order of files.
        template: "chat", "plain", or a text with {context} and {question} once each.
        max_positions: the model's limit, where known.
        template_kwargs: options of the chat template.
        on_error: "raise" stops at the first broken record; "skip" leaves it out and warns.

    Returns:
        Episodes. `meta`: "group" (questions on one text, or on files that meet in a question, are one), "question",
        "answer_text" (None where a reply is not judged), "reference", "kind", "titles", "fact_documents",
        "length" (of this prompt), "left_out" (questions), "units_left_out".

    Raises:
        ValueError: a setting cannot be met, or a record is broken.
    """
    check_sizes(n, length, max_positions)
    found = read_located(source, kind=kind, on_error=on_error) if isinstance(source, str | Path) else list(source)
    groups = joined([q.id for q in found], [[(d.title, d.text) for d in q.documents] for q in found])
    shared = {"seed": seed, "haystack_sha256": sha256_of(found), "kind": kind, **told(template_kwargs)}
    tokenised: dict[Document, list[Piece]] = {}

    def draft(i: int) -> Draft | None:
        question = found[i]
        for document in question.documents:
            if document not in tokenised:
                tokenised[document] = cut(tokenizer, document.sentences)
        prompt = Prompt.of(
            tokenizer, template, question.question, options=template_kwargs, instruction=_INSTRUCTIONS[kind]
        )
        rng = random.Random(f"{seed}/{question.id}")
        order = rng.sample(range(len(question.documents)), len(question.documents))
        texts = _Texts.of(tokenizer, question, [tokenised[question.documents[i]] for i in order], order)
        kept = texts.kept(None if length is None else length - len(prompt), rng)
        if kept is None:
            return None
        meta = {**shared, **_meta(question, order), "group": groups[i], "units_left_out": texts.size - len(kept)}
        return Draft(question.id, question.answer, prompt, texts.context(kept), meta)

    return finished(tokenizer, drawn(len(found), n, seed=seed), draft, n=n, max_positions=max_positions)


_Unit = tuple[int, int]
"""A document in the prompt's order, and a unit of it."""


@dataclass(frozen=True, eq=False)
class _Texts:
    """The documents of a question in the prompt's order, as pieces."""

    units: list[list[Piece]]
    titles: list[Piece | None]
    cut_mark: Piece
    """Stands where units are left out."""
    gap: Piece
    """Parts the documents."""
    runs: list[Run]
    """The evidence, with documents in the prompt's order."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, question: Located, units: list[list[Piece]], order: list[int]) -> "_Texts":
        titles = [question.documents[i].title for i in order]
        heads = [f"[{k}] {title}\n" for k, title in enumerate(titles, 1)]
        mark, gap = (cut(tokenizer, [text], after=".")[0] for text in ("\n[...]\n", "\n\n"))
        shown = [cut(tokenizer, [head])[0] if title else None for head, title in zip(heads, titles, strict=True)]
        runs = [(order.index(document), first, last) for document, first, last in question.runs]
        return cls(units, shown, mark, gap, runs)

    @property
    def size(self) -> int:
        """All units."""
        return sum(map(len, self.units))

    def kept(self, room: int | None, rng: random.Random) -> set[_Unit] | None:
        """The evidence and what else `room` tokens hold around it; None where they do not hold the evidence."""
        if room is None:
            return {(d, i) for d, units in enumerate(self.units) for i in range(len(units))}
        kept = {(d, i) for d, first, last in self.runs for i in range(first, last + 1)}
        # At most: a mark before each run and a gap before each title.
        frame = len(self.cut_mark) * (len(self.runs) + len(self.units)) + sum(len(title or ()) for title in self.titles)
        left = room - frame - sum(len(self.units[d][i]) for d, i in kept)
        if left < 0:
            return None
        share = rng.random()
        edges = {
            -1: [(d, first - 1) for d, first, _ in self.runs],
            1: [(d, last + 1) for d, _, last in self.runs],
        }
        while edges[-1] or edges[1]:
            step = -1 if edges[-1] and (not edges[1] or rng.random() < share) else 1
            d, i = edges[step].pop(rng.randrange(len(edges[step])))
            if 0 <= i < len(self.units[d]) and (d, i) not in kept and len(self.units[d][i]) <= left:
                kept.add((d, i))
                left -= len(self.units[d][i])
                edges[step].append((d, i + step))
        return kept

    def context(self, kept: set[_Unit]) -> list[Piece]:
        """The pieces of the kept units, marked where some are left out between them."""
        pieces: list[Piece] = []
        for d, units in enumerate(self.units):
            shown = [i for i in range(len(units)) if (d, i) in kept]
            body: list[Piece] = []
            for before, i in zip([shown[0] - 1, *shown], shown, strict=False):
                facts = [f"fact_{k}" for k, (of, first, last) in enumerate(self.runs) if of == d and first <= i <= last]
                body += [self.cut_mark] if i > before + 1 else []
                body.append(units[i].named(*facts))
            title = self.titles[d]
            if title is not None:
                body = [piece.named(f"doc_{d}") for piece in (title, *body)]
            pieces += [self.gap, *body] if pieces else body
        return pieces


def _meta(question: Located, order: Sequence[int]) -> dict[str, Any]:
    return {
        "question": question.question,
        "answer_text": question.answer if question.closed else None,
        "reference": question.answer,
        "source": question.source,
        "titles": [question.documents[i].title for i in order],
        "fact_documents": [order.index(document) for document, _, _ in question.runs],
    }
