"""`dhlens rerank`: do heads rank the passages of a corpus better than the words that found them?"""

from pathlib import Path
from typing import Annotated

import typer

from dhlens.cli import options as o
from dhlens.cli.show import say


def rerank(
    corpus: Annotated[Path, typer.Option(help="Passages: records of id, title, text.")],
    gold: Annotated[Path, typer.Option(help="Which passages answer which question: question_id, gold.")],
    model: o.Model = "smollm2-135m",
    questions: o.Questions = None,
    n: o.Asked = 20,
    fit: o.Fit = "20",
    length: o.Length = None,
    template: o.Template = "chat",
    template_kwargs: o.TemplateKwargs = None,
    policies: Annotated[str, typer.Option(help="Who ranks, comma-separated; default: all.")] = "",
    query: Annotated[bool, typer.Option(help="QRHead's heads as well.")] = True,
    k: o.Heads = 5,
    candidates: Annotated[int, typer.Option(help="Passages that BM25 finds, which are ranked again.")] = 40,
    per_prompt: Annotated[int, typer.Option(help="Candidates in one prompt.")] = 10,
    broken: o.Broken = "raise",
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
    from dhlens.choosers import CHOOSERS, reasoning_policies
    from dhlens.cli import fitted
    from dhlens.policies import Static
    from dhlens.recipes import rerank as run_rerank
    from dhlens.recipes.passages import CorpusLookup
    from dhlens.recipes.reranking import candidates_of

    able = [name for name in CHOOSERS if name not in CorpusLookup.without]
    wanted = o.some_of("policies", policies or ",".join(able), able)
    index, known = fitted.corpus(given)
    progress = not (quiet or as_json)
    asked = fitted.questions(given)
    texts = {e.id: str(e.meta["question"]) for e in asked.episodes}
    limits = {"candidates": candidates, "per_prompt": per_prompt}
    candidates_of(asked.model, texts, known, index, **limits, progress=progress)  # refused before anything is read
    trace = asked.trace(given, progress=progress)
    chosen = reasoning_policies(trace, k=k, seed=seed)
    if query:
        heads = fitted.query_heads(asked.model, trace.episodes, k, fitted.beside(out, "query"), progress=progress)
        chosen["query"], wanted = Static(heads), (*wanted, "query")
    result = run_rerank(
        asked.model,
        texts,
        known,
        index,
        {name: chosen[name] for name in wanted},
        **limits,
        seed=seed,
        out=out,
        progress=progress,
    )
    say(result, out, as_json)
