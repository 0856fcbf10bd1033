"""Every kind of model under every law; what is limited or refused; and the page that says so."""

import re
from functools import cache

import pytest
import torch
from laws import ANSWER, LAWS, ONLY, PROMPT, Case, eager, fed, half
from supported import PAGE, page
from tiny import VOCAB, episode, tokenizer
from zoo import BREAK, FALLING_SHORT, KINDS, PADDING, build

from dhlens import hooks as sites
from dhlens.edits import hide, uniform, zero
from dhlens.engine import observe
from dhlens.heads import HeadSet
from dhlens.lanes import Lane, decode
from dhlens.limits import check_edit_on, check_episodes
from dhlens.model import load
from dhlens.policies import Static
from dhlens.shadow import effects

case = cache(Case)


@pytest.mark.parametrize(("name", "law"), [(n, law) for n in KINDS for law in LAWS if n in ONLY.get(law, KINDS)])
def test_cell(name, law):
    LAWS[law](case(name))


def test_only_those_have_windows_and_rope_breaks():
    assert {n for n in KINDS if any(case(n).model.windows)} == set(ONLY["window"])
    assert {n for n in KINDS if case(n).model.rope_breaks} == {"phi-4-mini", "phi-4-mini, long"}
    assert {n for n in KINDS if case(n).model.limits} == set()


def test_the_page_is_what_the_matrix_says():
    assert PAGE.read_text() == page(), "stale: make supported-models"


def test_heads_are_query_heads_whatever_they_share():
    heads = {n: (case(n).model.n_heads, case(n).model.n_kv_heads) for n in KINDS}
    assert heads["llama-3.1"] == heads["qwen3"] == (8, 2) and heads["llama-3.2"] == heads["phi-4-mini"] == (6, 2)
    assert heads["llama-2"] == (10, 10) and heads["gemma-3"] == (4, 1) and heads["starcoder"] == (6, 1)


def test_ties_in_bfloat16_are_counted_and_decoded_singly():
    hf = build("llama-3.1").bfloat16()
    e = episode(PROMPT)
    first = int(eager(hf, e.tokens)[0][-1].argmax())
    with torch.no_grad():
        hf.lm_head.weight[(first + 1) % VOCAB] = hf.lm_head.weight[first]
    trace = half(load(hf, tokenizer=tokenizer()), type(e)(e.id, e.tokens, torch.tensor([first]), e.spans, e.meta))
    assert trace.card.counts["low_margin"] >= 1
    assert int(trace.next_token[0]) in (first, (first + 1) % VOCAB)


def test_an_embedding_longer_than_the_vocabulary():
    model = case("padded").model
    assert model.hooked.cfg.d_vocab == VOCAB + PADDING and len(model.tokenizer) == VOCAB
    hf = build("padded")
    with torch.no_grad():  # a model that says what its tokenizer does not know
        hf.lm_head.weight[VOCAB + 5] = 40 * hf.lm_head.weight[VOCAB + 5]
    odd = load(hf, tokenizer=tokenizer())
    said = observe(odd, [episode(PROMPT, seed=i, name=f"e{i}") for i in range(3)], max_new_tokens=4, progress=False)
    assert bool((said.next_token == VOCAB + 5).any())
    assert all(isinstance(o.text, str) for o in said.outcomes)


def test_a_prompt_and_answer_beyond_the_positions_are_refused():
    model = case("llama-2").model
    assert model.max_positions == 4096
    check_episodes(model, [episode(4048)], max_new_tokens=48)
    with pytest.raises(ValueError, match="4049 prompt tokens and 48 new ones exceed the model's 4096 positions"):
        check_episodes(model, [episode(4049)], max_new_tokens=48)


def test_phi_has_no_rotated_hooks_and_is_never_fed_in_chunks():
    model = case("phi-4-mini").model
    fired = []
    for name in ("llama-3.1", "phi-4-mini"):
        rotated = ("blocks.0.attn.hook_rot_q", lambda x, hook, name=name: fired.append(name))
        case(name).model.stream().feed(episode(20).tokens[None], hooks=[rotated])
    assert fired == ["llama-3.1"]
    # why: chunks below the break take the short factors, the whole prompt the long ones
    tokens = episode(BREAK + 16).tokens[None]
    whole, chunked = model.stream(), model.stream()
    chunked.feed(tokens[:, :40], hooks=())
    gap = (chunked.feed(tokens[:, 40:], hooks=()) - whole.feed(tokens, hooks=())).abs().max()
    assert gap > 0.1
    alone = load(model.hooked, tokenizer=model.tokenizer)
    passes = []
    point = model.hooked.blocks[0].attn.hook_pattern
    point.add_hook(lambda pattern, hook: passes.append(pattern.shape[2]))
    long = episode(300)
    observe(alone, [long], max_new_tokens=1, draft=False, progress=False)
    point.remove_hooks()
    assert passes[0] == 299 and fed(model, [long]) == 299


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt-oss", r"rows of blocks.0.attn.hook_pattern do not sum to 1; observe is refused"),
        ("Mamba", r"has no usable attention hooks: missing hook_pattern"),
    ],
)
def test_what_is_refused_at_load(name, reason):
    with pytest.raises(ValueError, match=f"{type(FALLING_SHORT[name]()).__name__}.*{reason}"):
        load(build(name), tokenizer=tokenizer())


@pytest.mark.parametrize("name", ["OPT", "GPT-J"])
def test_edits_of_scores_are_refused_where_they_do_nothing(name):
    model, e = load(build(name), tokenizer=tokenizer()), episode(PROMPT)
    reason = f"-inf in {sites.scores(0)} leaves mass .* are refused"
    heads = HeadSet(["L1H2"], model.shape)
    answer = observe(model, [e], max_new_tokens=ANSWER, progress=False).next_token
    for edit in (uniform(), hide([20])):
        with pytest.raises(ValueError, match=reason):
            effects(model, e, answer, [(0, heads)], edit=edit)
        with pytest.raises(ValueError, match=reason):
            decode(model, [e], {"x": Lane(Static(heads), edit)}, progress=False)
    check_edit_on(model, zero())
    assert float(effects(model, e, answer, [(0, heads)]).kl) > 0


@pytest.mark.parametrize(("name", "limit"), [("Bloom", "shadow rows"), ("Gemma 2", None)])
def test_slower_but_the_same(name, limit):
    hf = build(name)
    model, e = load(hf, tokenizer=tokenizer()), episode(PROMPT)
    assert (model.twin is None) == (name == "Gemma 2") and (not limit or re.search(limit, model.limits["shadow_rows"]))
    trace = observe(model, [e], max_new_tokens=ANSWER, draft=False, progress=False)
    hf.set_attn_implementation("eager")
    logits, pattern, _ = eager(hf, torch.cat([e.tokens, trace.next_token[:-1]]))
    assert trace.next_token.tolist() == logits[trace.position].argmax(-1).tolist()
    heaviest = pattern[:, :, trace.position].amax(-1).permute(2, 0, 1)
    torch.testing.assert_close(trace.peak_weight[..., 0], heaviest, atol=1e-4, rtol=0)
    kl = effects(model, e, trace.next_token, [(1, HeadSet(["L1H2"], model.shape))]).kl
    assert float(kl) > 0
