"""Prompts with known places: a template rendered once, parted where the context goes, and text as tokens in context.

`Prompt.of` renders the tokenizer's chat template, a plain one for base models, or a text of your own; a task puts its
context tokens between `head` and `tail`. Characters map to tokens by offsets, never by searching for strings.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy import ndarray

from dhlens.episode import Span, Tokenizer

SYSTEM = "You are a helpful AI bot that answers a user's questions. Keep your replies short and direct."
CHAT = "Context:\n{context}\n\nQuestion:\n{question}\n\nInstruction:\n{instruction}"
INSTRUCTION = "Answer from the context only, with nothing from outside it. Do not repeat what you found."
PLAIN = "{context}\n\nQuestion: {question}\nAnswer:"

_CONTEXT, _QUESTION, _REPLY = "<<dhlens:context>>", "<<dhlens:question>>", "<<dhlens:reply>>"


def encode(tokenizer: Tokenizer, text: str, *, after: str = "") -> tuple[list[int], ndarray]:
    """Token ids of `text` as it reads behind `after`, and the characters each covers, [token 2], half-open.

    The context keeps SentencePiece tokenizers from putting a space of their own in front. No special tokens are added.

    Raises:
        ValueError: the tokenizer gives no character offsets (it is not a fast one).
    """
    if not getattr(tokenizer, "is_fast", True):
        raise ValueError("tasks need a fast tokenizer (one that maps tokens to characters), got a slow one")
    row = tokenizer(after + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(row["offset_mapping"], dtype=int).reshape(-1, 2) - len(after)
    if ((offsets[:, 0] < 0) & (offsets[:, 1] > 0)).any():
        return encode(tokenizer, text)
    inside = offsets[:, 0] >= 0
    return [i for i, kept in zip(row["input_ids"], inside, strict=True) if kept], offsets[inside]


def covering(offsets: ndarray, start: int, stop: int) -> tuple[int, int]:
    """The tokens, half-open, that hold any of the characters start..stop; (0, 0) where none does."""
    touching = ((offsets[:, 0] < stop) & (offsets[:, 1] > start)).nonzero()[0]
    return (int(touching[0]), int(touching[-1]) + 1) if len(touching) else (0, 0)


def check_decodes(tokenizer: Tokenizer, tokens: list[int], text: str, what: str) -> None:
    """Tokens must give back the text they stand for; the outer ones may hold characters of its neighbours.

    Raises:
        ValueError: characters are lost or changed.
    """
    decoded = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    if text not in decoded:
        raise ValueError(f"the tokenizer must give the {what} back as it is: {text!r} came back as {decoded!r}")


def told(template_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of an episode's meta that says with which options its template was rendered; empty without any."""
    return {"template_kwargs": dict(template_kwargs)} if template_kwargs else {}


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt without its context."""

    kind: str
    """"chat", "plain" or "own"."""
    head: list[int]
    """Token ids before the context; BOS as the template writes it."""
    tail: list[int]
    """Token ids behind the context."""
    question: str
    """What is asked."""
    question_at: tuple[int, int]
    """Its tokens in head + tail, half-open."""
    lead: str
    """White space that belongs in front of a reply, as this template writes replies."""

    def __len__(self) -> int:
        return len(self.head) + len(self.tail)

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        template: str,
        question: str,
        *,
        options: Mapping[str, Any] | None = None,
        instruction: str = INSTRUCTION,
    ) -> "Prompt":
        """Render `template` ("chat", "plain", or a text with {context} and {question}) and tokenise both sides once.

        `options` and `instruction` are of the chat prompt: what its template takes, and how it asks for the answer.

        Raises:
            ValueError: no chat template where one is asked for, options it does not take, a place-holder is missing or
                doubled, or the tokenizer does not give the question back.
        """
        if options and template != "chat":
            raise ValueError(f"options are for the chat template, the prompt is {template!r}, got {sorted(options)}")
        if template == "chat":
            text, lead = _render_chat(tokenizer, options or {}, instruction)
        else:
            text, lead = _render_text(tokenizer, PLAIN if template == "plain" else template)
        if text.count(_CONTEXT) != 1 or text.count(_QUESTION) != 1:
            raise ValueError("the tokenizer's chat template must show the user's turn once, as it was given")
        before, behind = text.split(_CONTEXT)
        head, head_offsets = encode(tokenizer, before.replace(_QUESTION, question))
        tail, tail_offsets = encode(tokenizer, behind.replace(_QUESTION, question), after=".")
        if _QUESTION in before:
            shift, offsets, start = 0, head_offsets, before.index(_QUESTION)
        else:
            shift, offsets, start = len(head), tail_offsets, behind.index(_QUESTION)
        first, stop = (i + shift for i in covering(offsets, start, start + len(question)))
        check_decodes(tokenizer, (head + tail)[first:stop], question, "question")
        return cls(template if template in ("chat", "plain") else "own", head, tail, question, (first, stop), lead)

    def question_span(self, context: int) -> Span:
        """Where the question stands behind or before a context of `context` tokens."""
        first, stop = self.question_at
        shift = context if first >= len(self.head) else 0
        return Span("question", first + shift, stop + shift)


def _render_chat(tokenizer: Tokenizer, options: Mapping[str, Any], instruction: str) -> tuple[str, str]:
    """The marked chat prompt and the white space that the template writes in front of a reply."""
    written = getattr(tokenizer, "chat_template", None)
    if written is None:
        raise ValueError(
            'the tokenizer has no chat template: use template="plain", or a text with {context} and {question}'
        )

    unused = [name for name in options if not re.search(rf"\b{re.escape(name)}\b", str(written))]
    if unused:
        raise ValueError(f"the tokenizer's chat template takes no option {', '.join(map(repr, unused))}: misspelt?")

    def render(turns: list[dict[str, str]], ask: bool) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask, **options)

    user = CHAT.format(context=_CONTEXT, question=_QUESTION, instruction=instruction)
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    try:
        text = render(turns, True)
    except TemplateError:
        # Some templates refuse a system turn.
        turns = [{"role": "user", "content": f"{SYSTEM}\n\n{user}"}]
        text = render(turns, True)
    answered = render([*turns, {"role": "assistant", "content": _REPLY}], False)
    lead = answered[len(text) :].partition(_REPLY)[0] if answered.startswith(text) else ""
    return text, lead if lead.isspace() else ""


def _render_text(tokenizer: Tokenizer, template: str) -> tuple[str, str]:
    """A template as marked text, BOS in front where the tokenizer has the habit, and the white space before a reply."""
    if template.count("{context}") != 1 or template.count("{question}") != 1:
        raise ValueError(
            f'template must be "chat", "plain" or a text with {{context}} and {{question}} once each, got {template!r}'
        )
    text = template.replace("{context}", _CONTEXT).replace("{question}", _QUESTION)
    bos = getattr(tokenizer, "bos_token", None)
    if bos and tokenizer("a")["input_ids"][:1] == [getattr(tokenizer, "bos_token_id", None)]:
        text = text if text.startswith(bos) else bos + text
    return text, "" if text[-1].isspace() else " "
