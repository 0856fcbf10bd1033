"""Edits: what happens to a head that is taken away or changed.

Each factory returns an `Edit`, a function of heads that returns ordinary TransformerLens hooks:

    with model.hooked.hooks(fwd_hooks=dh.zero()(static)):
        model.hooked(tokens)                              # every row of the pass, TransformerLens' convention

`heads` is one HeadSet, or one per row, so that many experiments share a pass. Which rows an edit acts on (decode rows,
the prompt too) is for the caller to say: `rows` picks them, rows of a batch one after the other. Edits compose in list
order. Hooks return new tensors and never write into what they were given. `on_z` and `on_scores` make your own.

`zero` is the default. `uniform` is what the authors of the static study did (arXiv 2404.15574): attention spread
evenly, so the head puts out the mean of the values it can see. `mean`, `resample` and `patch` put in what the same
head said elsewhere, from a trace that was observed with `Capture(z=True)`. `hide` takes keys away, not heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dhlens import hooks as sites
from dhlens.card import digest
from dhlens.heads import HeadSet
from dhlens.hooks import Hook, first_key
from dhlens.trace import Trace

Heads = HeadSet | Sequence[HeadSet]
Rows = Sequence[int] | None


@runtime_checkable
class Edit(Protocol):
    """What to do to heads, as hooks."""

    def __call__(
        self,
        heads: Heads,
        *,
        rows: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
        keys: int | None = None,
    ) -> list[Hook]:
        """Hooks that edit `heads`.

        Args:
            heads: one set for all rows, or one for each of `rows`.
            rows: rows of the pass, batch-major; None for all of them.
            steps: the generation step of each row, for edits that put in what a trace holds for that step.
            keys: positions fed once the pass is over, as for reads; None where patterns are as wide as the sequence.
        """
        ...


def zero() -> Edit:
    """The head puts out nothing."""
    return on_z("zero", lambda z, chosen, layer: z.masked_fill(chosen[..., None], 0))


def mean(reference: Trace) -> Edit:
    """The head puts out its mean over the answer rows of `reference`.

    Raises:
        ValueError: the trace holds no head outputs, or no answer row.
    """
    z = _outputs(reference)[reference.answer_rows()]
    if not len(z):
        raise ValueError("a mean needs at least one answer row in the reference, got none")
    means = z.float().mean(0)

    def put(z: Tensor, chosen: Tensor, layer: int) -> Tensor:
        return torch.where(chosen[..., None], means[layer].to(z), z)

    return on_z("mean", put, shape=means.shape, key=digest(means))


def resample(source: Trace, *, seed: int) -> Edit:
    """The head puts out what it put out at the same step of an episode of `source`, drawn for every step.

    Whatever else is in the pass, a step draws the same episode. Steps past the end of every answer take last rows.

    Raises:
        ValueError: the trace holds no head outputs or no answer row; at the call: `steps` is missing.
    """
    z = _outputs(source)

    def drawn(step: int) -> int:
        # a generator of the step's own, so that neither order nor company changes the draw
        return int(np.random.default_rng([seed, step]).choice(_at_step(source, step)))

    return _from_rows("resample", z, lambda steps: [drawn(step) for step in steps], key=f"seed {seed}, {digest(z)}")


def patch(source: Trace) -> Edit:
    """The head puts out what it put out at the same step of `source`, the trace of one episode (a counterfactual twin).

    Steps past the end of its answer take its last row.

    Raises:
        ValueError: the trace holds no head outputs, no answer row or several episodes; at the call: `steps` is missing.
    """
    if len(source.episodes) != 1:
        raise ValueError(f"a patch comes from the trace of one episode, got {len(source.episodes)}")
    z = _outputs(source)
    return _from_rows("patch", z, lambda steps: [_at_step(source, step)[0] for step in steps], key=digest(z))


def uniform() -> Edit:
    """The head attends evenly to all keys that its row can see.

    Source: the released code of arXiv 2404.15574, whose masking sets the scores before the softmax to 0.
    """

    def even(scores: Tensor, chosen: Tensor, keys: int | None) -> Tensor:
        return torch.where(chosen[..., None] & _visible(scores), torch.zeros_like(scores), scores)

    return on_scores("uniform", even)


def hide(positions: Sequence[int]) -> Edit:
    """The head cannot see these key positions; its attention goes to the others.

    Raises:
        ValueError: no position is given, or one is negative; in the pass: a row would see nothing.
    """
    if not len(positions) or min(positions) < 0:
        raise ValueError(f"hide needs key positions of at least 0, got {list(positions)[:5]}")
    wanted = torch.tensor(sorted({int(p) for p in positions}))

    def without(scores: Tensor, chosen: Tensor, keys: int | None) -> Tensor:
        width = scores.shape[-1]
        first = 0 if keys is None else first_key(keys, width)
        gone = torch.isin(torch.arange(first, first + width), wanted).to(scores.device)
        left = (_visible(scores) & ~gone).any(-1)
        if bool((chosen & ~left).any()):
            raise ValueError("hide would leave a row without any key to see; keep one, such as the row's own token")
        return scores.masked_fill(chosen[..., None] & gone, float("-inf"))

    return on_scores("hide", without, key=digest(wanted))


def on_z(name: str, change: Callable[[Tensor, Tensor, int], Tensor], *, shape: Any = None, key: str = "") -> Edit:
    """An edit of head outputs, the way to one of your own: `on_z("half", lambda z, chosen, layer: ...)`.

    Args:
        name: as it stands in tables.
        change: from z [batch query head d_head], chosen (bool [batch query head]) and the layer to the new z.
        shape: (layers, heads) of the model it is made for, where it is made for one, and d_head, where that counts.
        key: what tells it from others of its name: a run's card holds it.
    """

    def edit(heads: Heads, *, rows: Rows = None, steps: Rows = None, keys: int | None = None) -> list[Hook]:
        chosen = _Chosen.of(heads, rows, steps, None if shape is None else shape[:2])

        def at(layer: int) -> Hook:
            def fn(z: Float[Tensor, "batch query head d_head"], hook: Any) -> Tensor:
                return change(z, chosen.rows(layer, z, batch=z.shape[0], query=z.shape[1]), layer)

            return sites.z(layer), fn

        return [at(layer) for layer in chosen.layers()]

    return _named(edit, name, key, shape)


def on_scores(name: str, change: Callable[[Tensor, Tensor, int | None], Tensor], *, key: str = "") -> Edit:
    """An edit of attention scores before the softmax, as `on_z`.

    Args:
        name: as it stands in tables.
        change: from masked scores [batch head query key], chosen (bool [batch head query]) and `keys` (see `Edit`) to
            new scores. A key that cannot be seen has a score near the dtype's least or -inf.
        key: as in `on_z`.
    """

    def edit(heads: Heads, *, rows: Rows = None, steps: Rows = None, keys: int | None = None) -> list[Hook]:
        chosen = _Chosen.of(heads, rows, steps, None)

        def at(layer: int) -> Hook:
            def fn(scores: Float[Tensor, "batch head query key"], hook: Any) -> Tensor:
                named = chosen.rows(layer, scores, batch=scores.shape[0], query=scores.shape[2])
                return change(scores, named.transpose(1, 2), keys)

            return sites.scores(layer), fn

        return [at(layer) for layer in chosen.layers()]

    return _named(edit, name, key)


def check_edit(edit: Any, shape: tuple[int, int], d_head: int) -> None:
    """Refuse what is no edit, or one made for another model, before any pass.

    Raises:
        TypeError: it cannot be called as an edit is.
        ValueError: it was made for other dimensions.
    """
    made_for = getattr(edit, "shape", None)
    if made_for is not None and tuple(made_for) != (*shape, d_head)[: len(made_for)]:
        raise ValueError(
            f"the edit {edit.__name__!r} holds outputs of {tuple(made_for)} (layers, heads, d_head), "
            f"the model has {(*shape, d_head)}"
        )
    try:
        edit(HeadSet([(0, 0)], shape), rows=[0], steps=[0], keys=1)
    except TypeError as error:
        name = getattr(edit, "__name__", type(edit).__name__)
        raise TypeError(
            f"an edit is called with heads, rows=, steps= and keys=, which {name!r} does not take (write dh.zero(), "
            "not dh.zero)"
        ) from error


def _named(edit: Any, name: str, key: str, shape: Any = None) -> Edit:
    """The edit with the name it has in tables, what tells it apart, and what it was made for."""
    edit.__name__, edit.key, edit.shape = name, key, shape
    return edit


def _visible(scores: Tensor) -> Bool[Tensor, "batch head query key"]:
    return scores > torch.finfo(scores.dtype).min / 2


def _outputs(trace: Trace) -> Float[Tensor, "n layer head d_head"]:
    if trace.z is None:
        raise ValueError("the trace holds no head outputs: observe it with Capture(z=True)")
    if not bool((trace.step >= 0).any()):
        raise ValueError("head outputs are taken from generation steps, and the source trace has none")
    return trace.z


def _at_step(trace: Trace, step: int) -> list[int]:
    """Rows at a step; past the last one, rows there."""
    found = (trace.step == min(step, int(trace.step.max()))).nonzero().flatten().tolist()
    if not found:
        raise ValueError(f"the source trace has no row at step {step}; it has steps up to {int(trace.step.max())}")
    return found


@dataclass(frozen=True)
class _Chosen:
    """Head sets as one mask per row, made once for all layers of a pass."""

    masks: Bool[Tensor, "set layer head"]
    at: list[int] | None
    """Rows of the sets; None for one set on every row."""

    @classmethod
    def of(cls, heads: Heads, rows: Sequence[int] | None, steps: Sequence[int] | None, shape: Any) -> "_Chosen":
        """Refuse what does not fit together, before any pass."""
        sets = [heads] if isinstance(heads, HeadSet) else list(heads)
        shapes = {h.shape for h in sets} | ({tuple(shape)} if shape is not None else set())
        if len(shapes) != 1:
            raise ValueError(f"an edit needs head sets of one model shape, got {sorted(shapes) or 'no set'}")
        many = not isinstance(heads, HeadSet)
        for name, given in (("rows", rows), ("steps", steps)):
            if many and given is not None and len(given) != len(sets):
                raise ValueError(f"one head set per row: {name} must hold {len(sets)} entries, got {len(given)}")
        at = list(rows) if rows is not None else list(range(len(sets))) if many else None
        return cls(torch.stack([h.mask() for h in sets]), at)

    def layers(self) -> list[int]:
        """Layers that any set names."""
        return self.masks.any(0).any(-1).nonzero().flatten().tolist()

    def rows(self, layer: int, like: Tensor, *, batch: int, query: int) -> Bool[Tensor, "batch query head"]:
        """Which (batch, query, head) of a pass are named in one layer."""
        out = torch.zeros(batch * query, self.masks.shape[2], dtype=torch.bool)
        out[slice(None) if self.at is None else self.at] = self.masks[:, layer]
        return out.reshape(batch, query, -1).to(like.device)


def _from_rows(
    name: str,
    z: Float[Tensor, "n layer head d_head"],
    rows_of: Callable[[Sequence[int]], list[int]],
    *,
    key: str,
) -> Edit:
    """Each row takes the outputs of one row of a trace, which `rows_of` finds for its step."""

    def edit(heads: Heads, *, rows: Rows = None, steps: Rows = None, keys: int | None = None) -> list[Hook]:
        if steps is None:
            raise ValueError("this edit takes each row from the same step of a trace: say steps=, one per row")
        source = z[rows_of(steps)]

        def change(now: Tensor, chosen: Tensor, layer: int) -> Tensor:
            there = now.flatten(0, 1).clone()
            there[slice(None) if rows is None else list(rows)] = source[:, layer].to(there)
            return torch.where(chosen[..., None], there.reshape(now.shape), now)

        return on_z(name, change, shape=z.shape[1:])(heads, rows=rows, steps=steps, keys=keys)

    return _named(edit, name, key, z.shape[1:])
