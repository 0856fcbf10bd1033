"""`dhlens show`: print a finished run again, or two runs of one kind side by side."""

import json
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from dhlens.cli import options as o
from dhlens.contrasts import CONDITION


def show(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    other: Annotated[Path | None, typer.Argument(help="A second run to set beside it.")] = None,
    as_json: o.AsJson = False,
) -> None:
    """Print a run again, or two runs side by side with what their settings differ in."""
    if other is None:
        say(_load(run), run, as_json)
        return
    first, second = _load(run), _load(other)
    if type(first) is not type(second):
        raise ValueError(f"{run} and {other} are runs of different commands and have no measures in common")
    differences = _card(first).differences(_card(second))
    if as_json:
        values = {str(run): _values(first), str(other): _values(second)}
        typer.echo(json.dumps({"values": values, "differences": differences}))
        return
    tables = [_measures(str(run), first), _measures(str(other), second)]
    both = pd.concat(tables, axis=1, keys=[str(run), str(other)])
    typer.echo(both.to_string(float_format=lambda x: f"{x:,.4f}", na_rep=""))
    typer.echo("\nsettings that differ:\n" + ("\n".join(differences) or "none"))


def say(result: Any, folder: Path, as_json: bool) -> None:
    """Print what a run found and where its report is."""
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "model": _card(result).model, **_values(result)}))
        return
    typer.echo(result.summary())
    typer.echo(f"\nreport: {folder / 'report.html'}")


def _load(folder: Path) -> Any:
    from dhlens.recipes import Ablation, Scan
    from dhlens.store import Run

    kind = Run.read(folder).card.settings.get("recipe")
    return Ablation.load(folder) if kind == "ablate" else Scan.load(folder)


def _card(result: Any) -> Any:
    return result.card if hasattr(result, "card") else result.trace.card


def _measures(folder: str, result: Any) -> pd.DataFrame:
    """The table that two runs are compared by, with value, low and high."""
    if hasattr(result, "trace"):
        if result.problem:
            raise ValueError(f"{folder} has no dynamics to compare: {result.problem}")
        return result.dynamics.table.set_index("metric")[["value", "low", "high"]]
    if "summary" not in result.tables:
        raise ValueError(f"{folder} has no answers to compare: the untouched model gave no right one")
    return result.tables["summary"].set_index(CONDITION)[["accuracy", "rouge_l", "kept", "kl"]]


def _values(result: Any) -> dict[str, Any]:
    """What was measured, as JSON; measures without a value (too few groups or heads) are left out."""
    if hasattr(result, "trace"):
        if result.problem:
            return {"problem": result.problem}
        table = result.dynamics.table.dropna(subset="value")
        bounded = table.dropna(subset="low")
        intervals = {row.metric: [row.low, row.high] for row in bounded.itertuples()}
        return {**dict(zip(table["metric"], table["value"], strict=True)), "intervals": intervals}
    return {
        name: json.loads(result.tables[name].to_json(orient="records"))
        for name in ("summary", "contrasts", "sweep")
        if name in result.tables
    }
