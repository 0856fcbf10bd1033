"""`dhlens show`: print a finished run again, or two runs of one kind side by side."""

import json
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from dhlens.cli import options as o


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
    differences = first.card.differences(second.card)
    if as_json:
        values = {str(run): first.values(), str(other): second.values()}
        typer.echo(json.dumps({"values": values, "differences": differences}))
        return
    both = pd.concat([first.measures(), second.measures()], axis=1, keys=[str(run), str(other)])
    typer.echo(both.to_string(float_format=lambda x: f"{x:,.4f}", na_rep=""))
    typer.echo("\nsettings that differ:\n" + ("\n".join(differences) or "none"))


def say(result: Any, folder: Path, as_json: bool) -> None:
    """Print what a run found and where its report is."""
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "model": result.card.model, **result.values()}))
        return
    typer.echo(result.summary())
    typer.echo(f"\nreport: {folder / 'report.html'}")


def _load(folder: Path) -> Any:
    from dhlens.recipes import Ablation, Scan
    from dhlens.store import Run

    kind = Run.read(folder).card.settings.get("recipe")
    return Ablation.load(folder) if kind == "ablate" else Scan.load(folder)
