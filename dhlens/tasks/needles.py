"""Needles: facts to hide in a text, the built-in ones and your own, and a needle as tokens with its answer's place."""

import random
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dhlens.episode import Span, Tokenizer
from dhlens.tasks.prompts import check_decodes, covering, encode

Answer = str | Callable[[random.Random], str]

SLOT = "{answer}"
_WORDS = (
    "apple anchor basket bridge butter button candle carpet castle copper cotton desert dinner dragon engine feather "
    "finger flower forest garden ginger guitar hammer harbor honey island jacket kettle ladder lemon letter marble "
    "market mirror monkey mountain needle orange paper pepper pillow planet pocket rabbit ribbon river rocket saddle "
    "silver spider spring summer table temple thunder ticket tiger turtle valley velvet violin window winter yellow"
).split()


@dataclass(frozen=True)
class Needle:
    """A fact to hide, the question that asks for it, and the reply that is right.

    Raises:
        ValueError: sentence or question is empty, or the place of the answer in the sentence is not clear.
    """

    sentence: str
    """What is hidden, with {answer} once where the answer stands."""
    question: str
    """What the model is asked."""
    answer: Answer | None = None
    """A text; a function of a `random.Random`, called afresh for each episode; or None: then the sentence holds no
    {answer}, episodes have no span "answer", and replies are not judged."""
    reply: str | None = None
    """The whole reply that is right, {answer} filled in; None for the sentence itself."""
    kind: str = "own"
    """Its name in the episodes' meta."""

    def __post_init__(self) -> None:
        for name in ("sentence", "question"):
            text = getattr(self, name)
            if not text or text != text.strip():
                raise ValueError(f"a needle's {name} must be text without white space around it, got {text!r}")
        slots = 0 if self.answer is None else 1
        if self.sentence.count(SLOT) != slots:
            given = "without an answer" if self.answer is None else "with an answer"
            raise ValueError(f"a needle {given} must hold {SLOT} {slots} times in its sentence, got {self.sentence!r}")
        if self.answer is None and SLOT in (self.reply or ""):
            raise ValueError(f"a needle without an answer must not hold {SLOT} in its reply, got {self.reply!r}")


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _words(rng: random.Random) -> str:
    return " ".join(rng.sample(_WORDS, 4))


NEEDLES: Mapping[str, Needle] = {
    "uuid": Needle("The magic word is {answer}.", "What is the magic word?", _uuid, kind="uuid"),
    "number": Needle("The secret number is {answer}.", "What is the secret number?", _number, kind="number"),
    "words": Needle("The four secret words are {answer}.", "What are the four secret words?", _words, kind="words"),
}
"""The built-in needles; "uuid" is the paper's."""


def needle_called(needle: str | Needle) -> Needle:
    """A built-in needle by its name, or the one given.

    Raises:
        ValueError: no built-in needle is called so.
    """
    if isinstance(needle, Needle):
        return needle
    if needle not in NEEDLES:
        raise ValueError(f"needle must be one of {', '.join(NEEDLES)}, or a Needle, got {needle!r}")
    return NEEDLES[needle]


@dataclass(frozen=True)
class Placed:
    """A needle with its answer filled in, as tokens."""

    text: str
    """What it says."""
    tokens: list[int]
    """Its token ids, the space in front included."""
    answer_at: tuple[int, int] | None
    """The tokens of the answer, half-open; None for a needle without one."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, sentence: str, answer: str | None, *, opens: bool) -> "Placed":
        """The needle at the place it takes.

        Args:
            tokenizer: a fast one.
            sentence: as in `Needle`.
            answer: what fills it.
            opens: whether it opens the context; elsewhere a space parts it from the sentence before.

        Raises:
            ValueError: the answer is empty, or the tokenizer loses characters of needle or answer.
        """
        if answer is not None and not answer.strip():
            raise ValueError(f"a needle's answer must hold some text, got {answer!r}")
        text = fill(sentence, answer)
        ids, offsets = encode(tokenizer, text, after="\n") if opens else encode(tokenizer, f" {text}", after=".")
        check_decodes(tokenizer, ids, text, "needle")
        if answer is None:
            return cls(text, ids, None)
        start = sentence.index(SLOT) + (not opens)
        at = covering(offsets, start, start + len(answer))
        check_decodes(tokenizer, ids[at[0] : at[1]], answer, "answer")
        return cls(text, ids, at)

    def spans(self, start: int) -> tuple[Span, ...]:
        """Needle and answer where the needle begins at `start`."""
        needle = Span("needle", start, start + len(self.tokens))
        return (needle,) if self.answer_at is None else (needle, Span("answer", *(start + i for i in self.answer_at)))


def fill(text: str, answer: str | None) -> str:
    """`text` with the answer in its slot."""
    return text if answer is None else text.replace(SLOT, answer)
