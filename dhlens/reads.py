"""Reads: hooks that reduce attention to small per-head features the moment it exists.

Each factory returns ordinary TransformerLens hooks that fill `out[field][layer]` and change nothing, so they work in
the engine and alone:

    out = {}
    with model.hooked.hooks(fwd_hooks=dh.reads.peaks(out, n_layers=model.n_layers)):
        model.hooked(tokens)
    keys = dh.reads.stack(out["peak_key"])                  # [row, layer, head, k]

Rows are the queries of the pass, batch-major. Cost: a few reductions over [head, row, key] per layer; no attention
matrix is kept unless `rows` is attached. `keys` is the number of positions fed once the pass is over, the pass
included: the last column of a pattern is always position `keys - 1`, whether the layer's cache holds all positions or
a sliding window.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dhlens import hooks as sites
from dhlens.hooks import Hook, first_key

Readings = dict[str, dict[int, Tensor]]
"""Field to layer to [row, head, ...]; hidden sites are kept under layer 0."""


@dataclass(frozen=True)
class Capture:
    """What an observation keeps of every row.

    Raises:
        ValueError: a size is out of range.
    """

    k: int = 4
    """Peaks per head."""
    sink: int = 4
    """First positions that "core" leaves out (the template's start)."""
    local: int = 32
    """Last keys, the query's own included, that "core" leaves out."""
    focus: tuple[str, ...] = ("needle", "answer")
    """Spans whose every key's attention is kept."""
    hidden: tuple[str, ...] = ("final",)
    """Hidden sites: "final" (the final norm's output) or "resid_<layer>"."""
    rows: bool = False
    """Keep whole attention rows (float16; prompt length x heads x 2 bytes a step)."""
    z: bool = False
    """Keep head outputs in the model's dtype (heads x d_head numbers a step), for mean, resample and patch edits."""

    def __post_init__(self) -> None:
        if isinstance(self.focus, str) or isinstance(self.hidden, str):
            raise ValueError('focus and hidden hold several names: write ("needle",), not "needle"')
        if self.k < 1 or self.sink < 0 or self.local < 0:
            raise ValueError(
                f"k must be at least 1, sink and local at least 0, got {self.k}, {self.sink}, {self.local}"
            )

    def seeing(self, sites: Sequence[str]) -> "Capture":
        """The same with these hidden sites besides its own."""
        return dataclasses.replace(self, hidden=tuple(dict.fromkeys((*self.hidden, *sites))))

    def settings(self) -> dict[str, Any]:
        """JSON values for the run card."""
        return {
            "k": self.k,
            "sink": self.sink,
            "local": self.local,
            "focus": list(self.focus),
            "hidden": list(self.hidden),
            "rows": self.rows,
            "z": self.z,
        }


def peaks(out: Readings, *, n_layers: int, k: int = 4, keys: int | None = None) -> list[Hook]:
    """`peak_key` and `peak_weight`, [row, head, k]: the k keys of largest weight, equal weights by position.

    Where fewer than k keys exist the rest is key -1 with weight 0.
    """

    def read(layer: int, pattern: Float[Tensor, "batch head query key"]) -> None:
        weight, column = _largest(_rows(pattern), k)
        put(out, "peak_key", layer, torch.where(column >= 0, column + _first(keys, pattern), column))
        put(out, "peak_weight", layer, weight)

    return _pattern_hooks(n_layers, read)


def mass(
    out: Readings,
    *,
    n_layers: int,
    spans: Sequence[tuple[int, int]],
    sink: int = 4,
    local: int = 32,
    keys: int | None = None,
) -> list[Hook]:
    """`mass` and `mass_core`, [row, head, span]: attention on each (start, stop) run of positions.

    Core leaves out the first `sink` positions and each row's last `local` keys. An empty run yields 0.

    Source: arXiv 2602.11162, eq. 2 (its sink and local sets, whose sizes the paper leaves open).
    """

    def read(layer: int, pattern: Float[Tensor, "batch head query key"]) -> None:
        rows = _rows(pattern)
        n_queries, width = pattern.shape[2:]
        position = torch.arange(width, device=rows.device) + _first(keys, pattern)
        inside = torch.stack([(position >= start) & (position < stop) for start, stop in spans], dim=1)
        query = position[-n_queries:].repeat(pattern.shape[0])
        core = (position >= sink) & (position <= query[:, None] - local)
        put(out, "mass", layer, rows @ inside.to(rows.dtype))
        put(out, "mass_core", layer, (rows * core[:, None]) @ inside.to(rows.dtype))

    return _pattern_hooks(n_layers, read)


def focus(out: Readings, *, n_layers: int, at: Int[Tensor, " focus"], keys: int | None = None) -> list[Hook]:
    """`focus`, float16 [row, head, focus]: attention on each of the positions `at`; 0 where a window hides it."""

    def read(layer: int, pattern: Float[Tensor, "batch head query key"]) -> None:
        column = at.to(pattern.device) - _first(keys, pattern)
        picked = _rows(pattern)[..., column.clamp(min=0)]
        put(out, "focus", layer, (picked * (column >= 0)).half())

    return _pattern_hooks(n_layers, read)


def rows(out: Readings, *, n_layers: int, keys: int | None = None) -> list[Hook]:
    """`rows`, float16 [row, head, key]: whole attention rows over absolute positions. Memory grows with the prompt."""

    def read(layer: int, pattern: Float[Tensor, "batch head query key"]) -> None:
        put(out, "rows", layer, torch.nn.functional.pad(_rows(pattern).half(), (_first(keys, pattern), 0)))

    return _pattern_hooks(n_layers, read)


def outputs(out: Readings, *, n_layers: int) -> list[Hook]:
    """`z`, [row, head, d_head]: head outputs before the output projection."""

    def at(layer: int) -> Hook:
        return sites.z(layer), lambda z, hook: put(out, "z", layer, z.flatten(0, 1).clone())

    return [at(layer) for layer in range(n_layers)]


def hidden(out: Readings, name: str, *, site: str) -> list[Hook]:
    """`name`, float32 [row, d_model]: the residual stream at a hook `site`."""

    def read(tensor: Float[Tensor, "batch query d_model"], hook: Any) -> None:
        put(out, name, 0, tensor.flatten(0, 1).float().clone())

    return [(site, read)]


def capture_hooks(
    out: Readings,
    capture: Capture,
    *,
    n_layers: int,
    keys: int,
    spans: Sequence[tuple[int, int]],
    focus_at: Int[Tensor, " focus"],
    hidden_sites: Mapping[str, str],
) -> list[Hook]:
    """All hooks that `capture` asks for, for one pass that ends at `keys` positions."""
    found = peaks(out, n_layers=n_layers, k=capture.k, keys=keys)
    found += mass(out, n_layers=n_layers, spans=spans, sink=capture.sink, local=capture.local, keys=keys)
    if capture.focus:
        found += focus(out, n_layers=n_layers, at=focus_at, keys=keys)
    if capture.rows:
        found += rows(out, n_layers=n_layers, keys=keys)
    if capture.z:
        found += outputs(out, n_layers=n_layers)
    for name, site in hidden_sites.items():
        found += hidden(out, name, site=site)
    return found


def put(out: Readings, field: str, layer: int, value: Tensor) -> None:
    """Keep one layer's reading of a field."""
    out.setdefault(field, {})[layer] = value


def stack(by_layer: Mapping[int, Tensor]) -> Tensor:
    """[row, head, ...] per layer to one CPU tensor [row, layer, head, ...]."""
    first, *others = (by_layer[layer] for layer in sorted(by_layer))
    # layers of a spread model lie on several devices
    return torch.stack([first, *(value.to(first.device) for value in others)], dim=1).cpu()


def _pattern_hooks(n_layers: int, read: Any) -> list[Hook]:
    def at(layer: int) -> Hook:
        return sites.pattern(layer), lambda pattern, hook: read(layer, pattern)

    return [at(layer) for layer in range(n_layers)]


def _rows(pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "row head key"]:
    # float32 before any sum or comparison: bfloat16 patterns tie near 1/256
    return pattern.transpose(1, 2).flatten(0, 1).float()


def _first(keys: int | None, pattern: Tensor) -> int:
    return 0 if keys is None else first_key(keys, pattern.shape[-1])


def _largest(
    rows: Float[Tensor, "row head key"], k: int
) -> tuple[Float[Tensor, "row head k"], Int[Tensor, "row head k"]]:
    width = rows.shape[-1]
    weight, column = rows.topk(min(k + 1, width))
    # topk leaves the order of equal weights open, and which of them it keeps at the border
    tied: Bool[Tensor, "row head"] = (weight[..., 1:] == weight[..., :-1]).any(-1)
    if tied.any():
        fixed, order = rows[tied].sort(dim=-1, descending=True, stable=True)
        weight[tied], column[tied] = fixed[..., : weight.shape[-1]], order[..., : weight.shape[-1]]
    short = max(k - width, 0)
    pad = torch.nn.functional.pad
    return pad(weight[..., :k], (0, short)), pad(column[..., :k], (0, short), value=-1)
