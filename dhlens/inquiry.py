"""One question under many arms: what `dhlens.recipes.rag` does for every episode, as rows of its tables.

`inquire` answers under every trigger, visibility and policy, and beside these under the references: nothing of the
context, all of it, and the supporting facts alone. It also looks once, at the first token of the answer, with the heads
of every policy and without any draft: what they would show under several budgets, which is the fairest way to compare
them, and the cheapest.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from dhlens.answering import Answer, Arm, answer
from dhlens.arms import ELSEWHERE, reference_visibility
from dhlens.episode import Episode
from dhlens.heads import HeadSet, head_name
from dhlens.lookup import VISIBILITIES, ContextLookup, Found, Lookup
from dhlens.model import Model
from dhlens.policies import Policy
from dhlens.stream import HFStream
from dhlens.tables import marks
from dhlens.triggers import Trigger, never, reading
from dhlens.views import View, first_logits, hidden_in_decode, masked
from dhlens.windows import Windows

REFERENCES = ("none", "full", "gold")
"""What is visible from beginning to end: nothing of the context, all of it, the supporting facts."""
CONTROLS = ("random windows", "first tokens")
"""Selections that look at no head."""
SHARES = (0.0, 0.01, 0.1, 1.0)
"""Shares of hidden tokens that are replaced to measure the leak; the first stands for a single token."""

Rows = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Inquiry:
    """What is asked of every question; the fields are arguments of `dhlens.recipes.rag`."""

    policies: Mapping[str, Policy]
    triggers: Mapping[str, Trigger]
    visibilities: Sequence[str]
    windows: Windows
    budgets: Sequence[int]
    max_new_tokens: int
    batch: int
    seed: int
    joint: tuple[int, ...] = ()
    """Tokens between windows that are put one behind the other."""
    corpus: Any = None
    """From a model, an episode and policies to a `Lookup`, for the visibility "retrieve"."""

    @property
    def reads(self) -> tuple[str, ...]:
        """What the triggers need of a draft."""
        return tuple(sorted({form for t in self.triggers.values() if (form := getattr(t, "form", None))}))


def inquire(model: Model, full: HFStream, episode: Episode, asked: Inquiry, *, leaks: bool) -> Rows:
    """The rows of one question, by table: answers, events, looks, and with `leaks` those of the leak.

    Args:
        model: a loaded model, see `views.check_views`.
        full: the clean prompt but for its last token; left as it is.
        episode: with the spans "context" and "fact_*".
        asked: what is done.
        leaks: whether hidden tokens are replaced to see what of them is left.
    """
    context = episode.span("context")
    head = model.stream()
    assert isinstance(head, HFStream)
    head.feed(episode.tokens[None, : context.start])
    lookup = ContextLookup(
        model, full, episode, asked.policies, windows=asked.windows, head=head, joint=list(asked.joint)
    )
    references, lookups = _references(lookup, asked), _lookups(model, lookup, asked)
    arms = {arm: found.view for arm, found in references.items()}
    for visibility in asked.visibilities:
        start = arms[Arm("never", reference_visibility(visibility), "none")]
        unable = getattr(asked.corpus, "without", ()) if visibility == ELSEWHERE else ()
        chosen = [name for name in asked.policies if name not in unable]
        arms |= {Arm(t, visibility, p): start for t in asked.triggers for p in chosen}
    triggers = {**asked.triggers, "never": never}
    answers = answer(
        model,
        arms,
        triggers=triggers,
        lookups=lookups,
        max_new_tokens=asked.max_new_tokens,
        read=asked.reads,
        batch=asked.batch,
    )
    named = {"episode": episode.id, "group": episode.group}
    rows: Rows = {"answers": [], "events": [], "looks": [], "leak": [], "questions": [named | _question(episode)]}
    for arm, one in answers.items():
        row = named | arm._asdict()
        rows["answers"].append(row | _answer_row(model, episode, one, references.get(arm)))
        rows["events"] += [row | {"event": i, **event} for i, event in enumerate(_events(one, triggers[arm.trigger]))]
    rows["looks"] = [named | row for row in _looks(lookup, asked)]
    if leaks:
        rows["leak"] = [named | row for row in _leaks(model, episode, lookup, asked)]
    return rows


def _question(episode: Episode) -> dict[str, Any]:
    """What was asked, and where its documents and facts stand in the prompt."""
    context = episode.span("context")
    runs = {
        kind: [[span.start, span.stop] for span in episode.spans if fnmatchcase(span.name, f"{kind}_*")]
        for kind in ("doc", "fact")
    }
    return {
        "question": episode.meta.get("question", ""),
        "answer": str(episode.meta["answer_text"]),
        "titles": list(episode.meta.get("titles", ())),
        "prompt": len(episode.tokens),
        "context": [context.start, context.stop],
        "documents": runs["doc"],
        "facts": runs["fact"],
    }


def _references(lookup: ContextLookup, asked: Inquiry) -> dict[Arm, Found]:
    """What is visible throughout."""
    context, spans = lookup.episode.span("context"), lookup.episode.spans
    shown = {name: torch.zeros(len(lookup.episode.tokens), dtype=torch.bool) for name in REFERENCES}
    shown["full"][context.start : context.stop] = True
    for span in spans:
        if fnmatchcase(span.name, "fact_*"):
            shown["gold"][span.start : span.stop] = True
    no_heads = HeadSet([], lookup.shape)
    kinds = dict.fromkeys(map(reference_visibility, asked.visibilities))
    return {
        Arm("never", kind, name): lookup.found(kind, visible, no_heads)
        for kind in kinds
        for name, visible in shown.items()
    }


def _lookups(model: Model, lookup: ContextLookup, asked: Inquiry) -> dict[str, Lookup]:
    found: dict[str, Lookup] = {v: lookup.through(v) for v in asked.visibilities if v in VISIBILITIES}
    if ELSEWHERE in asked.visibilities:
        found[ELSEWHERE] = asked.corpus(model, lookup.episode, asked.policies)
    return found


def _answer_row(model: Model, episode: Episode, one: Answer, reference: Found | None) -> dict[str, Any]:
    text = model.tokenizer.decode(one.said)
    right = [str(episode.meta["answer_text"]), *episode.meta.get("aliases", ())]
    shown = one.lookups if reference is None else [reference]
    return {
        "text": text,
        "answer": right[0],
        **marks(episode, text),
        "contains": any(gold.lower() in text.lower() for gold in right),
        "tokens": len(one.said),
        "stopped": one.events[-1].draft.stopped,
        "retrievals": len(one.lookups),
        "calls": len(one.events),
        **{name: _mean([getattr(f, name) for f in shown]) for name in ("visible", "facts", "fact_tokens")},
    }


def _events(one: Answer, trigger: Trigger) -> Iterator[dict[str, Any]]:
    for event in one.events:
        draft, found = event.draft, event.found
        values, threshold = reading(trigger, draft) if found is None else ([], np.nan)
        yield {
            "kind": "draft" if found is None else "looked up",
            "step": event.step,
            "kept": event.kept,
            "pieces": draft.pieces(),
            "entropy": [round(x, 4) for x in draft.entropy.tolist()],
            "values": values,
            "threshold": threshold,
            "windows": [list(run) for run in found.windows] if found else [],
            "passages": list(found.passages) if found else [],
            "heads": [head_name(head) for head in found.heads] if found else [],
            "facts": found.facts if found else np.nan,
        }


def _looks(lookup: ContextLookup, asked: Inquiry) -> Iterator[dict[str, Any]]:
    """What every policy, and the controls, would show at the answer's first token under each budget."""
    context, n = lookup.episode.span("context"), len(lookup.episode.tokens)
    noise = np.random.default_rng([asked.seed, zlib.crc32(lookup.episode.id.encode())]).random(n)
    weights = {"random windows": torch.from_numpy(noise).float(), "first tokens": -torch.arange(n).float()}
    chosen = {name: lookup.heads(name, []) for name in asked.policies}
    weights |= {name: lookup.attention(heads, []) for name, heads in chosen.items() if len(heads)}
    for name, weight in weights.items():
        heads = chosen.get(name, HeadSet([], lookup.shape))
        for budget in asked.budgets:
            windows = dataclasses.replace(asked.windows, budget=budget, peaks=None)
            found = lookup.recalled(windows(weight, context))
            yield {"policy": name, "budget": budget, "heads": [head_name(head) for head in heads], **found}


def _leaks(model: Model, episode: Episode, lookup: ContextLookup, asked: Inquiry) -> Iterator[dict[str, Any]]:
    """How far the first logits move when hidden tokens are replaced by others of the context."""
    context = episode.span("context")
    policy = next(iter(asked.policies))
    shown = asked.windows(lookup.attention(lookup.heads(policy, []), []), context)
    visible = shown.clone()
    visible[: context.start], visible[context.stop :] = True, True
    hidden = (~visible).nonzero()[:, 0]
    if not len(hidden):
        return
    rng = np.random.default_rng([asked.seed, zlib.crc32(episode.id.encode())])
    views = {"mask": masked, "mask_decode": _behind}
    before = {name: view(model, episode, visible) for name, view in views.items()}
    for share in SHARES:
        n = max(1, round(share * len(hidden)))
        other = dataclasses.replace(episode, tokens=episode.tokens.clone())
        at = torch.from_numpy(rng.choice(hidden.numpy(), n, replace=False))
        other.tokens[at] = episode.tokens[torch.from_numpy(rng.integers(context.start, context.stop, n))]
        for name, view in views.items():
            moved = _moved(model, before[name], view(model, other, visible))
            yield {"visibility": name, "share": share, "replaced": n, **moved}


def _behind(model: Model, episode: Episode, visible: Bool[Tensor, " prompt"]) -> View:
    stream = model.stream()
    assert isinstance(stream, HFStream)
    stream.feed(episode.tokens[None, :-1])
    return hidden_in_decode(stream, episode, visible)


def _moved(model: Model, view: View, other: View) -> dict[str, float]:
    first, second = (first_logits(one).float().cpu() for one in (view, other))
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return {"logit_change": float((first - second).abs().max()), "kl": float((p.exp() * (p - q)).sum())}


def _mean(values: Sequence[float | int]) -> float:
    return float(np.mean(values)) if values else np.nan
