import dataclasses
import inspect
import json
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from toy_render import HEADS, LAYERS, toy_score, toy_trace
from transformers import PreTrainedTokenizerFast

from dhlens.episode import Episode, Span
from dhlens.heads import HeadSet
from dhlens.render.texts import circuitsvis_safe
from dhlens.render.tokens import TokenView, attention_patterns, attention_to_tokens, token_texts

SHAPE = (LAYERS, HEADS)
ALL = HeadSet([(layer, head) for layer in range(LAYERS) for head in range(HEADS)], SHAPE)


def props(view: TokenView) -> dict:
    """What circuitsvis was given: the last JSON object of the fragment."""
    line = next(x for x in reversed(view.body.splitlines()) if x.strip().startswith("{"))
    return json.loads(line)


def names(n: int) -> list[str]:
    return [f" t{i}" for i in range(n)]


def shown(view: TokenView) -> dict[str, list[float]]:
    """Token text to its values, gaps left out."""
    data = props(view)
    return {t.strip(): v for t, v in zip(data["tokens"], data["values"], strict=True) if "…" not in t}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, decoded as byte-level vocabularies do, and a special one."""
    table = {f"<0x{b:02X}>": b for b in range(256)} | {"<unk>": 256}
    tokenizer = Tokenizer(models.BPE(table, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<|end|>"})
    return fast


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"▁The": 0, "▁word": 1, "s": 2, "▁": 3}, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_split_characters_are_named_with_their_parts():
    ids = [*"a你🦉b".encode(), 257]
    expected = ["a", *(f"你[{i}/3]" for i in (1, 2, 3)), *(f"🦉[{i}/4]" for i in (1, 2, 3, 4)), "b", "<|end|>"]
    assert token_texts(byte_tokenizer(), ids) == expected


def test_bytes_that_make_no_character_stand_alone():
    ids = [0xE4, ord("x"), 0x80, *"你".encode()]
    assert token_texts(byte_tokenizer(), torch.tensor(ids)) == [
        "\ufffd",
        "x",
        "\ufffd",
        "你[1/3]",
        "你[2/3]",
        "你[3/3]",
    ]


def test_leading_spaces_that_a_decoder_drops_are_kept():
    assert token_texts(sentencepiece_tokenizer(), [0, 1, 2, 3]) == [" The", " word", "s", " "]


def test_heads_are_counted_at_their_strongest_key_step_by_step():
    view = attention_to_tokens(toy_trace(), names(65), toy_score().heads())
    data, values = props(view), shown(view)
    assert data["labels"] == ["all steps", "0:t60", "1:t61", "2:t62", "3:t63", "4:t64"]
    assert len(values) == 65
    assert (
        values["t20"] == [2, 2, 0, 0, 0, 0]
        and values["t21"] == [1, 0, 1, 0, 0, 0]
        and values["t24"] == [2, 0, 0, 0, 0, 2]
    )
    assert sum(v[0] for v in values.values()) == 8


def test_rows_per_head_are_the_active_ones_by_activity():
    view = attention_to_tokens(toy_trace(), names(65), toy_score().heads(), by="head")
    assert props(view)["labels"] == ["all heads", "L1H2", "L0H1"]
    assert shown(view)["t21"] == [1, 1, 0] and shown(view)["t22"] == [2, 1, 1]
    cut = attention_to_tokens(toy_trace(), names(65), toy_score().heads(), by="head", max_rows=1)
    assert props(cut)["labels"] == ["all heads", "L1H2"] and "Rows: 1 of 2." in cut.note


def test_a_head_set_counts_at_every_step():
    view = attention_to_tokens(toy_trace(), names(65), HeadSet(["L0H1"], SHAPE))
    assert shown(view)["t0"] == [2, 0, 1, 0, 1, 0]


def test_weights_are_exact_on_the_focus_and_peaks_elsewhere():
    head = HeadSet(["L1H2"], SHAPE)
    peaks = shown(attention_to_tokens(toy_trace(), names(65), head, measure="weight"))
    assert peaks["t20"] == [0.75, 0.75, 0, 0, 0, 0] and peaks["t1"][0] == pytest.approx(5 * 0.125)
    focus = shown(attention_to_tokens(toy_trace(focus=True), names(65), head, measure="weight"))
    assert focus["t20"] == pytest.approx([5 * 0.0625, *[0.0625] * 5]), "the peak on a focus key is not counted twice"
    assert focus["t1"][0] == pytest.approx(5 * 0.125)


def test_long_contexts_are_cropped_around_the_span_and_the_note_says_what_is_hidden():
    trace = toy_trace(prompt=4000, start=3000)
    view = attention_to_tokens(trace, names(4005), ALL, margin=10, max_tokens=60)
    data = props(view)
    assert [t for t in data["tokens"] if "…" in t] == [" … 2,990 tokens … ", " … 984 tokens … "]
    assert list(shown(view)) == [f"t{i}" for i in [*range(2990, 3015), *range(3999, 4005)]]
    # 12 heads x 5 steps; 8 of the looks rest on the needle, the others on token 0
    assert f"{52 / 60:.0%} of it lies on tokens left out" in view.note
    assert len(view.body) < 1_500_000


def test_where_room_is_short_the_span_stays_in_the_middle():
    view = attention_to_tokens(toy_trace(prompt=4000, start=3000), names(4005), ALL, margin=40, max_tokens=31)
    assert list(shown(view)) == [f"t{i}" for i in [*range(2990, 3015), *range(3999, 4005)]]


def test_a_crop_never_exceeds_its_limit():
    trace = toy_trace(prompt=500, start=100, answer=200)
    tokens = props(attention_to_tokens(trace, names(700), ALL, max_tokens=120, max_rows=3))["tokens"]
    assert sum("…" not in t for t in tokens) == 120


def test_no_firing_head_is_said():
    none = torch.zeros_like(toy_score().heads())
    assert "None of these heads fires" in attention_to_tokens(toy_trace(), names(65), none).note


def test_token_text_cannot_become_markup_or_end_the_script():
    texts = ["<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "<!--", "&lt;b&gt;", *names(61)]
    view = attention_to_tokens(toy_trace(), texts, toy_score().heads())
    assert view.body.lower().count("</script") == 1 and "<img" not in view.body and "<!--" not in view.body
    assert [t.replace("\u2060", "") for t in props(view)["tokens"][:4]] == texts[:4]
    assert not any(re.search(r"<[a-z!/?]|&[a-z#]", t, re.IGNORECASE) for t in props(view)["tokens"])


def test_emitted_tokens_in_labels_are_harmless_too():
    view = attention_to_tokens(toy_trace(), [*names(60), "</script>", *names(4)], toy_score().heads())
    assert view.body.count("</script") == 1 and props(view)["labels"][1] == "0:<\u2060/script>"


UNCHECKED = inspect.unwrap(attention_to_tokens)  # without the test run's own checks of types


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"by": "layer"}, ValueError, "by must be 'step' or 'head', got 'layer'"),
        ({"measure": "sum"}, ValueError, "measure must be 'count' or 'weight', got 'sum'"),
        ({"heads": toy_score().values}, ValueError, r"shape \(5, 3, 4\), got torch.float32 of \(5, 3, 4\)"),
        ({"heads": [(1, 2)]}, TypeError, "heads must be a HeadSet, got list"),
        ({"texts": list(range(65))}, TypeError, "texts must hold texts only, got int at place 0"),
        ({"texts": "a" * 65}, TypeError, "texts must be a sequence of texts, got str"),
        ({"trace": toy_score()}, TypeError, "trace must be a Trace, got Score"),
    ],
)
def test_what_is_something_else_is_named(options, error, message):
    with pytest.raises(error, match=message):
        UNCHECKED(**({"trace": toy_trace(), "texts": names(65), "heads": ALL} | options))


def test_patterns_take_a_head_set():
    with pytest.raises(TypeError, match="heads must be a HeadSet, got list"):
        inspect.unwrap(attention_patterns)(toy_trace(rows=True), names(65), [(1, 2)])


def test_what_cannot_be_seen_is_shown_by_its_code():
    texts = ["\u202eabc", "\x1b[31m", "\u2066", "\ud800", "", "a\u200db", *names(59)]
    texts[60] = ""
    view = attention_to_tokens(toy_trace(), texts, toy_score().heads())
    assert props(view)["tokens"][:6] == ["U+202Eabc", "U+001B[31m", "U+2066", "U+D800", "∅", "a\u200db"]
    assert props(view)["labels"][1] == "0:∅"


def test_the_note_says_what_the_bounds_are():
    note = attention_to_tokens(toy_trace(), names(65), toy_score().heads()).note
    assert "Positive Bound and Negative Bound are the ends of the colour scale" in note


def test_line_breaks_are_shown():
    assert circuitsvis_safe("a\r\nb") == "a␍↵\nb"


def test_views_work_offline(tmp_path):
    view = attention_to_tokens(toy_trace(), names(65), toy_score().heads())
    page = view.save(tmp_path / "view.html").read_text(encoding="utf-8")
    assert (
        "unpkg" not in page
        and "sourceMappingURL" not in page
        and not re.search(r"<(script|img|link)[^>]* (src|href)=", page)
    )
    assert "default-src 'none'" in page and "connect-src" not in page
    assert view._repr_html_() == view.body and view.body in page
    with pytest.raises(FileExistsError, match="overwrite=True"):
        view.save(tmp_path / "view.html")


def test_patterns_put_observed_rows_at_their_position():
    trace = toy_trace(rows=True)
    data = props(attention_patterns(trace, names(65), HeadSet(["L0H1", "L1H2"], SHAPE), max_tokens=200))
    grid = torch.tensor(data["attention"])
    assert data["attentionHeadNames"] == ["L0H1", "L1H2"] and grid.shape == (2, 65, 65)
    for step in range(5):
        assert grid[1, 59 + step, 20 + step] == 0.75 and grid[1, 59 + step].sum() == pytest.approx(0.875)
    assert grid[:, :59].sum() == 0 and grid[0, 60, 0] == 0.75


def test_patterns_are_cropped():
    trace = toy_trace(prompt=2000, start=1000, rows=True)
    view = attention_patterns(trace, names(2005), HeadSet(["L1H2"], SHAPE), margin=5, max_tokens=40)
    data = props(view)
    assert data["tokens"] == [f" t{i}" for i in [*range(995, 1010), *range(1999, 2005)]]
    assert data["attention"][0][15][5] == 0.75 and "1,984 of 2,005 tokens are left out" in view.note


def test_patterns_need_captured_rows():
    with pytest.raises(ValueError, match=r"observe with Capture\(rows=True\)"):
        attention_patterns(toy_trace(), names(65), ALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episode": 3}, "episode must lie within 0..0, got 3"),
        ({"texts": names(64)}, "texts must name the 65 tokens of prompt and answer, got 64"),
        ({"heads": HeadSet([], (3, 5))}, r"heads must come from \(3, 4\) \(layers, heads\), got \(3, 5\)"),
        ({"heads": torch.zeros(2, 3, 4, dtype=torch.bool)}, r"heads must be Bool\[n layer head\] of shape \(5, 3, 4\)"),
        ({"span": "fact_9"}, "has no span 'fact_9'; it has: needle"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"margin": -1}, "margin must be at least 0, got -1"),
    ],
)
def test_refusals(options, message):
    options = {"texts": names(65), "heads": ALL} | options
    with pytest.raises(ValueError, match=message):
        attention_to_tokens(toy_trace(), options.pop("texts"), options.pop("heads"), **options)


def test_patterns_refuse_too_many_heads_and_none():
    trace = toy_trace(rows=True)
    for heads in (HeadSet([], SHAPE), ALL):
        with pytest.raises(ValueError, match=f"between 1 and 5 heads can be shown, got {len(heads)}"):
            attention_patterns(trace, names(65), heads, max_heads=5)


def test_only_the_episode_asked_for_is_shown():
    trace = toy_trace()
    other = Episode("other", trace.episodes[0].tokens, trace.episodes[0].answer, (Span("needle", 0, 2),))
    second = dataclasses.replace(trace, episodes=(other,), peak_key=torch.full_like(trace.peak_key, 7))
    both = trace.cat([trace, second])
    heads = HeadSet(["L1H2"], SHAPE)
    assert shown(attention_to_tokens(both, names(65), heads, episode=1))["t7"] == [5, 1, 1, 1, 1, 1]
    assert shown(attention_to_tokens(both, names(65), heads, episode=0))["t7"] == [0] * 6
