"""`dhlens circuit`: are dynamic heads parts of circuits? Clusters, graphs of steps, and what they are worth."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dhlens.cli import options as o
from dhlens.cli.show import say


def circuit(
    model: o.Model = "smollm2-135m",
    haystack: o.Haystack = None,
    lengths: o.Lengths = "1000",
    depths: o.Depths = "0.5",
    n: o.Windows = 10,
    needle: o.Needle = "uuid",
    question: o.Question = None,
    answer: o.Answer = None,
    twin: Annotated[
        str | None, typer.Option(help="With an own needle sentence: an answer of as many tokens, for the twin.")
    ] = None,
    needles_per_cell: o.PerCell = 1,
    template: o.Template = "chat",
    template_kwargs: o.TemplateKwargs = None,
    repeat: o.Repeat = False,
    graphs: Annotated[
        int | None, typer.Option(help="Of how many answered episodes steps are taken apart; default: all.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Most steps of each, in neighbouring pairs over the answer.")] = 6,
    edges: Annotated[int, typer.Option(help="Edges of a step's graph.")] = 200,
    exact: Annotated[int, typer.Option(help="Of these, how many are patched exactly.")] = 100,
    more: Annotated[int, typer.Option(help="Other steps of each, to see which heads feed each other.")] = 12,
    points: Annotated[int, typer.Option(help="Of integrated gradients; 0: the gradient of the clean run.")] = 0,
    sizes: Annotated[str, typer.Option(help="Edges of the circuits that are run alone, comma-separated.")] = (
        "50,200,1000,5000,20000,60000"
    ),
    rests: Annotated[
        str, typer.Option(help="What the rest puts out meanwhile: counterfactual, zero, mean; comma-separated.")
    ] = "counterfactual,zero,mean",
    min_steps: Annotated[int, typer.Option(help="Steps at which a head must be dynamic to have company.")] = 20,
    draws: Annotated[int, typer.Option(help="Shuffles of the clusters' nulls.")] = 500,
    seed: o.Seed = 0,
    max_new_tokens: o.MaxNewTokens = 48,
    out: o.Out = Path("runs/circuit"),
    dtype: o.Dtype = "float32",
    device: o.Device = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Hide needles, see which heads work together, take steps of the answers apart, and say what is a circuit."""
    given = {**locals(), "quantize": None}
    from dhlens.circuits import RESTS
    from dhlens.dissection import Asked
    from dhlens.recipes import circuit as run_circuit
    from dhlens.tasks import niah
    from dhlens.tasks.needles import NEEDLES

    stands_in: Any = o.some_of("rests", rests, RESTS)
    asked = Asked(
        edges=edges,
        exact=exact,
        points=points,
        more=more,
        sizes=o.numbers("sizes", sizes, int),
        rests=stands_in,
        seed=seed,
    )
    if (twin is None) != (needle in NEEDLES):
        raise ValueError("--twin goes with an own needle sentence, which draws no other answer by itself")
    loaded, episodes = o.needle_episodes(given)
    result = run_circuit(
        loaded,
        episodes,
        n_graphs=graphs,
        steps=steps,
        asked=asked,
        min_steps=min_steps,
        draws=draws,
        twin=None if twin is None else lambda e: niah.twin(loaded.tokenizer, e, seed=seed, answer=twin),
        max_new_tokens=max_new_tokens,
        seed=seed,
        out=out,
        progress=not (quiet or as_json),
    )
    say(result, out, as_json)
    if not as_json:
        typer.echo(f"time-lapse: {out / 'lapse.html'}")
