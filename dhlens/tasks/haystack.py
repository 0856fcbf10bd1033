"""Haystacks: where the text around a needle comes from, and which windows of it are used.

`read_haystack` takes a file, a folder, a Hub data set or nothing: then the prose of the language reference that every
Python carries offline (`pydoc_data.topics`, about 110,000 characters). That text differs between Python versions, so
the hash of what was read belongs into the run card.
`windows` cuts stretches of tokens that do not overlap, each beginning where a sentence begins: the independent groups
of an experiment. Every file is tokenised at most once; a megabyte takes about a second.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from dhlens.episode import Tokenizer
from dhlens.tasks.prompts import encode

SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|\Z)")

_SUFFIXES = (".txt", ".md")
_HUB = re.compile(r"hub:(?P<name>[^:]+)(?::(?P<split>[^:\[]+(?:\[[^\]]*\])?)(?::(?P<column>[^:]+))?)?")
_PROSE = re.compile(r"[“\"(]?[A-Z].*[.!?][)”\"’']*")
_NOTE = re.compile(r"(New|Added|Changed|Deprecated|Removed) (in|since) version|CPython implementation detail|See also")


@dataclass(frozen=True)
class Haystack:
    """Named texts that needles are hidden in. Give your own text as `Haystack((("mine", text),))`.

    Raises:
        ValueError: there is no text in it.
    """

    texts: tuple[tuple[str, str], ...] = field(repr=False)
    """(name, text) of every file; a window lies within one of them."""
    source: str = "given"
    """Where the texts were read."""
    sha256: str = field(init=False)
    """Hash of the texts in order: of one file in UTF-8, the hash of the file."""

    def __post_init__(self) -> None:
        filled = tuple((name, text) for name, text in self.texts if text.strip())
        if not filled:
            raise ValueError(f"haystack {self.source!r} is empty: it must hold some text")
        object.__setattr__(self, "texts", filled)
        joined = "\0".join(text for _, text in filled)
        object.__setattr__(self, "sha256", hashlib.sha256(joined.encode()).hexdigest())


def read_haystack(source: str | Path | Haystack | None = None) -> Haystack:
    """The texts of a source.

    Args:
        source: None for Python's own documentation; a text file; a folder (its .txt and .md files, sorted);
            `hub:owner/name[:split[:column]]` for a Hub data set (split "train", column "text"; its rows become one
            text, so slice a large one: `hub:owner/name:train[:500]`); or a Haystack, handed back.

    Raises:
        ValueError: nothing is there, it is empty, or it is not text.
        ImportError: a Hub data set is asked for and `datasets` is not installed.
    """
    if isinstance(source, Haystack):
        return source
    if source is None:
        return Haystack((("python-docs", "\n\n".join(_documentation())),), "pydoc_data.topics")
    if str(source).startswith("hub:"):
        return _read_hub(str(source))
    root = Path(source).expanduser()
    if root.is_dir():
        files = sorted(p for p in root.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
        return Haystack(tuple((p.relative_to(root).as_posix(), _read_text(p)) for p in files), str(source))
    if not root.is_file():
        raise ValueError(
            f"haystack must be a file, a folder or hub:owner/name, and {str(source)!r} is not there; "
            'text itself is given as Haystack((("name", text),))'
        )
    return Haystack(((root.name, _read_text(root)),), str(source))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"haystack file {str(path)!r} must be UTF-8 text: {error}") from error


def _read_hub(source: str) -> Haystack:
    match = _HUB.fullmatch(source)
    if match is None:
        raise ValueError(f"a Hub haystack reads hub:owner/name[:split[:column]], got {source!r}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"haystack {source!r} needs the package datasets: pip install datasets") from error
    column = match["column"] or "text"
    rows: Any = load_dataset(match["name"], split=match["split"] or "train")
    if column not in rows.column_names:
        raise ValueError(f"{source!r} has no column {column!r}; it has: {', '.join(rows.column_names)}")
    return Haystack(((match["name"], "\n\n".join(str(text) for text in rows[column])),), source)


def _documentation() -> Iterator[str]:
    """Paragraphs of running prose: flush left, whole sentences, nine characters in ten letters or spaces."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name].strip("\n")):
            if re.search(r"^\s", block, re.MULTILINE):
                continue
            text = _reflow(block)
            letters = sum(c.isalpha() or c == " " for c in text) / max(len(text), 1)
            prose = _PROSE.fullmatch(text) and not _NOTE.match(text) and text.count(" ") > 10
            if prose and letters >= 0.9 and text not in seen:
                seen.add(text)
                yield text


def _reflow(block: str) -> str:
    text = " ".join(block.split())
    text = re.sub(r"(?<=\w)- (?=\w)", "-", text)
    text = re.sub(r"(?<![\w*])\*(\w[\w ]*)\*(?![\w*])", r"\1", text)
    return re.sub(r" \[\d+\]", "", text)


@dataclass(frozen=True, eq=False)
class Window:
    """A stretch of one text that begins where a sentence begins."""

    id: str
    """File and character offset: "walden.txt@12345"."""
    group: str
    """The independent unit: the id; the file's name where the text was repeated, for then windows share text."""
    tokens: Int[Tensor, " width"]
    """Int[width]: its tokens."""
    breaks: ndarray
    """Token indices from 0 on at which a sentence has just ended (0 itself included), ascending."""


@dataclass(frozen=True, eq=False)
class _TokenText:
    name: str
    tokens: Int[Tensor, " n"]
    offsets: ndarray
    breaks: ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer, name: str, text: str) -> "_TokenText":
        # A line break in front: a needle at the very start is parted from the text like anywhere else.
        ids, offsets = encode(tokenizer, "\n" + text, after=".")
        offsets = offsets - 1
        ends = np.array([m.end() for m in SENTENCE_END.finditer(text)], dtype=int)
        after = np.searchsorted(offsets[:, 0], ends)
        # A token that holds the full stop and what follows it (".\n\n") is no place to part the text.
        clean = offsets[after - 1, 1] <= ends
        return cls(name, torch.tensor(ids, dtype=torch.long), offsets, np.unique([0, *after[clean]]))

    def latest_starts(self, width: int) -> list[int]:
        """The starts of as many windows as fit, each as far right as it can be."""
        starts: list[int] = []
        limit = len(self.tokens) - width
        while limit >= 0:
            starts.append(int(self.breaks[np.searchsorted(self.breaks, limit, side="right") - 1]))
            limit = starts[-1] - width
        return starts[::-1]

    def place(self, n: int, width: int, rng: np.random.Generator) -> list[int]:
        """Random starts of `n` windows at breaks, ascending, without overlap."""
        latest = self.latest_starts(width)[-n:]
        slack = len(self.tokens) - n * width
        drawn = np.sort(rng.integers(0, slack + 1, n)) + width * np.arange(n)
        starts: list[int] = []
        for wish, last in zip(drawn, latest, strict=True):
            first = starts[-1] + width if starts else 0
            starts.append(int(self.breaks[np.searchsorted(self.breaks, max(min(wish, last), first))]))
        return starts

    def window(self, start: int, width: int, repeated: bool) -> Window:
        inside = (self.breaks >= start) & (self.breaks <= start + width)
        name = f"{self.name}@{max(self.offsets[start, 0], 0)}"
        group = self.name if repeated else name
        return Window(name, group, self.tokens[start : start + width], self.breaks[inside] - start)


def windows(
    tokenizer: Tokenizer, haystack: Haystack, *, n: int, width: int, seed: int, repeat: bool = False
) -> list[Window]:
    """`n` windows of `width` tokens that do not overlap, spread evenly over the files in random order.

    Where the texts are too short, `repeat` doubles each until they suffice; the windows of a file then share text and
    therefore one group.

    Raises:
        ValueError: the texts hold fewer windows, or no sentence end on a token boundary.
    """
    rng = np.random.default_rng(seed)
    order = [int(i) for i in rng.permutation(len(haystack.texts))]
    copies = 1
    while True:
        texts, share = _spread(tokenizer, haystack, order, n=n, width=width, copies=copies)
        if share.total() == n:
            placed = [(texts[i], start) for i in sorted(share) for start in texts[i].place(share[i], width, rng)]
            return [text.window(start, width, repeated=copies > 1) for text, start in placed]
        if not any(len(text.breaks) > 1 for text in texts.values()):
            raise ValueError(f"no sentence end on a token boundary found in haystack {haystack.source!r}")
        if not repeat:
            break
        copies *= 2
    found = sum(len(text.tokens) for text in texts.values())
    raise ValueError(
        f"haystack {haystack.source!r} is too short: {n} separate windows of {width} tokens need {n * width} tokens "
        f"(and a little more, to begin at sentences), found {found} in {len(texts)} file(s), room for "
        f"{share.total()} window(s); ask for fewer or shorter ones, or repeat=True repeats the text"
    )


def _spread(
    tokenizer: Tokenizer, haystack: Haystack, order: Sequence[int], *, n: int, width: int, copies: int
) -> tuple[dict[int, _TokenText], Counter[int]]:
    """Windows per file, dealt round by round; files that are not reached are not tokenised."""
    texts: dict[int, _TokenText] = {}
    room: dict[int, int] = {}
    share: Counter[int] = Counter()
    while share.total() < n:
        before = share.total()
        for i in order:
            if share.total() == n:
                break
            if i not in texts:
                name, text = haystack.texts[i]
                texts[i] = _TokenText.of(tokenizer, name, "\n\n".join([text] * copies))
                room[i] = len(texts[i].latest_starts(width))
            share[i] += share[i] < room[i]
        if share.total() == before:
            break
    return texts, share
