"""The parts of a prediction study, each a few tables: what `dhlens.recipes.predict` runs, keeps and puts together.

Every part is a function of a trace alone and can be made again by itself; the order is from the general to the special:
correlations, probes by lag, the same on other runs, the layers, one episode, the monitor of wrong answers.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import pandas as pd

from dhlens.episode import Tokenizer
from dhlens.fitting import fit_probe, parts, training_of
from dhlens.lagged import check_options, lagged_cca
from dhlens.monitor import Unit, monitor
from dhlens.network import Training
from dhlens.pairs import GroupSplit, pair_steps
from dhlens.probe import Kind, Probe, same_model
from dhlens.probe_report import ProbeTables, probe_table
from dhlens.raster import Raster
from dhlens.reasoning import TOP, calibrated
from dhlens.scores import Score, Scoring
from dhlens.trace import Trace, regrouped

_MEMBERS = {"probes": "table"} | {n: n for n in ("contrasts", "heads", "layers", "reliability", "curves", "joint")}
_MONITOR = {"monitor": "table", "monitor_kinds": "kinds", "monitor_roc": "roc"}
SHARES = (0.6, 0.2, 0.2)
"""Groups that train, validate and test; every group is tested once."""

Tables = dict[str, pd.DataFrame]


class Part(NamedTuple):
    """One piece of the study."""

    name: str
    tables: tuple[str, ...]
    """Names of what it makes."""
    make: Callable[[], Tables]


@dataclass(frozen=True, eq=False)
class Study:
    """What is asked of a trace; the fields are arguments of `dhlens.recipes.predict`."""

    trace: Trace
    scoring: Scoring
    on: Mapping[str, Trace]
    lags: tuple[int, ...]
    kinds: tuple[Kind, ...]
    preset: str | Training
    site: str
    sweep: tuple[int, ...]
    controls: tuple[str, ...]
    draws: int
    tokenizer: Tokenizer | None
    absent: Callable[[], Trace] | None
    """Gives the answers to questions without their needle, when the monitor's turn comes."""
    absent_key: str
    """What tells them from others: the run's card holds it."""
    seed: int
    device: str = "cpu"
    """Where probes are trained."""
    answered: bool = True
    """Whether episodes that were judged wrong are left out."""

    def of_separate_windows(self) -> "Study":
        """The same; where another run's windows share text with the trace's own, they count as these."""
        trace, *others = regrouped([self.trace, *self.on.values()])
        return dataclasses.replace(self, trace=trace, on=dict(zip(self.on, others, strict=True)))

    @cached_property
    def score(self) -> Score:
        """Of the trace."""
        return self.scoring(self.trace)

    @cached_property
    def _watched(self) -> Trace:
        """What the monitor looks at."""
        return self.trace if self.absent is None else Trace.pool([self.trace, self.absent()])

    @property
    def ahead(self) -> int:
        """The lag that examples and the monitor take: the nearest that looks ahead."""
        return min((lag for lag in self.lags if lag), default=0)

    def lags_on(self, name: str) -> list[int]:
        """The lags that are not longer than all answers of another run."""
        longest = int(Raster.of(self.scoring(self.on[name]), answered=self.answered).place().max())
        return [lag for lag in self.lags if lag <= longest]

    def problems(self) -> pd.DataFrame:
        """Lags that another run's answers are too short for: part, problem."""
        left = {name: [lag for lag in self.lags if lag not in self.lags_on(name)] for name in self.on}
        rows = [
            (f"on {n}", f"its answers are too short for lags {', '.join(map(str, k))}") for n, k in left.items() if k
        ]
        return pd.DataFrame(rows, columns=["part", "problem"])

    def check(self) -> None:
        """Refuse what cannot be run.

        Raises:
            ValueError: see `lagged.check_options`, `training_of`, `pair_steps`, `Pairs.hidden`, `GroupSplit.folds` and
                `fitting.parts`; the runs belong to different models.
        """
        training_of(self.preset)
        asked: Any = {"draws": self.draws, "controls": self.controls, "answered": self.answered}
        check_options(self.trace, self.score, self.lags, **asked)
        for lag in {*self.lags, *self.sweep}:
            pairs = pair_steps(self.trace, self.score, lag, answered=self.answered)
            for split in self._splits():
                parts(pairs, split)
        for trace in (self.trace, *self.on.values()):
            same_model(self.trace.card, self.trace.shape, trace.card, trace.shape)
            pair_steps(trace, self.scoring(trace), 0, answered=self.answered).hidden(self.site)

    def parts(self) -> Iterator[Part]:
        """The pieces, in order."""
        yield Part("cca", ("cca",), lambda: {"cca": self._cca(())})
        if self.controls:
            yield Part("controlled", ("controlled",), lambda: {"controlled": self._cca(self.controls)})
        for lag in self.lags:
            yield Part(f"lag {lag}", tuple(_MEMBERS), partial(self._probes, lag))
        for name in self.on:
            for lag in self.lags_on(name):
                yield Part(f"on {name}, lag {lag}", ("probes", "transfers"), partial(self._transfer, name, lag))
        if len(self.trace.hidden) > 1:
            for site in self.trace.hidden:
                yield Part(f"at {site}", ("sites",), partial(self._sites, site))
        yield Part("example", ("example",), self._example)
        units: tuple[Unit, ...] = ("answer", "token") if self.tokenizer else ("answer",)
        for unit in units:
            yield Part(f"monitor, {unit}", (*_MONITOR, "problems"), partial(self._monitor, unit))

    def probe(self, lag: int, split: GroupSplit | None = None, *, kind: Kind | None = None) -> Probe:
        """A probe of the first kind, by default on the first split."""
        split = split or self._splits()[0]
        options: Any = {"kind": kind or self.kinds[0], "preset": self.preset, "hidden": self.site, "seed": self.seed}
        options |= {"answered": self.answered}
        return fit_probe(self.trace, self.score, lag=lag, split=split, device=self.device, **options)

    def _splits(self) -> list[GroupSplit]:
        groups = pair_steps(self.trace, self.score, 0, answered=self.answered).groups
        return GroupSplit.folds(groups, SHARES, seed=self.seed)

    def _cca(self, controls: Sequence[str]) -> pd.DataFrame:
        options: Any = {"hidden": self.site, "draws": self.draws, "seed": self.seed, "answered": self.answered}
        return lagged_cca(self.trace, self.score, self.lags, controls=controls, **options)

    def _probes(self, lag: int) -> Tables:
        found = self._measured((lag,), self.kinds, self.site)
        tables = {name: getattr(found, field) for name, field in _MEMBERS.items()}
        return {**tables, "probes": tables["probes"].assign(on="")}

    def _transfer(self, name: str, lag: int) -> Tables:
        found = self._measured((lag,), self.kinds, self.site, on=(self.on[name], self.scoring(self.on[name])))
        return {"probes": found.table.assign(on=name), "transfers": found.contrasts.assign(on=name)}

    def _sites(self, site: str) -> Tables:
        found = self._measured(self.sweep, ("linear",), site).table
        return {"sites": found.loc[found["forecast"] == "linear"].assign(site=site)}

    def _measured(
        self, lags: Sequence[int], kinds: Sequence[Kind], site: str, on: tuple[Trace, Score] | None = None
    ) -> ProbeTables:
        options: Any = {"preset": self.preset, "shares": SHARES, "seed": self.seed, "device": self.device}
        options |= {"answered": self.answered}
        return probe_table(self.trace, self.score, lags=lags, kinds=kinds, hidden=site, on=on, **options)

    def _example(self) -> Tables:
        """An answer of the test groups, the probe's say beside what came; of several the middle one."""
        probe = self.probe(self.ahead)
        pairs = pair_steps(self.trace, self.score, self.ahead, answered=self.answered).of(probe.split.test)
        chosen = sorted(set(pairs.episode.tolist()))
        if not chosen:
            return {"example": pd.DataFrame(columns=["episode", "step", "layer", "head", "probability", "active"])}
        episode = chosen[len(chosen) // 2]
        rows = pairs.episode == episode
        said = probe.predict(pairs.hidden(self.site)[rows]).numpy()
        came = pairs.heads[rows].unflatten(1, self.trace.shape).numpy()
        index = pd.MultiIndex.from_product(
            [pairs.step[rows], range(said.shape[1]), range(said.shape[2])], names=["step", "layer", "head"]
        )
        # of values, as many as the static set are called active
        most = float(min(TOP, said[0].size - 1))
        level = calibrated(self.score, most) if probe.threshold is None else probe.threshold
        active = came.ravel() > (0 if self.score.binary else level)
        table = pd.DataFrame({"probability": said.ravel(), "active": active}, index=index).reset_index()
        return {"example": table.assign(episode=self.trace.episodes[episode].id, lag=self.ahead, threshold=level)}

    def _monitor(self, unit: Unit) -> Tables:
        """Where too few answers are wrong (or right) to tell, the reason stands in `problems`."""
        trace = self._watched
        probes = [self.probe(self.ahead, split, kind="linear") for split in self._splits()]
        try:
            found = monitor(
                trace, self.scoring(trace), probe=probes, unit=unit, tokenizer=self.tokenizer, seed=self.seed
            )
        except ValueError as error:
            none = {name: pd.DataFrame(columns=["unit"]) for name in _MONITOR}
            return {**none, "problems": pd.DataFrame({"part": [f"monitor, {unit}"], "problem": [str(error)]})}
        left = [(f"monitor, {unit}", f"{n} episodes left out: {why}") for why, n in found.left_out.items()]
        problems = pd.DataFrame(left, columns=["part", "problem"])
        return {name: getattr(found, field) for name, field in _MONITOR.items()} | {"problems": problems}
