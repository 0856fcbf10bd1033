"""A corpus of passages and its BM25 index: where `retrieve` looks things up.

    passages = read_corpus("hotpot_corpus.jsonl.gz")
    index = Index.of(passages)                     # built once, found again in the cache
    index.search("Which county is Van Hook in?", 10)

Records are {"id", "title", "text"}, one a line. The index is bm25s (Lucene's form of BM25; k1 1.5, b .75), over titles
and texts in lower case without its English stop words. It is kept in the user's cache directory (`DHLENS_CACHE` where
that is set) under the hash of the passages. Cost: three seconds to index 15,000 passages, a millisecond a search.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import bm25s

from dhlens.cache import cache_dir
from dhlens.tasks.questions import Document
from dhlens.tasks.records import collect, composed, records_of, text


@dataclass(frozen=True)
class Passage:
    """One passage of a corpus."""

    id: str
    """Unique in its corpus."""
    title: str
    """Its heading."""
    text: str
    """What it says."""

    @property
    def document(self) -> Document:
        """The passage as a document of a prompt, of one sentence."""
        return Document(self.title, (self.text,))


def read_corpus(source: str | Path, *, on_error: str = "raise") -> list[Passage]:
    """The passages of a .jsonl, .json or gzipped file, or of a folder of such, in order.

    Args:
        source: where they are.
        on_error: "raise" stops at the first broken record, named by its line; "skip" leaves it out and warns once.

    Raises:
        ValueError: see `dhlens.tasks.records`; a passage lacks its id, title or text.
    """
    return collect(records_of(source), _passages, on_error=on_error)


def read_gold(source: str | Path, *, on_error: str = "raise") -> dict[str, frozenset[str]]:
    """Which passages answer which question, from records {"question_id", "gold": [passage ids]}.

    Raises:
        ValueError: see `dhlens.tasks.records`; a record names no question or no passage.
    """
    return {one.id: one.passages for one in collect(records_of(source), _golds, on_error=on_error)}


@dataclass(frozen=True)
class _Gold:
    id: str
    passages: frozenset[str]


def _passages(record: Mapping[str, Any], where: str) -> list[Passage]:
    found = Passage(text(record, "id"), text(record, "title"), text(record, "text"))
    if not found.id.strip() or not found.text.strip():
        raise ValueError("a passage must have an id and a text")
    return [found]


def _golds(record: Mapping[str, Any], where: str) -> list[_Gold]:
    named = record.get("gold")
    if not isinstance(named, list) or not named:
        raise ValueError(f"gold must be a list of passage ids, got {named!r:.80}")
    return [_Gold(text(record, "question_id"), frozenset(composed(one, "a passage id in gold") for one in named))]


class Index:
    """BM25 over passages."""

    def __init__(self, passages: Sequence[Passage], engine: bm25s.BM25) -> None:
        """Of passages and the engine that has indexed them; see `of`."""
        self.passages, self.sha256 = list(passages), _sha256(passages)
        self._engine = engine

    @classmethod
    def of(cls, passages: Sequence[Passage], folder: str | Path | None = None) -> "Index":
        """The index of these passages: found in `folder` where it lies there, else built and kept there.

        Args:
            passages: the corpus.
            folder: where the index lies or will lie; by default one in the cache directory, named by its hash.

        Raises:
            ValueError: there is no passage or no word in them, or the folder holds something else: the index of another
                corpus, or a damaged one.
        """
        if not passages:
            raise ValueError("an index needs at least one passage, got none")
        sha256 = _sha256(passages)
        place = Path(folder) if folder is not None else cache_dir() / f"bm25-{sha256[:16]}"
        if (place / "corpus.json").is_file():
            try:
                kept = json.loads((place / "corpus.json").read_text(encoding="utf-8"))
                holds, size = str(kept["sha256"]), kept["passages"]
                engine = bm25s.BM25.load(str(place), show_progress=False) if holds == sha256 else None
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"the index in {place} is damaged, delete the folder: {error!r}") from None
            if engine is None:
                raise ValueError(
                    f"{place} holds the index of another corpus ({size} passages, {holds[:12]}), "
                    f"not of these {len(passages)} ({sha256[:12]}): name another folder"
                )
            return cls(passages, engine)
        if place.is_file():
            raise ValueError(f"{place} is a file: an index needs a folder")
        if place.exists() and any(place.iterdir()):
            raise ValueError(f"{place} holds something else than an index: name an empty or a new folder")
        tokens = _tokens([f"{p.title} {p.text}" for p in passages])
        if not any(tokens):
            raise ValueError(f"an index needs a word that is no stop word, and {len(passages)} passages hold none")
        engine = bm25s.BM25()
        engine.index(tokens, show_progress=False)
        _keep(engine, place, {"sha256": sha256, "passages": len(passages)})
        return cls(passages, engine)

    def search(self, query: str, k: int) -> list[tuple[Passage, float]]:
        """The `k` best passages with their scores, best first; fewer where fewer share a word with the query.

        Raises:
            ValueError: k is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1 passage, got {k}")
        tokens = _tokens([query])
        if not tokens[0]:
            return []
        ids, scores = self._engine.retrieve(tokens, k=min(k, len(self.passages)), show_progress=False, n_threads=1)
        pairs = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
        return [(self.passages[i], score) for i, score in pairs if score > 0]


def _tokens(texts: list[str]) -> list[list[str]]:
    found = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
    assert isinstance(found, list)
    return found


def _sha256(passages: Sequence[Passage]) -> str:
    content = hashlib.sha256()
    for passage in passages:
        content.update(json.dumps([passage.id, passage.title, passage.text], ensure_ascii=False).encode())
    return content.hexdigest()


def _keep(engine: bm25s.BM25, place: Path, card: Mapping[str, Any]) -> None:
    """Write the index beside its place and move it there whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(mkdtemp(dir=place.parent, prefix=".bm25-"))
    try:
        engine.save(str(fresh), show_progress=False)
        (fresh / "corpus.json").write_text(json.dumps(card), encoding="utf-8")
        if place.is_dir():
            place.rmdir()
        fresh.rename(place)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
