"""What does looking cost? `dhlens.observe` beside what one would do without it, on the same prompts and answers.

    python benchmarks/observe.py                      # the table: time, grid, memory, growth
    python benchmarks/observe.py --only time --pairs 7
    python benchmarks/observe.py --haystack walden.txt --out benchmarks/results

`floor`         transformers' greedy `generate` on SDPA; it observes nothing
`bare loop`     the same passes in a bare loop
`observe`       `dh.observe` without a draft, with the right answer as a draft, with prompt lookup
`mixed`         two models by hand: SDPA prefill, eager steps that return attentions
`fair`          one eager model, attentions asked for in the steps only
`naive`         one eager model, attentions asked for always
`recompute`     the bridge's `run_with_cache` on the whole sequence at each step, patterns only; 4 timed, scaled
`grid`          5 depths x 4 needles on one haystack window
`equal`         what `observe` reads against one uncached eager pass over prompt and answer

Time: one process, methods in turn within each round, so that noise hits all; the median over rounds of the ratio to
the round's floor, with a bootstrap interval. Memory: a fresh process per method, peak resident size less that of the
same process with the weights loaded (Linux). A method that would not fit is computed and marked, not run. No stop
token ends an answer, so all methods say equally many tokens, but for the grid.
"""

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import bootstrap
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

import dhlens as dh
from dhlens.episode import Episode
from dhlens.tasks import niah

MODEL = "smollm2-135m"
STEPS = 32
GIB = 2**30
MEMORY_LIMIT = 16 * GIB


class Bench:
    """The model, a plain eager copy of it, and one episode per length."""

    def __init__(self, haystack: str | None, lengths: tuple[int, ...], *, seed: int = 0, eager: bool = True) -> None:
        """Load once; make one episode per length."""
        self.model = dataclasses.replace(dh.load(MODEL, device="cpu"), stop_ids=())
        self.model.twin.generation_config.eos_token_id = None  # `generate` would fall back on it
        self.haystack, self.seed = haystack, seed
        self.episodes = {n: self.episode(n) for n in lengths}
        if eager:
            self.eager = AutoModelForCausalLM.from_pretrained(self.model.path, attn_implementation="eager").eval()

    def episode(self, length: int) -> Episode:
        """A UUID episode in the middle of the haystack."""
        grid = {"lengths": (length,), "depths": (0.5,), "n": 1, "repeat": True}
        return niah.episodes(self.model.tokenizer, self.haystack, **grid, seed=self.seed)[0]

    def right(self, episode: Episode, steps: int) -> Episode:
        """The episode with the answer that the model really gives, as a right draft of `steps` tokens."""
        said = dh.generate(self.model, [episode], max_new_tokens=steps, progress=False)[0].tokens
        return Episode(episode.id, episode.tokens, said, episode.spans, episode.meta)


@torch.no_grad()
def floor(bench: Bench, episode: Episode, steps: int, *, stop: int | None = None) -> list[int]:
    """`model.generate` of transformers, greedy, SDPA."""
    ids = episode.tokens[None]
    how = GenerationConfig(max_new_tokens=steps, do_sample=False, eos_token_id=stop, pad_token_id=0)
    out: Any = bench.model.twin.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return out[0, ids.shape[1] :].tolist()


@torch.no_grad()
def loop(bench: Bench, episode: Episode, steps: int) -> list[int]:
    """The same in a bare loop: nothing but the forward passes."""
    return _decode(bench.model.twin, bench.model.twin, episode, steps)


@torch.no_grad()
def mixed(bench: Bench, episode: Episode, steps: int) -> list[int]:
    """Two models by hand: SDPA prefill, eager steps that return attentions."""
    return _decode(bench.model.twin, bench.eager, episode, steps, step={"output_attentions": True})


@torch.no_grad()
def fair(bench: Bench, episode: Episode, steps: int) -> list[int]:
    """One eager model, attentions asked for in the steps only."""
    return _decode(bench.eager, bench.eager, episode, steps, step={"output_attentions": True})


@torch.no_grad()
def naive(bench: Bench, episode: Episode, steps: int) -> list[int]:
    """One eager model, attentions asked for always."""
    asked = {"output_attentions": True}
    return _decode(bench.eager, bench.eager, episode, steps, prompt=asked, step=asked)


def _decode(
    first: Any,
    rest: Any,
    episode: Episode,
    steps: int,
    *,
    prompt: Any = MappingProxyType({}),
    step: Any = MappingProxyType({}),
) -> list[int]:
    """Greedy decoding in a bare loop; of attentions that come back, the strongest key of each head is looked up."""
    cache = DynamicCache(config=first.config)
    out = first(episode.tokens[None], past_key_values=cache, use_cache=True, logits_to_keep=1, **prompt)
    said: list[int] = []
    while len(said) < steps:
        for pattern in out.attentions or ():
            pattern[0, :, -1].max(-1)
        said.append(int(out.logits[0, -1].argmax()))
        if len(said) < steps:
            out = rest(torch.tensor([said[-1:]]), past_key_values=cache, use_cache=True, **step)
    return said


@torch.no_grad()
def recompute(bench: Bench, episode: Episode, steps: int) -> list[int]:
    """`run_with_cache` over the growing sequence: 4 steps timed; the caller scales by steps / 4."""
    tokens, said = episode.tokens[None], []
    for _ in range(4):
        logits, cache = bench.model.hooked.run_with_cache(
            tokens, names_filter=lambda name: name.endswith("hook_pattern")
        )
        said.append(int(logits[0, -1].argmax()))
        tokens = torch.cat([tokens, torch.tensor([said[-1:]])], dim=1)
        del cache
    return said


def observe(draft: bool | str) -> Callable[[Bench, Episode, int], list[int]]:
    """`dh.observe` with this draft."""

    def run(bench: Bench, episode: Episode, steps: int) -> list[int]:
        trace = dh.observe(bench.model, [episode], max_new_tokens=steps, draft=draft, progress=False)
        return trace.outcomes[0].tokens.tolist()

    return run


METHODS: dict[str, Callable[[Bench, Episode, int], list[int]]] = {
    "floor": floor,
    "bare loop": loop,
    "observe": observe(False),
    "observe, right draft": observe(True),
    "observe, prompt lookup": observe("lookup"),
    "mixed": mixed,
    "fair": fair,
    "naive": naive,
    "recompute": recompute,
}


def bytes_of(method: str, length: int, model: dh.Model) -> int:
    """Attention patterns that a method holds at once; 0 for those that keep none."""
    kept = {"naive": model.n_layers, "recompute": model.n_layers}.get(method, 0)
    return 4 * kept * model.n_heads * length * length


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    gc.collect()
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def ratios(seconds: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Median ratio to the same round's floor, with a 95 % bootstrap interval over rounds."""
    rows = []
    wide = seconds.pivot(index="round", columns="method", values="seconds")
    for method in wide.columns.drop("floor"):
        paired = (wide[method] / wide["floor"]).dropna().to_numpy()
        low, high = np.nan, np.nan
        if len(paired) > 1:
            interval = bootstrap((paired,), np.median, method="percentile", rng=seed).confidence_interval
            low, high = interval
        rows.append((method, np.median(wide[method].dropna()), np.median(paired), low, high, len(paired)))
    rows.append(("floor", np.median(wide["floor"]), 1.0, 1.0, 1.0, len(wide)))
    return pd.DataFrame(rows, columns=["method", "seconds", "ratio", "low", "high", "pairs"]).sort_values("ratio")


def time_table(bench: Bench, length: int, pairs: int, slow_pairs: int = 1) -> pd.DataFrame:
    """All methods at one length; the slowest ones in the first rounds only."""
    episode = bench.right(bench.episodes[length], STEPS)
    said = floor(bench, episode, len(episode.answer))
    rows = []
    for k in range(pairs + 1):
        for method, run in METHODS.items():
            slow = method in ("naive", "recompute")
            if (slow and not 0 < k <= slow_pairs) or bytes_of(method, length, bench.model) > MEMORY_LIMIT:
                continue
            seconds, got = timed(lambda run=run: run(bench, episode, len(said)))
            assert got == said[: len(got)], (method, got, said)
            scale = len(said) / 4 if method == "recompute" else 1
            rows.append((k, method, seconds * scale))
    table = pd.DataFrame(rows, columns=["round", "method", "seconds"])
    return ratios(table[table["round"] > 0])  # the first round warms caches up


def grid_table(bench: Bench, length: int, pairs: int) -> pd.DataFrame:
    """5 depths x 4 needles on one window, answers that end by themselves: shared prefixes and drafts, and the floor."""
    stop = bench.model.tokenizer.eos_token_id
    model = dataclasses.replace(bench.model, stop_ids=(stop,))
    grid = {"lengths": (length,), "depths": (0.1, 0.3, 0.5, 0.7, 0.9), "n": 1, "needles_per_cell": 4, "repeat": True}
    episodes = niah.episodes(bench.model.tokenizer, bench.haystack, **grid, seed=bench.seed)
    rows = []
    floor(bench, episodes[0], 2)  # kernels warm
    for k in range(pairs):
        seconds, said = timed(lambda: [floor(bench, e, 48, stop=stop) for e in episodes])
        rows.append((k, "floor", seconds))
        for name, share in (("grid, shared prefixes", True), ("grid, each its own", False)):
            seconds, trace = timed(lambda share=share: dh.observe(model, episodes, share=share, progress=False))
            assert [o.tokens.tolist() for o in trace.outcomes] == said
            rows.append((k, name, seconds))
    table = ratios(pd.DataFrame(rows, columns=["round", "method", "seconds"]))
    counts = trace.card.counts
    table["drafts accepted"] = counts["accepted"] / counts["drafted"]
    return table


def _peak(haystack: str | None, method: str, length: int, out: Any) -> None:
    bench = Bench(haystack, (length,), eager=method in ("mixed", "fair", "naive"))
    METHODS[method](bench, bench.episode(300), STEPS)  # kernels warm, lazy imports done
    gc.collect()
    out.put(grown(lambda: METHODS[method](bench, bench.episodes[length], STEPS))[0])


def grown(run: Callable[[], Any]) -> tuple[int, Any]:
    """By how many bytes the peak of resident memory lies over what was there before, and the result (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far belongs to others
    before = _resident("VmRSS")
    result = run()
    return _resident("VmHWM") - before, result


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def memory_table(bench: Bench, length: int) -> pd.DataFrame:
    """Peak resident bytes over the loaded process, a fresh process per method."""
    rows = []
    # large blocks straight from the system: the peak is what is in use, not what the allocator happens to keep
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    context = multiprocessing.get_context("spawn")
    for method in METHODS:
        computed = bytes_of(method, length, bench.model)
        if computed > MEMORY_LIMIT or method == "recompute":
            rows.append((method, computed, "computed from the patterns it keeps"))
            continue
        queue = context.Queue()
        process = context.Process(target=_peak, args=(bench.haystack, method, length, queue))
        process.start()
        rows.append((method, queue.get(), "measured"))
        process.join()
    table = pd.DataFrame(rows, columns=["method", "bytes", "how"])
    table["MiB"] = table["bytes"] / 2**20
    table["over floor"] = table["bytes"] / table.loc[table["method"] == "floor", "bytes"].item()
    return table.drop(columns="bytes")


def growth_table(bench: Bench, lengths: tuple[int, ...], steps: tuple[int, ...], pairs: int) -> pd.DataFrame:
    """Seconds of floor and observe against prompt length (32 steps) and against steps (2,000 tokens)."""
    rows = []
    cells = [(n, STEPS) for n in lengths] + [(2000, s) for s in steps]
    for length, n_steps in cells:
        episode = bench.episodes.get(length) or bench.episode(length)
        for k in range(pairs):
            for method in ("floor", "observe"):
                seconds, got = timed(lambda method=method, e=episode, n=n_steps: METHODS[method](bench, e, n))
                rows.append((length, n_steps, len(got), k, method, seconds))
    table = pd.DataFrame(rows, columns=["length", "steps", "said", "round", "method", "seconds"])
    wide = table.groupby(["length", "steps", "method"])["seconds"].median().unstack().reset_index()
    wide["ratio"] = wide["observe"] / wide["floor"]
    return wide


@torch.no_grad()
def brute_force(eager: Any, tokens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The judge: one uncached eager pass. Logits [row vocab] and attention [row layer head key] of the last `rows`."""
    kept: list[Tensor] = []

    def cut(module: Any, args: Any, out: Any) -> None:
        kept.append(out[1][0, :, -rows:].clone())  # a whole layer at 4,000 tokens is half a GiB, all of them 17

    handles = [layer.self_attn.register_forward_hook(cut) for layer in eager.model.layers]
    try:
        logits = eager(tokens[None], use_cache=False, logits_to_keep=rows).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, torch.stack(kept).permute(2, 0, 1, 3)


def equal_table(bench: Bench, lengths: tuple[int, ...], depths: tuple[float, ...]) -> pd.DataFrame:
    """Per episode: the largest differences of weights and masses, and the cells whose strongest key is not sure."""
    grid = {"lengths": lengths, "depths": depths, "n": 1, "repeat": True}
    rows = []
    for e in niah.episodes(bench.model.tokenizer, bench.haystack, **grid, seed=bench.seed):
        trace = dh.observe(bench.model, [e], max_new_tokens=STEPS, progress=False)
        tokens = torch.cat([e.tokens, trace.outcomes[0].tokens[:-1]])
        logits, pattern = brute_force(bench.eager, tokens, len(trace))
        weight, key = pattern.topk(2, dim=-1)
        margin, differs = weight[..., 0] - weight[..., 1], trace.peak_key[..., 0] != key[..., 0]
        masses = [pattern[..., s.start : s.stop].sum(-1) - trace.mass[:, trace.span_index(s.name)] for s in e.spans]
        rows.append(
            {
                "length": len(e.tokens),
                "depth": e.meta["depth"],
                "steps": len(trace),
                "argmax equal": bool(torch.equal(logits.argmax(-1), trace.next_token)),
                "weight difference": float((trace.peak_weight[..., :2] - weight).abs().max()),
                "mass difference": float(torch.stack(masses).abs().max()),
                "cells": differs.numel(),
                "ties (1e-6)": int((margin < 1e-6).sum()),
                "other key": int(differs.sum()),
                "largest margin there": float(margin[differs].max()) if bool(differs.any()) else 0.0,
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Run what was asked for; print and save each table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--haystack", help="text file or folder; default: Python's own documentation")
    parser.add_argument("--only", choices=["time", "grid", "memory", "growth", "equal"])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    bench = Bench(args.haystack, (2000, 4000))
    parts: dict[str, Callable[[], pd.DataFrame]] = {
        "time": lambda: time_table(bench, 2000, args.pairs),
        "grid": lambda: grid_table(bench, 2000, min(args.pairs, 3)),
        "memory": lambda: memory_table(bench, 4000),
        "growth": lambda: growth_table(bench, (500, 1000, 2000, 4000, 8000 - STEPS), (8, 16, 64), min(args.pairs, 3)),
        "equal": lambda: equal_table(bench, (500, 2000, 4000), (0.2, 0.8)),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        if args.only in (None, name):
            table = part()
            print(f"\n{name}\n{table.to_string(index=False, float_format=lambda x: f'{x:.3g}')}", flush=True)  # noqa: T201
            table.to_csv(args.out / f"{name}.csv", index=False)
    card = {"model": MODEL, "threads": torch.get_num_threads(), "versions": dh.RunCard(MODEL).versions}
    (args.out / "card.json").write_text(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
