"""`dhlens compare`: published head sets and scores side by side, as tables and a picture."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dhlens.cli import options as o


def compare(
    files: Annotated[
        list[Path], typer.Argument(help="Head sets or scores of one model, in any published spelling; at least two.")
    ],
    top_k: Annotated[int, typer.Option(help="Heads that a score stands for.")] = 20,
    shape: Annotated[
        str | None, typer.Option(help="Layers x heads, as 32x32; needed unless a JSON file holds scores of every head.")
    ] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads of a layer, for a TSV.")] = None,
    boot: Annotated[int, typer.Option(help="Draws per interval; 0 for none.")] = 1000,
    seed: o.Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write the tables and the picture to.")] = None,
    as_json: o.AsJson = False,
) -> None:
    """Compare head sets and scores: overlap beside chance, rank correlation, and how sure each score is of itself."""
    from dhlens.compare import compare as comparing
    from dhlens.render.overlap import overlap_map

    if out is not None and out.exists():
        raise ValueError(f"{out} exists: results are never written over others")
    if boot < 0:
        raise ValueError(f"--boot is a number of draws, 0 or more, got {boot}")
    names = _names(files)
    found = comparing(_read(dict(zip(names, files, strict=True)), shape, kv_heads), top_k, seed=seed, n_boot=boot)
    tables = {"methods": found.methods, "overlap": found.overlap, "ranks": found.ranks}
    if out is not None:
        out.mkdir(parents=True)
        for name, table in tables.items():
            table.to_csv(out / f"{name}.csv", index=False)
        measures = ("jaccard", "coverage", "spearman") if len(found.ranks) else ("jaccard", "coverage")
        overlap_map(found, measures).savefig(out / "compare.png", dpi=150)
    if as_json:
        records: dict[str, Any] = {name: json.loads(str(t.to_json(orient="records"))) for name, t in tables.items()}
        records["sets"] = {name: [list(head) for head in heads] for name, heads in found.sets.items()}
        typer.echo(json.dumps({"k": top_k, "folder": None if out is None else str(out), **records}))
        return
    for name, table in tables.items():
        if len(table):
            typer.echo(f"{name}\n{table.to_string(index=False, float_format=lambda x: f'{x:.4f}', na_rep='')}\n")
    if out is not None:
        typer.echo(f"picture: {out / 'compare.png'}")


def _names(files: list[Path]) -> list[str]:
    """What the files are called in the tables: their stems, or their paths where stems are the same."""
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else [str(file) for file in files]
    if len(set(names)) < len(names):
        raise ValueError("a file is given twice")
    return names


def _read(files: dict[str, Path], shape: str | None, kv_heads: int | None) -> dict[str, Any]:
    """Each file as scores or as a set; what does not tell its shape takes that of scores by head."""
    from dhlens.spellings import content_of, read_head_scores, read_head_set

    size = _shape(shape)
    content = {name: content_of(file) for name, file in files.items()}
    found: dict[str, Any] = {}
    for name in sorted(files, key=lambda name: content[name] != "scores"):
        file, missing = files[name], []
        if size is None and content[name] != "scores":
            missing.append("--shape, layers x heads, as 32x32")
        if kv_heads is None and content[name] == "gates":
            missing.append("--kv-heads, KV heads of a layer")
        if missing:
            what = "a set of heads" if content[name] == "set" else "a TSV of KV heads"
            raise ValueError(f"{file} holds {what}: say the model's {', and '.join(missing)}")
        if content[name] == "set":
            assert size is not None
            found[name] = read_head_set(file, size)
        else:
            found[name] = read_head_scores(file, size, n_kv_heads=kv_heads)
        size = size or found[name].shape
    return {name: found[name] for name in files}


def _shape(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    layers, _, heads = text.partition("x")
    if not (layers.isdecimal() and heads.isdecimal()):
        raise ValueError(f"--shape reads like 32x32, layers x heads, got {text!r}")
    return int(layers), int(heads)
