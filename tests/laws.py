"""The laws of the matrix: what must hold on every kind of model, each against a slow judge.

A law takes a `Case` and asserts. The first line of its docstring stands in `docs/supported-models.md`.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest import mock

import pytest
import torch
from tiny import VOCAB, WINDOW, eager, episode, tokenizer
from zoo import BREAK, build, without

import dhlens.prefix
from dhlens import hooks as sites
from dhlens.edits import zero
from dhlens.engine import generate, observe, replay
from dhlens.heads import HeadSet
from dhlens.lanes import decode
from dhlens.model import load
from dhlens.policies import Dynamic, Static
from dhlens.prefix import prefill
from dhlens.reads import Capture
from dhlens.scores import reasoning_mass
from dhlens.shadow import effects

PROMPT, ANSWER = 40, 5
CAPTURE = Capture(k=2, sink=1, local=2)
LOOKING = Dynamic(score=lambda trace: reasoning_mass(trace, "question"), threshold=0.2)


@dataclass(frozen=True)
class Case:
    """A loaded model of one kind, and the plain Hugging Face model that judges it."""

    name: str

    @cached_property
    def hf(self) -> Any:
        return build(self.name)

    @cached_property
    def model(self) -> Any:
        return load(self.hf, tokenizer=tokenizer())

    @cached_property
    def some(self) -> HeadSet:
        """A few heads, in every layer."""
        n = self.model.n_heads
        return HeadSet([(0, 1), (1, 0), (1, n - 1), (2, n // 2)], self.model.shape)

    def see(self, episodes: Any, **options: Any) -> Any:
        settings = {"max_new_tokens": ANSWER, "draft": False, "capture": CAPTURE, "progress": False, **options}
        return observe(self.model, episodes, **settings)

    def lanes(self, lanes: Any, **options: Any) -> Any:
        return decode(
            self.model, [episode(PROMPT)], lanes, max_new_tokens=ANSWER, capture=CAPTURE, progress=False, **options
        )


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0, equal_nan=True)


def alike(a: Any, b: Any, atol: float = 1e-4) -> None:
    """Two traces say the same."""
    assert torch.equal(a.next_token, b.next_token)
    for name in ("mass", "mass_core", "peak_weight", "logprob", "entropy"):
        close(getattr(a, name), getattr(b, name), atol)


def greedy(hf: Any, tokens: torch.Tensor, n: int = ANSWER, stops: tuple[int, ...] = ()) -> list[int]:
    """Greedy decoding without any cache."""
    said: list[int] = []
    while len(said) < n and not (said and said[-1] in stops):
        said.append(int(eager(hf, torch.cat([tokens, torch.tensor(said, dtype=torch.long)]))[0][-1].argmax()))
    return said


def twin(case: Case) -> None:
    """Logits of the twin and of the hooked model, every attention row and the last hidden state are those of plain Hugging Face."""  # noqa: E501
    tokens = torch.randint(3, VOCAB, (PROMPT,), generator=torch.Generator().manual_seed(1))
    logits, pattern, hidden = eager(case.hf, tokens)
    seen: dict[str, torch.Tensor] = {}
    reading = [
        (name, lambda x, hook, name=name: seen.__setitem__(name, x[0]))
        for name in [*map(sites.pattern, range(case.model.n_layers)), sites.final()]
    ]
    close(case.model.stream().feed(tokens[None], hooks=reading, keep=PROMPT)[0], logits)
    assert case.model.twin is not None
    close(case.model.stream().feed(tokens[None], keep=PROMPT)[0], logits)
    close(torch.stack([seen[sites.pattern(layer)] for layer in range(case.model.n_layers)]), pattern)
    close(seen[sites.final()], hidden)


def replayed(case: Case) -> None:
    """Generated fast and replayed in one block, decoded step by step, and computed without any cache: one answer, one attention, one state."""  # noqa: E501
    e = episode(PROMPT)
    seen = case.see([e])
    said = greedy(case.hf, e.tokens, stops=case.model.stop_ids)
    assert seen.next_token.tolist() == said
    alike(seen, case.lanes({"none": None})["none"])
    alike(seen, case.see([e], draft="lookup"))
    logits, pattern, hidden = eager(case.hf, torch.cat([e.tokens, torch.tensor(said[:-1], dtype=torch.long)]))
    rows = seen.position
    close(seen.peak_weight[..., 0], pattern[:, :, rows].amax(-1).permute(2, 0, 1))
    close(seen.hidden["final"], hidden[rows])
    close(seen.logprob, logits[rows].log_softmax(-1)[range(len(said)), said])


def zeroed(case: Case) -> None:
    """Zeroed heads are dead input columns of the plain model's output projection: in a whole pass, and while answering."""  # noqa: E501
    dead = without(case.name, case.some)
    tokens = episode(PROMPT).tokens
    got = case.model.stream().feed(tokens[None], hooks=zero()(case.some), keep=PROMPT)[0]
    want = eager(dead, tokens)[0]
    close(got, want)
    assert not torch.allclose(want, eager(case.hf, tokens)[0], atol=1e-2)
    lane = case.lanes({"dead": Static(case.some)}, prompt=True)["dead"]
    assert lane.next_token.tolist() == greedy(dead, tokens, stops=case.model.stop_ids)


def reached(case: Case) -> None:
    """What is written to queries, keys, values, head outputs and the residual stream reaches the logits."""
    tokens = episode(PROMPT).tokens[None]
    plain = case.model.stream().feed(tokens, hooks=(), keep=PROMPT)
    for site in (sites.q, sites.k, sites.v, sites.z, sites.resid_pre, sites.resid):
        nothing = (site(1), lambda x, hook: torch.zeros_like(x))
        assert not torch.allclose(case.model.stream().feed(tokens, hooks=[nothing], keep=PROMPT), plain, atol=1e-2)


def shadows(case: Case) -> None:
    """Effects of many head sets in one pass of shadow rows are those of rewinding and feeding one edited row at a time."""  # noqa: E501
    assert "shadow_rows" not in case.model.limits
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(10, *case.model.shape, generator=generator) < 0.2
    sets = [(int(torch.randint(0, ANSWER, (1,), generator=generator)), HeadSet.from_mask(d)) for d in draw]
    e = episode(PROMPT)
    said = generate(case.model, [e], max_new_tokens=ANSWER, progress=False)[0].tokens
    sets = [(min(step, len(said) - 1), heads) for step, heads in sets]
    fast = effects(case.model, e, said, sets, rows=4)
    with mock.patch.dict(case.model.limits, {"shadow_rows": "for the judge's sake"}):
        slow = effects(case.model, e, said, sets)
    for name in ("logit", "logprob", "logprob_clean", "kl"):
        close(getattr(fast, name), getattr(slow, name), 2e-4)
    assert bool((fast.kl > 1e-3).any())


def lanes(case: Case) -> None:
    """Policies that run as lanes of one batch do what each does alone."""
    chosen = {"dynamic": LOOKING, "static": Static(case.some), "none": None}
    together = case.lanes(chosen)
    for name, policy in chosen.items():
        alone = case.lanes({name: policy})[name]
        alike(alone, together[name])
        assert torch.equal(alone.heads_used, together[name].heads_used)
    assert bool(together["dynamic"].heads_used.any())


def shared(case: Case) -> None:
    """A beginning that prompts share is fed once, and nothing changes by it."""
    base = episode(PROMPT).tokens[:30]
    family = [episode(PROMPT + 4 * i, name=f"e{i}", seed=i, prefix=base) for i in range(3)]
    with mock.patch.object(dhlens.prefix, "SHORTEST_SHARE", 8):
        assert fed(case.model, family) == 30 + sum(len(e.tokens) - 1 - 30 for e in family)
        together = case.see(family)
    alike(together, case.see(family, share=False))


def fed(model: Any, episodes: Any) -> int:
    """How many tokens run through the twin until every prompt has its stream."""
    count = [0]
    handle = model.twin.get_input_embeddings().register_forward_hook(
        lambda module, args, out: count.__setitem__(0, count[0] + args[0].shape[1])
    )
    for _ in prefill(model, episodes):
        pass
    handle.remove()
    return count[0]


def window(case: Case) -> None:
    """Rows of sliding layers see nothing beyond their window, in a context that is longer, and keep absolute positions."""  # noqa: E501
    assert WINDOW in case.model.windows
    e = episode(PROMPT + 10)
    seen = case.see([e])
    needle, sliding = e.span("needle"), [w is not None for w in case.model.windows]
    assert needle.stop <= len(e.tokens) - WINDOW
    at = seen.span_index("needle")
    assert float(seen.mass[:, at][:, sliding].max()) == 0
    first = seen.position[:, None, None, None] - WINDOW + 1
    assert bool((seen.peak_key[:, sliding] >= first).all()) and bool((seen.peak_key >= 0).all())
    full = [not s for s in sliding]
    if any(full):
        assert float(seen.mass[:, at][:, full].min()) > 0
        assert bool((seen.peak_key[:, full] < first).any())


def rope_break(case: Case) -> None:
    """An answer across the rope break is refused with both numbers, before any pass; no shared beginning crosses it."""
    assert case.model.rope_breaks == (BREAK,)
    e, answer = episode(BREAK - 4), torch.arange(3, 11)
    some = [(0, case.some)]
    refused: list[Callable[[], Any]] = [
        lambda: case.see([e], max_new_tokens=8),
        lambda: generate(case.model, [e], max_new_tokens=8, progress=False),
        lambda: replay(case.model, [e], [answer], progress=False),
        lambda: decode(case.model, [e], {"none": None}, max_new_tokens=8, progress=False),
        lambda: effects(case.model, e, answer, some),
    ]
    with mock.patch.object(type(case.model), "stream", lambda self: pytest.fail("a pass began")):
        for run in refused:
            with pytest.raises(ValueError, match=rf"change at length {BREAK}.* 60 tokens .* 68"):
                run()
    base = episode(PROMPT).tokens
    beyond = [episode(BREAK + 10, name=f"e{i}", seed=i, prefix=base) for i in range(2)]
    with mock.patch.object(dhlens.prefix, "SHORTEST_SHARE", 8):
        assert fed(case.model, beyond) == 2 * (BREAK + 9)
    for e in beyond:
        assert case.see([e]).next_token.tolist() == greedy(case.hf, e.tokens, stops=case.model.stop_ids)


def bfloat16(case: Case) -> None:
    """In bfloat16 the answer, drafted or not, is the plain model's as far as margins decide it; sums stay float32."""
    hf = copy.deepcopy(case.hf).bfloat16()
    model = load(hf, tokenizer=tokenizer())
    decided = 0
    for seed in range(4):
        e = episode(PROMPT, seed=seed)
        plain = half(model, e)
        said = plain.next_token
        drafted = half(model, dataclasses.replace(e, answer=said))
        top = eager(hf, torch.cat([e.tokens, said[:-1]]))[0][PROMPT - 1 :].float().topk(2)
        clear = (top.values[:, 0] - top.values[:, 1] > 2 * model.tie).int().cumprod(0).bool()
        decided += int(clear.sum())
        for trace in (plain, drafted):
            assert torch.equal(trace.next_token[: len(said)][clear], top.indices[:, 0][clear])
        assert drafted.card.counts.get("accepted", 0) >= int(clear.sum()) - 1
        assert plain.card.counts["mismatch"] <= int((~clear).sum())
        assert plain.mass.dtype == torch.float32
        close(plain.mass[:, -1], torch.ones_like(plain.mass[:, -1]), 2e-2)
    assert decided >= ANSWER


def half(model: Any, e: Any) -> Any:
    """One observed episode, drafted where its answer is the model's own."""
    with warnings.catch_warnings():  # two kernels part where a margin is a tie, and the trace says so
        warnings.filterwarnings("ignore", message="the hooked model disagrees")
        return observe(model, [e], max_new_tokens=ANSWER, capture=CAPTURE, progress=False)


LAWS: dict[str, Callable[[Case], None]] = {
    "twin": twin,
    "replay": replayed,
    "zero": zeroed,
    "sites": reached,
    "shadow rows": shadows,
    "lanes": lanes,
    "shared": shared,
    "window": window,
    "rope break": rope_break,
    "bfloat16": bfloat16,
}
ONLY = {"window": ("gemma-3", "mistral"), "rope break": ("phi-4-mini",)}
"""Laws that speak of what only these kinds have."""
