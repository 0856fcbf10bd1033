"""Read multi-hop questions: HotpotQA (distractor setting), 2WikiMultihopQA and MuSiQue, recognised by their fields.

`read_questions("hotpot_dev_distractor_v1.json")` takes a .json, .jsonl or .jsonl.gz file, a folder of such, the Hub's
"hotpotqa/hotpot_qa", or nothing: then questions of our own over invented people and places (`dhlens.tasks.twohop`).
HotpotQA and 2WikiMultihopQA mark sentences. MuSiQue marks paragraphs: each is one long sentence here, so a fact is a
whole paragraph and counts of facts do not compare with the other two. A thousand questions take a second.

What is done about the oddities of real files: text is put into Unicode's composed form, which tokenizers keep; a
paragraph without text is dropped; a title that stands twice is a flaw only where a supporting fact names it and both
paragraphs have that sentence; an answer that stands in no document is kept.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dhlens.tasks.questions import Document, Question
from dhlens.tasks.records import Record, collect, composed, is_number, objects, records_of, rows, text
from dhlens.tasks.twohop import generate

_HUB = re.compile(r"(?:hub:)?(?P<name>hotpotqa/hotpot_qa)(?::(?P<split>.+))?")


def read_questions(
    source: str | Path | Sequence[Question] | None = None,
    *,
    on_error: str = "raise",
    n_generated: int = 200,
    seed: int = 0,
) -> list[Question]:
    """The questions of a source, in its order.

    Args:
        source: a file, a folder (its files, sorted), "hotpotqa/hotpot_qa[:split]" for the Hub (split "validation";
            a file or folder of that name goes first), questions, or None for the generator.
        on_error: "raise" stops at the first broken record; "skip" leaves it out and warns once, with all places.
        n_generated: questions of the generator.
        seed: of the generator.

    Raises:
        ValueError: nothing is there, a record is broken, an id stands twice, or no record is left; file and line or
            record are named.
        ImportError: the Hub is asked for and `datasets` is not installed.
    """
    if source is None:
        return generate(n_generated, seed=seed)
    if not isinstance(source, str | Path):
        return list(source)
    return collect(_records(source), lambda record, where: [_question(record, where)], on_error=on_error)


def _records(source: str | Path) -> Iterator[Record]:
    match = None if Path(source).expanduser().exists() else _HUB.fullmatch(str(source))
    return records_of(source) if match is None else _hub_records(match["name"], match["split"] or "validation")


def _hub_records(name: str, split: str) -> Iterator[Record]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"questions {name!r} need the package datasets: pip install datasets") from error
    found: Any = load_dataset(name, "distractor", split=split)
    yield from ((f"{name} {split} record {i}", row) for i, row in enumerate(found, 1))


def _question(record: Mapping[str, Any], where: str) -> Question:
    if "paragraphs" in record:
        documents, facts, kind = _musique(record)
    elif "context" in record:
        documents, facts, kind = _hotpot(record)
    else:
        raise ValueError(
            f"a record must have the field context or paragraphs, it has: {', '.join(map(ascii, record)) or 'none'}"
        )
    return Question(
        id=text(record, "_id" if "_id" in record else "id"),
        question=text(record, "question").strip(),
        answer=text(record, "answer").strip(),
        documents=documents,
        facts=tuple(dict.fromkeys(facts)),
        aliases=tuple(composed(alias, "answer_aliases") for alias in rows(record, "answer_aliases")),
        kind=kind,
        source=where,
    )


def _hotpot(record: Mapping[str, Any]) -> tuple[tuple[Document, ...], list[tuple[int, int]], str]:
    context = _pairs(record, "context", "sentences")
    bare = not any(s[:1].isspace() for _, sentences in context for s in list(sentences)[1:] if isinstance(s, str))
    read = (Document(composed(title, "title"), _spaced(sentences, bare)) for title, sentences in context)
    documents = tuple(document for document in read if document.text.strip())
    facts = _pairs(record, "supporting_facts", "sent_id")
    named = [_named(documents, composed(title, "title"), sentence) for title, sentence in facts]
    return documents, named, composed(str(record.get("type", "")), "type")


def _musique(record: Mapping[str, Any]) -> tuple[tuple[Document, ...], list[tuple[int, int]], str]:
    if record.get("answerable") is False:
        raise ValueError("the question must be answerable from its paragraphs, and is marked as not")
    filled = [row for row in objects(record, "paragraphs") if text(row, "paragraph_text").strip()]
    documents = tuple(Document(text(row, "title"), (text(row, "paragraph_text").strip(),)) for row in filled)
    hops = len(rows(record, "question_decomposition"))
    return documents, [(i, 0) for i, row in enumerate(filled) if row.get("is_supporting")], f"{hops}hop" if hops else ""


def _pairs(record: Mapping[str, Any], field: str, second: str) -> list[tuple[Any, Any]]:
    """Pairs as published, or the columns of the Hub."""
    value: Any = record.get(field) or ()
    pairs: list[Any]
    try:
        pairs = list(zip(value["title"], value[second], strict=True) if isinstance(value, Mapping) else value)
    except (KeyError, TypeError, ValueError):
        pairs = [value]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{field} must be a list of [title, {second}], got {value!r:.80}")
    return [(title, other) for title, other in pairs]


def _spaced(sentences: Any, bare: bool) -> tuple[str, ...]:
    """Sentences that join to their paragraph: `bare` ones come without the space that parts them."""
    if isinstance(sentences, str) or not isinstance(sentences, Sequence):
        raise ValueError(f"a document's sentences must be a list of texts, got {sentences!r:.80}")
    spaced: list[str] = []
    parted = bare
    for sentence in (composed(s, "sentence") for s in sentences):
        said = sentence.strip()
        space = " " if said and any(spaced) and (parted or sentence[0].isspace()) else ""
        spaced.append(space + said)
        parted = bare or sentence[-1:].isspace()
    return tuple(spaced)


def _named(documents: Sequence[Document], title: str, sentence: Any) -> tuple[int, int]:
    """The document and sentence that a supporting fact names."""
    titled = [i for i, document in enumerate(documents) if document.title == title]
    if not titled:
        raise ValueError(f"a supporting fact names {title!r}, and no document with text is called so")
    if not is_number(sentence):
        raise ValueError(f"a supporting fact must name a sentence by its number, got {sentence!r}")
    holding = [i for i in titled if 0 <= sentence < len(s := documents[i].sentences) and s[sentence].strip()]
    if len(holding) > 1:
        raise ValueError(
            f"a supporting fact must name one sentence, and {len(holding)} documents called {title!r} have "
            f"a sentence {sentence}"
        )
    return (holding or titled)[0], sentence
