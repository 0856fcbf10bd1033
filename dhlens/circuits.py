"""A circuit on its own: the block of a step run with some edges live and all others cut.

    step = next(open_steps(model, clean, twin, steps=[5]))
    logits = run_circuits(step, [attribute(step).top(n) for n in (50, 500)], rest="zero")
    step.metric(logits)

In one pass every receiver's input (queries of a head, keys and values of a key/value head, an MLP, the final norm) is
made anew: the sum over all senders before it of what the sender puts out in this very run where the edge is in the
circuit, and of what stands in for it, the rest, where it is not. The rest is what the sender puts out in the
counterfactual, nothing ("zero"), or a mean. With every edge the block gives the clean logits, with none those of the
rest; with all but one it is exact path patching (`dhlens.paths`). Biases that belong to no sender are left as they
are, keys and values stay one per key/value head, and rows outside the block stay frozen (`dhlens.opened`).

What a circuit is worth, at many sizes, is `dhlens.faithfulness`. Cost: circuits are lanes of one batch, each about
two plain passes of the block; in memory one vector of d_model numbers per lane, sender and row.

Source: circuits as sets of edges with the rest ablated, arXiv 2211.00593 (section 4) and arXiv 2304.14997.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from dhlens import hooks as sites
from dhlens.copies import FINAL_IN, Run, add_up, attn_in, head_outputs, mlp_in, mlp_out
from dhlens.edgesets import entries_of, mask_of, of_layer, places_of
from dhlens.hooks import Hook
from dhlens.nodes import Edge
from dhlens.opened import PROJECTED, OpenStep
from dhlens.paths import projected
from dhlens.transplant import KEYS_A_ROW

Rest = Literal["counterfactual", "zero", "mean"]
RESTS: tuple[Rest, ...] = get_args(Rest)
ROWS = 512
"""Rows per pass, if nothing else is said."""


def run_circuits(
    opened: OpenStep,
    circuits: Sequence[Iterable[Edge]],
    *,
    rest: Rest | Float[Tensor, "sender row d_model"] = "counterfactual",
    rows: int = ROWS,
    progress: bool = False,
) -> Float[Tensor, "circuit vocab"]:
    """Logits of the step with the edges of each circuit live and all others cut.

    Args:
        opened: a step of `open_steps`.
        circuits: the edges of each; one may have none.
        rest: what every sender counts for where an edge is cut: "counterfactual", "zero", "mean" (see `means`), or
            vectors of your own.
        rows: rows per pass, over all lanes: bounds the memory.
        progress: show a bar.

    Raises:
        ValueError: no circuit; an edge that the model cannot have, rows that the block has not, or the needle's rows
            named both as a whole and one by one; a rest of another shape; `rows` below 1.
    """
    kept = [tuple(circuit) for circuit in circuits]
    if not kept:
        raise ValueError("there must be at least one circuit, got none")
    places = places_of(opened, chain(*kept))
    masks = [mask_of(opened, places, entries_of(opened, places, circuit)) for circuit in kept]
    bench = Bench.of(opened, places, [rest], rows=rows)
    return torch.cat(list(bench.run([(0, mask) for mask in masks], progress=progress)))


@torch.no_grad()
def means(steps: Iterable[OpenStep]) -> Float[Tensor, "sender row d_model"]:
    """What each sender puts out on average, over clean and counterfactual runs, as a rest.

    At the needle's rows the mean is over all of them, at the step's row over the steps given. With one step alone the
    latter is half-way to the counterfactual: hand in the steps of the whole answer where you can.

    Args:
        steps: of one answer.

    Raises:
        ValueError: no steps, or needles of different lengths.
    """
    total, n, lengths = torch.tensor(0.0), 0, set()
    for step in steps:
        total, n = total + _clean(step) + step.difference / 2, n + 1
        lengths.add(step.n_needle)
        if len(lengths) > 1:
            raise ValueError(f"steps must be of one needle, got needles of {sorted(lengths)} rows")
    if not n:
        raise ValueError("a mean needs at least one step, got none")
    return _level(total / n)


@dataclass(frozen=True, eq=False)
class Bench:
    """A step with what stands in for cut edges, ready to run circuits."""

    opened: OpenStep
    places: tuple[list[int], ...]
    """The rows of each place."""
    rests: Float[Tensor, "rest sender row d_model"]
    """Float[rest sender row d_model]: what each sender counts for where an edge is cut."""
    bases: Float[Tensor, "rest sender row d_model"]
    """Float[rest sender row d_model]: the sum of these up to and with each sender, and of the biases so far."""
    lanes: int
    """Circuits per pass."""

    @classmethod
    @torch.no_grad()
    def of(
        cls, opened: OpenStep, places: Sequence[str], rests: Sequence[Rest | Tensor], *, rows: int = ROWS
    ) -> "Bench":
        """Get ready, by one plain pass.

        Raises:
            ValueError: before it: a rest of unknown name or of another shape, `rows` below 1. After it: heads and MLPs
                that do not add up to what is read.
        """
        check_rests(opened, rests)
        if rows < 1:
            raise ValueError(f"a pass needs at least one row, got {rows}")
        clean = _clean(opened)
        biases = _biases(opened, clean)
        add_up(opened.model, opened.wiring, clean + biases[:, None], opened.entered, size=opened.entered)
        known: dict[str, Callable[[], Tensor]] = {
            "counterfactual": lambda: clean + opened.difference,
            "zero": lambda: torch.zeros_like(clean),
            "mean": lambda: _level(clean + opened.difference / 2),
        }
        found = torch.stack([rest.to(clean) if isinstance(rest, Tensor) else known[rest]() for rest in rests])
        a_lane = max(len(opened.positions), opened.stream.length // KEYS_A_ROW)
        bases = (found + biases[:, None]).cumsum(1)
        return cls(opened, tuple(opened.rows(at) for at in places), found, bases, max(1, rows // a_lane))

    def run(
        self, circuits: Sequence[tuple[int, Bool[Tensor, "place sender receiver"]]], *, progress: bool = False
    ) -> Iterator[Float[Tensor, "circuit vocab"]]:
        """Logits, some circuits at a time: each has its rest, by its place in `rests`, and its edges."""
        n_layers = self.opened.model.n_layers
        with tqdm(total=len(circuits), desc="circuits", unit="circuit", disable=not progress) as bar:
            for begin in range(0, len(circuits), self.lanes):
                which, kept = zip(*circuits[begin : begin + self.lanes], strict=True)
                live = _Pass(self, torch.tensor(which), torch.stack(kept))
                yield self.opened.feed(live.hooks(), joins=[len(which) - 1, *[0] * (n_layers - 1)])
                bar.update(len(which))


def check_rests(opened: OpenStep, rests: Sequence[Rest | Tensor]) -> None:
    """Refuse what cannot stand in for cut edges.

    Raises:
        ValueError: a rest of unknown name or of another shape.
    """
    shape = tuple(opened.difference.shape)
    for rest in rests:
        if isinstance(rest, Tensor) and rest.shape != shape:
            raise ValueError(f"a rest must be of shape {shape} (sender, row, d_model), got {tuple(rest.shape)}")
        if not isinstance(rest, Tensor) and rest not in RESTS:
            raise ValueError(f"a rest is one of {', '.join(RESTS)}, or vectors, got {rest!r}")


class _Pass:
    """One pass: what the senders of every lane have put out so far, less what stands in for them."""

    def __init__(
        self, bench: Bench, which: Int[Tensor, " lane"], kept: Bool[Tensor, "lane place sender receiver"]
    ) -> None:
        self.bench, self.which, self.kept = bench, which, kept
        _, senders, _, d_model = bench.rests.shape
        self.live = [bench.rests.new_empty(len(which), senders, len(rows), d_model) for rows in bench.places]

    def hooks(self) -> list[Hook]:
        """In order of layers."""
        model, wiring = self.bench.opened.model, self.bench.opened.wiring
        found: list[Hook] = [(sites.resid_pre(0), lambda x, hook: self.put(0, x[:, None]))]
        for layer in range(model.n_layers):
            found += self._of_layer(layer)
        n = len(wiring.senders)
        return [*found, (FINAL_IN, lambda x, hook: (self.read(slice(-1, None), 0, n) + self.base(n))[:, 0].to(x))]

    def put(self, first: int, outputs: Float[Tensor, "lane sender row d_model"]) -> None:
        """These senders, from the first on, have put out this."""
        part = slice(first, first + outputs.shape[1])
        for live, rows in zip(self.live, self.bench.places, strict=True):
            live[:, part] = outputs[:, :, rows] - self.bench.rests[self.which, part][:, :, rows]

    def read(self, receivers: slice, start: int, stop: int) -> Float[Tensor, "lane receiver row d_model"]:
        """What live edges from senders start..stop add to the inputs of receivers, beyond the rest."""
        parts = []
        for place, live in enumerate(self.live):
            kept = self.kept[:, place, start:stop, receivers].transpose(1, 2).to(live)
            parts.append((kept @ live[:, start:stop].flatten(2)).unflatten(2, live.shape[2:]))
        return torch.cat(parts, 2)

    def base(self, n_before: int) -> Float[Tensor, "lane 1 row d_model"]:
        """What a receiver behind so many senders reads without any edge."""
        return self.bench.bases[self.which, n_before - 1, None]

    def _of_layer(self, layer: int) -> list[Hook]:
        opened = self.bench.opened
        (sender, into), clean = of_layer(opened.wiring, layer), opened.entered[attn_in(layer)]
        n_before = int(opened.wiring.n_before[into["mlp"]])
        everyone = slice(into["q"].start, into["mlp"].stop)
        shifts: dict[str, Tensor] = {}
        waiting: list[Tensor] = []

        def enter(x: Tensor, hook: object) -> Tensor:
            """The projections start from the clean input, and are shifted from there."""
            parts = self.read(everyone, 0, sender)
            waiting.append(parts[:, -1:])
            moved = parts[:, :-1] + (self.base(sender) - clean)
            for kind in ("q", "k", "v"):
                mine = moved[:, into[kind].start - everyone.start : into[kind].stop - everyone.start]
                heads = torch.arange(mine.shape[1]).repeat(len(mine))
                shift = projected(opened, layer, kind, heads, mine.flatten(0, 1).to(x))
                shifts[kind] = shift.unflatten(0, mine.shape[:2]).transpose(1, 2)
            return clean.expand_as(x)

        def into_mlp(x: Tensor, hook: object) -> Tensor:
            parts = waiting.pop() + self.read(into["mlp"], sender, n_before) + self.base(n_before)
            return parts[:, 0].to(x)

        return [
            (sites.resid_pre(layer), enter),
            *((site(layer), lambda x, hook, kind=kind: x + shifts.pop(kind)) for kind, site in PROJECTED),
            (sites.z(layer), lambda x, hook: self.put(sender, head_outputs(opened.model, layer, x))),
            (mlp_in(layer), into_mlp),
            (mlp_out(layer), lambda x, hook: self.put(sender + opened.wiring.n_heads, x[:, None])),
        ]


def _clean(opened: OpenStep) -> Float[Tensor, "sender row d_model"]:
    """What every sender puts out in the clean run, in single precision at least."""
    outputs = Run.of(opened.model, opened.stream, opened.tokens, opened.positions).outputs
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _level(outputs: Float[Tensor, "sender row d_model"]) -> Float[Tensor, "sender row d_model"]:
    """The needle's rows as their mean."""
    needle = outputs[:, :-1].mean(1, keepdim=True).expand_as(outputs[:, :-1])
    return torch.cat([needle, outputs[:, -1:]], 1)


def _biases(opened: OpenStep, like: Float[Tensor, "sender row d_model"]) -> Float[Tensor, "sender d_model"]:
    """What a layer's output projection adds beside its heads, at the last of them."""
    found = torch.zeros_like(like[:, 0])
    for layer, block in enumerate(opened.model.hooked.blocks):
        sender, _ = of_layer(opened.wiring, layer)
        bias = getattr(block.attn, "b_O", None)
        if bias is not None:
            found[sender + opened.wiring.n_heads - 1] = bias.detach().to(found)
    return found
