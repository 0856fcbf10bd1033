"""Streams and masks: cached equals uncached through marks, rewinds and forks, on full and sliding layers."""

import pytest
import torch
from tiny import MODELS, VOCAB, WINDOW, build, tokenizer

from dhlens import hooks as sites
from dhlens.masks import shadow_masks, shadow_positions, shadow_visible
from dhlens.model import load
from dhlens.stream import attached


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request):
    return load(build(request.param), tokenizer=tokenizer())


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, VOCAB, (1, 48), generator=torch.Generator().manual_seed(1))


def whole(model, tokens, keep):
    return model.stream().feed(tokens, hooks=(), keep=keep)


@pytest.mark.parametrize("hooks", [None, ()])
@pytest.mark.parametrize("prompt", [8, 40])
def test_rewind_forgets(model, tokens, prompt, hooks):
    stream = model.stream()
    stream.feed(tokens[:, :prompt])
    mark = stream.mark()
    stream.feed(tokens.flip(1)[:, :7], hooks=hooks)
    stream.rewind(mark)
    assert stream.length == prompt
    got = stream.feed(tokens[:, prompt:], hooks=hooks, keep=4)
    torch.testing.assert_close(got, whole(model, tokens, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("keep", [0, 1, 3, 6])
def test_rewind_keeps_a_part(model, tokens, keep):
    stream = model.stream()
    stream.feed(tokens[:, :40])
    mark = stream.mark()
    stream.feed(torch.cat([tokens[:, 40 : 40 + keep], tokens[:, : 6 - keep]], dim=1), keep=6)
    stream.rewind(mark, keep=keep)
    assert stream.length == 40 + keep
    got = stream.feed(tokens[:, 40 + keep :], keep=2)
    torch.testing.assert_close(got, whole(model, tokens, 2), atol=1e-4, rtol=0)


def test_forks_are_independent(model, tokens):
    stream = model.stream()
    stream.feed(tokens[:, :30])
    before = [layer.keys.clone() for layer in stream._cache.layers]
    branch = stream.fork()
    branch.feed(tokens.flip(1)[:, :5])
    branch.rewind(stream.mark())
    branch.feed(tokens.flip(1)[:, :9])
    assert stream.length == 30 and branch.length == 39
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, stream._cache.layers, strict=True))
    torch.testing.assert_close(stream.feed(tokens[:, 30:], keep=3), whole(model, tokens, 3), atol=1e-4, rtol=0)


def test_without_a_twin_long_feeds_go_in_chunks(tokens):
    hooked = load(build("gemma3"), tokenizer=tokenizer()).hooked
    alone = load(hooked, tokenizer=tokenizer())
    assert alone.twin is None
    stream = alone.stream()
    stream._chunk = 7
    passes = []
    hooked.blocks[0].attn.hook_pattern.add_hook(lambda pattern, hook: passes.append(pattern.shape[2]))
    got = stream.feed(tokens, keep=10)
    hooked.reset_hooks()
    assert passes == [7, 7, 7, 7, 7, 3, 10]
    torch.testing.assert_close(got, whole(alone, tokens, 10), atol=1e-4, rtol=0)


def test_attached_names_a_missing_hook_and_attaches_nothing(model):
    point = model.hooked.blocks[0].attn.hook_pattern
    hooks = [(sites.pattern(0), print), ("blocks.0.attn.hook_nothing", print)]
    with pytest.raises(ValueError, match="hook_nothing"), attached(model.hooked, hooks):
        pass
    assert point.fwd_hooks == []


@pytest.mark.parametrize("cached", [0, 5, 40])
def test_shadow_rows_equal_the_rewind_loop_under_edits(model, tokens, cached):
    """Every shadow row is edited on its own; the judge rewinds and feeds one edited row at a time."""
    n_clean, sources, heads = 6, [0, 2, 5, 5], [1, 0, 3, 5]
    block = tokens[:, cached : cached + n_clean]

    def zero(row, head, layer=1):
        def edit(z, hook):
            z = z.clone()
            z[:, row, head] = 0
            return z

        return (sites.z(layer), edit)

    stream = model.stream()
    if cached:
        stream.feed(tokens[:, :cached])
    start = stream.mark()
    got = stream.feed(
        torch.cat([block, block[:, sources]], dim=1),
        hooks=[zero(n_clean + i, head) for i, head in enumerate(heads)],
        keep=n_clean + len(sources),
        positions=shadow_positions(cached, n_clean, sources),
        mask=shadow_masks(cached, n_clean, sources, windows=model.windows, dtype=torch.float32),
    )
    stream.rewind(start)
    for i, (source, head) in enumerate(zip(sources, heads, strict=True)):
        judge = stream.fork()
        if source:
            judge.feed(block[:, :source])
        want = judge.feed(block[:, source : source + 1], hooks=[zero(0, head)])
        torch.testing.assert_close(got[:, n_clean + i], want[:, 0], atol=1e-4, rtol=0)
    clean = stream.feed(block, hooks=(), keep=n_clean)
    torch.testing.assert_close(got[:, :n_clean], clean, atol=1e-4, rtol=0)
    assert not torch.allclose(got[:, n_clean], got[:, 0], atol=1e-3)


def test_shadow_visibility_by_hand():
    #        two cached keys, two clean rows, shadows of row 1 and row 0
    want = [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert shadow_visible(2, 2, [1, 0]).int().tolist() == want
    # window 2: only the key before and the row itself; the cache holds one column
    assert shadow_visible(2, 2, [1, 0], window=2).int().tolist() == [
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]
    with pytest.raises(ValueError, match="one of the 2 clean rows"):
        shadow_visible(2, 2, [2])


def test_windows_are_read_from_the_config(model):
    kinds = {"mistral": (WINDOW,) * 3, "gemma3": (WINDOW, None, WINDOW)}
    name = type(model.hooked.original_model).__name__.lower()
    want = next((v for k, v in kinds.items() if name.startswith(k)), (None,) * 3)
    assert model.windows == want
