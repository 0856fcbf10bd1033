"""What does looking cost on a GPU, at the size of the paper's models? A random-weight model, nothing is downloaded.

    python benchmarks/gpu.py                           # Llama-3.1-8B's shape, bfloat16, 5,000 and 50,000 tokens, CUDA
    python benchmarks/gpu.py --lengths 5000 --pairs 7
    python benchmarks/gpu.py --tiny                    # two small layers, on any machine: does the script run?

`floor`           transformers' greedy `generate` on SDPA; it observes nothing
`observe`         `dh.observe` without a draft
`observe, draft`  the same with the right answer as a draft

All three in turn, so that noise hits all; times are medians over the rounds, ratios medians of the paired ratios. The
peak is what torch's allocator held at most, weights included, beside what `dhlens plan` foretells. Weights are random,
so answers mean nothing; their kernels and sizes are the real ones. Random logits lie close together: `low_margin`
counts the steps at which bfloat16 may tie, where a draft falls back to single steps. Written as CSV and as a table for
a page.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

import dhlens as dh

Said = tuple[list[int], int]
"""Tokens, and steps of low margin."""
STEPS = 48
GIB = 2**30
LLAMA_3_1_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
TINY = LLAMA_3_1_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def load(config: LlamaConfig, device: str) -> dh.Model:
    """A model with random weights made on the device, which never ends its answer by itself."""
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = dh.load(hf, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0"))
    model.twin.generation_config.eos_token_id = None  # `generate` would fall back on it
    return dataclasses.replace(model, stop_ids=())


def episode(model: dh.Model, length: int) -> dh.Episode:
    """Random tokens with the spans of a needle episode."""
    tokens = torch.randint(3, model.hooked.cfg.d_vocab, (length,), generator=torch.Generator().manual_seed(length))
    middle = length // 2
    spans = (dh.Span("needle", middle, middle + 40), dh.Span("answer", middle + 20, middle + 36))
    return dh.Episode(f"random-{length}", tokens, tokens[middle + 20 : middle + 36], spans, {"group": "w0"})


@torch.no_grad()
def floor(model: dh.Model, e: dh.Episode) -> tuple[list[int], int]:
    """`model.generate` of transformers, greedy, SDPA."""
    ids = e.tokens[None].to(model.device)
    how = GenerationConfig(max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
    out: Any = model.twin.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return out[0, ids.shape[1] :].tolist(), 0


def observe(model: dh.Model, e: dh.Episode, *, draft: bool) -> tuple[list[int], int]:
    """What `dh.observe` emits, and how many of its steps had too narrow a margin to take from a draft."""
    trace = dh.observe(model, [e], max_new_tokens=STEPS, draft=draft, progress=False)
    return trace.outcomes[0].tokens.tolist(), trace.card.counts.get("low_margin", 0)


def measured(run: Callable[[], Said], device: str) -> tuple[float, float, Said]:
    """Seconds, peak GiB on the device (NaN without CUDA) and what was said."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    said = run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated() / GIB if cuda else float("nan"), said


def rounds(model: dh.Model, length: int, pairs: int, device: str) -> pd.DataFrame:
    """One row per method and round; the first round warms kernels up and is left out."""
    e = episode(model, length)
    right = dataclasses.replace(e, answer=torch.tensor(observe(model, e, draft=False)[0]))
    methods: dict[str, Callable[[], Said]] = {
        "floor": lambda: floor(model, e),
        "observe": lambda: observe(model, e, draft=False),
        "observe, draft": lambda: observe(model, right, draft=True),
    }
    rows = []
    for k in range(pairs + 1):
        said: list[int] = []
        for name, run in methods.items():
            seconds, peak, (tokens, low) = measured(run, device)
            said = said or tokens
            same = sum(a == b for a, b in zip(said, tokens, strict=True))
            row = {"round": k, "length": length, "method": name, "seconds": seconds, "peak": peak}
            rows.append(row | {"same": same, "low_margin": low})
    return pd.DataFrame(rows).query("round > 0")


def summary(table: pd.DataFrame, config: LlamaConfig) -> pd.DataFrame:
    """Medians, ratios to the floor, peaks, and the plan's peak."""
    seconds = table.pivot(index=["length", "round"], columns="method", values="seconds")
    ratio = seconds.div(seconds["floor"], axis=0).groupby("length").median().stack().rename("ratio")
    found = table.groupby(["length", "method"], sort=False).agg(
        seconds=("seconds", "median"),
        peak_gib=("peak", "max"),
        same_tokens=("same", "min"),
        low_margin=("low_margin", "max"),
    )
    lengths = sorted(table["length"].unique().tolist())
    foretold = dh.plan(config, lengths, steps=STEPS, memory="1TB").table.set_index("length")["peak"] / GIB
    return found.join(ratio).join(foretold.rename("planned_gib")).reset_index()


def markdown(table: pd.DataFrame) -> str:
    """The table for a page."""
    cells = table.map(lambda x: f"{x:,.2f}" if isinstance(x, float) else str(x))
    lines = [list(cells.columns), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default=None, help="prompt lengths, comma-separated")
    parser.add_argument("--pairs", type=int, default=5, help="rounds that count")
    parser.add_argument("--tiny", action="store_true", help="two small layers and short prompts, on any device")
    parser.add_argument("--device", default=None, help="default: cuda, or with --tiny the best there is")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() or not args.tiny else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device is there; --tiny tries the script on a CPU")
    config = LlamaConfig(**(TINY if args.tiny else LLAMA_3_1_8B))
    lengths = [int(n) for n in (args.lengths or ("200,600" if args.tiny else "5000,50000")).split(",")]
    model = load(config, device)
    table = pd.concat([rounds(model, n, args.pairs, device) for n in lengths])
    found = summary(table, config)
    name = "gpu_tiny" if args.tiny else "gpu"
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / f"{name}_rounds.csv", index=False)
    found.to_csv(args.out / f"{name}.csv", index=False)
    what = torch.cuda.get_device_name() if device.startswith("cuda") else device
    text = f"{what}, {sum(p.numel() for p in model.twin.parameters()):,} parameters, bfloat16, {STEPS} tokens\n\n"
    text += markdown(found) + "\n"
    (args.out / f"{name}.md").write_text(text)
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
