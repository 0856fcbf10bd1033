"""Questions that are asked, and others to fit policies on: what `dhlens rag` and `dhlens rerank` share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dhlens.cli import options as o


@dataclass(frozen=True)
class Asked:
    """Questions to ask, and others that share no gold document with these."""

    model: Any
    """Loaded."""
    episodes: list[Any]
    """To ask."""
    others: list[Any]
    """To fit policies on."""
    earlier: Any
    """The trace of a finished scan of these others; None where they have yet to be observed."""

    def trace(self, given: Mapping[str, Any], *, progress: bool) -> Any:
        """The others, observed: now, in a folder of their own, where no finished scan was given."""
        if self.earlier is not None:
            return self.earlier
        return _observed(self.model, self.others, beside(given["out"], "fit"), given["max_new_tokens"], progress)


def questions(given: Mapping[str, Any]) -> Asked:
    """The model is loaded and the questions are read; nothing is run.

    `given` holds the command's arguments by name: those of the questions, and fit, a number or a finished scan.

    Raises:
        ValueError: no question, or a fit that is neither.
    """
    from dhlens.model import load
    from dhlens.tasks import hotpot

    n, fit, room = given["n"], given["fit"], given["max_new_tokens"]
    for option, value in (("n", n), ("k", given["k"]), ("max-new-tokens", room)):
        if value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    if fit.isdecimal() and int(fit) < 3:
        raise ValueError(f"--fit must be at least 3 questions, or a finished scan of such, got {fit}")
    earlier = None if fit.isdecimal() else _trace(Path(fit))
    size = int(fit) if earlier is None else len(earlier.episodes)
    options = o.json_object("template-kwargs", given["template_kwargs"])
    dtype = o.one_of("dtype", given["dtype"], o.DTYPES)
    model = load(given["model"], dtype=dtype, device=given["device"])
    episodes = hotpot.episodes(
        model.tokenizer,
        given["questions"],
        n=n + size,
        length=given["length"],
        seed=given["seed"],
        template=given["template"],
        template_kwargs=options,
        max_positions=model.max_positions - room,
        on_error=given["broken"],
    )
    heads = model.n_layers * model.n_heads
    if given["k"] > heads:
        raise ValueError(f"--k must lie within 1..{heads}, the heads of the model, got {given['k']}")
    others = episodes[:size] if earlier is None else list(earlier.episodes)
    # groups are named within one reading of a file: those of a scan of another file are known by their documents
    known = {one for e in others for one in (e.group, e.id, *_gold_documents(e))}
    asked = [e for e in episodes if known.isdisjoint((e.group, e.id, *_gold_documents(e)))][:n]
    return Asked(model, asked, others, earlier)


def _gold_documents(episode: Any) -> set[tuple[int, ...]]:
    """The tokens of the documents that hold the facts."""
    spans = [episode.span(f"doc_{i}") for i in episode.meta["fact_documents"]]
    return {tuple(episode.tokens[span.start : span.stop].tolist()) for span in spans}


def beside(out: Path, name: str) -> Path:
    """A folder beside the run's, for what it builds on."""
    return out.with_name(f"{out.name}-{name}")


def corpus(given: Mapping[str, Any]) -> tuple[Any, dict[str, frozenset[str]]]:
    """The index of the corpus, and which passages answer which episode as far as it is said."""
    from dhlens.tasks.corpus import Index, read_corpus, read_gold
    from dhlens.tasks.pieces import episode_id

    gold = {} if given["gold"] is None else read_gold(given["gold"], on_error=given["broken"])
    gold = {episode_id(question): passages for question, passages in gold.items()}
    return Index.of(read_corpus(given["corpus"], on_error=given["broken"])), gold


def query_heads(model: Any, episodes: Sequence[Any], k: int, folder: Path, *, progress: bool) -> Any:
    """The k heads of largest QRHead score on these questions, in a folder of their own, so that it can be resumed."""
    from dhlens.heads import HeadSet
    from dhlens.recipes.reasoning import query_scores
    from dhlens.store import Run

    run = Run.open(folder, model.card.with_episodes(episodes).with_settings(recipe="query"))
    with run.alone():
        score = query_scores(model, episodes, run, progress=progress)
    return HeadSet.top_k(score.mean(), k)


def _trace(folder: Path) -> Any:
    """The observed questions of a finished scan."""
    from dhlens.store import Run, load_trace

    run = Run.read(folder)
    if not run.finished or not (folder / "trace.safetensors").is_file():
        raise ValueError(f"--fit takes a number or the folder of a finished scan of questions, and {folder} is none")
    return load_trace(folder / "trace.safetensors")


def _observed(model: Any, episodes: Any, folder: Path, max_new_tokens: int, progress: bool) -> Any:
    """The questions that probe and static heads are fitted on, in a folder of their own, so that it can be resumed."""
    from dhlens.engine import observation_card
    from dhlens.observation import Observation, gathered
    from dhlens.reads import Capture
    from dhlens.store import Run, load_trace

    seen = Observation(max_new_tokens=max_new_tokens, draft=False, capture=Capture(focus=()))
    card = observation_card(model, **{**vars(seen), "rows": None}).with_episodes(episodes)
    run = Run.open(folder, card.with_settings(recipe="questions"))
    if run.finished:
        return load_trace(run.folder / "trace.safetensors")
    with run.alone():
        trace = gathered(model, episodes, seen, run.card, run=run, progress=progress)
        run.finish({}, trace=trace)
    return trace
