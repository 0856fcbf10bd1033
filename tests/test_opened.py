"""A step laid open: the block against the plain model, what the counterfactual is, and what is refused."""

import dataclasses
from typing import Any, cast

import pytest
import torch
import zoo
from tiny import MODELS, VOCAB, build, tokenizer
from toy_steps import STEP, Judge, twins
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import dhlens.opened
from dhlens.copies import block_visible
from dhlens.heads import HeadSet
from dhlens.model import load
from dhlens.nodes import Wiring
from dhlens.opened import open_steps

KINDS = {name: build for name in ("llama", "qwen3", "phi")} | dict.fromkeys(
    ("llama-3.1", "gpt-2", "pythia", "starcoder", "padded"), zoo.build
)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return load(KINDS[request.param](request.param), tokenizer=tokenizer())


@pytest.fixture(scope="module")
def llama():
    return load(build("llama"), tokenizer=tokenizer())


def test_left_alone_the_block_gives_the_clean_logits(model):
    """At every step, though the needle's rows are computed twice."""
    clean, twin = twins()
    run = torch.cat([clean.tokens, clean.answer])
    want = model.twin(run[None]).logits[0, len(clean.tokens) - 1 : -1].detach()
    steps = list(open_steps(model, clean, twin))
    assert [step.step for step in steps] == [0, 1, 2, 3, 4]
    for step in steps:
        torch.testing.assert_close(step.feed()[0], want[step.step], atol=1e-4, rtol=0)
        torch.testing.assert_close(step.feed(joins=[1, 0, 2])[:4:3], want[step.step].expand(2, -1), atol=1e-4, rtol=0)
        torch.testing.assert_close(step.feed_from(step.embeddings[0], []), want[step.step], atol=1e-4, rtol=0)
        right, other = clean.answer[step.step], twin.answer[step.step]
        assert step.metric_clean == pytest.approx(float(want[step.step, right] - want[step.step, other]), abs=1e-4)


def test_the_counterfactual_is_the_block_with_the_needle_of_the_twin():
    hf = build("llama").requires_grad_(False)
    judge = Judge(hf, *twins())
    step = next(open_steps(load(hf, tokenizer=tokenizer()), *twins(), steps=[STEP]))
    assert step.metric_twin == pytest.approx(judge.metric(judge.twin_logits), abs=1e-5)
    assert abs(step.metric_twin - step.metric_clean) > 0.01
    for i, sender in enumerate(step.wiring.senders):
        torch.testing.assert_close(step.difference[i], judge.difference(sender)[judge.rows], atol=1e-5, rtol=0)


def test_or_the_whole_run_of_the_twin(model):
    clean, twin = twins()
    rows, run = (next(open_steps(model, clean, twin, steps=[STEP], through=t)) for t in ("rows", "run"))
    tokens = torch.cat([twin.tokens, clean.answer[:STEP]])
    logits = model.twin(tokens[None]).logits[0, -1].detach()
    want = float(logits[clean.answer[STEP]] - logits[twin.answer[STEP]])
    assert run.metric_twin == pytest.approx(want, abs=1e-4) and abs(rows.metric_twin - want) > 1e-3
    assert run.metric_clean == rows.metric_clean
    torch.testing.assert_close(run.difference[:, 0], rows.difference[:, 0], atol=1e-5, rtol=0)  # nothing before it
    assert (run.difference[:, -1] - rows.difference[:, -1]).abs().max() > 1e-3


def test_steps_do_not_depend_on_their_company(llama):
    alone = next(open_steps(llama, *twins(), steps=[3]))
    together = list(open_steps(llama, *twins(), steps=[4, 0, 3]))
    assert [step.step for step in together] == [0, 3, 4]
    torch.testing.assert_close(together[1].difference, alone.difference, atol=1e-5, rtol=0)
    assert together[1].stream.length == alone.stream.length == 42
    assert alone.positions.tolist() == [*range(13, 20), 42] and alone.rows("step") == [7]


def test_metrics(llama):
    clean, twin = twins()
    right = int(clean.answer[STEP])
    logprob = next(open_steps(llama, clean, twin, steps=[STEP], metric="logprob"))
    own = next(open_steps(llama, clean, twin, steps=[STEP], metric=lambda logits: logits[..., 5] * 2))
    logits = logprob.feed()[0]
    assert logprob.metric_clean == pytest.approx(float(logits.log_softmax(-1)[right]), abs=1e-5)
    assert own.metric_clean == pytest.approx(2 * float(logits[5]), abs=1e-5)
    said = clean.answer.clone()
    said[STEP] = 50
    asked = next(open_steps(llama, clean, twin, steps=[STEP], answers=(said, twin.answer)))
    assert asked.metric_clean == pytest.approx(float(logits[50] - logits[twin.answer[STEP]]), abs=1e-5)


def test_who_sees_what_worked_by_hand():
    """Five cached rows; copies of rows 1 and 2, and the row behind them all."""
    visible = block_visible(5, torch.tensor([1, 2, 5]))
    assert visible.int().tolist() == [[1, 0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1, 1, 0], [1, 0, 0, 1, 1, 1, 1, 1]]


def test_heads_in_question(llama):
    heads = HeadSet(["L1H4", "L2H0"], llama.shape)
    step = next(open_steps(llama, *twins(), steps=[1], heads={1: heads}))
    assert torch.equal(step.asked, Wiring(3, 6, 2).into(heads)) and int(step.asked.sum()) == 6


def bad_inputs():
    clean, twin = twins()
    short = dataclasses.replace(twin, tokens=twin.tokens[1:], spans=())
    late = dataclasses.replace(clean, spans=(dataclasses.replace(clean.span("question"), name="needle"),))
    none, same = HeadSet([], (3, 6)), dataclasses.replace(clean, id="same")
    return {
        "length": ((clean, short), {}, "equal length, got 40 and 39"),
        "no head": ((clean, twin), {"steps": [1], "heads": {1: none}}, "step 1 has no heads"),
        "no step of heads": ((clean, twin), {"steps": [1], "heads": {}}, "step 1 has no heads"),
        "shape": ((clean, twin), {"steps": [1], "heads": {1: HeadSet(["L0H0"], (2, 2))}}, "model's shape"),
        "no step": ((clean, twin), {"steps": []}, "there must be a step"),
        "past the end": ((clean, twin), {"steps": [5]}, r"0\.\.4, got 5"),
        "nothing differs": ((clean, same), {}, "there must be a step"),
        "same token": ((clean, same), {"steps": [1]}, "must differ at step 1"),
        "no span": ((clean, twin), {"span": "fact"}, "no span 'fact'"),
        "late": ((late, twin), {}, "must end before the prompt's last token"),
        "words": ((clean, twin), {"through": cast(Any, "all")}, "through"),
        "metric": ((clean, twin), {"metric": cast(Any, "loss")}, "metric"),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_input_before_any_pass(llama, name, monkeypatch):
    episodes, options, message = bad_inputs()[name]
    monkeypatch.setattr(dhlens.opened, "prefill", lambda *a, **k: pytest.fail("a forward pass began"))
    with pytest.raises(Exception, match=message):
        open_steps(llama, *episodes, **options)


def test_models_without_what_it_takes(llama, monkeypatch):
    monkeypatch.setattr(dhlens.opened, "prefill", lambda *a, **k: pytest.fail("a forward pass began"))
    for name in ("mistral", "gemma3"):
        with pytest.raises(ValueError, match="sliding-window layers"):
            open_steps(load(MODELS[name](), tokenizer=tokenizer()), *twins())
    with pytest.raises(ValueError, match="a mask of their own: no 4-D"):
        open_steps(dataclasses.replace(llama, limits={"shadow_rows": "no 4-D"}), *twins())
    hf = build("llama").requires_grad_(False)
    model = load(hf, tokenizer=tokenizer())
    weight = model.hooked.blocks[0].mlp.original_component.down_proj
    monkeypatch.setattr(weight.original_component, "weight", torch.nn.Parameter(weight.weight.to(torch.int8), False))
    with pytest.raises(ValueError, match=r"gradients, which weights that are quantised \(torch.int8\) do not carry"):
        open_steps(model, *twins())
    with torch.inference_mode():
        hf = build("llama").requires_grad_(False)
        model = load(hf, tokenizer=tokenizer())
    with pytest.raises(ValueError, match="made for inference alone"):
        open_steps(model, *twins())


def test_norms_behind_attention_are_refused():
    """Gemma norms what a head puts out before it is added: there is no such thing as its part of a sum."""
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=["full_attention"] * 2,
        eos_token_id=1,
    )
    model = load(Gemma3ForCausalLM(config).eval(), tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"the input of L0\.mlp is not the sum of those before it"):
        next(open_steps(model, *twins()))
