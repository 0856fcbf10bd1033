"""Activations of one run put into another: the passes behind `dhlens.patching`, two ways to run them.

`read` runs the source once and keeps a site's activations. `by_shadows` puts them into shadow rows, one for each
experiment, where every step is patched in its own row; `by_lanes` puts them into lanes of a batch that go on from the
first patched position to the last step that is measured, which any model and any position allows. Both patch every
layer and head of the site, one at a time, and yield the metric part by part.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dhlens.hooks import Hook, HookFn
from dhlens.model import Model
from dhlens.prefix import straddles
from dhlens.shadow import feed_shadows
from dhlens.stream import CHUNK, Stream

KEYS_A_ROW = 32
"""Each lane copies the cache: so many of its keys count as one row of the budget."""

HooksAt = Callable[[int, int], list[Hook]]
"""Hooks for a pass over the positions start..stop."""
Part = tuple[tuple[Tensor | int, ...], Tensor]
"""An index into [step position layer head], and the metrics that belong there."""


@dataclass(frozen=True, eq=False)
class Task:
    """What is patched and measured. A run is a prompt with its answer behind it, and positions count through both."""

    model: Model
    site: Callable[[int], str]
    """Layer to hook name."""
    where: Int[Tensor, "step position patched"]
    """Int[step position patched]: what is patched for each step; along the last axis at once."""
    row: Int[Tensor, " step"]
    """Int[step]: the position whose row predicts the step."""
    right: Int[Tensor, " step"]
    """Int[step]: the token whose logit counts."""
    other: Int[Tensor, " step"]
    """Int[step]: the token whose logit is taken off."""
    length: int
    """Tokens of a run."""

    @property
    def own_rows(self) -> bool:
        """Whether each step is patched in its own row alone."""
        return torch.equal(self.where, self.row[:, None, None])

    def start(self, position: int) -> int:
        """From where to run what changes at `position`: no cache may cross a change of position factors."""
        return 0 if straddles(self.model.rope_breaks, position, self.length) else position

    def block(self, n: int) -> int:
        """How many of `n` rows to run in one pass."""
        return n if self.model.rope_breaks else min(n, CHUNK)

    def metric(
        self, logits: Float[Tensor, "lane row vocab"], row: Int[Tensor, " n"], step: Int[Tensor, " n"]
    ) -> Float[Tensor, "lane n"]:
        """The right logit less the other in each `row` of these, which predicts `step`."""
        right, other = (logits[:, row, token[step]].float().cpu() for token in (self.right, self.other))
        return right - other


def measure(
    task: Task,
    stream: Stream,
    tokens: Int[Tensor, " position"],
    hooks_at: HooksAt,
    *,
    steps: Int[Tensor, " step"] | None = None,
    lanes: int = 1,
) -> Float[Tensor, "lane step"]:
    """Run `tokens` from where the stream is to the last of `steps` (default all) and read off the metric."""
    steps = torch.arange(len(task.row)) if steps is None else steps
    row, metric = task.row[steps], torch.empty(lanes, len(steps))
    rest = tokens[stream.length : int(row.max()) + 1]
    for part in rest.split(task.block(len(rest))):
        start, stop = stream.length, stream.length + len(part)
        inside = (start <= row) & (row < stop)
        first = int(row[inside].min()) if bool(inside.any()) else stop - 1
        logits = stream.feed(part.expand(lanes, -1), hooks=hooks_at(start, stop), keep=stop - first)
        metric[:, inside] = task.metric(logits, row[inside] - first, steps[inside])
    return metric


def read(
    task: Task, stream: Stream, tokens: Int[Tensor, " position"]
) -> tuple[Float[Tensor, "patched layer head d"], Float[Tensor, " step"]]:
    """The site at all patched positions, ascending, and the metric of this run.

    Raises:
        ValueError: the site does not fire.
    """
    at = task.where.unique()
    found: list[list[Tensor]] = [[] for _ in range(task.model.n_layers)]

    def reading(layer: int, rows: Tensor) -> HookFn:
        return lambda x, hook: found[layer].append(_by_head(x)[0, rows])

    def hooks_at(start: int, stop: int) -> list[Hook]:
        rows = at[(start <= at) & (at < stop)] - start
        return [(task.site(layer), reading(layer, rows)) for layer in range(task.model.n_layers)]

    metric = measure(task, stream, tokens, hooks_at)[0]
    for layer, parts in enumerate(found):
        if not parts:
            raise ValueError(f"{task.model.card.model}: {task.site(layer)} does not fire, so it cannot be patched")
    device = found[0][0].device  # layers of a spread model lie on several devices
    return torch.stack([torch.cat(parts).to(device) for parts in found], 1), metric


def by_shadows(
    task: Task, stream: Stream, tokens: Int[Tensor, " position"], found: Tensor, rows: int
) -> Iterator[Part]:
    """Put what was `found` into each step's own row: `rows` shadow rows behind the plain ones in every pass."""
    here, fed = stream.mark(), tokens[stream.length :]
    own = torch.searchsorted(task.where.unique(), task.row)
    for part in torch.cartesian_prod(*map(torch.arange, (len(task.row), *found.shape[1:3]))).split(rows):
        step, layer, head = part.unbind(1)
        sources = (task.row[step] - here.length).tolist()
        first = max(sources) + 1
        at = torch.arange(first, first + len(part))
        hooks = _put(task, layer, torch.zeros_like(layer), at, head, found[own[step], layer, head])
        logits = feed_shadows(task.model, stream, fed, sources, hooks)
        stream.rewind(here)
        yield (step, 0, layer, head), task.metric(logits[None], torch.arange(len(part)), step)[0]


def by_lanes(task: Task, stream: Stream, tokens: Int[Tensor, " position"], found: Tensor, rows: int) -> Iterator[Part]:
    """Put what was `found` into each place and run on from there, as many lanes at a time as `rows` allows."""
    every = torch.cartesian_prod(*map(torch.arange, found.shape[1:3]))
    places: dict[tuple[int, ...], list[int]] = {}
    for step, entry in product(*map(range, task.where.shape[:2])):
        patched = task.where[step, entry].tolist()
        places.setdefault((min(patched), entry, *patched), []).append(step)
    for (first, entry, *patched), steps in sorted(places.items()):
        start, last, at_steps = task.start(first), int(task.row[steps].max()), torch.tensor(steps)
        if stream.length < start:
            stream.feed(tokens[None, stream.length : start])
        a_lane = max(task.block(last + 1 - start), last // KEYS_A_ROW)
        for part in every.split(max(1, rows // a_lane)):
            hooks_at = _lane_hooks(task, torch.tensor(patched), part, found)
            metric = measure(task, stream.fork(len(part)), tokens, hooks_at, steps=at_steps, lanes=len(part))
            yield (at_steps[:, None], entry, part[:, 0], part[:, 1]), metric.T


def _lane_hooks(task: Task, positions: Tensor, part: Int[Tensor, "lane 2"], found: Tensor) -> HooksAt:
    """One (layer, head) per lane, patched at all `positions`."""
    at = task.where.unique()

    def hooks_at(start: int, stop: int) -> list[Hook]:
        inside = positions[(start <= positions) & (positions < stop)]
        lane, position = torch.arange(len(part)).repeat_interleave(len(inside)), inside.repeat(len(part))
        layer, head = part[lane].unbind(1)
        values = found[torch.searchsorted(at, position), layer, head]
        return _put(task, layer, lane, position - start, head, values)

    return hooks_at


def _put(task: Task, layer: Tensor, lane: Tensor, row: Tensor, head: Tensor, values: Tensor) -> list[Hook]:
    """Put each of `values` [n d] into its own place of a pass."""

    def putting(here: Tensor) -> HookFn:
        def fn(x: Tensor, hook: Any) -> Tensor:
            out = x.clone()
            _by_head(out)[lane[here], row[here], head[here]] = values[here].to(x)
            return out

        return fn

    return [(task.site(int(n)), putting(layer == n)) for n in layer.unique()]


def _by_head(x: Tensor) -> Float[Tensor, "batch query head d"]:
    """The residual stream counts as one head."""
    return x if x.ndim == 4 else x[:, :, None]
