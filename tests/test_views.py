import pytest
import tiny
import torch

import dhlens
from dhlens.episode import Span
from dhlens.masks import additive
from dhlens.prefix import prefill
from dhlens.views import check_views, first_logits, generate, hidden_in_decode, masked, prompt_view, spliced

MIDDLE = Span("context", 3, 36)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def pair(request):
    """A tiny model and the plain Hugging Face model of the same weights."""
    hf = tiny.build(request.param)
    return dhlens.load(hf, tokenizer=tiny.tokenizer(), check=False), hf.eval()


@pytest.fixture(scope="module")
def episode():
    return tiny.episode(40)


@pytest.fixture(scope="module")
def visible():
    shown = torch.ones(40, dtype=torch.bool)
    shown[5:12], shown[15:30] = False, False
    return shown


def full(model, episode):
    return next(prefill(model, [episode]))[1]


def greedy_judge(hf, tokens, positions, mask, steps):
    """Greedy tokens of the plain model under a whole [row, key] visibility, nothing cached."""
    found = []
    for _ in range(steps):
        out = hf(
            torch.tensor([tokens]), position_ids=torch.tensor([positions]), attention_mask=additive(mask, torch.float32)
        )
        found.append(int(out.logits[0, -1].argmax()))
        tokens, positions = [*tokens, found[-1]], [*positions, positions[-1] + 1]
        mask = torch.nn.functional.pad(mask, (0, 1, 0, 1))
        mask[-1] = torch.cat([mask[-2][:-1], torch.ones(1, dtype=torch.bool)])
        mask[-1, -2] = True
    return found


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def test_masked_is_a_prefill_in_which_no_row_sees_a_hidden_token(pair, episode, visible):
    model, hf = pair
    hf.set_attn_implementation("eager")
    mask = causal(40) & (visible[None] | torch.eye(40, dtype=torch.bool))
    with torch.no_grad():
        judge = hf(episode.tokens[None], attention_mask=additive(mask, torch.float32)).logits[0, -1]
        tokens = greedy_judge(hf, episode.tokens.tolist(), list(range(40)), mask, 6)
    view = masked(model, episode, visible)
    torch.testing.assert_close(first_logits(view), judge, atol=2e-5, rtol=0)
    draft = generate(model, [view], [[]], max_new_tokens=6)[0]
    assert list(draft.tokens) == tokens[: len(draft.tokens)] and (draft.stopped or len(draft.tokens) == 6)


def test_hidden_in_decode_hides_from_generated_rows_only(pair, episode, visible):
    model, hf = pair
    hf.set_attn_implementation("eager")
    mask = causal(40)
    mask[-1] &= visible
    with torch.no_grad():
        judge = hf(episode.tokens[None], attention_mask=additive(mask, torch.float32)).logits[0, -1]
        tokens = greedy_judge(hf, episode.tokens.tolist(), list(range(40)), mask, 6)
    view = hidden_in_decode(full(model, episode), episode, visible)
    torch.testing.assert_close(first_logits(view), judge, atol=2e-5, rtol=0)
    assert list(generate(model, [view], [[]], max_new_tokens=6)[0].tokens) == tokens


def test_nothing_of_a_hidden_token_is_left_under_a_mask_and_something_behind_a_clean_prefill(pair, episode, visible):
    model, _ = pair
    changed = dhlens.Episode("other", torch.where(visible, episode.tokens, episode.tokens.roll(7)), episode.answer)
    assert not torch.equal(changed.tokens, episode.tokens)
    one, other = (first_logits(masked(model, e, visible)) for e in (episode, changed))
    assert torch.equal(one, other)
    one, other = (first_logits(hidden_in_decode(full(model, e), e, visible)) for e in (episode, changed))
    assert float((one - other).abs().max()) > 1e-3


def test_everything_visible_is_the_plain_prompt(pair, episode):
    model, _ = pair
    plain = dhlens.generate(model, [episode], max_new_tokens=8, progress=False)[0].tokens.tolist()
    shown = torch.ones(40, dtype=torch.bool)
    views = [masked(model, episode, shown), hidden_in_decode(full(model, episode), episode, shown)]
    views.append(spliced(model, episode, shown, within=MIDDLE))
    for draft in generate(model, views, [[]] * 3, max_new_tokens=8):
        assert [*draft.tokens, *([1] if draft.stopped else [])] == plain


def test_spliced_is_the_prompt_of_the_visible_runs(pair, episode, visible):
    model, _ = pair
    tokens = torch.cat(
        [episode.tokens[:5], torch.tensor([7]), episode.tokens[12:15], torch.tensor([7]), episode.tokens[30:]]
    )
    plain = dhlens.generate(model, [dhlens.Episode("s", tokens, episode.answer)], max_new_tokens=8, progress=False)[0]
    head = model.stream()
    head.feed(episode.tokens[None, :3])
    for start in (None, head):
        draft = generate(
            model, [spliced(model, episode, visible, within=MIDDLE, joint=[7], head=start)], [[]], max_new_tokens=8
        )[0]
        assert list(draft.tokens) == [t for t in plain.tokens.tolist() if t not in model.stop_ids]


def test_a_shared_head_changes_nothing(pair, episode, visible):
    model, _ = pair
    head = model.stream()
    head.feed(episode.tokens[None, :4])
    logits = [first_logits(masked(model, episode, visible, head=start)) for start in (None, head)]
    torch.testing.assert_close(*logits, atol=2e-5, rtol=0)
    assert head.length == 4


def test_lanes_of_different_views_equal_their_single_runs(pair, episode, visible):
    model, _ = pair
    clean = full(model, episode)
    fewer = visible.clone()
    fewer[30:35] = False
    views = [
        masked(model, episode, visible),
        hidden_in_decode(clean, episode, fewer),
        spliced(model, episode, fewer, within=MIDDLE),
    ]
    said, room = [[], [4, 9], [3]], [5, 3, 7]
    together = generate(model, views, said, max_new_tokens=room, batch=2, read=("coded", "published"))
    for i, draft in enumerate(together):
        single = generate(model, [views[i]], [said[i]], max_new_tokens=room[i], read=("coded", "published"))[0]
        assert draft.tokens == single.tokens and draft.stopped == single.stopped
        for name in ("entropy", "attention", "alone"):
            torch.testing.assert_close(getattr(draft, name), getattr(single, name), atol=1e-5, rtol=0)
    assert clean.length == 39 and [view.stream.length for view in views] == [
        int(visible[:-1].sum()),
        *[int(fewer[:-1].sum())] * 2,
    ]


def test_what_was_said_is_fed_on(pair, episode, visible):
    model, _ = pair
    view = masked(model, episode, visible)
    whole = generate(model, [view], [[]], max_new_tokens=8)[0]
    assert len(whole.tokens) == 8, "the case needs an answer without a stop"
    rest = generate(model, [view], [whole.tokens[:3]], max_new_tokens=5)[0]
    assert whole.tokens[3:] == rest.tokens
    torch.testing.assert_close(whole.entropy[3:], rest.entropy, atol=1e-5, rtol=0)


def test_what_is_read_of_a_draft_is_the_attention_of_the_plain_model(pair, episode):
    model, hf = pair
    shown = torch.ones(40, dtype=torch.bool)
    draft = generate(model, [masked(model, episode, shown)], [[]], max_new_tokens=6, read=("coded", "published"))[0]
    tokens = torch.tensor(draft.tokens)
    logits, patterns, _ = tiny.eager(hf, torch.cat([episode.tokens, tokens]))
    torch.testing.assert_close(draft.attention, patterns[-1][:, 40:, 40:].mean(0), atol=1e-5, rtol=0)
    entropy = torch.distributions.Categorical(logits=logits[39:-1]).entropy()
    torch.testing.assert_close(draft.entropy, entropy, atol=1e-4, rtol=0)
    _, alone, _ = tiny.eager(hf, tokens)
    torch.testing.assert_close(draft.alone, alone[-1].amax(1).mean(0), atol=1e-5, rtol=0)


def test_starts_are_where_tokens_start_in_the_text(pair, episode):
    model, _ = pair
    draft = generate(model, [prompt_view(model, episode.tokens.tolist())], [[]], max_new_tokens=6)[0]
    for i, start in enumerate(draft.starts):
        assert draft.text[:start] == model.tokenizer.decode(draft.tokens[:i])


def test_models_that_cannot_be_shown_parts_are_refused():
    model = dhlens.load(tiny.build("mistral"), tokenizer=tiny.tokenizer(), check=False)
    with pytest.raises(ValueError, match=r"needs full attention, .* has sliding windows"):
        check_views(model)
