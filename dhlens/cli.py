"""The command line: `dhlens scan` runs the first experiment, `dhlens show` prints a run again, or two runs compared."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

app = typer.Typer(
    help="Find, change, predict and show dynamic retrieval heads.", no_args_is_help=True, pretty_exceptions_enable=False
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DRAFTS: dict[str, bool | str] = {"known": True, "lookup": "lookup", "none": False}


def main() -> None:
    """The entry point: what the user can mend is one line, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        typer.echo(f"dhlens: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("dhlens: stopped; the same command goes on from here", err=True)
        sys.exit(130)


@app.callback()
def _root() -> None:
    """Keep subcommands even while there is only one."""


@app.command()
def scan(
    model: Annotated[str, typer.Option(help="Name, Hub id, folder or .gguf file.")] = "smollm2-135m",
    haystack: Annotated[
        str | None, typer.Option(help="Text file, folder or hub:owner/name; default: Python's own docs.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, comma-separated.")] = "500,1000",
    depths: Annotated[str, typer.Option(help="Where the needle goes, 0 to 1, comma-separated.")] = "0.1,0.5,0.9",
    n: Annotated[int, typer.Option(help="Haystack windows: the independent groups.")] = 5,
    needle: Annotated[str, typer.Option(help="uuid, number or words; or a sentence with {answer}.")] = "uuid",
    question: Annotated[str | None, typer.Option(help="With an own needle sentence.")] = None,
    answer: Annotated[str | None, typer.Option(help="With an own needle sentence.")] = None,
    needles_per_cell: Annotated[int, typer.Option(help="Needles per window, length and depth.")] = 1,
    template: Annotated[str, typer.Option(help="chat, plain, or an own text with {context} and {question}.")] = "chat",
    repeat: Annotated[bool, typer.Option(help="Repeat a haystack that is too short.")] = False,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Most answer tokens.")] = 48,
    draft: Annotated[
        str, typer.Option(help="known, lookup or none: how answers are sped up; never what they are.")
    ] = "known",
    out: Annotated[Path, typer.Option(help="Folder of the run; resumed if it was cut off.")] = Path("runs/scan"),
    workers: Annotated[int, typer.Option(help="Processes, each with its own model.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; default: the best there is.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One machine-readable line.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Hide needles in a haystack, observe every step of the answers, and measure how dynamic the copying heads are."""
    from dhlens.executor import Processes, serial
    from dhlens.model import load
    from dhlens.recipes.detect import Observation
    from dhlens.recipes.detect import scan as run_scan
    from dhlens.tasks import niah
    from dhlens.tasks.haystack import read_haystack

    chosen = _needle(needle, question, answer)
    observation = Observation(max_new_tokens=max_new_tokens, draft=_one_of("draft", draft, _DRAFTS))
    asked, where = _numbers("lengths", lengths, int), _numbers("depths", depths, float)
    executor = serial if workers == 1 else Processes(workers)
    prose = read_haystack(haystack)  # before the model, which takes longer
    loaded = load(model, dtype=_one_of("dtype", dtype, _DTYPES), device=device)
    episodes = niah.episodes(
        loaded.tokenizer,
        prose,
        lengths=asked,
        depths=where,
        n=n,
        needle=chosen,
        seed=seed,
        template=template,
        needles_per_cell=needles_per_cell,
        repeat=repeat,
        max_positions=loaded.max_positions,
    )
    result = run_scan(
        loaded,
        episodes,
        out=out,
        observation=observation,
        seed=seed,
        executor=executor,
        progress=not (quiet or as_json),
    )
    _say(result, out, as_json)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    other: Annotated[Path | None, typer.Argument(help="A second run to set beside it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One machine-readable line.")] = False,
) -> None:
    """Print a run again, or two runs side by side with what their settings differ in."""
    from dhlens.recipes.detect import Scan

    if other is None:
        _say(Scan.load(run), run, as_json)
        return
    first, second = Scan.load(run), Scan.load(other)
    for folder, scan in ((run, first), (other, second)):
        if scan.problem:
            raise ValueError(f"{folder} has no dynamics to compare: {scan.problem}")
    tables = [s.dynamics.table.set_index("metric")[["value", "low", "high"]] for s in (first, second)]
    both = pd.concat(tables, axis=1, keys=[str(run), str(other)])
    differences = first.trace.card.differences(second.trace.card)
    if as_json:
        values = {str(folder): _values(scan) for folder, scan in ((run, first), (other, second))}
        typer.echo(json.dumps({"values": values, "differences": differences}))
        return
    typer.echo(both.to_string(float_format=lambda x: f"{x:,.4f}", na_rep=""))
    typer.echo("\nsettings that differ:\n" + ("\n".join(differences) or "none"))


def _say(result: Any, folder: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "model": result.trace.card.model, **_values(result)}))
        return
    typer.echo(result.summary())
    typer.echo(f"\nreport: {folder / 'report.html'}")


def _values(result: Any) -> dict[str, Any]:
    """Measure to value; those without one (too few groups or heads) are left out."""
    if result.problem:
        return {"problem": result.problem}
    table = result.dynamics.table.dropna(subset="value")
    return dict(zip(table["metric"], table["value"], strict=True))


def _needle(needle: str, question: str | None, answer: str | None) -> Any:
    from dhlens.tasks.needles import NEEDLES, Needle

    if needle in NEEDLES:
        if question or answer:
            raise ValueError(f"--question and --answer go with an own needle sentence, not with {needle!r}")
        return needle
    if not question or not answer:
        raise ValueError(
            f"--needle is {', '.join(NEEDLES)}, or a sentence with --question and --answer; got {needle!r}"
        )
    return Needle(sentence=needle, question=question, answer=answer)


def _one_of(option: str, value: str, known: dict[str, Any]) -> Any:
    if value not in known:
        raise ValueError(f"--{option} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def _numbers(option: str, text: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--{option} takes {kind.__name__} numbers parted by commas, got {text!r}") from None
