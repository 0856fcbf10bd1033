"""The engine against the brute-force judge: one uncached eager pass of the plain Hugging Face model."""

import dataclasses

import pytest
import torch
from tiny import MODELS, VOCAB, build, eager, episode, tokenizer

import dhlens.engine
from dhlens.engine import generate, observe, replay
from dhlens.limits import check_episodes
from dhlens.model import load
from dhlens.reads import Capture
from dhlens.trace import Trace

LOCAL = 7
CAPTURE = Capture(k=3, sink=2, local=LOCAL, rows=True, hidden=("final", "resid_1"))


@pytest.fixture(scope="module", params=sorted(MODELS))
def pair(request):
    """A loaded tiny model and the plain model that judges it."""
    hf = build(request.param)
    return load(hf, tokenizer=tokenizer()), hf


def greedy(hf, tokens, n, stops):
    """Uncached greedy decoding."""
    said = []
    while len(said) < n and not (said and said[-1] in stops):
        logits, _, _ = eager(hf, torch.cat([tokens, torch.tensor(said, dtype=torch.long)]))
        said.append(int(logits[-1].argmax()))
    return said


def judge(trace: Trace, hf) -> None:
    """Every field of the first episode's rows equals what the eager pass says."""
    e, o = trace.episodes[0], trace.outcomes[0]
    rows = trace.position
    tokens = torch.cat([e.tokens, o.tokens])
    logits, pattern, final = eager(hf, tokens[: int(rows.max()) + 1])
    pattern = pattern[:, :, rows].permute(2, 0, 1, 3)
    width = pattern.shape[-1]
    torch.testing.assert_close(trace.rows[..., :width].float(), pattern, atol=1e-3, rtol=0)
    weight, key = pattern.sort(dim=-1, descending=True, stable=True)
    torch.testing.assert_close(trace.peak_weight, weight[..., :3], atol=1e-5, rtol=0)
    clear = (weight[..., :3] - weight[..., 1:4]).amin(-1) > 1e-5
    assert clear.float().mean() > 0.9
    assert torch.equal(trace.peak_key[clear], key[..., :3][clear])
    assert torch.equal(trace.peak_token, tokens[trace.peak_key])
    core = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, p in enumerate(rows.tolist()):
        core[i, CAPTURE.sink : max(p - LOCAL + 1, 0)] = True
    for name in ("needle", "question", "prompt", "all"):
        start, stop = (0, len(tokens)) if name == "all" else (0, len(e.tokens)) if name == "prompt" else _ends(e, name)
        at = trace.span_index(name)
        torch.testing.assert_close(trace.mass[:, at], pattern[..., start:stop].sum(-1), atol=1e-5, rtol=0)
        cored = pattern * core[:, None, None]
        torch.testing.assert_close(trace.mass_core[:, at], cored[..., start:stop].sum(-1), atol=1e-5, rtol=0)
    needle = e.span("needle")
    assert trace.focus_key[0].tolist() == list(range(needle.start, needle.stop))
    torch.testing.assert_close(trace.focus.float(), pattern[..., needle.start : needle.stop], atol=1e-3, rtol=0)
    torch.testing.assert_close(trace.hidden["final"], final[rows], atol=1e-4, rtol=0)
    logp = logits[rows].log_softmax(-1)
    torch.testing.assert_close(trace.logprob, logp.gather(1, trace.next_token[:, None])[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(trace.entropy, torch.distributions.Categorical(logits=logp).entropy(), atol=1e-4, rtol=0)
    assert torch.equal(trace.argmax, logits[rows].argmax(-1))


def _ends(e, name):
    return e.span(name).start, e.span(name).stop


@pytest.mark.parametrize("draft", [False, True, "lookup"])
def test_observe_equals_the_eager_pass(pair, draft):
    model, hf = pair
    e = episode()
    trace = observe(model, [e], max_new_tokens=12, draft=draft, capture=CAPTURE, progress=False)
    assert trace.outcomes[0].tokens.tolist() == greedy(hf, e.tokens, 12, model.stop_ids)
    assert torch.equal(trace.next_token, trace.outcomes[0].tokens)
    assert torch.equal(trace.fed[1:], trace.next_token[:-1]) and trace.fed[0] == e.tokens[-1]
    assert trace.step.tolist() == list(range(len(trace)))
    judge(trace, hf)


def test_a_right_draft_is_one_block_and_changes_nothing(pair):
    model, hf = pair
    e = episode()
    said = greedy(hf, e.tokens, 10, ())
    right = dhlens.episode.Episode(e.id, e.tokens, torch.tensor(said), e.spans, e.meta)
    plain = observe(model, [right], max_new_tokens=10, draft=False, capture=CAPTURE, progress=False)
    drafted = observe(model, [right], max_new_tokens=10, draft=True, capture=CAPTURE, progress=False)
    assert drafted.card.counts["accepted"] >= len(plain) - 1
    assert torch.equal(plain.next_token, drafted.next_token)
    torch.testing.assert_close(plain.mass, drafted.mass, atol=1e-5, rtol=0)


def test_a_half_wrong_draft_gives_the_plain_answer(pair):
    model, hf = pair
    e = episode()
    said = greedy(hf, e.tokens, 10, ())
    said[4] = (said[4] + 1) % VOCAB
    wrong = dhlens.episode.Episode(e.id, e.tokens, torch.tensor(said), e.spans, e.meta)
    trace = observe(model, [wrong], max_new_tokens=10, draft=True, capture=CAPTURE, progress=False)
    assert trace.outcomes[0].tokens.tolist() == greedy(hf, e.tokens, 10, model.stop_ids)
    judge(trace, hf)


def test_generate_and_replay_are_the_halves_of_observe(pair):
    model, _ = pair
    episodes = [episode(name="a"), episode(50, name="b", seed=1)]
    whole = observe(model, episodes, max_new_tokens=8, draft=False, progress=False)
    outcomes = generate(model, episodes, max_new_tokens=8, progress=False)
    again = replay(model, episodes, [o.tokens for o in outcomes], progress=False)
    assert [o.tokens.tolist() for o in outcomes] == [o.tokens.tolist() for o in whole.outcomes]
    torch.testing.assert_close(again.mass, whole.mass, atol=1e-6, rtol=0)
    torch.testing.assert_close(again.logprob, whole.logprob, atol=1e-5, rtol=0)


def test_prompt_rows_equal_the_eager_pass(pair):
    model, hf = pair
    trace = observe(model, [episode()], rows="question", capture=CAPTURE, progress=False)
    assert trace.step.tolist() == [-5, -4, -3, -2, -1, 0]
    assert torch.equal(trace.fed, trace.episodes[0].tokens[-6:])
    assert torch.equal(trace.next_token[:-1], trace.fed[1:])
    judge(trace, hf)


def test_long_stretches_are_read_in_blocks(pair, monkeypatch):
    model, _ = pair
    whole = observe(model, [episode()], max_new_tokens=12, draft=False, capture=CAPTURE, progress=False)
    monkeypatch.setattr(dhlens.engine, "ROWS", 5)
    parts = observe(model, [episode()], max_new_tokens=12, draft=False, capture=CAPTURE, progress=False)
    torch.testing.assert_close(parts.mass, whole.mass, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts.rows, whole.rows, atol=1e-3, rtol=0)


def test_observing_leaves_no_hook_even_after_an_exception(pair, monkeypatch):
    model, _ = pair
    points = [p for p in model.hooked.hook_dict.values()]
    mine = model.hooked.hook_dict["blocks.0.attn.hook_pattern"]
    mine.add_hook(lambda pattern, hook: None)
    before = [len(p.fwd_hooks) for p in points]

    def interrupt(*args):
        raise KeyboardInterrupt

    observe(model, [episode()], max_new_tokens=3, progress=False)
    assert [len(p.fwd_hooks) for p in points] == before
    monkeypatch.setattr(dhlens.reads, "_largest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        observe(model, [episode()], max_new_tokens=3, progress=False)
    assert [len(p.fwd_hooks) for p in points] == before
    model.hooked.reset_hooks()


def test_bad_input_is_refused_before_any_pass(pair, monkeypatch):
    model, _ = pair
    monkeypatch.setattr(type(model), "stream", lambda self: pytest.fail("a forward pass began"))
    cases = [
        ([], {}, "at least one"),
        ([episode(), episode()], {}, "unique"),
        ([episode(500)], {}, "512 positions"),
        ([episode()], {"draft": "answer"}, "draft must be"),
        ([episode()], {"rows": "fact_0"}, "no span"),
        ([episode()], {"capture": Capture(hidden=("resid_9",))}, "resid_2"),
    ]
    for episodes, options, message in cases:
        with pytest.raises(ValueError, match=message):
            observe(model, episodes, progress=False, **options)
    outside = episode()
    outside.tokens[3] = VOCAB
    with pytest.raises(ValueError, match="ids must lie in 0"):
        check_episodes(model, [outside], max_new_tokens=4)
    with pytest.raises(ValueError, match="non-empty answer"):
        replay(model, [episode()], [torch.tensor([], dtype=torch.long)], progress=False)


def test_nan_logits_are_an_error(pair):
    model, _ = pair
    weight = model.hooked.original_model.get_input_embeddings().weight
    saved = weight[5].clone()
    with torch.no_grad():
        weight[5] = float("nan")
    e = episode()
    e.tokens[:] = 5
    try:
        with pytest.raises(ValueError, match="NaN"):
            observe(model, [e], max_new_tokens=3, progress=False)
    finally:
        with torch.no_grad():
            weight[5] = saved


@pytest.mark.parametrize("length", [60, 90])
def test_longrope_is_right_on_either_side_of_its_break(length):
    hf = build("phi")
    model = load(hf, tokenizer=tokenizer())
    assert model.rope_breaks == (64,)
    side = observe(model, [episode(length - 8)], max_new_tokens=8, capture=CAPTURE, progress=False)
    judge(side, hf)


def test_an_answer_across_a_rope_break_is_refused():
    model = load(build("phi"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"64.*60 tokens.*68"):
        observe(model, [episode(60)], max_new_tokens=8, progress=False)


def test_a_replayed_answer_counts_like_the_observed_one(pair):
    model, _ = pair
    e = episode()
    said = observe(model, [e], max_new_tokens=6, progress=False).outcomes[0].tokens
    stopping = dataclasses.replace(model, stop_ids=(int(said[-1]),))
    seen = observe(stopping, [e], max_new_tokens=6, progress=False)
    again = replay(stopping, [e], [seen.outcomes[0].tokens], progress=False)
    assert torch.equal(seen.answer_rows(), again.answer_rows()) and again.outcomes[0].stopped == "stop_token"
    assert observe(model, [e], rows="question", progress=False).outcomes[0].correct is None
    with pytest.raises(ValueError, match="token ids within 0"):
        replay(model, [e], [torch.tensor([3, VOCAB])], progress=False)
