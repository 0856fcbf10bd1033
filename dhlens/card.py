"""The run card: where numbers come from. Two runs are comparable, and a run resumable, where `fingerprint()` agrees."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from dhlens.episode import Episode

_TOGETHER = ("model:", "weights_sha256:", "dtype:", "versions.", "settings.capture.")
_PACKAGES = ("dhlens", "torch", "transformers", "transformer-lens", "numpy")


def digest(*values: Any) -> str:
    """A short hash of tensors and texts, for what decides numbers but is too long for a card."""
    found = hashlib.sha256()
    for value in values:
        found.update(value.numpy().tobytes() if isinstance(value, Tensor) else str(value).encode())
    return found.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a number."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


@dataclass(frozen=True)
class RunCard:
    """Origin of a Trace or a run: everything that can change a number, as JSON values."""

    model: str
    """The name the model was loaded by."""
    revision: str | None = None
    """Hub revision, where there is one."""
    weights_sha256: str | None = None
    """Hash of the weight files; of samples of every parameter for a model object or one from the Hub."""
    dtype: str = "float32"
    """Parameter dtype."""
    seed: int | None = None
    """Seed of the task's draws."""
    versions: Mapping[str, str] = field(default_factory=versions)
    """Package versions."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Capture options (sink, local, k, spans, hidden sites), prompt template, generation, masking mode."""
    haystack_sha256: str | None = None
    """Hash of the haystack text."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What happened: rows, low_margin, mismatch, drafted, accepted. Not part of the fingerprint."""

    def with_settings(self, **settings: Any) -> "RunCard":
        """This card with `settings` added or replaced."""
        return dataclasses.replace(self, settings={**self.settings, **settings})

    def with_episodes(self, episodes: Sequence[Episode]) -> "RunCard":
        """This card with what was asked: counts, the task's settings and a hash of every token and span."""
        first, content = episodes[0].meta, hashlib.sha256()
        for e in episodes:
            spans = [str(span) for span in e.spans]
            whole = [e.id, e.tokens.tolist(), e.answer.tolist(), spans, dict(e.meta)]
            content.update(json.dumps(whole, default=str).encode())
        card = self.with_settings(
            episodes=len(episodes),
            episodes_sha256=content.hexdigest(),
            windows=len({e.group for e in episodes}),
            lengths=sorted({e.meta.get("length", len(e.tokens)) for e in episodes}),
            depths=sorted({e.meta["depth"] for e in episodes if "depth" in e.meta}),
            **{key: first.get(key) for key in ("template", "needle", "sentence", "question")},
            **{key: first[key] for key in ("template_kwargs",) if key in first},
        )
        return dataclasses.replace(card, seed=first.get("seed"), haystack_sha256=first.get("haystack_sha256"))

    @classmethod
    def common(cls, cards: Sequence["RunCard"]) -> "RunCard":
        """The card of several runs taken together: what they agree in, and the fingerprints of all as "runs".

        Raises:
            ValueError: one is given twice, or they come from different weights or captured differently.
        """
        first, prints = cards[0], sorted(c.fingerprint() for c in cards)
        if len(set(prints)) < len(prints):
            raise ValueError("a run is given twice, and its steps would count twice")
        for other in cards[1:]:
            apart = [d for d in first.differences(other) if d.startswith(_TOGETHER)]
            if apart:
                raise ValueError(f"runs can only be taken together where model and capture agree; {'; '.join(apart)}")
        agreed = {k: v for k, v in first.settings.items() if all(c.settings.get(k, cls) == v for c in cards)}
        texts, seeds = ({getattr(c, name) for c in cards} for name in ("haystack_sha256", "seed"))
        return dataclasses.replace(
            first,
            haystack_sha256=texts.pop() if len(texts) == 1 else None,
            seed=seeds.pop() if len(seeds) == 1 else None,
            settings={**agreed, "runs": prints},
            counts={},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RunCard":
        """The inverse of `to_dict`."""
        return cls(**data)

    def fingerprint(self) -> str:
        """sha256 over all fields but `counts`."""
        data = {k: v for k, v in self.to_dict().items() if k != "counts"}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def differences(self, other: "RunCard") -> list[str]:
        """One line for each field or setting in which two cards differ, counts aside."""
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        keys = sorted(k for k in {*mine, *theirs} if not k.startswith("counts.") and mine.get(k) != theirs.get(k))
        return [f"{k}: {mine.get(k)!r} here, {theirs.get(k)!r} there" for k in keys]


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return out
