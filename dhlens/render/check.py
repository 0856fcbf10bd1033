"""What renderers refuse before any work: values of another kind, words without meaning, numbers that cannot be drawn.

A renderer is called by hand in a notebook, where arguments are swapped and forgotten; the messages use its own names.
"""

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args

from jaxtyping import Float, Int
from torch import Tensor

from dhlens.heads import HeadSet, head_name

_KINDS = {Integral: "whole number", Real: "number", Mapping: "mapping", Sequence: "sequence"}


def expect(kind: Any, **values: object) -> None:
    """Refuse values that are no `kind`: a class, or a union of classes and None.

    Raises:
        TypeError: one is something else.
    """
    for name, value in values.items():
        if not isinstance(value, kind):
            kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
            wanted = " or ".join(_named(k) for k in kinds if k is not type(None))
            raise TypeError(f"{name} must be {wanted}, got {_got(value)}")


def texts_only(**values: Any) -> None:
    """Refuse what is no sequence of texts; one text alone is a sequence of letters, and is refused.

    Raises:
        TypeError: one is something else, or holds something else.
    """
    for name, value in values.items():
        if isinstance(value, str) or not isinstance(value, Collection):
            raise TypeError(f"{name} must be a sequence of texts, got {_got(value)}")
        for place, text in enumerate(value):
            if not isinstance(text, str):
                raise TypeError(f"{name} must hold texts only, got {_got(text)} at place {place}")


def heads_of(shape: tuple[int, int], **sets: object) -> None:
    """Refuse what is no HeadSet of a model of this `shape`.

    Raises:
        TypeError: one is something else.
        ValueError: one is of another model shape.
    """
    for name, heads in sets.items():
        if not isinstance(heads, HeadSet):
            raise TypeError(f"{name} must be a HeadSet, got {_got(heads)}")
        if heads.shape != shape:
            raise ValueError(f"{name} must come from {shape} (layers, heads), got {heads.shape}")


def one_of(words: Sequence[str], **values: object) -> None:
    """Refuse what is none of `words`.

    Raises:
        ValueError: one is not.
    """
    for name, value in values.items():
        if value not in words:
            raise ValueError(f"{name} must be {' or '.join(map(repr, words))}, got {value!r}")


def finite(name: str, values: Float[Tensor, "n ..."], step: Int[Tensor, " n"]) -> None:
    """Refuse NaN and infinity; the second and third axis, where there are some, are layer and head.

    Raises:
        ValueError: there is one; the message says at which step and head.
    """
    if bool(values.isfinite().all()):
        return
    row, *rest = (~values.isfinite()).nonzero()[0].tolist()
    found = str(float(values[(row, *rest)])).replace("nan", "NaN")
    head = f", {head_name((rest[0], rest[1]))}" if rest else ""
    raise ValueError(f"{name} must be finite, got {found} at step {int(step[row])}{head}")


def _named(kind: type) -> str:
    name = _KINDS.get(kind, kind.__name__)
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def _got(value: object) -> str:
    return "None" if value is None else type(value).__name__
