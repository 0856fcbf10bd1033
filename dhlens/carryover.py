"""Does what holds on needles carry over? One table of tasks whose evidence is located: questions, contracts, meetings.

    runs = {name: dh.recipes.Reasoning.load(f"runs/{name}").trace for name in ("hotpot", "contracts", "code")}
    table = carry_over(runs, niah=dh.recipes.Scan.load("runs/walden").trace)
    carry_map(table).savefig("tasks.pdf")            # dhlens.render.carryover
    dhlens carryover runs/hotpot runs/contracts runs/code --niah runs/walden      # the same from a shell

The first run is the reference: its threshold holds for all, and a probe of reasoning mass is fitted on it. A probe of
copying heads is fitted on the needles. Cost: seconds a run and a few more for each probe; no model is needed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from dhlens.compare import compare
from dhlens.dynamics import dynamics
from dhlens.heads import HeadSet
from dhlens.probe import same_model
from dhlens.probe_report import probe_table
from dhlens.reasoning import TOP, ReasoningHeads, answer_steps, calibrated, facts_table, needle_size, samples
from dhlens.scores import copy_paste, reasoning_mass
from dhlens.stats import grouped_mean
from dhlens.trace import Trace

MEASURES = {
    "mass": "reasoning mass, all heads",
    "mass_static": "reasoning mass, static top 20",
    "heads_per_step": "reasoning heads a step",
    "jaccard_adjacent": "Jaccard from step to step",
    "entropy": "entropy (nats)",
    "as_needles": "static Jaccard with copying heads",
    "as_reference": "static Jaccard with the reference",
    "needle_probe": "needle probe on reasoning heads (AUPRC)",
    "needle_probe_copying": "needle probe on copying heads (AUPRC)",
    "reference_probe": "reference probe on mass (skill)",
}
"""What is measured, in words."""


def carry_over(
    runs: Mapping[str, Trace], *, niah: Trace, fit_from: float = 0.5, seed: int = 0, progress: bool = False
) -> pd.DataFrame:
    """Reasoning mass, dynamics, static overlap and probe transfer of each task.

    Args:
        runs: name to observed answers over supporting facts ("fact_0" on) of one model, with the hidden site "final";
            the first is the reference.
        niah: an observed needle scan of this model, with the same site.
        fit_from: share of each run's groups that static heads and the reference's threshold are fitted on.
        seed: of splits, probes, nulls and bootstrap.
        progress: show a bar.

    Returns:
        task, measure (of `MEASURES`), value, low, high (95 % over groups), chance, n. Chance is, of masses, even
        attention; of Jaccard from step to step, shuffled time; of overlaps, random sets; of probes, each head's mean in
        training. Skill is already over that mean.

    Raises:
        ValueError: no run; another model; a run lacks facts, groups or states.

    Source: the paper's open question (arXiv 2602.11162, its limitations); table and controls are ours.
    """
    if not runs:
        raise ValueError("a table of tasks needs at least one run, got none")
    for trace in runs.values():
        same_model(niah.card, niah.shape, trace.card, trace.shape)
    reference = next(iter(runs.values()))
    first, _ = reference.split(fit_from, seed=seed)
    tau = calibrated(reasoning_mass(first), needle_size(niah, niah.shape))
    rows = []
    for name, trace in tqdm(runs.items(), desc="carry over", unit="task", disable=not progress):
        found = [*_own(trace, tau, fit_from, seed), *_alike(trace, niah, reference, seed)]
        found += _forecast(trace, niah.answered(), reference, tau, seed)
        rows += [{"task": name, **row} for row in found]
    return pd.DataFrame(rows).loc[:, ["task", "measure", "value", "low", "high", "chance", "n"]]


def _own(trace: Trace, tau: float, fit_from: float, seed: int) -> Iterator[dict[str, Any]]:
    """Mass and dynamics, on the groups that static heads were not fitted on."""
    fit, held = trace.split(fit_from, seed=seed)
    ranking = answer_steps(reasoning_mass(fit)).mean(0, dtype=torch.float64)
    static = HeadSet.top_k(ranking, min(TOP, ranking.numel()))
    table = facts_table(held, static, fitted=set())
    groups = table["group"].to_numpy(dtype=str)
    for measure in ("mass", "mass_static"):
        interval = grouped_mean(table[measure].to_numpy(dtype=float), groups, seed=seed)
        yield {"measure": measure, **interval._asdict(), "chance": table["share"].mean(), "n": len(table)}
    found = dynamics(ReasoningHeads(tau)(held), static_from=ranking, seed=seed, answered=False)
    rows = found.table.set_index("metric")
    for measure in ("heads_per_step", "jaccard_adjacent", "entropy"):
        chance = found["jaccard_adjacent_shuffled"] if measure == "jaccard_adjacent" else np.nan
        yield {"measure": measure, **rows.loc[measure, ["value", "low", "high", "n"]].to_dict(), "chance": chance}


def _alike(trace: Trace, niah: Trace, reference: Trace, seed: int) -> Iterator[dict[str, Any]]:
    """Overlap of the static top 20 with those of needles and of the reference."""
    mine = samples(reasoning_mass(trace))
    others = {"as_needles": samples(copy_paste(niah).answered())}
    others |= {} if trace is reference else {"as_reference": samples(reasoning_mass(reference))}
    k = min(TOP, trace.shape[0] * trace.shape[1] - 1)
    for measure, other in others.items():
        row = compare({"this": mine, "other": other}, k, seed=seed).overlap.iloc[0]
        yield {"measure": measure, "value": row["jaccard"], "low": row["low"], "high": row["high"]} | {
            "chance": row["jaccard_chance"],
            "n": len(trace.episodes),
        }


def _forecast(trace: Trace, niah: Trace, reference: Trace, tau: float, seed: int) -> Iterator[dict[str, Any]]:
    """What probes of the needles and of the reference foresee here; the reference's own on groups it has not seen."""
    copying, mass = copy_paste(niah), reasoning_mass(trace)
    other = None if trace is reference else (trace, mass)
    asked: list[tuple[str, str, Trace, Any, Any]] = [
        ("needle_probe", "auprc", niah, copying, (trace, ReasoningHeads(tau)(trace))),
        ("needle_probe_copying", "auprc", niah, copying, (trace, copy_paste(trace, "context"))),
        ("reference_probe", "skill", reference, reasoning_mass(reference), other),
    ]
    for measure, metric, source, score, on in asked:
        table = probe_table(source, score, on=on, seed=seed, answered=False).table
        rows = table.loc[table["metric"] == metric].set_index("forecast")
        found = rows.loc["linear", ["value", "low", "high"]].to_dict()
        chance = 0.0 if metric == "skill" else rows.loc["marginal", "value"]
        yield {"measure": measure, **found, "chance": chance, "n": int(rows.loc["linear", "rows"])}
