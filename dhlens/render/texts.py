"""The text of single tokens, for people and pages: split characters named, special tokens shown, markup harmless.

A tokenizer's `decode` of one id loses the leading space (sentencepiece) and gives U+FFFD for a piece of a character
(byte-level vocabularies). `token_texts` mends both and needs nothing but `decode`: twice for each different token.
"""

import re
from collections.abc import Callable, Sequence

from jaxtyping import Int
from torch import Tensor

from dhlens.episode import Tokenizer

_WORD_JOINER = "\u2060"
_SPLIT = "\ufffd"
_MAX_PIECES = 8


def token_texts(tokenizer: Tokenizer, ids: Int[Tensor, " n"] | Sequence[int]) -> list[str]:
    """One text per token, special tokens and leading spaces included.

    Tokens that share a character (Chinese or emoji in a byte-level vocabulary) each show that character with their
    part: `你[1/2]`, `你[2/2]`.
    """

    def decode(run: list[int]) -> str:
        return tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    numbers = [int(i) for i in ids]
    alone = {i: _alone(decode, i) for i in set(numbers)}
    texts: list[str] = []
    while len(texts) < len(numbers):
        start = len(texts)
        length = _run_length(decode, numbers[start : start + _MAX_PIECES], alone)
        if length == 1:
            texts.append(alone[numbers[start]])
        else:
            whole = decode(numbers[start : start + length])
            texts += [f"{whole}[{part + 1}/{length}]" for part in range(length)]
    return texts


def _alone(decode: Callable[[list[int]], str], token: int) -> str:
    # sentencepiece drops the leading space of the first token only: the second of two shows it
    single = decode([token])
    return single if _SPLIT in single else decode([token, token]).removeprefix(single) or single


def _run_length(decode: Callable[[list[int]], str], ids: list[int], alone: dict[int, str]) -> int:
    """How many tokens from the first make whole characters; 1 where none do."""
    for n, token in enumerate(ids, start=1):
        if _SPLIT not in alone[token]:
            return 1
        if n > 1 and _SPLIT not in decode(ids[:n]):
            return n
    return 1


def circuitsvis_safe(text: str) -> str:
    """`text` for circuitsvis, which writes tokens as raw HTML inside a script: no tag, entity or script end can form.

    An invisible word joiner behind `<` and `&` shows the character in HTML and in tooltips alike, where an entity would
    show as itself in one of the two.
    """
    return re.sub("[<&]", lambda m: m[0] + _WORD_JOINER, text.replace("\r", "␍").replace("\n", "↵\n"))
