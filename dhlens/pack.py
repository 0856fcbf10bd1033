"""A Trace as plain values: one dictionary of JSON values and one of named tensors, and back, exactly.

`dhlens.store` writes the two as a safetensors file; use it unless you bring a format of your own. Token rows of
different lengths lie flat, with their lengths beside them; the clean read of a decode nests under "clean.".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dhlens.card import RunCard
from dhlens.episode import Episode, Outcome, Span
from dhlens.trace import Trace

_COLUMNS = [f.name for f in dataclasses.fields(Trace) if f.metadata.get("per_row")]
_CLEAN = "clean."


def pack(trace: Trace) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON values and the tensors of a trace; optional records that it lacks have no tensor."""
    columns = {name: getattr(trace, name) for name in _COLUMNS}
    tensors = {name: column for name, column in columns.items() if column is not None}
    tensors |= {f"hidden.{site}": hidden for site, hidden in trace.hidden.items()}
    tensors |= _flat("prompt", [e.tokens for e in trace.episodes])
    tensors |= _flat("answer", [e.answer for e in trace.episodes])
    tensors |= _flat("generated", [o.tokens for o in trace.outcomes])
    values: dict[str, Any] = {
        "card": trace.card.to_dict(),
        "episodes": [
            {"id": e.id, "spans": [dataclasses.astuple(span) for span in e.spans], "meta": dict(e.meta)}
            for e in trace.episodes
        ],
        "outcomes": [{"text": o.text, "correct": o.correct, "stopped": o.stopped} for o in trace.outcomes],
        "span_names": list(trace.span_names),
        "hidden": list(trace.hidden),
        "clean": None,
    }
    if trace.clean is not None:
        values["clean"], clean = pack(trace.clean)
        tensors |= {_CLEAN + name: tensor for name, tensor in clean.items()}
    return values, tensors


def unpack(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trace:
    """The inverse of `pack`.

    Raises:
        KeyError, TypeError, ValueError: something is missing or does not fit together.
    """
    clean = {name.removeprefix(_CLEAN): tensor for name, tensor in tensors.items() if name.startswith(_CLEAN)}
    columns: dict[str, Any] = {name: tensors[name] for name in _COLUMNS if name in tensors}
    return Trace(
        episodes=tuple(
            Episode(e["id"], tokens, answer, tuple(Span(*span) for span in e["spans"]), e["meta"])
            for e, tokens, answer in zip(
                values["episodes"], _rows("prompt", tensors), _rows("answer", tensors), strict=True
            )
        ),
        outcomes=tuple(
            Outcome(tokens, o["text"], o["correct"], o["stopped"])
            for o, tokens in zip(values["outcomes"], _rows("generated", tensors), strict=True)
        ),
        card=RunCard.from_dict(values["card"]),
        span_names=tuple(values["span_names"]),
        hidden={site: tensors[f"hidden.{site}"] for site in values["hidden"]},
        clean=None if values["clean"] is None else unpack(values["clean"], clean),
        **columns,
    )


def _flat(name: str, rows: Sequence[Int[Tensor, " _"]]) -> dict[str, Tensor]:
    return {
        f"{name}.tokens": torch.cat([*rows]) if rows else torch.empty(0, dtype=torch.long),
        f"{name}.lengths": torch.tensor([len(row) for row in rows], dtype=torch.long),
    }


def _rows(name: str, tensors: Mapping[str, Tensor]) -> Sequence[Int[Tensor, " _"]]:
    return tensors[f"{name}.tokens"].split(tensors[f"{name}.lengths"].tolist())
