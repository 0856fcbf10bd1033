"""Lagged CCA: how much of the heads' pattern at step n + k can be read linearly from the state at step n.

    print(dh.lagged_cca(trace, dh.copy_paste(trace)))

1. On the training groups: standardise the states and keep 95 % of their variance by PCA; scale heads to 0..1 and keep
   99 %, which drops those that never change. Real pairs and nulls share this, so they have the same components.
2. CCA of the pairs (n, n + k), after the controls, if any, are partialled out of both sides.
3. Correlate both projections on the rows that were fitted (in sample, as the paper does) and on groups that were not
   (held out, every group once). In-sample numbers grow with the number of components and say little by themselves.
4. The same with other heads for the same states (`dhlens.pairs`): what chance, an answer's habits and the mere clock
   give. What the states say beyond the clock is what held-out real pairs have over held-out `step_aligned` ones.

Cost: half a minute for 3,000 steps, 600 dimensions and 11 lags; it grows with `draws`, and with d_model in the PCA.
For a prediction rather than a correlation, and for baselines of other kinds, use `dhlens.fit_probe`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, StandardScaler

from dhlens.cca import CCA, Whitened, correlations, moments
from dhlens.pairs import NULLS, Pairs, pair_steps
from dhlens.scores import Score
from dhlens.trace import Trace

TOPS = (1, 10, 50)
"""Numbers of leading components whose correlations are averaged."""
CONTROLS = ("step", "fed", "next", "target")
"""What can be partialled out: the generation step, and the tokens fed at n, emitted at n, emitted at n + k."""
_RARE = 5
_N_BOOT = 1000


def lagged_cca(
    trace: Trace,
    score: Score,
    lags: Iterable[int] = range(11),
    *,
    hidden: str = "final",
    variance: tuple[float, float] = (0.95, 0.99),
    n_components: int = 50,
    shrink: bool = False,
    controls: Sequence[str] = (),
    folds: int = 5,
    draws: int = 20,
    seed: int = 0,
    answered: bool = True,
) -> pd.DataFrame:
    """Canonical correlations of states and heads, `lags` steps apart, beside their nulls. The defaults are the paper's.

    Args:
        trace: The states.
        score: A score of this trace.
        lags: Steps from the state to the heads.
        hidden: Site of the states.
        variance: Shares of variance that PCA keeps of states and heads.
        n_components: Canonical components at most.
        shrink: Regularise (see `dhlens.cca.cca`).
        controls: Names from `CONTROLS`, to be partialled out of both sides by regression on their classes.
        folds: Parts of the groups that are held out in turn; fewer where a part would have less than 2 groups.
        draws: Random draws of each null.
        seed: Of folds, nulls and bootstrap.
        answered: Leave out episodes that were judged wrong.

    Returns:
        One row per lag, reading, pairing and top: `reading` is in_sample or held_out; `pairing` is real, free_shuffle,
        circular_shift or step_aligned, with controls also controls_only (their classes in place of the states); `value`
        the mean correlation of the leading `top` components (1, 10, 50, or all where there are fewer); `low` and `high`
        of a null the 95 % range of its draws, else held out the 95 % interval over groups with directions as fitted;
        then `rows`, `groups`, `components`, and `x_dims` and `y_dims` after PCA (the fewest of all folds).

    Raises:
        ValueError: see `pair_steps` and `Pairs.hidden`; fewer than 4 groups with pairs at every lag; no head that
            changes; an unknown control; a number out of its range.

    Source: arXiv 2602.11162, A.4, which reads in sample. Holding out, nulls and controls are ours.
    """
    recipe = _Recipe(hidden, variance, n_components, shrink, tuple(controls), draws, folds)
    every = {lag: pair_steps(trace, score, lag, answered=answered) for lag in lags}
    names = _common_groups(every)
    rng = np.random.default_rng(seed)
    parts = np.array_split(rng.permutation(names), min(folds, len(names) // 2))
    splits = {"in_sample": [(names, names)], "held_out": [(np.setdiff1d(names, part), part) for part in parts]}
    tables = []
    for lag, pairs in every.items():
        for reading, parted in splits.items():
            cuts = [_Fold.of(pairs, train, test, recipe) for train, test in parted]
            sums = [fold.read(names, rng) for fold in cuts]
            table = _table({name: np.sum([s[name] for s in sums], axis=0) for name in sums[0]}, reading, seed)
            x_dims, y_dims = np.min([(fold.x.shape[1], fold.y.shape[1]) for fold in cuts], axis=0)
            tables.append(table.assign(groups=len(names), x_dims=x_dims, y_dims=y_dims, lag=lag, reading=reading))
    order = "lag reading pairing top value low high rows groups components x_dims y_dims".split()
    return pd.concat(tables, ignore_index=True).reindex(columns=order)


def check_options(
    trace: Trace,
    score: Score,
    lags: Iterable[int],
    *,
    draws: int = 20,
    controls: Sequence[str] = (),
    answered: bool = True,
) -> None:
    """Refuse what `lagged_cca` would, without its work.

    Raises:
        ValueError: see `lagged_cca`.
    """
    _Recipe("final", (0.95, 0.99), 1, False, tuple(controls), draws, 2)
    _common_groups({lag: pair_steps(trace, score, lag, answered=answered) for lag in lags})


def _common_groups(every: Mapping[int, Pairs]) -> Shaped[np.ndarray, " group"]:
    """The groups that have a pair at every lag."""
    if not every:
        raise ValueError("lags must name at least one lag")
    names = sorted(set[str].intersection(*(set(pairs.groups) for pairs in every.values())))
    if len(names) < 4:
        raise ValueError(
            "CCA holds out 2 groups (haystack windows) at a time and fits on 2 at least: it needs 4 with pairs at "
            f"every lag, got {len(names)} for lags {', '.join(map(str, every))}"
        )
    return np.array(names)


@dataclass(frozen=True)
class _Recipe:
    """The choices that real pairs and nulls share."""

    site: str
    variance: tuple[float, float]
    n_components: int
    shrink: bool
    controls: tuple[str, ...]
    draws: int
    folds: int

    def __post_init__(self) -> None:
        shares = 0 < min(self.variance) <= max(self.variance) < 1
        if not shares or self.n_components < 1 or self.draws < 1 or self.folds < 2:
            raise ValueError(
                "variance must hold shares between 0 and 1; n_components and draws be at least 1, folds 2; got "
                f"{self.variance}, {self.n_components}, {self.draws}, {self.folds}"
            )
        if unknown := set(self.controls) - set(CONTROLS):
            raise ValueError(f"a control is one of {', '.join(CONTROLS)}, got {', '.join(sorted(unknown))}")


@dataclass(frozen=True, eq=False)
class _Fold:
    """The pairs of one lag, some groups to fit and some to read; both sides reduced as the former say."""

    recipe: _Recipe
    train: Pairs
    test: Pairs
    x: Float[np.ndarray, "train x"]
    y: Float[np.ndarray, "train y"]
    x_test: Float[np.ndarray, "test x"]
    y_test: Float[np.ndarray, "test y"]

    @classmethod
    def of(cls, pairs: Pairs, train: np.ndarray, test: np.ndarray, recipe: _Recipe) -> "_Fold":
        """Fit scaling and PCA on the groups of `train`; the same array as `test` means in sample."""
        fitted = pairs.of(train)
        read = fitted if test is train else pairs.of(test)
        x, x_test = (part.hidden(recipe.site).numpy().astype(np.float64) for part in (fitted, read))
        y, y_test = (part.heads.numpy().astype(np.float64) for part in (fitted, read))
        for name, side in (("state", x), ("head's score", y)):
            if not np.ptp(side, axis=0).any():
                raise ValueError(f"no {name} changes over the {len(side)} pairs of lag {pairs.lag} to fit CCA on")
        solver = "covariance_eigh" if len(x) > x.shape[1] else "full"
        states = make_pipeline(StandardScaler(), PCA(recipe.variance[0], svd_solver=solver)).fit(x)
        heads = make_pipeline(MinMaxScaler(), PCA(recipe.variance[1], svd_solver="full")).fit(y)
        reduced = (states.transform(x), heads.transform(y), states.transform(x_test), heads.transform(y_test))
        return cls(recipe, fitted, read, *reduced)

    def read(self, names: np.ndarray, rng: np.random.Generator) -> dict[str, Float[np.ndarray, "unit 6 component"]]:
        """Moments of the projections by pairing: a unit is one of the groups in `names`, or a draw of a null."""
        out = {}
        x, x_test, y, y_test = self.x, self.x_test, self.y, self.y_test
        if self.recipe.controls:
            classes, classes_test = _classes(self.train, self.test, self.recipe.controls)
            fitted = self._join(Whitened.of(classes), y)
            out["controls_only"] = self._by_group(*fitted.project(classes_test, y_test), names)
            x, x_test = _residual(classes, classes_test, x, x_test)
            y, y_test = _residual(classes, classes_test, y, y_test)
        white = Whitened.of(x, shrink=self.recipe.shrink)
        out["real"] = self._by_group(*self._join(white, y).project(x_test, y_test), names)
        for name, null in NULLS.items():
            sums = []
            for _ in range(self.recipe.draws):
                i = null(self.train, rng)
                j = i if self.test is self.train else null(self.test, rng)
                sums.append(self._moments(*self._join(white, y[i]).project(x_test, y_test[j])))
            out[name] = np.stack(sums)
        return out

    def _join(self, x: Whitened, y: np.ndarray) -> CCA:
        return x.join(Whitened.of(y, shrink=self.recipe.shrink), self.recipe.n_components)

    def _moments(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        missing = self.recipe.n_components - a.shape[1]
        return np.pad(moments(a, b), ((0, 0), (0, missing)), constant_values=np.nan)

    def _by_group(self, a: np.ndarray, b: np.ndarray, names: np.ndarray) -> np.ndarray:
        groups = self.test.groups
        return np.stack([self._moments(a[groups == name], b[groups == name]) for name in names])


def _classes(train: Pairs, test: Pairs, controls: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The controls as indicators; classes with less than `_RARE` training pairs are thrown together."""

    def values(pairs: Pairs) -> np.ndarray:
        trace = pairs.trace
        columns = {
            "step": trace.step[pairs.now],
            "fed": trace.fed[pairs.now],
            "next": trace.next_token[pairs.now],
            "target": trace.next_token[pairs.then],
        }
        return np.stack([columns[name].numpy() for name in controls], axis=1)

    encoder = OneHotEncoder(min_frequency=_RARE, handle_unknown="infrequent_if_exist", sparse_output=False)
    encoder.fit(values(train))
    return np.asarray(encoder.transform(values(train))), np.asarray(encoder.transform(values(test)))


def _residual(
    classes: np.ndarray, classes_test: np.ndarray, side: np.ndarray, side_test: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What a regression on the classes, fitted on training rows, leaves of training and test rows."""
    model = LinearRegression().fit(classes, side)
    return side - model.predict(classes), side_test - model.predict(classes_test)


def _table(sums: Mapping[str, Float[np.ndarray, "unit 6 component"]], reading: str, seed: int) -> pd.DataFrame:
    records = []
    for pairing, units in sums.items():
        null = pairing in NULLS
        found = correlations(units if null else units.sum(0, keepdims=True))
        n = len(units)
        weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), _N_BOOT)
        spread = found if null else correlations(np.tensordot(weights, units, 1))
        rows = int(units[0, 0, 0] if null else units[:, 0, 0].sum())
        components = int((~np.isnan(found)).sum(1).min())
        for top in TOPS:
            low, high = np.quantile(np.nanmean(spread[:, :top], axis=1), (0.025, 0.975))
            if reading == "in_sample" and not null:
                low = high = np.nan
            value = np.nanmean(found[:, :top])
            records.append((pairing, top, value, low, high, rows, components))
    return pd.DataFrame(records, columns=["pairing", "top", "value", "low", "high", "rows", "components"])
