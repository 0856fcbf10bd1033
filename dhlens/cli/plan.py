"""`dhlens plan`: what observing a model would take, before anything but its config is downloaded."""

import json
from typing import Annotated

import typer

from dhlens.cli import options as o


def plan(
    model: Annotated[str, typer.Argument(help="Name, Hub id, folder, .gguf or config.json.")],
    lengths: o.Lengths = "5000,50000",
    steps: Annotated[int, typer.Option(help="Answer tokens.")] = 48,
    dtype: o.Dtype = "bfloat16",
    quantize: o.Quantize = None,
    device: o.Device = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Instead of --device the size of one elsewhere, as 80GB.")
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Tell what observing a model takes and whether it fits; nothing but its config is downloaded."""
    from dhlens.plan import plan as make

    found = make(
        model,
        o.numbers("lengths", lengths, int),
        steps=steps,
        dtype=o.one_of("dtype", dtype, o.DTYPES),
        quantize=quantize,
        device=device,
        memory=device_memory,
    )
    typer.echo(json.dumps(found.values()) if as_json else str(found))
