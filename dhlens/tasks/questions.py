"""Multi-hop questions: documents, the sentences that prove the answer, and which questions are independent.

    bo = Document("Bo", ("Bo was born in Ost.", " Bo died in Ulm."))
    Question("q1", "Where was Ann's father born?", "Ost", (ann, bo), facts=((0, 1), (1, 0)))

`dhlens.tasks.multihop.read_questions` reads them from the published data sets and `dhlens.tasks.twohop.generate` makes
them up; `dhlens.tasks.hotpot.episodes` turns them into prompts. A question that does not hold together cannot be made:
what it must hold is checked here, once, for every source.
"""

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.cluster.hierarchy import DisjointSet


@dataclass(frozen=True)
class Document:
    """A titled paragraph in sentences."""

    title: str
    """Its heading; several documents of a question may share one."""
    sentences: tuple[str, ...]
    """In order, each with the space that parts it from the one before, so that they join to the paragraph."""

    @property
    def text(self) -> str:
        """The paragraph."""
        return "".join(self.sentences)


@dataclass(frozen=True)
class Question:
    """A question over documents, with its evidence.

    Raises:
        ValueError: question or answer is empty, there is no supporting fact, or one names no sentence with text.
    """

    id: str
    """Its name in the source."""
    question: str
    """What is asked."""
    answer: str
    """The answer."""
    documents: tuple[Document, ...]
    """Gold documents and distractors."""
    facts: tuple[tuple[int, int], ...]
    """(document, sentence) of every supporting sentence, counted from 0, each once."""
    aliases: tuple[str, ...] = ()
    """Other ways to write the answer."""
    kind: str = ""
    """"bridge", "comparison", or what the source calls it."""
    source: str = ""
    """Where it was read: file and line."""

    def __post_init__(self) -> None:
        for name in ("id", "question", "answer"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} must hold some text")
        if not self.facts:
            raise ValueError("there must be supporting facts, found none")
        for document, sentence in self.facts:
            if not 0 <= document < len(self.documents):
                raise ValueError(f"a supporting fact names document {document} of {len(self.documents)}")
            title, sentences = self.documents[document].title, self.documents[document].sentences
            if not (0 <= sentence < len(sentences) and sentences[sentence].strip()):
                raise ValueError(
                    f"a supporting fact must name a sentence with text, got {sentence} of the {len(sentences)} (from 0 "
                    f"on) in {title!r}"
                )
        if len(set(self.facts)) < len(self.facts):
            raise ValueError(f"supporting facts must differ from one another, got {self.facts}")

    @property
    def gold(self) -> frozenset[int]:
        """The documents that hold supporting facts."""
        return frozenset(document for document, _ in self.facts)


def sha256_of(questions: Sequence[Any]) -> str:
    """Hash of what questions (dataclasses with `source`) say, in order; where they were read does not count."""
    said = [{**asdict(question), "source": ""} for question in questions]
    return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()


def groups_of(questions: Sequence[Question]) -> list[str]:
    """The independent unit of each question: questions that share a gold document, directly or not, are one.

    Distractors do not count: they carry no evidence.
    """
    gold = [[question.documents[i] for i in sorted(question.gold)] for question in questions]
    return joined([question.id for question in questions], [[(d.title, d.text) for d in shown] for shown in gold])


def joined(names: Sequence[str], holds: Sequence[Sequence[Hashable]]) -> list[str]:
    """The group of each name, called after its first member: names that hold something in common share one."""
    sets = DisjointSet(range(len(names)))
    first: dict[Hashable, int] = {}
    for i, held in enumerate(holds):
        for thing in held:
            sets.merge(i, first.setdefault(thing, i))
    return [names[min(sets.subset(i))] for i in range(len(names))]
