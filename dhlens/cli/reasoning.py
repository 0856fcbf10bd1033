"""Questions over documents on the command line: what `dhlens scan` and `ablate` do with --task hotpot or evidence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dhlens.cli import options as o

EDITS = ("zero", "mean", "uniform", "resample")
"""Of the standard edits those that need no needle."""


def scan_questions(given: Mapping[str, Any], observed: Any, *, executor: Any, progress: bool) -> Any:
    """Observe the answers to questions and measure reasoning heads; `given` are the arguments of `dhlens scan`."""
    from dhlens.recipes import reason

    niah = o.needle_trace(given["niah"])
    model, episodes = o.question_episodes(given)
    return reason(
        model,
        episodes,
        niah=niah,
        query=given["query"],
        out=given["out"],
        observation=observed,
        seed=given["seed"],
        executor=executor,
        progress=progress,
    )


def ablate_questions(given: Mapping[str, Any], *, progress: bool) -> Any:
    """Take reasoning heads away, and as many others; `given` are the arguments of `dhlens ablate`."""
    from dhlens.controls import POLICIES, StaticLike, sized_policies, standard_policies, static_set
    from dhlens.engine import observe
    from dhlens.episode import split_episodes
    from dhlens.policies import Dynamic
    from dhlens.probe import same_model
    from dhlens.reads import Capture
    from dhlens.reasoning import ReasoningHeads, calibrated, needle_size
    from dhlens.recipes.ablation import ablate
    from dhlens.recipes.standard import standard_edits
    from dhlens.scores import copy_paste, reasoning_mass

    niah, seed = o.needle_trace(given["niah"]), given["seed"]
    known = (*POLICIES, *(("copying",) if niah else ()))
    wanted = o.some_of("policies", given["policies"] or ",".join(known), known)
    how, stays = o.some_of("edits", given["edits"], EDITS), o.some_of("commits", given["commits"], ("edited", "clean"))
    sizes = o.numbers("ks", given["ks"], int)
    model, episodes = o.question_episodes(given)
    if niah is not None:
        same_model(model.card, model.shape, niah.card, niah.shape)
    first, held = split_episodes(episodes, given["static_from"], seed=seed)
    room = given["max_new_tokens"]
    fit = observe(model, first, max_new_tokens=room, capture=Capture(focus=(), z=True), progress=progress)
    scoring = ReasoningHeads(calibrated(reasoning_mass(fit), needle_size(niah, model.shape)))
    chosen = standard_policies(fit, seed=seed, score=scoring)
    if niah is not None:
        chosen["copying"] = StaticLike(Dynamic(score=scoring), copy_paste(niah).mean())
    plain = {name: {None: chosen[name]} for name in wanted}
    sized = sized_policies(fit, sizes, seed=seed, score=reasoning_mass) if sizes else {}
    return ablate(
        model,
        held,
        {name: {**plain.get(name, {}), **sized.get(name, {})} for name in {**plain, **sized}},
        edit=standard_edits(model, fit, how, seed=seed),
        commit=stays,
        static=static_set(fit, score=scoring),
        span="context",
        score=scoring,
        by="f1",
        max_new_tokens=room,
        causal_maps=given["causal_maps"],
        batch=given["batch"],
        seed=seed,
        out=Path(given["out"]),
        progress=progress,
    )
