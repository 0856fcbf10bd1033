"""What does an intervention cost? Effects by shadow rows beside the step-by-step loop, and the exact causal map.

    python benchmarks/ablate.py                            # both tables
    python benchmarks/ablate.py --haystack walden.txt --pairs 3

`effects`       32 steps x 4 policies on a 1,000-token episode in shadow rows, and the same sets fed one row at a time:
                clean up to the step, one edited row, back; the same numbers, compared; behind a prompt that is there
`causal map`    every single head at 24 steps of a 1,000-token episode, exactly; peak memory over what was there (Linux)
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from observe import grown

import dhlens as dh
from dhlens.policies import along
from dhlens.shadow import effects_on
from dhlens.tasks import niah


def answered(model: dh.Model, haystack: str | None, seed: int) -> tuple[dh.Episode, dh.Trace]:
    """A 1,000-token episode that the model answers, with its clean trace."""
    grid = {"lengths": (1000,), "depths": (0.2, 0.5, 0.8), "n": 3, "repeat": True}
    for e in niah.episodes(model.tokenizer, haystack, **grid, seed=seed):
        trace = dh.observe(model, [e], progress=False)
        if trace.outcomes[0].correct and len(trace) >= 32:
            return e, trace
    raise SystemExit("the model answered none of 9 episodes at length")


def effects_table(model: dh.Model, episode: dh.Episode, trace: dh.Trace, pairs: int) -> pd.DataFrame:
    """Seconds of the fast path and of the loop, and the largest difference between their numbers."""
    steps, dyn = 32, dh.Dynamic()
    said = trace.outcomes[0].tokens[:steps]
    clean = trace.select(trace.step < steps)
    ranking = dh.copy_paste(trace).mean()
    policies = [dyn, dh.StaticLike(dyn, ranking), dh.RandomLike(dyn, seed=0), dh.OtherStep(seed=0)]
    sets = [(step, heads) for policy in policies for step, heads in enumerate(along(policy, clean))]
    rows = []
    for k in range(pairs + 1):
        _, prompt = next(iter(dh.prefill(model, [episode])))
        begin = time.perf_counter()
        fast = effects_on(model, prompt, episode, said, sets)
        middle = time.perf_counter()
        slow = loop(prompt, episode, said, sets)
        end = time.perf_counter()
        difference = float((fast.logit - slow["logit"]).abs().max())
        same = bool((fast.kept == slow["kept"]).all())
        if k:  # the first round warms caches up
            rows.append((len(sets), middle - begin, end - middle, (end - middle) / (middle - begin), difference, same))
    columns = ["sets", "shadow rows, s", "loop, s", "ratio", "largest logit difference", "same argmax kept"]
    return pd.DataFrame(rows, columns=columns)


@torch.no_grad()
def loop(prompt: Any, episode: dh.Episode, said: torch.Tensor, sets: Any) -> dict[str, torch.Tensor]:
    """What one writes by hand: per policy, step after step, an edited row, back, the clean row."""
    edit, found = dh.zero(), []
    by_policy = [sets[i : i + len(said)] for i in range(0, len(sets), len(said))]
    fed = torch.cat([episode.tokens[-1:], said[:-1]])
    for part in by_policy:
        stream = prompt.fork()
        for step, heads in part:
            here = stream.mark()
            row = fed[None, step : step + 1]
            edited = stream.feed(row, hooks=edit([heads], rows=[0], steps=[step], keys=stream.length + 1))[0, -1]
            stream.rewind(here)
            clean = stream.feed(row, hooks=())[0, -1]
            found.append((edited[said[step]], edited.argmax() == clean.argmax()))
    logit, kept = (torch.stack(column) for column in zip(*found, strict=True))
    return {"logit": logit, "kept": kept}


def map_table(model: dh.Model, episode: dh.Episode, trace: dh.Trace, budgets: tuple[int, ...]) -> pd.DataFrame:
    """Seconds and peak memory of the causal map under several row budgets."""
    rows, said = [], trace.outcomes[0].tokens[:24]
    for budget in budgets:
        begin = time.perf_counter()
        peak, found = grown(lambda n=budget: dh.causal_map(model, episode, said, rows=n, progress=False))
        rows.append((budget, found.kl.numel(), time.perf_counter() - begin, peak / 2**20))
    return pd.DataFrame(rows, columns=["rows at once", "experiments", "seconds", "peak over before, MiB"])


def main() -> None:
    """Run both and save them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--haystack", help="text file or folder; default: Python's own documentation")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    model = dh.load("smollm2-135m", device="cpu")
    episode, trace = answered(model, args.haystack, seed=0)
    args.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], pd.DataFrame]] = {
        "effects": lambda: effects_table(model, episode, trace, args.pairs),
        "causal_map": lambda: map_table(model, episode, trace, (64, 256)),
    }
    for name, part in parts.items():
        table = part()
        print(f"\n{name}\n{table.to_string(index=False, float_format=lambda x: f'{x:.3g}')}", flush=True)  # noqa: T201
        table.to_csv(args.out / f"{name}.csv", index=False)


if __name__ == "__main__":
    main()
