"""`dhlens show`: print a finished run again, two runs of one kind side by side, or write the player of a scan."""

import json
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from dhlens.cli import options as o


def show(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    other: Annotated[
        Path | None, typer.Argument(help="A second run to set beside it; the file to write with --player.")
    ] = None,
    player: o.Player = False,
    episode: o.Episode = "0",
    as_json: o.AsJson = False,
) -> None:
    """Print a run again, two runs side by side with what their settings differ in, or write the player of a scan."""
    if player:
        page = _play(run, other or run / "player.html", episode)
        typer.echo(json.dumps({"player": str(page)}) if as_json else f"player: {page}")
        return
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


def _play(folder: Path, page: Path, episode: str) -> Path:
    """Write the player of one episode of a scan, with the static heads of its report."""
    from dhlens.heads import HeadSet
    from dhlens.render.player import player
    from dhlens.store import Run, load_table, load_trace
    from dhlens.weights import load_tokenizer, resolve

    if page.exists():
        raise ValueError(f"{page} exists: name another file, dhlens show {folder} FILE --player")
    run = Run.read(folder)
    if not (run.finished and (folder / "trace.safetensors").is_file()):
        raise ValueError(f"--player takes the folder of a finished scan, which keeps its trace; {folder} has none")
    trace = load_trace(folder / "trace.safetensors")
    index = _index(episode, [e.id for e in trace.episodes])
    heads = folder / "heads.parquet"
    sets = {}
    if heads.is_file():
        table = load_table(heads).query("in_static_20")
        sets["static"] = HeadSet(table[["layer", "head"]].to_numpy().tolist(), trace.shape)
    tokenizer = load_tokenizer(resolve(run.card.model), revision=run.card.revision)
    return player(trace, tokenizer, sets=sets, episode=index).save(page)


def _index(episode: str, ids: list[str]) -> int:
    """The number of an episode that is given by number or id."""
    if episode in ids:
        return ids.index(episode)
    if not (episode.isdecimal() and int(episode) < len(ids)):
        raise ValueError(f"--episode takes 0 to {len(ids) - 1} or an id such as {ids[0]}, got {episode!r}")
    return int(episode)


def _load(folder: Path) -> Any:
    from dhlens.recipes import Ablation, Circuit, Prediction, Rag, Reasoning, Reranking, Scan
    from dhlens.store import Run

    kinds = {
        "ablate": Ablation,
        "predict": Prediction,
        "rag": Rag,
        "reason": Reasoning,
        "rerank": Reranking,
        "circuit": Circuit,
    }
    return kinds.get(Run.read(folder).card.settings.get("recipe", ""), Scan).load(folder)
