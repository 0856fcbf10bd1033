"""`dhlens rerank`: do heads rank the passages of a corpus better than the words that found them?"""

from pathlib import Path
from typing import Annotated

import typer

from dhlens.cli import options as o
from dhlens.cli.show import say

_POLICIES = ("predicted", "static", "by step", "dynamic random", "fixed random", "all heads")


def rerank(
    corpus: Annotated[Path, typer.Option(help="Passages: records of id, title, text.")],
    gold: Annotated[Path, typer.Option(help="Which passages answer which question: question_id, gold.")],
    model: o.Model = "smollm2-135m",
    questions: o.Questions = None,
    n: Annotated[int, typer.Option(help="Questions; fewer where some share a gold document with a fitted one.")] = 20,
    fit: Annotated[
        str, typer.Option(help="How many other questions the heads are chosen on, or a finished scan of such.")
    ] = "20",
    length: o.Length = None,
    template: o.Template = "chat",
    template_kwargs: o.TemplateKwargs = None,
    policies: Annotated[str, typer.Option(help="Who ranks, comma-separated; default: all.")] = "",
    query: Annotated[bool, typer.Option(help="QRHead's heads as well.")] = True,
    k: Annotated[int, typer.Option("--k", help="Heads of each.")] = 5,
    candidates: Annotated[int, typer.Option(help="Passages that BM25 finds, which are ranked again.")] = 40,
    per_prompt: Annotated[int, typer.Option(help="Candidates in one prompt.")] = 10,
    broken: Annotated[str, typer.Option(help="Broken records: raise (stop) or skip (leave out).")] = "raise",
    seed: o.Seed = 0,
    max_new_tokens: o.MaxNewTokens = 32,
    out: o.Out = Path("runs/rerank"),
    dtype: o.Dtype = "float32",
    device: o.Device = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Rank BM25's candidates again by the attention of heads, and compare recall of the gold passages."""
    given = dict(locals())
    from dhlens.choosers import reasoning_policies
    from dhlens.cli import fitted
    from dhlens.recipes import rerank as run_rerank

    wanted = o.some_of("policies", policies or ",".join(_POLICIES), _POLICIES)
    index, known = fitted.corpus(given)
    progress = not (quiet or as_json)
    loaded, asked, trace = fitted.asked_and_fitted(given, progress=progress)
    chosen = reasoning_policies(trace, k=k, seed=seed)
    heads = {}
    if query:
        heads["query"] = fitted.query_heads(loaded, trace.episodes, k, fitted.beside(out, "query"), progress=progress)
    result = run_rerank(
        loaded,
        {e.id: str(e.meta["question"]) for e in asked},
        known,
        index,
        {name: chosen[name] for name in wanted},
        query_heads=heads,
        candidates=candidates,
        per_prompt=per_prompt,
        seed=seed,
        out=out,
        progress=progress,
    )
    say(result, out, as_json)
