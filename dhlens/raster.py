"""Rasters: which heads were active at which step, and how alike the steps of an episode are.

`dhlens.dynamics` and its nulls are functions of a `Raster`. Cost: one byte per step and head, and one small matrix
product per episode for the Jaccard of all its pairs of steps.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Num, Shaped
from scipy.stats import entropy

from dhlens.scores import Score


@dataclass(frozen=True, eq=False)
class Raster:
    """The active heads of the measured rows; rows of a sequence stand together, in step order."""

    active: Bool[np.ndarray, "n heads"]
    """Bool[n heads]: heads flattened, layer by layer."""
    rows: Int[np.ndarray, " n"]
    """Int[n]: where each row stands in the score."""
    sequence: Int[np.ndarray, " n"]
    """Int[n]: rows of one sequence follow each other in time: the episode; 0 for all samples of a traceless score."""
    step: Int[np.ndarray, " n"]
    """Int[n]: time within the sequence."""
    episode: Int[np.ndarray, " n"]
    """Int[n]: index of the episode in the score's trace; without steps each sample is its own episode."""
    group: Shaped[np.ndarray, " n"]
    """Str[n]: the independent unit."""

    @classmethod
    def of(cls, score: Score, *, threshold: float = 0.0, answered: bool = True) -> "Raster":
        """The heads above `threshold` at the rows that `Score.answer_rows` keeps.

        Raises:
            ValueError: no row is kept.
        """
        kept = score.answer_rows(answered=answered)
        if not kept.any():
            raise ValueError("the score has no answer step to measure: replies are empty, or no row has step >= 0")
        rows = kept.nonzero().flatten().numpy()
        active = score.heads(threshold).flatten(1)[kept].numpy()
        group = score.row_groups[rows].astype(str)
        if score.trace is None:
            return cls(active, rows, np.zeros_like(rows), rows, rows, group)
        episode = score.trace.episode.numpy()[rows]
        return cls(active, rows, episode, score.trace.step.numpy()[rows], episode, group)

    @property
    def size(self) -> Int[np.ndarray, " n"]:
        """Int[n]: active heads of each row."""
        return self.active.sum(1)

    def runs(self, of: Shaped[np.ndarray, " n"]) -> Int[np.ndarray, " runs"]:
        """First row of each run of equal entries of `of`, one of the fields above."""
        return np.flatnonzero(np.concatenate([[True], of[1:] != of[:-1]]))

    def place(self) -> Int[np.ndarray, " n"]:
        """Int[n]: how many rows of its own sequence stand before each row."""
        starts = self.runs(self.sequence)
        return np.arange(len(self.rows)) - np.repeat(starts, np.diff(starts, append=len(self.rows)))

    def pairs(self, lag: int) -> Int[np.ndarray, " pair"]:
        """Rows `i` such that row `i + lag` is `lag` steps later in the same sequence."""
        first = np.arange(max(len(self.rows) - lag, 0))
        together = self.sequence[first] == self.sequence[first + lag]
        return first[together & (self.step[first + lag] - self.step[first] == lag)]

    def jaccard(self) -> Float32[np.ndarray, "n place"]:
        """Jaccard of each row with every row of its sequence, by `place`; NaN where both are empty or none is there."""
        out = np.full((len(self.rows), int(self.place().max()) + 1), np.nan, dtype=np.float32)
        for start, rows in self._by_sequence():
            both = rows @ rows.T
            size = rows.sum(1)
            union = size[:, None] + size - both
            block = out[start : start + len(rows), : len(rows)]
            np.divide(both, union, out=block, where=union > 0)
        return out

    def counts(self, of: Shaped[np.ndarray, " n"]) -> Int[np.ndarray, "unit heads"]:
        """How often each head was active in each unit named by `of`, units in sorted order."""
        units, code = np.unique(of, return_inverse=True)
        order = np.argsort(code, kind="stable")
        starts = np.searchsorted(code[order], np.arange(len(units)))
        return np.add.reduceat(self.active[order], starts, axis=0, dtype=np.int64)

    def _by_sequence(self) -> list[tuple[int, np.ndarray]]:
        starts = self.runs(self.sequence)
        parts = np.split(self.active, starts[1:])
        return [(int(start), part.astype(np.float32)) for start, part in zip(starts, parts, strict=True)]


def share_entropy(counts: Num[np.ndarray, "*unit heads"]) -> np.ndarray:
    """Entropy in nats of the heads' shares of all activations; NaN where nothing was active.

    Source: arXiv 2602.11162, A.3, read as p_h = c_h / sum of c: the one reading that its table allows.
    """
    return np.asarray(entropy(counts, axis=-1))


def ever_active(counts: Int[np.ndarray, "*unit heads"]) -> np.ndarray:
    """How many heads were active at all."""
    return np.asarray((counts > 0).sum(-1))
