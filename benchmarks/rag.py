"""What does dynamic retrieval cost? Arms answered together and one by one, and a view by its visible tokens alone.

    python benchmarks/rag.py                                    # our own questions, smollm2-135m
    python benchmarks/rag.py --questions hotpot.json --length 1400 --n 5

`together`  one question in every arm (RIND, three visibilities, six policies, the references): drafts, looks and views
            are shared and arms are decoded as lanes of one batch; beside it the same arms one after the other
`view`      the prompt with a quarter of its context visible: only visible tokens fed, at their positions, beside the
            whole prompt fed under a mask that hides the rest from every row; and how far their logits differ
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import dhlens as dh
from dhlens.answering import Arm, answer
from dhlens.choosers import CHOOSERS, reasoning_policies
from dhlens.lookup import VISIBILITIES, ContextLookup
from dhlens.masks import additive
from dhlens.tasks import hotpot
from dhlens.triggers import RIND, never
from dhlens.views import first_logits, masked
from dhlens.windows import Windows

ROOM = 32


def lookup_of(model: dh.Model, episode: dh.Episode, policies: dict[str, dh.Policy]) -> ContextLookup:
    """A lookup with nothing kept yet: prompt and head are prefilled."""
    head = model.stream()
    head.feed(episode.tokens[None, : episode.span("context").start])
    _, full = next(iter(dh.prefill(model, [episode])))
    return ContextLookup(model, full, episode, policies, windows=Windows(), head=head, joint=[])


def answered(lookup: ContextLookup, model: dh.Model, arms: list[Arm]) -> dict[Arm, list[int]]:
    """What is said in these arms."""
    nothing = torch.zeros(len(lookup.episode.tokens), dtype=torch.bool)
    found = answer(
        model,
        {arm: lookup.view(arm.visibility, nothing) for arm in arms},
        triggers={"rind": RIND(), "never": never},
        lookups={v: lookup.through(v) for v in VISIBILITIES},
        max_new_tokens=ROOM,
        read=("coded",),
    )
    return {arm: one.said for arm, one in found.items()}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def together_row(model: dh.Model, episode: dh.Episode, policies: dict[str, dh.Policy]) -> dict[str, Any]:
    """One question in all arms at once and one by one."""
    arms = [Arm("rind", v, p) for v in VISIBILITIES for p in policies] + [Arm("never", v, "none") for v in VISIBILITIES]
    at_once, said = timed(lambda: answered(lookup_of(model, episode, policies), model, arms))
    alone, singly = timed(lambda: [answered(lookup_of(model, episode, policies), model, [arm]) for arm in arms])
    same = sum(one[arm] == said[arm] for arm, one in zip(arms, singly, strict=True))
    row = {"tokens": len(episode.tokens), "arms": len(arms), "same answers": same}
    return row | {"together, s": at_once, "one by one, s": alone, "ratio": alone / at_once}


def view_row(model: dh.Model, episode: dh.Episode) -> dict[str, Any]:
    """One view, its visible tokens alone and all tokens under a mask."""
    context, n = episode.span("context"), len(episode.tokens)
    visible = torch.ones(n, dtype=torch.bool)
    visible[context.start + len(context) // 4 : context.stop] = False
    few, logits = timed(lambda: first_logits(masked(model, episode, visible)))
    mask = torch.ones(n, n, dtype=torch.bool).tril() & (visible[None] | torch.eye(n, dtype=torch.bool))
    whole, judge = timed(lambda: model.stream().feed(episode.tokens[None], mask=additive(mask, model.dtype))[0, -1])
    apart = float((logits - judge).abs().max())
    return {"tokens": n, "visible alone, s": few, "under a mask, s": whole, "ratio": whole / few, "logits apart": apart}


def main() -> None:
    """Run both and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", default=None, help="what `dhlens rag --questions` takes")
    parser.add_argument("--length", type=int, default=None)
    parser.add_argument("--n", type=int, default=3, help="questions")
    parser.add_argument("--fit", type=int, default=6, help="questions that the policies are fitted on")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-rag"))
    given = parser.parse_args()
    model = dh.load(given.model)
    asked = hotpot.episodes(model.tokenizer, given.questions, n=given.n + given.fit, length=given.length, seed=0)
    fitted = reasoning_policies(dh.observe(model, asked[: given.fit], max_new_tokens=ROOM), seed=0)
    policies = {name: fitted[name] for name in CHOOSERS[:-1]}
    first_logits(masked(model, asked[0], torch.ones(len(asked[0].tokens), dtype=torch.bool)))  # warms caches up
    given.out.mkdir(parents=True, exist_ok=True)
    for name, rows in {
        "view": [view_row(model, episode) for episode in asked[given.fit :]],
        "together": [together_row(model, episode, policies) for episode in asked[given.fit :]],
    }.items():
        table = pd.DataFrame(rows)
        table.to_csv(given.out / f"{name}.csv", index=False)
        print(f"{name}\n{table.round(4).to_string(index=False)}\nmedian ratio {table['ratio'].median():.2f}\n")  # noqa: T201


if __name__ == "__main__":
    main()
