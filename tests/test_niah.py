"""Needle episodes: exact lengths, depths and spans, shared prefixes, twins, and refusals."""

import json
import re
from itertools import groupby

import pytest
import torch
from toy_tokenizers import byte_level, lower_case, metaspace, prose

from dhlens.tasks import niah
from dhlens.tasks.haystack import Haystack
from dhlens.tasks.needles import Needle

HAYSTACK = Haystack((("one.txt", prose(500, seed=1)), ("two.txt", prose(500, seed=2))))
LENGTHS, DEPTHS = (400, 700), (0, 0.1, 0.5, 0.9, 1)
SENTENCE_END = r"[.!?][\"”]?\s*\Z"
BOTH = pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte", "metaspace"])
OWN = Needle(
    "The captain hid {answer} in the garden.", "What was hidden?", lambda rng: f"{rng.randrange(10, 99)} letters"
)


def make(tokenizer, **kwargs):
    given = {"haystack": HAYSTACK, "lengths": LENGTHS, "depths": DEPTHS, "n": 3, "seed": 4}
    return niah.episodes(tokenizer, **{**given, **kwargs})


def text_of(tokenizer, episode, name):
    span = episode.span(name)
    return tokenizer.decode(episode.tokens[span.start : span.stop])


def parted(episode):
    """Head, haystack before the needle, haystack behind it, tail."""
    hay, needle = episode.span("haystack"), episode.span("needle")
    t = episode.tokens
    return t[: hay.start], t[hay.start : needle.start], t[needle.stop : hay.stop], t[hay.stop :]


@BOTH
@pytest.mark.parametrize("needle", ["uuid", "number", "words", OWN], ids=["uuid", "number", "words", "own"])
@pytest.mark.parametrize("template", ["chat", "plain", "<s>Q: {question}\n{context}\nSo:"])
def test_lengths_and_spans_are_exact(tokenizer, needle, template):
    for episode in make(tokenizer, needle=needle, template=template):
        meta = episode.meta
        assert len(episode.tokens) == meta["length"]
        assert text_of(tokenizer, episode, "needle").strip() == meta["needle_text"]
        assert meta["answer_text"] in text_of(tokenizer, episode, "answer")
        assert meta["question"] in text_of(tokenizer, episode, "question")
        needle_span, answer, hay = (episode.span(name) for name in ("needle", "answer", "haystack"))
        assert needle_span.start <= answer.start < answer.stop <= needle_span.stop
        assert hay.start <= needle_span.start and needle_span.stop <= hay.stop
        assert tokenizer.decode(episode.answer).strip() == meta["needle_text"]
        assert episode.judge(tokenizer.decode(episode.answer)) and not episode.judge("The magic word is 7.")


@BOTH
def test_the_needle_goes_back_to_the_nearest_sentence_end(tokenizer):
    for episode in make(tokenizer, depths=(0.01, 0.05, 0.3, 0.77)):
        _, before, behind, _ = parted(episode)
        asked = int(episode.meta["depth"] * (len(before) + len(behind)))
        assert episode.meta["depth_real"] == len(before) / (len(before) + len(behind))
        assert len(before) <= asked
        assert len(before) == 0 or re.search(SENTENCE_END, tokenizer.decode(before))
        assert tokenizer.decode(episode.tokens).count("\n" + episode.meta["needle_text"]) == (len(before) == 0)
        hay = torch.cat([before, behind])
        for i in range(len(before) + 1, asked + 1):
            at_end = re.search(r"[.!?][\"”]?\Z", tokenizer.decode(hay[:i]))
            assert not (at_end and tokenizer.decode(hay[: i + 3])[len(tokenizer.decode(hay[:i])) :][:1].isspace())


@BOTH
def test_depth_0_is_the_start_and_1_the_end(tokenizer):
    for episode in make(tokenizer, depths=(0, 1)):
        _, before, behind, _ = parted(episode)
        assert len(behind if episode.meta["depth"] else before) == 0
        assert episode.meta["depth_real"] == episode.meta["depth"]
        if episode.meta["depth"] == 0:
            assert re.match(
                r"\s",
                tokenizer.decode(episode.tokens[: episode.span("haystack").stop])[
                    len(tokenizer.decode(episode.tokens[: episode.span("needle").stop])) :
                ],
            )


@BOTH
def test_episodes_of_a_window_share_all_tokens_up_to_the_needle(tokenizer):
    for _, window in groupby(make(tokenizer, needles_per_cell=2), key=lambda e: e.group):
        members = list(window)
        assert len(members) == len(LENGTHS) * len(DEPTHS) * 2
        longest = torch.cat(parted(members[-1])[1:3])
        for episode in members:
            head, before, behind, tail = parted(episode)
            hay = torch.cat([before, behind])
            assert torch.equal(head, parted(members[0])[0]) and torch.equal(tail, parted(members[0])[3])
            shared = min(len(hay), len(longest))
            assert torch.equal(hay[:shared], longest[:shared])


def test_order_ids_groups_and_meta():
    made = make(byte_level(), needles_per_cell=2, depths=(0.25, 1 / 3))
    cells = ["L400-d0.25-k0", "L400-d0.25-k1", "L400-d0.333333-k0", "L400-d0.333333-k1", "L700-d0.25-k0"]
    assert [e.id for e in made[:5]] == [f"w000-{cell}" for cell in cells]
    assert len({e.id for e in made}) == len(made) == 3 * 2 * 2 * 2
    assert [e.meta["window"] for e in made] == [w for w in range(3) for _ in range(8)]
    assert len({e.group for e in made}) == 3 and all(re.fullmatch(r"(one|two)\.txt@\d+", e.group) for e in made)
    for episode in made:
        assert json.loads(json.dumps(dict(episode.meta))) == episode.meta
        assert episode.meta["haystack_sha256"] == HAYSTACK.sha256 and episode.meta["seed"] == 4


def test_every_answer_is_fresh_and_fixed_by_the_seed():
    first, again, other = (make(byte_level(), needles_per_cell=2, seed=s) for s in (4, 4, 5))
    answers = [e.meta["answer_text"] for e in first]
    assert len(set(answers)) == len(answers)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert not set(answers) & {e.meta["answer_text"] for e in other}
    fewer = {e.id: e for e in make(byte_level(), depths=(0.5,))}
    assert fewer and all(torch.equal(e.tokens, fewer[e.id].tokens) for e in first if e.id in fewer)


@BOTH
def test_the_reply_continues_the_prompt_as_the_template_writes_it(tokenizer):
    episode = make(tokenizer, n=1)[0]
    turn = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": episode.meta["needle_text"]}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False)
    whole = tokenizer(rendered, add_special_tokens=False).input_ids
    ids = episode.answer.tolist()
    assert any(whole[i : i + len(ids)] == ids for i in range(len(whole)))
    plain = make(tokenizer, n=1, template="plain")[0]
    assert tokenizer.decode(torch.cat([plain.tokens, plain.answer])).endswith(f"\nAnswer: {plain.meta['needle_text']}")


def test_an_own_reply_and_a_needle_without_answer():
    short = Needle("The captain hid {answer} here.", "What?", "bread", reply="{answer}!")
    episode = make(byte_level(), needle=short, n=1)[0]
    assert byte_level().decode(episode.answer) == "bread!" and episode.meta["needle"] == "own"
    bare = make(byte_level(), needle=Needle("It rained in the garden.", "What was the weather?"), n=1)[0]
    assert bare.judge("rain") is None and not bare.has("answer")
    with pytest.raises(ValueError, match="needs answer="):
        niah.twin(byte_level(), bare, seed=0, answer="snow")


@BOTH
@pytest.mark.parametrize("kind", ["uuid", "number", "words"])
def test_a_twin_differs_in_nothing_but_the_answer(tokenizer, kind):
    for episode in make(tokenizer, needle=kind, n=1):
        twin = niah.twin(tokenizer, episode, seed=1)
        answer = episode.span("answer")
        changed = (episode.tokens != twin.tokens).nonzero().flatten().tolist()
        assert changed and set(changed) <= set(range(answer.start, answer.stop))
        assert twin.spans == episode.spans and twin.id == f"{episode.id}=twin" and twin.group == episode.group
        old, new = episode.meta["answer_text"], twin.meta["answer_text"]
        assert new != old and new in text_of(tokenizer, twin, "answer")
        assert twin.meta["needle_text"] == episode.meta["needle_text"].replace(old, new)
        assert tokenizer.decode(twin.answer).strip() == twin.meta["needle_text"]
        same = niah.twin(tokenizer, episode, seed=1)
        assert torch.equal(same.tokens, twin.tokens) and same.meta == twin.meta
        assert not torch.equal(niah.twin(tokenizer, episode, seed=2).tokens, twin.tokens)


def test_twins_of_own_needles_take_an_answer():
    episode = make(byte_level(), needle=OWN, n=1)[0]
    old = episode.meta["answer_text"]
    new = "77 letters" if old != "77 letters" else "78 letters"
    assert niah.twin(byte_level(), episode, seed=0, answer=new).meta["answer_text"] == new
    assert niah.twin(byte_level(), episode, seed=0, answer=OWN.answer).meta["answer_text"] != old
    with pytest.raises(ValueError, match="needs answer="):
        niah.twin(byte_level(), episode, seed=0)
    for hopeless in (old, "seventy-seven yellow letters", lambda rng: old):
        with pytest.raises(ValueError, match="no other answer tried fills the token spans"):
            niah.twin(byte_level(), episode, seed=0, answer=hopeless)


def test_windows_of_a_repeated_text_are_one_group():
    small = Haystack((("small.txt", prose(12)),))
    with pytest.raises(ValueError, match=r"too short.*repeat=True"):
        make(byte_level(), haystack=small)
    made = make(byte_level(), haystack=small, repeat=True)
    assert {e.group for e in made} == {"small.txt"} and len({e.meta["window_id"] for e in made}) == 3
    assert {len(e.tokens) for e in made} == set(LENGTHS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n": 0}, "n must be positive, got 0"),
        ({"needles_per_cell": 0}, "needles_per_cell must be positive"),
        ({"lengths": ()}, "lengths must be positive, got none"),
        ({"lengths": (400, -1)}, "lengths must be positive, got 400, -1"),
        ({"lengths": (400, 400)}, "lengths must differ"),
        ({"depths": (0.5, 0.5)}, "depths must differ"),
        ({"depths": (0.5, 1.5)}, r"within 0\.\.1 .* got \(0\.5, 1\.5\)"),
        ({"depths": (-0.1,)}, r"within 0\.\.1"),
        ({"depths": (float("nan"),)}, r"within 0\.\.1"),
        ({"depths": ()}, r"within 0\.\.1"),
        ({"max_positions": 699}, "length 700 is beyond the model's 699 positions"),
        ({"needle": "uid"}, "needle must be one of"),
        ({"template": "tell me"}, "once each"),
        ({"lengths": (20,)}, "must exceed the .* tokens of template and question"),
        ({"lengths": (700, 215)}, "the needle takes .* tokens and must be shorter than the context"),
        ({"n": 99}, r"99 separate windows of \d+ tokens need \d+ tokens .* found \d+ in 2 file"),
        ({"haystack": "nowhere.txt"}, "is not there"),
        ({"haystack": Haystack((("list", "heron river " * 900),)), "n": 1}, "no sentence end found in the first"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        make(byte_level(), **settings)


def test_a_limit_that_is_met_is_no_error():
    assert make(byte_level(), max_positions=700, n=1)


def test_a_tokenizer_without_chat_template_or_capitals_is_refused():
    with pytest.raises(ValueError, match='template="plain"'):
        make(lower_case())
    with pytest.raises(ValueError, match="give the needle back"):
        make(lower_case(), template="plain", needle=Needle("the word is {answer}.", "which word?", "Heron"))


def test_the_real_tokenizer_on_a_real_book(smollm2, data):
    tokenizer = smollm2.tokenizer
    book = data / "haystack_public_domain" / "books" / "walden.txt"
    made = niah.episodes(tokenizer, book, depths=(0, 0.1, 0.5, 0.9, 1), n=8)
    assert len(made) == 80 and len({e.group for e in made}) == 8
    for episode in made:
        assert len(episode.tokens) == episode.meta["length"]
        for name in ("needle", "answer", "question"):
            text = episode.meta["question" if name == "question" else f"{name}_text"]
            assert text_of(tokenizer, episode, name).strip() == text
        twin = niah.twin(tokenizer, episode, seed=0)
        assert text_of(tokenizer, twin, "answer").strip() == twin.meta["answer_text"] != episode.meta["answer_text"]
