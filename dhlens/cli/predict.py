"""`dhlens predict`: what the state at a step says of the heads, from finished scans."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dhlens.cli import options as o
from dhlens.cli.show import say


def predict(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of finished scans of one model; several are taken together.")
    ],
    on: Annotated[
        list[Path] | None, typer.Option(help="Another scan to be forecast by these probes; may be given repeatedly.")
    ] = None,
    lags: Annotated[str, typer.Option(help="Steps ahead, comma-separated.")] = "0,1,2,3,4,5,6,7,8,9,10",
    kinds: Annotated[str, typer.Option(help="linear, mlp; the probes of the first are saved.")] = "linear,mlp",
    preset: Annotated[str, typer.Option(help="small, or paper: its sizes and schedule, for much data.")] = "small",
    site: Annotated[str, typer.Option(help="The hidden state that is read: final, resid_3, ...")] = "final",
    sweep: Annotated[str, typer.Option(help="Lags at which the layers are compared.")] = "0,1,4",
    controls: Annotated[
        str, typer.Option(help="Partialled out in a second set of correlations: step, fed, next, target; or none.")
    ] = "step,fed,next",
    draws: Annotated[int, typer.Option(help="Of each null.")] = 20,
    absent: Annotated[
        int, typer.Option(help="Besides, ask this many questions with the needle taken away, for the monitor.")
    ] = 0,
    seed: o.Seed = 0,
    out: o.Out = Path("runs/predict"),
    device: o.Device = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Correlate states with heads, forecast heads from states, save the probes, and watch for wrong answers."""
    from dhlens.recipes.prediction import run_study
    from dhlens.scores import copy_paste, reasoning_mass
    from dhlens.study import Study
    from dhlens.trace import Trace
    from dhlens.weights import load_tokenizer, resolve

    steps, swept = o.numbers("lags", lags, int), o.numbers("sweep", sweep, int)
    chosen: Any = o.some_of("kinds", kinds, ("linear", "mlp"))
    partial = () if controls == "none" else o.some_of("controls", controls, ("step", "fed", "next", "target"))
    o.one_of("preset", preset, {"small": 0, "paper": 0})
    others = {other.name: _trace(other) for other in on or []}
    if len(others) < len(on or []):
        raise ValueError("the folders of --on must differ in their last name, which stands in the tables")
    facts = _over_facts([*runs, *(on or [])])
    trace = Trace.pool([_trace(run) for run in runs]) if len(runs) > 1 else _trace(runs[0])
    if facts and absent:
        raise ValueError("--absent takes needles away, and these runs are of questions over documents")
    if not 0 <= absent <= len(trace.episodes):
        raise ValueError(f"--absent must lie within 0..{len(trace.episodes)}, the episodes of the runs, got {absent}")
    progress = not (quiet or as_json)
    study = Study(
        trace=trace,
        scoring=reasoning_mass if facts else copy_paste,
        on=others,
        lags=steps,
        kinds=chosen,
        preset=preset,
        site=site,
        sweep=swept,
        controls=partial,
        draws=draws,
        tokenizer=load_tokenizer(resolve(trace.card.model), revision=trace.card.revision),
        absent=(lambda: _absent(trace, absent, seed=seed, device=device, progress=progress)) if absent else None,
        absent_key=f"{absent}, seed {seed}" if absent else "",
        seed=seed,
        device=device or "cpu",
        # what heads look at is asked, not whether the answer is right
        answered=not facts,
    )
    result = run_study(study, out=out, progress=progress)
    say(result, out, as_json)


def _over_facts(runs: list[Path]) -> bool:
    """Whether the runs are of questions over documents; else of needles."""
    from dhlens.store import Run

    kinds = {run: Run.read(run).card.settings.get("recipe", "scan") for run in runs}
    for run, kind in kinds.items():
        if kind not in ("scan", "reason"):
            raise ValueError(f"states are read from scans (dhlens scan --out RUN), and {run} holds: {kind}")
    if len(set(kinds.values())) > 1:
        raise ValueError("needle scans and scans over documents have other scores: predict one kind at a time")
    return kinds[runs[0]] == "reason"


def _trace(folder: Path) -> Any:
    from dhlens.recipes import Reasoning, Scan
    from dhlens.store import Run

    of_facts = Run.read(folder).card.settings.get("recipe") == "reason"
    return (Reasoning if of_facts else Scan).load(folder).trace


def _absent(trace: Any, n: int, *, seed: int, device: str | None, progress: bool) -> Any:
    """The model's answers to `n` questions of the trace, evenly spread, whose needle is taken away."""
    import torch

    from dhlens.engine import observe
    from dhlens.model import load
    from dhlens.reads import Capture
    from dhlens.tasks.absent import absent

    asked = [trace.episodes[i * len(trace.episodes) // n] for i in range(n)]
    card = trace.card
    model = load(card.model, dtype=getattr(torch, card.dtype), device=device, revision=card.revision)
    kept: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in trace.card.settings["capture"].items()}
    return observe(
        model,
        [absent(model.tokenizer, e, seed=seed) for e in asked],
        max_new_tokens=trace.card.settings.get("max_new_tokens", 48),
        capture=Capture(**kept),
        progress=progress,
    )
