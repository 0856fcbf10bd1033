"""Evidence in long texts: contracts, meetings and source files, in units that are kept whole.

Each reader takes one record of a data set in the fields named at it, and gives a `Located` for each question that has
evidence: ContractNLI (clauses), QMSum (turns of speech), SWE-QA (lines of files). Several evidence blocks that touch
the same unit are one. `dhlens.tasks.evidence` makes prompts of them; questions over paragraphs are
`dhlens.tasks.questions`.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dhlens.tasks.questions import Document
from dhlens.tasks.records import Record, collect, composed, is_number, objects, rows, text, whole

Run = tuple[int, int, int]
"""A document, and its first and last unit that belong to a piece of evidence."""


@dataclass(frozen=True)
class Located:
    """A question about long texts, with the places that answer it.

    Raises:
        ValueError: question or answer is empty, there is no evidence, or a place is not in the texts.
    """

    id: str
    """Its name in the source."""
    question: str
    """What is asked."""
    answer: str
    """The reply that is right."""
    documents: tuple[Document, ...]
    """The texts, their units as sentences: clauses, turns or lines. A title only where there are several."""
    runs: tuple[Run, ...]
    """The evidence, in order and apart from one another."""
    closed: bool = False
    """Whether the answer is one of a few words, so that a reply can be judged by holding it."""
    source: str = ""
    """Where it was read."""

    def __post_init__(self) -> None:
        for name in ("id", "question", "answer"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} must hold some text")
        if not self.runs:
            raise ValueError(f"question {self.id!r} must have evidence, found none")
        for document, first, last in self.runs:
            units = self.documents[document].sentences
            if not 0 <= first <= last < len(units) or not "".join(units[first : last + 1]).strip():
                raise ValueError(
                    f"the evidence of question {self.id!r} must be units with text, got {first}..{last} of the "
                    f"{len(units)} (from 0 on) in {self.documents[document].title or 'the text'}"
                )


def contract(record: Mapping[str, Any], where: str) -> Iterator[Located]:
    """Hypotheses of a contract: text, spans [[start, end]], qa [{id, hypothesis, answer, evidence [[start, end]]}].

    Those that it does not mention have no evidence and give no question.
    """
    # Offsets count the characters as they came: no composing.
    written, spans = whole(record.get("text"), "text"), sorted(_ends(span, "spans") for span in rows(record, "spans"))
    if not spans:
        raise ValueError("a contract must have spans")
    stops = [stop for _, stop in spans]
    if stops != sorted(set(stops)) or stops[-1] > len(written):
        raise ValueError(f"spans must be apart and within the {len(written)} characters of the text")
    clauses = tuple(written[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True))
    documents = (Document("", clauses),)
    for asked in objects(record, "qa"):
        name, label = text(asked, "id"), text(asked, "answer")
        if label == "NotMentioned":
            continue
        if label not in _VERDICTS:
            raise ValueError(
                f"question {name!r}: answer must be Entailment, Contradiction or NotMentioned, got {label!r}"
            )
        runs = []
        for start, stop in (_ends(e, f"question {name!r}: evidence") for e in rows(asked, "evidence")):
            if stop > stops[-1]:
                raise ValueError(f"question {name!r}: evidence {start}..{stop} is outside the spans of the text")
            runs.append((0, bisect_right(stops, start), bisect_right(stops, stop - 1)))
        question = f"Is this statement entailed or contradicted by the contract? {text(asked, 'hypothesis').strip()}"
        yield Located(name, question, _VERDICTS[label], documents, _apart(runs), closed=True, source=where)


_VERDICTS = {"Entailment": "entailed", "Contradiction": "contradicted"}


def meeting(record: Mapping[str, Any], where: str) -> Iterator[Located]:
    """Queries on a meeting: turns [[speaker, content]], qa [{id, question, answer, evidence_turns [[first, last]]}]."""
    turns = rows(record, "turns")
    if not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
        raise ValueError("turns must be pairs of speaker and content")
    said = [": ".join(composed(part, "turn").strip() for part in turn) for turn in turns]
    documents = (Document("", tuple(f"\n{turn}" if i else turn for i, turn in enumerate(said))),)
    for asked in objects(record, "qa"):
        name = text(asked, "id")
        ends = [_pair(e, f"question {name!r}: evidence_turns") for e in rows(asked, "evidence_turns")]
        runs = _apart([(0, first, last) for first, last in ends])
        yield Located(name, text(asked, "question").strip(), text(asked, "answer"), documents, runs, source=where)


def code(records: Iterable[Record], *, on_error: str) -> list[Located]:
    """Questions on repositories, {id, repo, question, answer, evidence [{path, start_line, end_line}]}.

    Lines count from 1 on, and the last one is included. The files, {repo, path, text}, are among the same records.
    """
    files: dict[tuple[str, str], Document] = {}
    asked: list[tuple[str, Any]] = []
    for where, record in records:
        if isinstance(record, Mapping) and "text" in record and "path" in record:
            try:
                files |= _code_file(record)
            except ValueError as error:
                asked.append((where, error))
        else:
            asked.append((where, record))
    return collect(asked, lambda record, where: [_code_question(record, where, files)], on_error=on_error)


def _code_file(record: Mapping[str, Any]) -> dict[tuple[str, str], Document]:
    lines = text(record, "text").split("\n")
    units = tuple(f"\n{line}" if i else line for i, line in enumerate(lines))
    return {(text(record, "repo"), text(record, "path")): Document(text(record, "path"), units)}


def _code_question(record: Mapping[str, Any], where: str, files: Mapping[tuple[str, str], Document]) -> Located:
    repo, places = text(record, "repo"), objects(record, "evidence")
    paths = list(dict.fromkeys(text(place, "path") for place in places))
    for path in paths:
        if (repo, path) not in files:
            raise ValueError(f"the evidence is in {path!r} of {repo!r}, and no such file is in the source")
    ends = [_pair((p.get("start_line"), p.get("end_line")), "evidence lines") for p in places]
    runs = [(paths.index(text(p, "path")), first - 1, last - 1) for p, (first, last) in zip(places, ends, strict=True)]
    return Located(
        id=text(record, "id"),
        question=text(record, "question").strip(),
        answer=text(record, "answer"),
        documents=tuple(files[repo, path] for path in paths),
        runs=_apart(runs),
        source=where,
    )


def _pair(value: Any, what: str) -> tuple[int, int]:
    if not isinstance(value, Sequence) or len(value) != 2 or not all(map(is_number, value)):
        raise ValueError(f"{what} must be pairs of numbers, got {value!r:.80}")
    return value[0], value[1]


def _ends(value: Any, what: str) -> tuple[int, int]:
    start, stop = _pair(value, what)
    if not 0 <= start < stop:
        raise ValueError(f"{what} must hold 0 <= start < end, got {start}..{stop}")
    return start, stop


def _apart(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The runs in order, those that overlap as one."""
    apart: list[Run] = []
    for document, first, last in sorted(set(runs)):
        if apart and apart[-1][0] == document and first <= apart[-1][2]:
            apart[-1] = (document, apart[-1][1], max(last, apart[-1][2]))
        else:
            apart.append((document, first, last))
    return tuple(apart)
