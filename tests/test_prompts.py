"""Prompts: text as tokens in context, and templates parted where the context goes."""

import numpy as np
import pytest
from toy_tokenizers import CHATML, byte_level, lower_case, metaspace

from dhlens.tasks.prompts import CHAT, INSTRUCTION, Prompt, check_decodes, covering, encode

QUESTION = "What is the magic word?"
BOTH = pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte", "metaspace"])


@BOTH
@pytest.mark.parametrize(
    ("text", "after"), [(" The heron – or 4.", "."), ("The heron", "\n"), ("\n\nQ", "."), ("", ".")]
)
def test_encode_reads_text_in_its_context(tokenizer, text, after):
    ids, offsets = encode(tokenizer, text, after=after)
    whole = tokenizer(after + text, add_special_tokens=False).input_ids
    assert whole[len(whole) - len(ids) :] == ids
    assert len(ids) == len(offsets)
    covered = "".join(text[a:b] for a, b in offsets if b > a)
    assert covered.replace("–", "") == text.replace("–", "")
    assert tokenizer.decode(ids).strip() == text.strip()


def test_a_token_over_the_border_makes_encode_fall_back():
    tokenizer = byte_level()
    assert len(tokenizer(" heron").input_ids) == 1
    ids, offsets = encode(tokenizer, "eron", after=" h")
    assert tokenizer.decode(ids) == "eron" and (offsets[0, 0], offsets[-1, 1]) == (0, 4)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

        def __call__(self, text, **kwargs):
            raise AssertionError("not reached")

        decode = apply_chat_template = __call__

    with pytest.raises(ValueError, match="fast tokenizer"):
        encode(Slow(), "text")


def test_covering_by_hand():
    offsets = np.array([[0, 2], [2, 3], [2, 3], [3, 7]])
    assert covering(offsets, 0, 7) == (0, 4)
    assert covering(offsets, 2, 3) == (1, 3)
    assert covering(offsets, 1, 3) == (0, 3)
    assert covering(offsets, 5, 6) == (3, 4)
    assert covering(offsets, 7, 9) == (0, 0)


def test_lost_characters_are_named():
    ids, _ = encode(byte_level(), "the word")
    check_decodes(byte_level(), ids, "e wor", "answer")
    with pytest.raises(ValueError, match="give the answer back as it is: 'The' came back as 'the word'"):
        check_decodes(byte_level(), ids, "The", "answer")


@BOTH
@pytest.mark.parametrize("template", ["chat", "plain", "Q {question} {context}", "<s>A {context} B {question}"])
def test_the_question_is_known_on_either_side(tokenizer, template):
    prompt = Prompt.of(tokenizer, template, QUESTION)
    context, _ = encode(tokenizer, " The heron.", after=".")
    span = prompt.question_span(len(context))
    tokens = prompt.head + context + prompt.tail
    assert QUESTION in tokenizer.decode(tokens[span.start : span.stop])
    assert QUESTION not in tokenizer.decode(tokens[span.start + 1 : span.stop])
    assert QUESTION not in tokenizer.decode(tokens[span.start : span.stop - 1])
    assert len(prompt) == len(tokens) - len(context)
    assert prompt.kind == (template if template in ("chat", "plain") else "own")


@BOTH
def test_the_text_behind_the_context_gets_no_space_of_the_tokenizer(tokenizer):
    context, _ = encode(tokenizer, "A heron.")
    assert tokenizer.decode(context + Prompt.of(tokenizer, "plain", QUESTION).tail) == (
        f"A heron.\n\nQuestion: {QUESTION}\nAnswer:"
    )


def test_the_chat_prompt_is_what_the_template_renders():
    tokenizer = byte_level()
    prompt = Prompt.of(tokenizer, "chat", QUESTION)
    text = tokenizer.decode(prompt.head) + "THE TEXT" + tokenizer.decode(prompt.tail)
    assert text.startswith("<|start|>system\n") and text.endswith("<|end|>\n<|start|>assistant\n")
    asked = CHAT.format(context="THE TEXT", question=QUESTION, instruction=INSTRUCTION)
    assert f"<|start|>user\n{asked}<|end|>" in text
    assert prompt.lead == ""


def test_the_instruction_is_the_last_thing_said():
    asked = Prompt.of(byte_level(), "chat", QUESTION, instruction="In {one} word.")
    assert byte_level().decode(asked.tail).endswith("Instruction:\nIn {one} word.<|end|>\n<|start|>assistant\n")


def test_a_template_without_system_turn_and_with_a_space_before_replies():
    prompt = Prompt.of(metaspace(), "chat", QUESTION)
    head = metaspace().decode(prompt.head)
    assert head.startswith("<s>") and "[INST] You are" in head
    assert metaspace().decode(prompt.tail).endswith("[/INST]")
    assert prompt.lead == " "


def test_options_reach_the_chat_template():
    tokenizer = byte_level()
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ mood }}" + CHATML
        prompt = Prompt.of(tokenizer, "chat", QUESTION, options={"mood": "calm"})
    finally:
        tokenizer.chat_template = template
    assert tokenizer.decode(prompt.head).startswith("calm<|start|>")


@pytest.mark.parametrize("template", ["chat", "plain", "{context} {question}", "<s>{context} {question}", "<s>"])
def test_bos_stands_once_where_the_tokenizer_has_the_habit(template):
    template = template if template != "<s>" else "<s>Read: {context} {question}"
    prompt = Prompt.of(metaspace(), template, QUESTION)
    bos = metaspace().bos_token_id
    assert prompt.head[0] == bos and (prompt.head + prompt.tail).count(bos) == 1


def test_no_bos_where_the_tokenizer_has_no_habit():
    prompt = Prompt.of(byte_level(), "plain", QUESTION)
    assert byte_level().bos_token_id not in prompt.head + prompt.tail
    assert prompt.head == [] and prompt.lead == " "
    assert Prompt.of(byte_level(), "{context} {question}\n", QUESTION).lead == ""


@pytest.mark.parametrize("template", ["{context}", "{question}", "{context} {context} {question}", "colour"])
def test_place_holders_stand_exactly_once(template):
    with pytest.raises(ValueError, match="once each"):
        Prompt.of(byte_level(), template, QUESTION)


def test_no_chat_template_names_the_way_out():
    with pytest.raises(ValueError, match='use template="plain"'):
        Prompt.of(lower_case(), "chat", "what?")


def test_a_question_the_tokenizer_changes_is_refused():
    with pytest.raises(ValueError, match="give the question back"):
        Prompt.of(lower_case(), "plain", QUESTION)
