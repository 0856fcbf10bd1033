"""What observing a model would take, told from its config alone: weights, cache, memory and work, per prompt length.

    print(dh.plan("llama-3.1-8b", lengths=(5000, 50000), memory="80GB"))
    dh.plan("my/config.json", lengths=(5000,)).table

Nothing but `config.json` is fetched and nothing is computed: the real model class is built without weights and the
passes of `dhlens.observe` run on shapes (`dhlens.skeleton`), seconds at any size. Numbers are of one episode at a time:
one pass over the prompt through the fused-attention twin, single steps, then the hooked block of the answer's rows.
A model without fused attention has no twin: its prompt goes through in chunks, and `warnings` says so. Episodes that
share a beginning hold one cache more for each place where they part.

Operations are what the matrix products take, two per multiply-add. Bytes moved are the least there can be: every
weight read once and the cache once read or written, so a device is never faster than the larger of operations over its
rate and bytes over its bandwidth. Memory is what lives at once if no allocator wastes any; `fits` leaves it a tenth.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from dhlens import reads
from dhlens.devices import check_quantize, memory_of, read_size, there
from dhlens.engine import ROWS
from dhlens.reads import Capture
from dhlens.skeleton import Meter, Skeleton, is_config, prefill, skeleton
from dhlens.weights import read_config

SPANS = 6
"""Spans that a Trace is taken to sum up: those of a needle episode, the prompt and all."""
FOCUS = 64
"""Keys of focus spans that a Trace is taken to keep."""
_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""A quantised weight; in 4 bits a float32 scale for every 64 of them comes on top."""
_ROOM = 0.9
_LABELS = {
    "cache": "KV cache of the prompt",
    "prefill_flops": "prefill: operations",
    "prefill_bytes": "prefill: bytes moved",
    "prefill_memory": "prefill: memory",
    "step_flops": "a step: operations",
    "step_bytes": "a step: bytes moved",
    "block_flops": "hooked block: operations",
    "block_memory": "hooked block: memory",
    "pattern": "its attention rows of a layer",
    "trace": "trace, in main memory",
    "peak": "peak on the device",
}


@dataclass(frozen=True, eq=False)
class Plan:
    """What `plan` found."""

    model: str
    """As it was asked for."""
    architecture: str
    dtype: str
    quantize: str | None
    parameters: dict[str, int]
    """Numbers by part: embedding, attention, mlp, other, head (0 where it is the embedding)."""
    weights: int
    """Bytes."""
    shape: tuple[int, int]
    """(n_layers, n_heads)."""
    n_kv_heads: int
    """As the cache holds them."""
    max_positions: int | None
    """Longest sequence it was made for; None where the config names none."""
    steps: int
    """Answer tokens."""
    device: str | None
    """What `memory` was read from; None where it was given."""
    memory: int
    """Bytes of the device."""
    table: pd.DataFrame
    """One row per length: length; cache, bytes of the prompt's keys and values; prefill_flops, prefill_bytes,
    prefill_memory, of the widest chunk where the prompt is fed in chunks; step_flops, step_bytes of one decoded token;
    block_flops, block_memory of the hooked block; pattern, bytes of its attention rows in one layer as float32; trace,
    bytes in main memory that the episode's Trace keeps; peak, bytes on the device, weights included; fits."""
    warnings: tuple[str, ...]
    """What the model cannot do at these lengths, or does in its own way."""

    def values(self) -> dict[str, Any]:
        """JSON values."""
        found = {k: v for k, v in vars(self).items() if k != "table"}
        return found | {"lengths": self.table.to_dict("records")}

    def __str__(self) -> str:
        total = sum(self.parameters.values())
        parts = ", ".join(f"{name} {n:,}" for name, n in self.parameters.items() if n)
        tied = "" if self.parameters["head"] else " (tied to the head)"
        bits = f" in {self.quantize}" if self.quantize else ""
        reach = f", {self.max_positions:,} positions" if self.max_positions else ""
        lines = [
            f"{self.model}: {self.architecture}, {self.shape[0]} layers x {self.shape[1]} heads "
            f"({self.n_kv_heads} KV){reach}",
            f"weights {_size(self.weights)}, {self.dtype}{bits}: {total:,} parameters: {parts}{tied}",
            f"{self.device or 'device'} of {_size(self.memory)}; {self.steps} answer tokens\n",
            self._readable().rename_axis(None, axis=1).to_string(),
        ]
        return "\n".join([*lines, *(f"! {warning}" for warning in self.warnings)])

    def _readable(self) -> pd.DataFrame:
        """A column per length."""
        shown = {
            label: self.table[name].map(_work if name.endswith("flops") else _size) for name, label in _LABELS.items()
        }
        shown["fits"] = self.table["fits"].map(lambda fits: "yes" if fits else "no")
        lengths = self.table["length"].map("{:,} tokens".format)
        return pd.DataFrame(shown).set_axis(lengths, axis=0).T


def plan(
    model: Any,
    lengths: Sequence[int] = (1000, 10000),
    *,
    steps: int = 48,
    dtype: torch.dtype = torch.bfloat16,
    quantize: str | None = None,
    device: str | None = None,
    memory: str | int | None = None,
    capture: Capture = Capture(),
    revision: str | None = None,
) -> Plan:
    """Tell weights, cache, memory and work of observing a model.

    Args:
        model: what `dhlens.load` takes by name or path, a config.json or its folder, or a transformers config.
        lengths: prompt lengths in tokens.
        steps: answer tokens.
        dtype: of weights and cache.
        quantize: "8bit" or "4bit", as in `dhlens.load`.
        device: the device to fit; by default the best one that is there, "auto" for all accelerators together.
        memory: instead of `device` the size of one that is elsewhere, as in "80GB".
        capture: what a Trace keeps.
        revision: Hub revision.

    Raises:
        TypeError: no name, path or config.
        ValueError: an unknown name, length, size or device, or a config that transformers cannot build or run, as of
            no causal language model; the message holds its reason.
        OSError: the config cannot be had; the message says what to do.
    """
    _check_lengths(lengths, steps)
    check_quantize(quantize)
    if device is not None and memory is not None:
        raise ValueError(f"a plan takes a device or the size of one, not both; got {device!r} and {memory!r}")
    named = isinstance(model, str | Path)
    name = str(model) if named else type(model).__name__
    if not named and not is_config(model):
        raise TypeError(f"a plan takes a name, a path or a transformers config, got {name}")
    where = None if memory is not None else str(there(device))
    room = memory_of(where) if memory is None else read_size(memory)
    with _refusing(name):
        bones = skeleton(read_config(model, revision=revision) if named else model, dtype)
    total = sum(bones.parameters.values())
    small = bones.linear * (_BYTES[quantize] if quantize else dtype.itemsize)
    weights = int((total - bones.linear) * dtype.itemsize + small)
    with _refusing(name):
        rows = [_costs(bones, length, steps, dtype=dtype, weights=weights, capture=capture) for length in lengths]
    table = pd.DataFrame(rows)
    table["fits"] = table["peak"] <= _ROOM * room
    config = bones.config
    return Plan(
        model=name,
        architecture=type(bones.twin).__name__,
        dtype=str(dtype).removeprefix("torch."),
        quantize=quantize,
        parameters=bones.parameters,
        weights=weights,
        shape=(config.num_hidden_layers, config.num_attention_heads),
        n_kv_heads=bones.n_kv_heads,
        max_positions=_positions(config),
        steps=steps,
        device=where,
        memory=room,
        table=table,
        warnings=tuple(_warnings(bones, lengths, steps)),
    )


def _check_lengths(lengths: Any, steps: Any) -> None:
    counts: list[Any] = [*lengths, steps] if isinstance(lengths, Sequence) and not isinstance(lengths, str) else [None]
    if not all(isinstance(n, int) for n in counts):
        raise TypeError(f"lengths are whole numbers in a list, steps is one, got lengths={lengths!r}, steps={steps!r}")
    if len(counts) < 2 or min(counts[:-1]) < 2 or steps < 1:
        raise ValueError(f"a plan needs lengths of at least 2 tokens and at least 1 step, got {list(lengths)}, {steps}")


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Whatever transformers makes of a config that it cannot build or run, as one line."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise ValueError(f"{name} cannot be planned: {reason}") from error


def _positions(config: Any) -> int | None:
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    return next((getattr(config, name) for name in names if getattr(config, name, None)), None)


def row_bytes(capture: Capture, shape: tuple[int, int], *, keys: int, d_head: int, d_model: int, dtype: Any) -> int:
    """Bytes that a Trace keeps of one row, in main memory."""
    heads = shape[0] * shape[1]
    whole_numbers, numbers = 6 * 8, 2 * 4
    peaks, masses = heads * capture.k * (8 + 8 + 4), 2 * SPANS * heads * 4
    focus = FOCUS * (heads * 2 + 8) if capture.focus else 0
    kept = (heads * keys * 2 if capture.rows else 0) + (heads * d_head * dtype.itemsize if capture.z else 0)
    return whole_numbers + numbers + peaks + masses + focus + kept + len(capture.hidden) * d_model * 4


def _costs(
    bones: Skeleton, length: int, steps: int, *, dtype: torch.dtype, weights: int, capture: Capture
) -> dict[str, Any]:
    """One row of the table: the passes of `observe` on shapes."""
    config, cache, rows = bones.config, bones.cache(), min(ROWS, steps)
    keys = length + rows
    meter = Meter()
    found: dict[str, Any] = {"length": length, "cache": 0}
    used = weights - (0 if bones.tied else bones.parameters["embedding"] * dtype.itemsize)
    found["prefill_flops"], found["prefill_memory"], passes = prefill(bones, length - 1, cache, meter)
    found["prefill_bytes"] = passes * used + _held(cache)
    with meter:
        bones.feed(1, cache)
    found["cache"] = _held(cache)
    found |= {"step_flops": meter.flops, "step_bytes": used + found["cache"], "step_memory": meter.peak}
    meter.at_pattern = _reading(capture, keys)
    with meter:
        bones.feed(rows, cache, keep=rows)
    found |= {"block_flops": meter.flops, "block_memory": meter.peak}
    layers: Any = cache.layers
    d_head = layers[0].values.shape[-1]
    shape = (config.num_hidden_layers, config.num_attention_heads)
    found["pattern"] = rows * shape[1] * keys * 4
    row = row_bytes(capture, shape, keys=keys, d_head=d_head, d_model=config.hidden_size, dtype=dtype)
    found["trace"] = steps * row
    found["peak"] = weights + max(found["prefill_memory"], found.pop("step_memory"), found["block_memory"])
    return found


def _reading(capture: Capture, keys: int) -> Any:
    """What the reads that take most memory do at a pattern; peaks sort what these copy."""
    out: reads.Readings = {}
    spans = [(0, keys)] * SPANS
    hooks = reads.mass(out, n_layers=1, spans=spans, sink=capture.sink, local=capture.local, keys=keys)
    hooks += reads.rows(out, n_layers=1, keys=keys) if capture.rows else []

    def read(pattern: Tensor) -> None:
        for _, hook in hooks:
            hook(pattern, None)

    return read


def _held(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _warnings(bones: Skeleton, lengths: Sequence[int], steps: int) -> list[str]:
    config, most, found = bones.config, _positions(bones.config), list(bones.limits)
    for length in lengths:
        if most is not None and length + steps > most:
            found.append(f"{length:,} + {steps} tokens are beyond the {most:,} positions that it was made for")
        for end in bones.rope_breaks:
            if length < end < length + steps:
                found.append(f"position factors change at {end:,} tokens, within the answer to {length:,}: refused")
    if bones.rope_breaks:
        ends = ", ".join(f"{end:,}" for end in bones.rope_breaks)
        found.append(f"position factors change at {ends} tokens: prompts are fed in one pass and share nothing across")
    windows = sorted({w for w in bones.windows if w is not None})
    if windows:
        n = sum(w is not None for w in bones.windows)
        sizes = ", ".join(f"{w:,}" for w in windows)
        found.append(f"{n} of {len(bones.windows)} layers see the last {sizes} tokens only and keep no more")
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        found.append("operations of experts are not counted; bytes take all of them as read")
    return found


def _size(n: int | float) -> str:
    power, unit = next(((p, u) for p, u in ((40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")) if n >= 2**p), (0, ""))
    return f"{n / 2**power:,.2f} {unit}B"


def _work(n: int | float) -> str:
    power, unit = next(((p, u) for p, u in ((15, "P"), (12, "T"), (9, "G"), (6, "M")) if n >= 10**p), (0, ""))
    return f"{n / 10**power:,.2f} {unit}FLOP"
