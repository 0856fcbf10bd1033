"""`dhlens rag`: let heads choose what the model reads of a long context, and compare who chooses best."""

from pathlib import Path
from typing import Annotated

import typer

from dhlens.cli import options as o
from dhlens.cli.show import say


def rag(
    model: o.Model = "smollm2-135m",
    questions: o.Questions = None,
    n: o.Asked = 20,
    fit: o.Fit = "20",
    length: o.Length = None,
    template: o.Template = "chat",
    template_kwargs: o.TemplateKwargs = None,
    policies: Annotated[str, typer.Option(help="Who chooses, comma-separated; default: all.")] = "",
    k: o.Heads = 5,
    triggers: Annotated[str, typer.Option(help="rind, rind-published, entropy, every; comma-separated.")] = "rind",
    threshold: Annotated[float, typer.Option(help="Of rind.")] = 1.0,
    threshold_published: Annotated[float, typer.Option(help="Of rind-published.")] = 0.1,
    threshold_entropy: Annotated[float, typer.Option(help="Of entropy, in nats.")] = 1.0,
    visibilities: Annotated[
        str, typer.Option(help="How windows are made visible: mask, mask_decode, concat, retrieve; comma-separated.")
    ] = "mask",
    budget: Annotated[int, typer.Option(help="Tokens of the context that a lookup shows.")] = 256,
    reach: Annotated[int, typer.Option(help="Tokens on each side of a peak.")] = 64,
    corpus: Annotated[Path | None, typer.Option(help="Passages for retrieve: records of id, title, text.")] = None,
    gold: Annotated[Path | None, typer.Option(help="Which passages answer which question, for their recall.")] = None,
    broken: o.Broken = "raise",
    seed: o.Seed = 0,
    max_new_tokens: o.MaxNewTokens = 32,
    out: o.Out = Path("runs/rag"),
    dtype: o.Dtype = "float32",
    device: o.Device = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Draft, look up what the draft is unsure of where heads look, and answer from these windows alone."""
    given = dict(locals())
    from dhlens.arms import ELSEWHERE
    from dhlens.choosers import CHOOSERS, reasoning_policies
    from dhlens.cli import fitted
    from dhlens.lookup import VISIBILITIES
    from dhlens.recipes import rag as run_rag
    from dhlens.recipes.passages import CorpusLookup
    from dhlens.triggers import RIND, MeanEntropy, every_sentence
    from dhlens.windows import Windows

    wanted = o.some_of("policies", policies or ",".join(CHOOSERS), CHOOSERS)
    shown = o.some_of("visibilities", visibilities, (*VISIBILITIES, ELSEWHERE))
    known = {
        "rind": RIND(threshold),
        "rind-published": RIND(threshold_published, "published"),
        "entropy": MeanEntropy(threshold_entropy),
        "every": every_sentence,
    }
    chosen = {name: known[name] for name in o.some_of("triggers", triggers, [*known])}
    windows = Windows(reach=reach, budget=budget)
    if (ELSEWHERE in shown) != (corpus is not None):
        raise ValueError("--visibilities retrieve and --corpus go together: passages need a file, and a file a use")
    if gold is not None and corpus is None:
        raise ValueError("--gold says which passages of a corpus answer a question: give --corpus as well")
    elsewhere = None if corpus is None else CorpusLookup(*fitted.corpus(given))
    progress = not (quiet or as_json)
    asked = fitted.questions(given)
    trace = asked.trace(given, progress=progress)
    choosers = reasoning_policies(trace, k=k, seed=seed)
    result = run_rag(
        asked.model,
        asked.episodes,
        {name: choosers[name] for name in wanted},
        triggers=chosen,
        visibilities=shown,
        windows=windows,
        corpus=elsewhere,
        max_new_tokens=max_new_tokens,
        seed=seed,
        out=out,
        progress=progress,
    )
    say(result, out, as_json)
