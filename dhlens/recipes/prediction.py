"""The third experiment: does the state at a step know which heads this step, and the steps to come, will need?

    trace = dh.recipes.Scan.load("runs/walden").trace        # or dh.observe(...): the default capture holds the state
    result = dh.recipes.predict(trace, on={"essays": dh.recipes.Scan.load("runs/essays").trace})
    print(result.summary())
    result.report().save("report.html")
    dh.decode(model, episodes, {"foreseen": dh.Predicted(result.probes[1])})

Everything that is reported comes from haystack windows that were not fitted on, beside nulls (correlations) and
baselines that need no state (probes). With `out=` the run is a folder that is resumed after a kill. No model is needed.
Cost at 80 episodes of a small model on one core: a minute or two per lag with "mlp", a quarter of that without.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from dhlens.card import RunCard
from dhlens.episode import Tokenizer
from dhlens.network import Training
from dhlens.probe import Kind, Probe
from dhlens.render import Report, report
from dhlens.render.foresight import in_words, main_metric
from dhlens.render.predict import predict_pictures
from dhlens.scores import Scoring, copy_paste
from dhlens.store import Run
from dhlens.study import Part, Study, Tables
from dhlens.tables import compact, outcomes, spread
from dhlens.trace import Trace


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a prediction study found."""

    tables: Mapping[str, pd.DataFrame]
    """By name: cca and controlled (`dhlens.lagged_cca`, plain and with `controls` partialled out); probes, contrasts,
    heads, layers, reliability, curves and joint (`dhlens.probe_report.ProbeTables`; probes has besides `on`, the run
    that was forecast, "" for its own); transfers (contrasts on other runs); sites (probes by hidden site); example (one
    answer); monitor, monitor_kinds and monitor_roc (`dhlens.monitor.Monitor`); problems (what could not be measured,
    and why); outcomes (one row per episode)."""
    probes: Mapping[int, Probe]
    """Lag to a probe of the first kind, trained on 60 % of the windows."""
    card: RunCard
    """Where the numbers come from."""
    folder: Path | None = None
    """Where the run lies, if on disk."""

    def notes(self) -> list[str]:
        """What was asked, and what came out, in sentences."""
        episodes = self.tables["outcomes"]
        right, windows = int(np.count_nonzero(episodes["correct"])), episodes["group"].nunique()
        return [f"{right} of {len(episodes)} episodes answered, {windows} windows.", *in_words(self.tables)]

    def summary(self) -> str:
        """Notes and main tables, as text."""
        shown = self._shown().items()
        return "\n\n".join([*self.notes(), *(f"{name}\n{t.to_string(index=False)}" for name, t in shown)])

    def measures(self) -> pd.DataFrame:
        """What two studies are compared by: value, low and high of each forecaster on its own run."""
        probes = self.tables["probes"]
        return probes.loc[probes["on"] == ""].set_index(["metric", "lag", "forecast"]).loc[:, ["value", "low", "high"]]

    def values(self) -> dict[str, Any]:
        """Correlations, probes and monitor as JSON values."""
        texts = {name: self.tables[name].to_json(orient="records") for name in ("cca", "probes", "monitor")}
        return {name: json.loads(text or "[]") for name, text in texts.items()}

    def figures(self) -> dict[str, tuple[Figure, str]]:
        """The pictures of the report, each with its caption; those that have nothing to show are left out."""
        return predict_pictures(self.tables)

    def report(self) -> Report:
        """One self-contained HTML page."""
        shown = {"tables": self._shown(), "figures": self.figures(), "notes": self.notes()}
        return report(f"Predicting the heads of {self.card.model}", **shown, card=self.card, max_rows=100)

    def _shown(self) -> Tables:
        cca, probes = self.tables["cca"], self.tables["probes"]
        cca = cca.loc[cca["top"] == 1].assign(pairing=lambda t: t["pairing"] + ", " + t["reading"])
        found = {"largest canonical correlation, by lag": spread(cca, "pairing", "lag")}
        metric = main_metric(probes)
        for on in probes["on"].unique():
            asked = probes.loc[(probes["metric"] == metric) & (probes["on"] == on)]
            found[f"{metric.replace('auprc', 'AUPRC')}{f' on {on}' if on else ''}, by lag"] = spread(
                asked, "forecast", "lag"
            )
        found = {name: table.rename_axis(columns=None).reset_index() for name, table in found.items()}
        monitor = self.tables["monitor"]
        return found if monitor.empty else {**found, "monitor": compact(monitor, digits=2)}

    @classmethod
    def load(cls, folder: str | Path) -> "Prediction":
        """A finished study from its folder.

        Raises:
            ValueError: no run there, not finished, or not a prediction.
        """
        run = Run.read(folder)
        tables, settings = run.tables(), run.card.settings
        if settings.get("recipe") != "predict":
            raise ValueError(f"{folder} is no prediction: it holds {', '.join(tables)}")
        probes = {lag: Probe.load(_probe_file(run, lag)) for lag in settings["lags"]}
        return cls(tables, probes, run.card, run.folder)


def predict(
    trace: Trace,
    *,
    scoring: Scoring = copy_paste,
    on: Mapping[str, Trace] | None = None,
    lags: Iterable[int] = range(11),
    kinds: Sequence[Kind] = ("linear", "mlp"),
    preset: str | Training = "small",
    site: str = "final",
    sweep: Sequence[int] = (0, 1, 4),
    controls: Sequence[str] = ("step", "fed", "next"),
    draws: int = 20,
    tokenizer: Tokenizer | None = None,
    absent: Trace | None = None,
    seed: int = 0,
    device: str = "cpu",
    answered: bool = True,
    out: str | Path | None = None,
    progress: bool = True,
) -> Prediction:
    """Correlate states with heads, forecast heads from states, and try what that is good for.

    Args:
        trace: observed answers with hidden states; several runs by `Trace.pool`. Layers are compared where it holds
            several sites.
        scoring: from a trace to the score that says which heads are active, or how far.
        on: name to another trace of the same model, to be forecast by probes fitted on the first.
        lags: steps ahead.
        kinds: "linear", "mlp"; the first is kept in `probes`.
        preset: "small", "paper" or a `Training`.
        site: the hidden site of everything but the comparison of layers.
        sweep: lags of the comparison of layers.
        controls: what is partialled out in the table "controlled", of `dhlens.lagged.CONTROLS`; none: no such table.
        draws: of each null of the correlations.
        tokenizer: the model's, for the monitor of single tokens; None measures answers only.
        absent: answers to questions whose needle is absent, for the monitor.
        seed: of splits, probes, nulls and bootstrap.
        device: where probes are trained.
        answered: leave out episodes that were judged wrong.
        out: folder of the run; begun, resumed or, if finished with the same settings, read.
        progress: show a bar.

    Raises:
        ValueError: a trace lacks the site or has answers shorter than a lag; fewer than 4 windows; another model in
            `on` or `absent`; an unknown kind, preset or control; see `store.Run.open`.

    Source: arXiv 2602.11162, sections 5 and A.4-A.5. Held-out readings, nulls, baselines, transfer and monitor
        are ours.
    """
    if absent is not None:
        Trace.pool([trace, absent])  # refuses what does not belong together
    study = Study(
        trace=trace,
        scoring=scoring,
        on=dict(on or {}),
        lags=tuple(lags),
        kinds=tuple(kinds),
        preset=preset,
        site=site,
        sweep=tuple(sweep),
        controls=tuple(controls),
        draws=draws,
        tokenizer=tokenizer,
        absent=None if absent is None else lambda: absent,
        absent_key="" if absent is None else absent.card.fingerprint(),
        seed=seed,
        device=device,
        answered=answered,
    )
    return run_study(study, out=out, progress=progress)


def run_study(study: Study, *, out: str | Path | None = None, progress: bool = True) -> Prediction:
    """`predict`, all its arguments in one.

    Raises:
        ValueError: see `predict`.
    """
    card = _card(study)
    study = study.of_separate_windows()
    _check(study)
    run = None if out is None else Run.open(out, card)
    if run is not None and run.finished:
        return Prediction.load(run.folder)
    with run.alone() if run else nullcontext():
        made = _tables(list(study.parts()), run, progress=progress)
        made["problems"] = _under_each_other([study.problems(), made["problems"]])
        none = pd.DataFrame(columns=["metric", "on"])
        tables = {"transfers": none, **made, "outcomes": outcomes(study.trace)}
        probes = {lag: _probe(study, lag, run) for lag in study.lags}
        result = Prediction(tables, probes, card, run.folder if run else None)
        if run:
            run.finish(result.tables, texts={"report.html": result.report().html, "summary.txt": result.summary()})
    return result


def _check(study: Study) -> None:
    unknown = [kind for kind in study.kinds if kind not in get_args(Kind)]
    doubled = any(len(set(x)) < len(x) for x in (study.kinds, study.lags))
    if not study.kinds or not study.lags or unknown or doubled:
        raise ValueError(f"a study needs kinds of linear and mlp, and lags, each once; got {study.kinds}, {study.lags}")
    if any(not name or {*name} & {*"/\\="} for name in study.on):
        raise ValueError(f"other runs need names without / \\ and =, got {', '.join(map(repr, study.on))}")
    try:
        torch.zeros(1, device=study.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {study.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    study.check()


def _card(study: Study) -> RunCard:
    preset = study.preset if isinstance(study.preset, str) else asdict(study.preset)
    asked: dict[str, Any] = {"recipe": "predict", "of": study.trace.card.fingerprint(), "score": study.score.source}
    asked |= {"on": {name: other.card.fingerprint() for name, other in study.on.items()}, "absent": study.absent_key}
    asked |= {"lags": list(study.lags), "kinds": list(study.kinds), "preset": preset, "site": study.site}
    asked |= {"sweep": list(study.sweep), "controls": list(study.controls), "draws": study.draws}
    asked |= {} if study.answered else {"answered": False}
    return study.trace.card.with_settings(**asked, tokens=study.tokenizer is not None, study_seed=study.seed)


def _tables(parts: Sequence[Part], run: Run | None, *, progress: bool) -> Tables:
    """All parts' tables, those of one name under each other; read where the run has them, else made and kept."""
    made: dict[str, list[pd.DataFrame]] = {}
    bar = tqdm(parts, desc="predict", unit="part", disable=not progress)
    for part in bar:
        bar.set_postfix_str(part.name)
        files = {name: f"{part.name}={name}" for name in part.tables}
        if run and all(run.done(file) for file in files.values()):
            found = {name: run.load_part(file) for name, file in files.items()}
        else:
            found = part.make()
            for name, file in files.items():
                if run and not run.done(file):
                    run.save_part(file, found[name])
        for name, table in found.items():
            made.setdefault(name, []).append(table)
    return {name: _under_each_other(tables) for name, tables in made.items()}


def _under_each_other(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    full = [table for table in tables if len(table)]
    return pd.concat(full, ignore_index=True) if full else tables[0]


def _probe(study: Study, lag: int, run: Run | None) -> Probe:
    if run is None:
        return study.probe(lag)
    file = _probe_file(run, lag)
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        study.probe(lag).save(file)
    return Probe.load(file)


def _probe_file(run: Run, lag: int) -> Path:
    return run.folder / "probes" / f"lag_{lag}.safetensors"
