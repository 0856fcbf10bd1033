"""Prompts of the paper's model families: templates of our own with the same switches, on tokenizers trained here."""

import datetime
import json

import pytest
import torch
from tiny import build
from toy_tokenizers import SPECIAL, byte_level, metaspace, prose
from typer.testing import CliRunner

from dhlens.cli import app, options
from dhlens.engine import generate, observe
from dhlens.model import load
from dhlens.tasks import niah
from dhlens.tasks.haystack import Haystack
from dhlens.tasks.prompts import SYSTEM, Prompt

QUESTION = "What is the magic word?"
LLAMA_3 = """
{{- bos_token }}
{%- if date_string is not defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "1 Jan 2025" %}{% endif %}
{%- endif %}
{%- if messages[0].role == "system" %}{% set told = messages[0].content | trim %}{% set turns = messages[1:] %}
{%- else %}{% set told = "" %}{% set turns = messages %}{% endif %}
{{- "<|start|>system\\n\\nDate: " + date_string + "\\n\\n" + told + "<|end|>" }}
{%- for m in turns %}{{- "<|start|>" + m.role + "\\n\\n" + m.content | trim + "<|end|>" }}{% endfor %}
{%- if add_generation_prompt %}{{- "<|start|>assistant\\n\\n" }}{% endif %}
"""  # noqa: E501
LLAMA_2 = """
{%- if messages[0].role == "system" %}
    {%- set told = "<<SYS>>\\n" + messages[0].content + "\\n<</SYS>>\\n\\n" %}{% set turns = messages[1:] %}
{%- else %}{% set told = "" %}{% set turns = messages %}{% endif %}
{%- for m in turns %}
    {%- if (m.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("turns must alternate") }}{% endif %}
    {%- if m.role == "user" %}{{- bos_token + "[INST] " + (told if loop.first else "") + m.content + " [/INST]" }}
    {%- else %}{{- " " + m.content | trim + " " + eos_token }}{% endif %}
{%- endfor %}
"""
QWEN_3 = """
{%- for m in messages %}
    {%- if m.role == "assistant" and loop.last %}{{- "<|start|>assistant\\n<think>\\n\\n</think>\\n\\n" + m.content + "<|end|>\\n" }}
    {%- else %}{{- "<|start|>" + m.role + "\\n" + m.content + "<|end|>\\n" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- "<think>\\n\\n</think>\\n\\n" }}{% endif %}
{%- endif %}
"""  # noqa: E501
PHI_4 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def speaking(tokenizer, template, monkeypatch):
    """The same tokenizer with another chat template, for one test."""
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return tokenizer


def rendered(tokenizer, **options):
    """The prompt around a context, as text, and how a reply begins."""
    prompt = Prompt.of(tokenizer, "chat", QUESTION, options=options)
    context = tokenizer("The heron.", add_special_tokens=False).input_ids
    return tokenizer.decode(prompt.head + context + prompt.tail), prompt


def test_llama_3_opens_once_and_writes_the_date_it_is_given(monkeypatch):
    tokenizer = speaking(byte_level(), LLAMA_3, monkeypatch)
    text, prompt = rendered(tokenizer, date_string="26 Jul 2024")
    assert text.startswith(
        f"<s><|start|>system\n\nDate: 26 Jul 2024\n\n{SYSTEM}<|end|><|start|>user\n\nContext:\nThe heron."
    )
    assert text.endswith("<|end|><|start|>assistant\n\n") and prompt.lead == ""
    assert (prompt.head + prompt.tail).count(tokenizer.bos_token_id) == 1
    today = datetime.datetime.now().strftime("%d %b %Y")
    assert f"Date: {today}\n\n" in rendered(tokenizer)[0], "without the option the prompt changes from day to day"


def test_llama_2_takes_the_system_text_into_the_first_turn(monkeypatch):
    tokenizer = speaking(metaspace(), LLAMA_2, monkeypatch)
    prompt = Prompt.of(tokenizer, "chat", QUESTION)
    head, tail = tokenizer.decode(prompt.head), tokenizer.decode(prompt.tail)
    assert head.startswith("<s>") and f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\nContext:\n" in head
    assert tail.endswith("[/INST]") and prompt.lead == " "
    assert prompt.head[0] == tokenizer.bos_token_id and (prompt.head + prompt.tail).count(tokenizer.bos_token_id) == 1


def test_qwen_3_is_told_not_to_think(monkeypatch):
    tokenizer = speaking(byte_level(), QWEN_3, monkeypatch)
    thinking, _ = rendered(tokenizer)
    silent, prompt = rendered(tokenizer, enable_thinking=False)
    assert thinking.endswith("<|end|>\n<|start|>assistant\n")
    assert silent == thinking + "<think>\n\n</think>\n\n" and prompt.lead == ""
    assert rendered(tokenizer, enable_thinking=True)[0] == thinking
    assert tokenizer.bos_token_id not in prompt.head


def test_phi_4_marks_turns_by_role(monkeypatch):
    text, prompt = rendered(speaking(byte_level(), PHI_4, monkeypatch))
    assert text.startswith(f"<|system|>{SYSTEM}<|end|><|user|>Context:\nThe heron.")
    assert text.endswith("<|end|><|assistant|>") and prompt.lead == ""


@pytest.mark.parametrize("template", [LLAMA_3, LLAMA_2, QWEN_3, PHI_4])
@pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte", "metaspace"])
def test_episodes_are_exact_under_every_family(tokenizer, template, monkeypatch):
    haystack = Haystack((("one.txt", prose(300, seed=1)),))
    tokenizer = speaking(tokenizer, template, monkeypatch)
    for e in niah.episodes(tokenizer, haystack, lengths=(400,), depths=(0.5,), n=2, seed=0, max_positions=4096):
        assert len(e.tokens) == 400
        span = e.span("needle")
        assert tokenizer.decode(e.tokens[span.start : span.stop]).strip() == e.meta["needle_text"]
        assert e.judge(tokenizer.decode(e.answer))


def test_lengths_beyond_the_window_are_refused(monkeypatch):
    tokenizer = speaking(metaspace(), LLAMA_2, monkeypatch)
    with pytest.raises(ValueError, match="length 5000 is beyond the model's 4096 positions"):
        niah.episodes(tokenizer, Haystack((("a", prose(50)),)), lengths=(1000, 5000), max_positions=4096)


def test_options_that_do_nothing_are_refused(monkeypatch):
    tokenizer = speaking(byte_level(), QWEN_3, monkeypatch)
    with pytest.raises(ValueError, match="takes no option 'enable_thinkin': misspelt"):
        Prompt.of(tokenizer, "chat", QUESTION, options={"enable_thinkin": False})
    with pytest.raises(ValueError, match=r"options are for the chat template, .* 'plain', got \['enable_thinking'\]"):
        Prompt.of(tokenizer, "plain", QUESTION, options={"enable_thinking": False})


def small(folder, tokenizer, stops):
    """A folder with a tiny model for a tokenizer, its stop tokens in the generation config."""
    hf = build("llama")
    hf.resize_token_embeddings(len(tokenizer))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for end in (hf.get_input_embeddings(), hf.get_output_embeddings()):
            end.weight.normal_(0, 0.5, generator=draw)
    hf.generation_config.eos_token_id = stops
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_replies_end_at_any_of_the_stop_tokens(tmp_path):
    tokenizer = byte_level()
    e = niah.episodes(tokenizer, Haystack((("a", prose(300)),)), lengths=(300,), depths=(0.5,), n=1, seed=0)
    free = load(small(tmp_path / "free", tokenizer, None), device="cpu")
    assert free.stop_ids == (tokenizer.eos_token_id,), "without one in the config it is the tokenizer's"
    said = generate(free, e, max_new_tokens=6, progress=False)[0].tokens.tolist()
    last = next(i for i in range(1, 6) if said[i] not in said[:i])
    model = load(small(tmp_path / "stops", tokenizer, [SPECIAL.index("<|start|>"), said[last]]), device="cpu")
    assert model.stop_ids == (SPECIAL.index("<|start|>"), said[last])
    for draft in (True, False):
        outcome = observe(model, e, max_new_tokens=6, draft=draft, progress=False).outcomes[0]
        assert outcome.tokens.tolist() == said[: last + 1] and outcome.stopped == "stop_token"


def test_the_command_line_hands_options_to_the_template(tmp_path, monkeypatch):
    tokenizer = speaking(byte_level(), QWEN_3, monkeypatch)
    folder = small(tmp_path / "qwen", tokenizer, [3])
    (tmp_path / "hay.txt").write_text(prose(400))
    given = ["scan", "--model", str(folder), "--haystack", str(tmp_path / "hay.txt"), "--lengths", "300", "--n", "2"]
    given += ["--depths", "0.5", "--max-new-tokens", "2", "--device", "cpu", "--quiet", "--out", str(tmp_path / "run")]
    asked = []
    real = niah.episodes
    monkeypatch.setattr(niah, "episodes", lambda *a, **k: asked.append(real(*a, **k)) or asked[-1])
    result = CliRunner().invoke(app, [*given, "--template-kwargs", '{"enable_thinking": false}'])
    assert result.exit_code == 0, result.output
    assert tokenizer.decode(asked[0][0].tokens).endswith("<think>\n\n</think>\n\n")
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    assert card["settings"]["windows"] == 2
    plain = real(tokenizer, tmp_path / "hay.txt", lengths=(300,), depths=(0.5,), n=2, seed=0)
    assert not torch.equal(plain[0].tokens, asked[0][0].tokens)


@pytest.mark.parametrize("text", ["enable_thinking=false", "[1]", "{'a': 1}"])
def test_the_option_is_a_json_object(text):
    with pytest.raises(ValueError, match="--template-kwargs takes a JSON object such as"):
        options.json_object("template-kwargs", text)
