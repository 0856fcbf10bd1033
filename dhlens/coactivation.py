"""Co-activation: which heads are active at the same steps, more often than the clock of the answer explains.

    found = coactivation(copy_paste(trace))
    found.pairs                                      # one row per pair of heads: phi, lift, intervals, null, p
    found.above()                                    # those that the null does not give
    found = coactivation(score, given=[classes])     # the same, with the class of the copied token explained, too

All answers run on one clock (first words first, the needle's characters in order), and heads that know nothing of each
other meet where the clock sends both. So the null keeps the clock:

1. Keep the heads that are active at enough steps, and inactive at enough, to have a phi at all; the others are counted.
2. Rows of one step form a stratum (samples without steps are one); `given` splits strata further. `within` is the
   correlation of what is left of each head's activity once the mean of every stratum is taken off: phi without the
   clock.
3. Shuffle: each head by itself changes places among the episodes, a whole answer at once, within each stratum. That
   keeps who is active how often at which step, and the runs of each head in time; it forgets with whom.
4. A pair's distance from its null, in standard deviations of the null, against the largest of all pairs in each draw:
   `p` holds the family-wise error over all pairs, those that go together and those that shun each other.

The null moves answers one by one, while answers of one haystack window may share their level of activity. Simulated
with independent heads, 10 windows x 3 answers: where the log-odds of a head spread by 1 over windows, some pair passes
p <= .05 in about a quarter of worlds (.05 without such a spread, .07 with .5). One answer per window avoids that.

Intervals resample whole groups (haystack windows). Cost: seconds at 100 episodes x 40 steps x 50 kept heads, half a
minute at 270. What joins the pairs to clusters is `dhlens.crowds`; what those bind to, `dhlens.bindings`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Float32, Int, Shaped
from scipy.sparse import csr_array

from dhlens.heads import Head, head_name
from dhlens.raster import Raster
from dhlens.scores import Score

_CHUNK = 2_000


@dataclass(frozen=True, eq=False)
class Crowd:
    """The heads that are active often enough, at the measured rows of a score, and how they may be shuffled."""

    score: Score
    rows: Int[np.ndarray, " n"]
    """Int[n]: where each row stands in the score."""
    active: Bool[np.ndarray, "n head"]
    """Bool[n head]: the kept heads only."""
    heads: tuple[Head, ...]
    """The kept heads, by layer and head."""
    left_out: int
    """How many other heads were active at some step."""
    stratum: Int[np.ndarray, " n"]
    """Int[n]: rows among which a shuffle may move a head: those of one step, and of one class of all that is given."""
    episode: Int[np.ndarray, " n"]
    """Int[n]: what is moved as a whole."""
    group: Shaped[np.ndarray, " n"]
    """Str[n]: the independent unit."""

    @classmethod
    def of(
        cls,
        score: Score,
        *,
        given: Sequence[Shaped[np.ndarray, " row"]] = (),
        min_steps: int = 20,
        threshold: float = 0.0,
        answered: bool = True,
    ) -> "Crowd":
        """The heads that are active at `min_steps` rows at least, and inactive at as many.

        Raises:
            ValueError: fewer than 3 heads are; `given` has other rows than the score; see `Raster.of`.
        """
        if bad := [len(labels) for labels in given if len(labels) != len(score.values)]:
            raise ValueError(f"given must label the score's {len(score.values)} rows, got {bad[0]} labels")
        raster = Raster.of(score, threshold=threshold, answered=answered)
        count = raster.active.sum(0)
        kept = np.flatnonzero((count >= min_steps) & (len(raster.rows) - count >= min_steps))
        if len(kept) < 3:
            raise ValueError(
                f"co-activation needs 3 heads that are active at {min_steps} steps at least and inactive at as many, "
                f"got {len(kept)} of {int((count > 0).sum())} in {len(raster.rows)} steps; min_steps= lowers the bar"
            )
        clock = np.zeros_like(raster.step) if score.trace is None else raster.step
        labels = np.stack([clock, *(np.unique(g, return_inverse=True)[1][raster.rows] for g in given)], axis=1)
        stratum = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
        heads = tuple((int(i) // score.shape[1], int(i) % score.shape[1]) for i in kept)
        left_out = int((count > 0).sum()) - len(kept)
        parts = (stratum, raster.episode, raster.group)
        return cls(score, raster.rows, raster.active[:, kept], heads, left_out, *parts)

    def at(self, kept: Bool[np.ndarray, " n"]) -> "Crowd":
        """The same heads at some of the rows."""
        names = ("rows", "active", "stratum", "episode", "group")
        return dataclasses.replace(self, **{name: getattr(self, name)[kept] for name in names})

    @cached_property
    def residual(self) -> Float32[np.ndarray, "n head"]:
        """Float32[n head]: activity less its mean in the stratum."""
        count = np.bincount(self.stratum)[self.stratum]
        member = csr_array((np.ones(len(self.rows)), (self.stratum, np.arange(len(self.rows)))))
        sums = member @ self.active.astype(np.float64)
        return (self.active - sums[self.stratum] / count[:, None]).astype(np.float32)

    @cached_property
    def within(self) -> Float[np.ndarray, "head head"]:
        """Float[head head]: correlation within strata; 0 for a head that the strata explain wholly."""
        products = (self.residual.T @ self.residual).astype(np.float64)
        width = np.sqrt(products.diagonal())
        size = np.outer(width, width)
        out = np.divide(products, size, out=np.zeros_like(products), where=size > 1e-9)
        np.fill_diagonal(out, 1.0)
        return out

    @cached_property
    def phi(self) -> Float[np.ndarray, "head head"]:
        """Float[head head]: the plain phi coefficient."""
        return np.corrcoef(self.active.T)

    @cached_property
    def _table(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, "stratum episode"]]:
        """Which episode each row is of, and the row of each episode in each stratum; -1 for none."""
        unit = np.unique(self.episode, return_inverse=True)[1]
        table = np.full((self.stratum.max() + 1, unit.max() + 1), -1)
        table[self.stratum, unit] = np.arange(len(unit))
        return unit, table

    def sources(self, rng: np.random.Generator, columns: int) -> Int[np.ndarray, "n column"]:
        """For each row the one whose activity it gets, when answers change places within strata; columns by themselves.

        One partner for a whole answer; where that one has no row in the stratum its own partner, and so on. So every
        row is given away once, and runs in time break no oftener than they must.
        """
        unit, table = self._table
        partner = rng.permuted(np.tile(np.arange(table.shape[1])[:, None], columns), axis=0)
        column, stratum = np.arange(columns), self.stratum[:, None]
        single = (table >= 0).sum(1)[self.stratum] == 1
        donor = np.where(single[:, None], unit[:, None], partner[unit])
        out = table[stratum, donor]
        while (missing := out < 0).any():
            row, which = missing.nonzero()
            donor[missing] = partner[donor[missing], column[which]]
            out[missing] = table[self.stratum[row], donor[missing]]
        return out

    def shuffles(self, draws: int, *, seed: int) -> Iterator["Crowd"]:
        """Every head moved among the episodes by itself, within strata, `draws` times."""
        rng = np.random.default_rng(seed)
        for _ in range(draws):
            source = self.sources(rng, len(self.heads))
            yield dataclasses.replace(self, active=np.take_along_axis(self.active, source, axis=0))


@dataclass(frozen=True, eq=False)
class Coactivation:
    """Every pair of the kept heads beside its null."""

    crowd: Crowd
    pairs: pd.DataFrame
    """a, b (heads), n_both (steps), phi, low, high (95 % over groups), phi_null with its 95 % band, within with low and
    high, lift with low and high, lift_null, z (null standard deviations) and p (family-wise)."""
    null: Float32[np.ndarray, "draw pair"]
    """Float32[draw pair]: `within` of each draw, pairs in the order of `pairs`."""

    def above(self, alpha: float = 0.05) -> pd.DataFrame:
        """The pairs that go together more than in the null, strongest first."""
        found = self.pairs.loc[(self.pairs["p"] <= alpha) & (self.pairs["z"] > 0)]
        return found.sort_values("within", ascending=False, ignore_index=True)

    def below(self, alpha: float = 0.05) -> pd.DataFrame:
        """The pairs that go together less than in the null, strongest first: one stands in for the other."""
        found = self.pairs.loc[(self.pairs["p"] <= alpha) & (self.pairs["z"] < 0)]
        return found.sort_values("within", ignore_index=True)


def coactivation(
    score: Score,
    *,
    given: Sequence[Shaped[np.ndarray, " row"]] = (),
    min_steps: int = 20,
    threshold: float = 0.0,
    answered: bool = True,
    draws: int = 500,
    n_boot: int = 1000,
    seed: int = 0,
) -> Coactivation:
    """Which pairs of heads are active together.

    Args:
        score: heads above `threshold` are active.
        given: labels of the score's rows (class of the copied token, depth, ...) that the null keeps beside the step.
        min_steps: steps at which a head must be active, and inactive, to be looked at.
        threshold: activity is a value above this.
        answered: leave out episodes that were judged wrong.
        draws: shuffles; a p-value cannot fall below 1 / (draws + 1).
        n_boot: bootstrap resamples of groups.
        seed: of both.

    Raises:
        ValueError: see `Crowd.of`; no draws.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    crowd = Crowd.of(score, given=given, min_steps=min_steps, threshold=threshold, answered=answered)
    i, j = np.triu_indices(len(crowd.heads), 1)
    null = np.stack([c.within[i, j] for c in crowd.shuffles(draws, seed=seed)]).astype(np.float32)
    z, p = family_wise(crowd.within[i, j], null)
    table = pd.DataFrame({"a": [head_name(crowd.heads[k]) for k in i], "b": [head_name(crowd.heads[k]) for k in j]})
    rate = crowd.active.mean(0)
    table["n_both"] = (crowd.active[:, i] & crowd.active[:, j]).sum(0)
    # under shuffles within strata phi and lift are linear in `within`: rates, and what strata share, stay
    slope = np.outer(*[np.sqrt((crowd.residual**2).mean(0) / (rate * (1 - rate)))] * 2)[i, j]
    base = crowd.phi[i, j] - slope * crowd.within[i, j]
    odds = np.outer(*[np.sqrt((1 - rate) / rate)] * 2)[i, j]
    spread = base + slope * np.stack([null.mean(0), *np.quantile(null, (0.025, 0.975), axis=0)])
    ends = _intervals(crowd, i, j, seed=seed, n_boot=n_boot)
    table = table.assign(phi=crowd.phi[i, j], phi_low=ends["phi"][0], phi_high=ends["phi"][1])
    table = table.assign(phi_null=spread[0], phi_null_low=spread[1], phi_null_high=spread[2])
    table = table.assign(within=crowd.within[i, j], within_low=ends["within"][0], within_high=ends["within"][1])
    lift = table["n_both"] * len(crowd.rows) / (crowd.active.sum(0)[i] * crowd.active.sum(0)[j])
    table = table.assign(lift=lift, lift_low=ends["lift"][0], lift_high=ends["lift"][1])
    return Coactivation(crowd, table.assign(lift_null=1 + odds * spread[0], z=z, p=p), null)


def family_wise(
    value: Float[np.ndarray, " test"], null: Float[np.ndarray, "draw test"] | Float32[np.ndarray, "draw test"]
) -> tuple[Float[np.ndarray, " test"], Float[np.ndarray, " test"]]:
    """Distance of each value from its null, in the null's standard deviations, and the two-sided p of all at once.

    For `p` the values count as one more draw, so that it is exact however few there are. A value whose null never moves
    has distance 0.

    Source: Westfall and Young 1993, single step, with values set on one scale.
    """
    every = np.vstack([value, null]).astype(np.float64)
    largest = np.abs(_standard(every, every)).max(1)
    own = np.abs(_standard(value, every))
    return _standard(value, null), (largest >= own[:, None] - 1e-9).mean(1)


def _standard(x: np.ndarray, null: np.ndarray) -> np.ndarray:
    width = null.std(0, dtype=np.float64)
    out = np.zeros(x.shape)
    return np.divide(x - null.mean(0, dtype=np.float64), width, out=out, where=np.broadcast_to(width > 1e-9, x.shape))


def _intervals(
    crowd: Crowd, i: np.ndarray, j: np.ndarray, *, seed: int, n_boot: int
) -> dict[str, Float[np.ndarray, "2 pair"]]:
    """Percentiles over resampled groups of phi, within (strata means as found) and lift; NaN below two groups."""
    names, code = np.unique(crowd.group, return_inverse=True)
    out = {name: np.full((2, len(i)), np.nan) for name in ("phi", "within", "lift")}
    if len(names) < 2:
        return out
    members = [code == g for g in range(len(names))]
    weights = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), n_boot)
    n = (weights @ np.bincount(code))[:, None]
    parts = [crowd.active[rows].astype(np.float64) for rows in members]
    ones = weights @ np.stack([part.sum(0) for part in parts])
    both = np.stack([(part.T @ part)[i, j] for part in parts])
    squares = [crowd.residual[rows].T @ crowd.residual[rows] for rows in members]
    power = weights @ np.stack([s.diagonal() for s in squares])
    shared = np.stack([s[i, j] for s in squares])
    for start in range(0, len(i), _CHUNK):
        at = slice(start, start + _CHUNK)
        a, b, ab = ones[:, i[at]] / n, ones[:, j[at]] / n, weights @ both[:, at] / n
        with np.errstate(divide="ignore", invalid="ignore"):
            values = {
                "phi": (ab - a * b) / np.sqrt(a * (1 - a) * b * (1 - b)),
                "within": weights @ shared[:, at] / np.sqrt(power[:, i[at]] * power[:, j[at]]),
                "lift": ab / (a * b),
            }
        for name, value in values.items():
            finite = pd.DataFrame(np.where(np.isfinite(value), value, np.nan))
            out[name][:, at] = finite.quantile([0.025, 0.975]).to_numpy()
    return out
