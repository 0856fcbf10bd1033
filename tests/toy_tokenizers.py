"""Small trained tokenizers of the two kinds that models have, and prose to train them on."""

import random
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "<|start|>", "<|end|>"]
CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}"
    "{% elif m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
NAMES = "heron river miller garden winter letter doctor bridge evening village daughter captain".split()
VERBS = "watched followed remembered painted crossed forgot praised repaired".split()


def prose(sentences: int, seed: int = 0) -> str:
    """Invented sentences in paragraphs, with quotes and a character of three bytes here and there."""
    rng = random.Random(seed)
    text = ""
    for i in range(sentences):
        who, what = rng.sample(NAMES, 2)
        line = f"The {who} {rng.choice(VERBS)} the {what} for {rng.randrange(2, 90)} days"
        line += rng.choice([".", "!", "?", ", and the “old” town slept.", " — so they say.", ', or "nearly so."'])
        text += line + ("\n\n" if i % 7 == 6 else " ")
    return text.strip()


def _corpus() -> list[str]:
    codes = " ".join(f"{random.Random(i).getrandbits(64):016x}" for i in range(40))
    asked = (
        "The magic word is. What is the magic word? Context:\nQuestion:\n\nInstruction:\nAnswer from the context alone"
    )
    return [prose(400), codes, asked, "".join(map(chr, range(32, 127))) * 2 + "–\n"]


def _wrap(raw: Tokenizer, template: str | None) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="<|end|>", chat_template=template
    )


@cache
def byte_level() -> Any:
    """Of GPT's kind: spaces belong to the next word, no BOS, a chat template with a system turn."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_corpus(), trainer)
    return _wrap(raw, CHATML)


@cache
def metaspace() -> Any:
    """Of Llama-2's kind: a space of its own before every text, BOS by habit, line breaks in tokens, no system turn."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.train_from_iterator(_corpus(), trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False))
    raw.pre_tokenizer = None
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    return _wrap(raw, INST)


@cache
def lower_case() -> Any:
    """One that loses capitals, and has no chat template."""
    raw = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    raw.normalizer = normalizers.Lowercase()
    return _wrap(raw, None)
