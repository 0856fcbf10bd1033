"""`dhlens carryover`: what carries over from needles to questions, contracts, meetings and code, in one table."""

import json
from math import nan
from pathlib import Path
from typing import Annotated, Any

import typer

from dhlens.cli import options as o


def carryover(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Finished scans of questions over facts (--task hotpot, evidence); the first is reference."
        ),
    ],
    niah: Annotated[Path, typer.Option(help="Finished needle scan of the same model.")],
    fit_from: Annotated[
        float, typer.Option(help="Share of a run's groups that heads and threshold are fitted on.")
    ] = 0.5,
    seed: o.Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write the table and the report to.")] = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Set reasoning mass, dynamics, static overlap and probe transfer of several tasks side by side."""
    from dhlens.carryover import MEASURES, carry_over
    from dhlens.recipes import Reasoning
    from dhlens.render import report
    from dhlens.render.carryover import carry_map
    from dhlens.tables import spread

    if out is not None and out.exists():
        raise ValueError(f"{out} exists: results are never written over others")
    if not 0 < fit_from < 1:
        raise ValueError(f"--fit-from must lie between 0 and 1, got {fit_from}")
    if len({run.name for run in runs}) < len(runs):
        raise ValueError("the folders must differ in their last name, which stands in the table")
    needles = o.needle_trace(niah)
    traces = {run.name: Reasoning.load(run).trace for run in runs}
    table = carry_over(traces, niah=needles, fit_from=fit_from, seed=seed, progress=not (quiet or as_json))
    named = table.assign(measure=table["measure"].map(MEASURES.__getitem__))
    chance = named.assign(value=table["chance"], low=nan, high=nan)
    tables = {"measured": spread(named, "measure", "task"), "by chance": spread(chance, "measure", "task")}
    if out is not None:
        caption = "Dots with 95 % intervals over groups of questions; a grey stroke is chance."
        page = report(
            f"What carries over from needles, {needles.card.model}",
            tables={name: wide.reset_index() for name, wide in tables.items()},
            figures={"Tasks side by side": (carry_map(table), caption)},
            card=needles.card,
        )
        out.mkdir(parents=True)
        table.to_csv(out / "carryover.csv", index=False)
        page.save(out / "report.html")
    if as_json:
        values: Any = json.loads(str(table.to_json(orient="records")))
        typer.echo(json.dumps({"folder": None if out is None else str(out), "carryover": values}))
        return
    for name, wide in tables.items():
        typer.echo(f"{name}\n{wide.rename_axis(index=None, columns=None).to_string()}\n")
    if out is not None:
        typer.echo(f"report: {out / 'report.html'}")
