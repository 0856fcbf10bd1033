"""The commands that run an experiment: `dhlens scan` and `dhlens ablate`."""

from pathlib import Path
from typing import Annotated

import typer

from dhlens.cli import options as o
from dhlens.cli.show import say

_DRAFTS: dict[str, bool | str] = {"known": True, "lookup": "lookup", "none": False}


def scan(
    model: o.Model = "smollm2-135m",
    task: o.Task = "niah",
    haystack: o.Haystack = None,
    lengths: o.Lengths = "500,1000",
    depths: o.Depths = "0.1,0.5,0.9",
    n: o.Count = None,
    needle: o.Needle = "uuid",
    question: o.Question = None,
    answer: o.Answer = None,
    needles_per_cell: o.PerCell = 1,
    template: o.Template = "chat",
    template_kwargs: o.TemplateKwargs = None,
    repeat: o.Repeat = False,
    questions: o.Questions = None,
    kind: o.Kind = None,
    length: o.Length = 1500,
    niah: o.Niah = None,
    query: Annotated[bool, typer.Option(help="Also score heads by the rows of the question, as QRHead does.")] = True,
    seed: o.Seed = 0,
    max_new_tokens: o.Room = None,
    draft: Annotated[
        str, typer.Option(help="known, lookup or none: how answers are sped up; never what they are.")
    ] = "known",
    hidden: Annotated[
        str, typer.Option(help="Hidden states to keep: final (the last norm's output), resid_0, resid_1, ...")
    ] = "final",
    out: o.Out = Path("runs/scan"),
    workers: Annotated[int, typer.Option(help="Processes, each with its own model.")] = 1,
    dtype: o.Dtype = "float32",
    device: o.Device = None,
    quantize: o.Quantize = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Hide needles in a haystack, observe every step of the answers, and measure how dynamic the copying heads are.

    With --task hotpot or evidence: ask questions over documents, and measure the heads that look at the facts.
    """
    given = dict(locals())
    from dhlens.cli.reasoning import scan_questions
    from dhlens.executor import Processes, serial
    from dhlens.reads import Capture
    from dhlens.recipes.detect import Observation
    from dhlens.recipes.detect import scan as run_scan

    o.check_task(scan, given)
    needles = task == "niah"
    seen = Capture(hidden=o.words(hidden)) if needles else Capture(hidden=o.words(hidden), focus=())
    room = _room(max_new_tokens, task)
    observation = Observation(max_new_tokens=room, draft=o.one_of("draft", draft, _DRAFTS), capture=seen)
    executor = serial if workers == 1 else Processes(workers)
    progress = not (quiet or as_json)
    if not needles:
        asked = {**given, "n": 100 if n is None else n, "max_new_tokens": room}
        say(scan_questions(asked, observation, executor=executor, progress=progress), out, as_json)
        return
    loaded, episodes = o.needle_episodes({**given, "n": 5 if n is None else n})
    result = run_scan(
        loaded, episodes, out=out, observation=observation, seed=seed, executor=executor, progress=progress
    )
    say(result, out, as_json)


def ablate(
    model: o.Model = "smollm2-135m",
    task: o.Task = "niah",
    haystack: o.Haystack = None,
    lengths: o.Lengths = "500",
    depths: o.Depths = "0.5",
    n: o.Count = None,
    needle: o.Needle = "uuid",
    question: o.Question = None,
    answer: o.Answer = None,
    needles_per_cell: o.PerCell = 1,
    template: o.Template = "chat",
    template_kwargs: o.TemplateKwargs = None,
    repeat: o.Repeat = False,
    questions: o.Questions = None,
    kind: o.Kind = None,
    length: o.Length = 1500,
    niah: o.Niah = None,
    seed: o.Seed = 0,
    max_new_tokens: o.Room = None,
    edits: Annotated[str, typer.Option(help="zero, mean, uniform, resample, patch, hide; comma-separated.")] = "zero",
    commits: Annotated[
        str, typer.Option(help="Whose keys and values stay: edited (the model lives with the loss), clean, or both.")
    ] = "edited",
    policies: Annotated[str, typer.Option(help="Which of the standard policies, comma-separated; default: all.")] = "",
    ks: Annotated[
        str, typer.Option(help="Besides, k dynamic, static and random heads at every step, for each of these k.")
    ] = "",
    static_from: Annotated[float, typer.Option(help="Share of the windows that static heads are fitted on.")] = 0.5,
    causal_maps: Annotated[
        int, typer.Option(help="Of how many answered episodes every single head is tried at every step.")
    ] = 1,
    batch: Annotated[int, typer.Option(help="Most conditions decoded at once.")] = 16,
    out: o.Out = Path("runs/ablate"),
    dtype: o.Dtype = "float32",
    device: o.Device = None,
    quantize: o.Quantize = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Take each step's heads away, and as many others, and measure what is left of the answers.

    With --task hotpot or evidence: the heads that look at the supporting facts, by the F1 of all answers.
    """
    given = dict(locals())
    from dhlens.cli.reasoning import ablate_questions
    from dhlens.controls import POLICIES, sized_policies, standard_policies, static_set
    from dhlens.engine import observe
    from dhlens.episode import split_episodes
    from dhlens.reads import Capture
    from dhlens.recipes.ablation import ablate as run_ablate
    from dhlens.recipes.standard import EDITS, standard_edits
    from dhlens.tasks.needles import NEEDLES

    o.check_task(ablate, given)
    if batch < 1:
        raise ValueError(f"--batch must be at least 1, got {batch}")
    progress = not (quiet or as_json)
    room = _room(max_new_tokens, task)
    if task != "niah":
        asked = {**given, "n": 40 if n is None else n, "max_new_tokens": room}
        say(ablate_questions(asked, progress=progress), out, as_json)
        return
    sizes, wanted = o.numbers("ks", ks, int), o.some_of("policies", policies or ",".join(POLICIES), POLICIES)
    how, stays = o.some_of("edits", edits, EDITS), o.some_of("commits", commits, ("edited", "clean"))
    if "patch" in how and needle not in NEEDLES:
        raise ValueError("--edits patch draws another answer for a twin, which only built-in needles have")
    loaded, episodes = o.needle_episodes({**given, "n": 20 if n is None else n})
    heads = loaded.n_layers * loaded.n_heads
    if sizes and not 1 <= min(sizes) <= max(sizes) <= heads:
        raise ValueError(f"--ks must lie within 1..{heads}, the heads of the model, got {ks}")
    first, held = split_episodes(episodes, static_from, seed=seed)
    fit = observe(loaded, first, max_new_tokens=room, capture=Capture(z=True), progress=progress)
    chosen = standard_policies(fit, seed=seed)
    plain = {name: {None: chosen[name]} for name in wanted}
    sized = sized_policies(fit, sizes, seed=seed) if sizes else {}
    result = run_ablate(
        loaded,
        held,
        {name: {**plain.get(name, {}), **sized.get(name, {})} for name in {**plain, **sized}},
        edit=standard_edits(loaded, fit, how, seed=seed),
        commit=stays,
        static=static_set(fit),
        max_new_tokens=room,
        causal_maps=causal_maps,
        batch=batch,
        seed=seed,
        out=out,
        progress=progress,
    )
    say(result, out, as_json)


def _room(max_new_tokens: int | None, task: str) -> int:
    """Most answer tokens; needles are copied out, questions asked for a few words."""
    return max_new_tokens if max_new_tokens is not None else 48 if task == "niah" else 32
