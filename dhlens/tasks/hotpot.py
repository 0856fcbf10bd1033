"""Multi-hop questions as prompts: every supporting sentence, document and the question an exact span.

    episodes(tokenizer, "hotpot_dev_distractor_v1.json", n=200, length=1500, seed=0)

HotpotQA, 2WikiMultihopQA, MuSiQue (`dhlens.tasks.multihop.read_questions`), or without a source questions of our own.
The context is "[1] Title", its paragraph, and so on, in an order that the seed draws; a length drops distractors,
never gold documents. Needles in a haystack are `dhlens.tasks.niah`; contracts, meetings and code
`dhlens.tasks.evidence`. Five hundred questions take a few seconds.

Source: arXiv 2602.11162, HotpotQA in the distractor setting. We depart from it in drawing the order of the documents,
so that depth does not depend on the source, and in saying which spans are evidence.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dhlens.episode import Episode, Tokenizer
from dhlens.tasks.multihop import read_questions
from dhlens.tasks.pieces import Draft, Piece, check_sizes, cut, drawn, finished, standing
from dhlens.tasks.prompts import Prompt, told
from dhlens.tasks.questions import Document, Question, groups_of, sha256_of

INSTRUCTION = "Reply with the answer only."
"""What the chat prompt asks for; own and plain templates say it themselves."""


def episodes(
    tokenizer: Tokenizer,
    source: str | Path | Sequence[Question] | None = None,
    *,
    n: int | None = None,
    length: int | None = None,
    seed: int = 0,
    template: str = "chat",
    max_positions: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    on_error: str = "raise",
) -> list[Episode]:
    """Questions over documents, as many as asked for.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        source: what `read_questions` takes; None for questions of our own.
        n: questions, drawn: those of a smaller n are the first of a larger one. None for all, in the source's order.
        length: tokens of the whole prompt at most. Distractors go in as long as they fit. A question whose gold
            documents do not fit is left out and counted in `meta["left_out"]`.
        seed: of the draw, of the order of the documents and of the generator.
        template: "chat", "plain", or a text with {context} and {question} once each.
        max_positions: the model's limit, where known.
        template_kwargs: options of the chat template.
        on_error: "raise" stops at the first broken record; "skip" leaves it out and warns.

    Returns:
        Episodes with the spans "fact_0" on (supporting sentences in the source's order), "doc_0" on (title line and
        paragraph, in the prompt's order), "context", "question", and "answer" where a fact says it word by word.
        `meta`: "group" (questions that share a gold document are one), "question", "answer_text", "aliases", "kind",
        "titles" of the documents shown, "fact_documents" (of each fact, i for "doc_i"), "documents_left_out",
        "answer_in_context", "length" (of this prompt), "left_out" (questions).

    Raises:
        ValueError: a setting cannot be met, or a record is broken; see `read_questions`.
        ImportError: see `read_questions`.
    """
    check_sizes(n, length, max_positions)
    questions = read_questions(source, on_error=on_error, seed=seed, **({} if n is None else {"n_generated": n}))
    groups = groups_of(questions)
    shared = {"seed": seed, "haystack_sha256": sha256_of(questions), **told(template_kwargs)}

    def draft(i: int) -> Draft | None:
        question = questions[i]
        prompt = Prompt.of(tokenizer, template, question.question, options=template_kwargs, instruction=INSTRUCTION)
        room = None if length is None else length - len(prompt)
        order = random.Random(f"{seed}/{question.id}").sample(range(len(question.documents)), len(question.documents))
        shown = _fitting(tokenizer, question, order, room)
        if shown is None:
            return None
        pieces = _context(tokenizer, shown.values())
        return Draft(
            question.id, question.answer, prompt, pieces, {**shared, **_meta(question, [*shown]), "group": groups[i]}
        )

    # Made-up questions are drawn already.
    order = drawn(len(questions), None if source is None else n, seed=seed)
    return finished(tokenizer, order, draft, n=n, max_positions=max_positions)


_Bodies = dict[int, list[Piece]]
"""Documents in the prompt's order, each as its title line and sentences."""


def _fitting(tokenizer: Tokenizer, question: Question, order: Sequence[int], room: int | None) -> _Bodies | None:
    """The documents of `order` that `room` tokens hold, gold ones first; None where it does not hold those."""
    facts = {i: {s: fact for fact, (document, s) in enumerate(question.facts) if document == i} for i in order}
    bodies = {i: _body(tokenizer, question.documents[i], facts[i]) for i in order}
    if room is None:
        return bodies
    # At most: the widest number, and a gap behind each.
    frame = len(_number(tokenizer, len(order))) + len(_gap(tokenizer))
    cost = {i: frame + sum(map(len, body)) for i, body in bodies.items()}
    left = room - sum(cost[i] for i in question.gold)
    if left < 0:
        return None
    kept = set(question.gold)
    for i in order:
        if i not in kept and cost[i] <= left:
            kept.add(i)
            left -= cost[i]
    return {i: body for i, body in bodies.items() if i in kept}


def over_documents(
    tokenizer: Tokenizer,
    question: str,
    documents: Sequence[Document],
    *,
    id: str,
    answer: str = "",
    template: str = "chat",
    template_kwargs: Mapping[str, Any] | None = None,
) -> Episode:
    """A question over any documents, such as retrieved ones, in their order: spans "doc_0" on, "context", "question".

    Raises:
        ValueError: no document, or see `Prompt.of`.
    """
    if not documents:
        raise ValueError("a prompt over documents needs at least one, got none")
    prompt = Prompt.of(tokenizer, template, question, options=template_kwargs, instruction=INSTRUCTION)
    pieces = _context(tokenizer, [_body(tokenizer, document, {}) for document in documents])
    return Draft(id, answer, prompt, pieces, {"question": question, "answer_text": answer}).episode(tokenizer)


def _body(tokenizer: Tokenizer, document: Document, facts: Mapping[int, int]) -> list[Piece]:
    """Title line and sentences; `facts` says which sentence is which fact."""
    title, *sentences = cut(tokenizer, [f" {document.title}\n", *document.sentences], after="]")
    named = [s.named(f"fact_{facts[i]}") if i in facts else s for i, s in enumerate(sentences)]
    return [title, *named]


def _context(tokenizer: Tokenizer, bodies: Iterable[list[Piece]]) -> list[Piece]:
    pieces: list[Piece] = []
    for position, body in enumerate(bodies):
        gap = [_gap(tokenizer)] if pieces else []
        document = [_number(tokenizer, position + 1), *body]
        pieces += [*gap, *(piece.named(f"doc_{position}") for piece in document)]
    return pieces


def _number(tokenizer: Tokenizer, number: int) -> Piece:
    return cut(tokenizer, [f"[{number}]"])[0]


def _gap(tokenizer: Tokenizer) -> Piece:
    return cut(tokenizer, ["\n\n"], after=".")[0]


def _meta(question: Question, shown: list[int]) -> dict[str, Any]:
    """What the episode says of its question; documents counted in the prompt's order."""
    texts = [f"{question.documents[i].title}\n{question.documents[i].text}" for i in shown]
    return {
        "question": question.question,
        "answer_text": question.answer,
        "aliases": list(question.aliases),
        "answer_in_context": any(standing(text, question.answer) for text in texts),
        "kind": question.kind,
        "source": question.source,
        "titles": [question.documents[i].title for i in shown],
        "fact_documents": [shown.index(document) for document, _ in question.facts],
        "documents_left_out": len(question.documents) - len(shown),
    }
