"""One answer taken apart: the graph of each of its steps, judged, run without the rest, and what feeds its heads.

    answers = answers_of(trace, twins)                            # dhlens.counterparts
    rows = dissect(model, answers["w000"], [3, 4], Asked())       # table name -> rows
    unpacked(list(taken_apart(model, answers, Asked(), 6, run=run)))  # tables of many answers

What the tables hold stands in `dhlens.recipes.circuit`. Cost, for each step: one attribution, `exact` runs of an edge,
and two runs of the block for each ranking, rest and size of the faithfulness curves; `more` steps cost an attribution
each. Memory: all steps of one answer, laid open.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dhlens.attribution import Attribution, attribute
from dhlens.circuits import RESTS, Rest, means
from dhlens.counterparts import Answer
from dhlens.direct import DirectEffects, direct_effects
from dhlens.faithfulness import attention_only, faithfulness, random_edges
from dhlens.findings import spread_steps
from dhlens.heads import HeadSet, head_name
from dhlens.model import Model
from dhlens.nodes import Edge, Receiver, Sender
from dhlens.opened import OpenStep, open_steps
from dhlens.paths import patch_edges
from dhlens.store import Run

TABLES = ("steps", "edges", "feeders", "ties", "faithfulness", "areas", "direct")
_SIDES = ("q", "k", "v")
Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What is asked of every step.

    Raises:
        ValueError: a number is out of range, or a rest or size is missing.
    """

    edges: int = 200
    """Edges of its graph: the strongest by attribution."""
    exact: int = 100
    """Of these, how many are patched exactly."""
    controls: int = 25
    """Edges drawn at random that are patched exactly as well."""
    points: int = 0
    """Of the attribution, see `attribute`."""
    sizes: tuple[int, ...] = (50, 200, 1000, 5000, 20000, 60000)
    """Edges of the circuits that are run alone."""
    rests: tuple[Rest, ...] = RESTS
    """What the rest puts out meanwhile."""
    more: int = 12
    """Other steps of each answer at which ties between its dynamic heads alone are asked about, by attribution."""
    seed: int = 0
    """Of edges drawn at random."""

    def __post_init__(self) -> None:
        if self.edges < 1 or not 0 <= self.exact <= self.edges:
            some = f"{self.edges} edges, {self.exact} exact"
            raise ValueError(f"a graph has at least 1 edge, of which 0..edges are patched exactly, got {some}")
        if min(self.controls, self.points, self.more) < 0:
            some = f"{self.controls}, {self.points} and {self.more}"
            raise ValueError(f"controls, points and more must be at least 0, got {some}")
        if not self.sizes or min(self.sizes) < 1 or len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes must be different numbers of edges, at least 1 each, got {self.sizes}")
        if not self.rests or not set(self.rests) <= set(RESTS) or len(set(self.rests)) < len(self.rests):
            raise ValueError(f"rests are some of {', '.join(RESTS)}, each once, got {self.rests}")


def dissect(
    model: Model, answer: Answer, steps: Sequence[int], asked: Asked, *, tick: Callable[[], Any] = lambda: None
) -> dict[str, list[Row]]:
    """All that is asked of these steps of an answer, and the ties at some more of them.

    Args:
        model: a loaded model.
        answer: what was said.
        steps: some of `answer.steps`.
        asked: what is asked.
        tick: called when a step is done.

    Raises:
        ValueError: see `open_steps` and `faithfulness`.
    """
    pair = (answer.said, answer.other)
    opened = list(open_steps(model, answer.episode, answer.twin, answers=pair, steps=steps))
    mean = means(opened) if "mean" in asked.rests else None
    end = max(steps) + 1
    direct = direct_effects(model, answer.episode, answer.said[:end], against=answer.other[:end])
    out: dict[str, list[Row]] = {name: [] for name in TABLES}
    for step in opened:
        found, heads = attribute(step, points=asked.points), answer.heads[step.step]
        drawn = random_edges(step, seed=asked.seed + step.step)
        curves = _curves(step, found, drawn, asked, mean)
        rows: dict[str, list[Row]] = {
            "steps": [_step(step, answer, heads)],
            "edges": list(_edges(step, found, drawn, asked)),
            "feeders": _feeders(found, heads),
            "ties": list(_ties(found, heads)),
            "faithfulness": _records(curves.table.drop(columns="step")),
            "areas": _records(curves.areas.drop(columns="step")),
            "direct": [_direct(direct, step.step, heads)],
        }
        for table, of in rows.items():
            out[table] += [{**_place(answer, step), **row} for row in of]
        tick()
    others = _others(answer, steps, asked)
    for step in open_steps(model, answer.episode, answer.twin, answers=pair, steps=others) if others else ():
        found = attribute(step, points=asked.points)
        out["ties"] += [{**_place(answer, step), **row} for row in _ties(found, answer.heads[step.step])]
        tick()
    return out


def taken_apart(
    model: Model,
    answers: Mapping[str, Answer],
    asked: Asked,
    steps: int,
    *,
    run: Run | None = None,
    progress: bool = False,
) -> Iterator[pd.DataFrame]:
    """The rows of each answer, each as table and JSON: read where the run has them, else made and kept."""
    chosen = {name: spread_steps(answer.steps, steps) for name, answer in answers.items() if answer.steps}
    total = {name: len(some) + len(_others(answers[name], some, asked)) for name, some in chosen.items()}
    with tqdm(total=sum(total.values()), desc="circuit", unit="step", disable=not progress) as bar:
        for name, some in chosen.items():
            part = f"{name}=circuit"
            if run and run.done(part):
                bar.update(total[name])
                yield run.load_part(part)
                continue
            rows = dissect(model, answers[name], some, asked, tick=bar.update)
            table = pd.DataFrame([{"table": t, "row": json.dumps(row)} for t, of in rows.items() for row in of])
            if run:
                run.save_part(part, table)
            yield table


def unpacked(parts: Sequence[pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The tables by name."""
    whole = pd.concat(parts, ignore_index=True)
    return {name: pd.DataFrame([json.loads(r) for r in whole.loc[whole["table"] == name, "row"]]) for name in TABLES}


def _others(answer: Answer, steps: Sequence[int], asked: Asked) -> list[int]:
    """Steps at which two heads or more could be tied, beside those that are taken apart."""
    left = [s for s in answer.steps if s not in steps and len(answer.heads[s]) > 1]
    return spread_steps(left, asked.more)


def _place(answer: Answer, step: OpenStep) -> Row:
    return {"episode": answer.episode.id, "group": answer.episode.group, "step": step.step}


def _step(step: OpenStep, answer: Answer, heads: HeadSet) -> Row:
    tokens = {"token": int(answer.said[step.step]), "twin_token": int(answer.other[step.step])}
    names = [head_name(h) for h in heads]
    return {**tokens, "heads": names, "metric_clean": step.metric_clean, "metric_twin": step.metric_twin}


def _edges(step: OpenStep, found: Attribution, drawn: Sequence[Edge], asked: Asked) -> Iterator[Row]:
    top = found.top(asked.edges)
    control = [e for e in drawn if e not in top][: asked.controls]
    judged = [*list(top)[: asked.exact], *control]
    exact = patch_edges(step, judged).scores if judged else {}
    for edge in (*top, *control):
        names = {name: str(getattr(edge, name)) for name in ("sender", "receiver", "at")}
        yield {**names, "score": found.score(edge), "exact": exact.get(edge, np.nan), "control": edge not in top}


def _curves(step: OpenStep, found: Attribution, drawn: Sequence[Edge], asked: Asked, mean: Tensor | None) -> Any:
    most = max(asked.sizes)
    rankings = {
        "attribution": tuple(found.top(most)),
        "attention only": attention_only(found)[:most],
        "random": drawn[:most],
    }
    return faithfulness(step, rankings, sizes=asked.sizes, rests=asked.rests, means=mean)


def _feeders(found: Attribution, heads: HeadSet) -> list[Row]:
    """Shares of what enters the dynamic heads, and the other heads of their layers, by side, place, kind and layer."""
    wiring, size = found.wiring, found.scores.abs().numpy()
    kinds = np.array([r.kind for r in wiring.receivers])
    mine = wiring.into(heads).numpy()
    near = np.isin([r.layer for r in wiring.receivers], list(heads.by_layer())) & np.isin(kinds, _SIDES) & ~mine
    named = ["dynamic" if s.kind == "head" and (s.layer, s.head) in heads else s.kind for s in wiring.senders]
    senders = pd.DataFrame({"kind": named, "layer": [-1 if s.kind == "embed" else s.layer for s in wiring.senders]})
    parts = [
        senders.assign(
            side=side,
            at=at,
            share=of[:, mine & (kinds == side)].sum(1),
            share_others=of[:, near & (kinds == side)].sum(1),
        )
        for at, of in zip(found.places, size, strict=True)
        for side in _SIDES
    ]
    table = pd.concat(parts).groupby(["side", "at", "kind", "layer"], sort=False, as_index=False)
    table = pd.DataFrame(table[["share", "share_others"]].sum())
    for column in ("share", "share_others"):
        table[column] /= table[column].sum() or 1.0
    return _records(table.loc[(table["share"] > 0) | (table["share_others"] > 0)])


def _ties(found: Attribution, heads: HeadSet) -> Iterator[Row]:
    """Each two dynamic heads: what the earlier sends into the later, and how alike the senders of their queries are.

    Heads of one key/value group share their key and value terms: what enters these counts for each of them, so that
    `feeds` into two of them counts it twice. And all that a sender puts out counts, at the needle's rows too, although
    it is "on" at the step's row.
    """
    wiring, size = found.wiring, found.scores.abs().double()
    into = {h: size[..., wiring.into(HeadSet([h], heads.shape))] for h in heads}  # [place sender input]
    entered = {h: of.sum((0, 2)) for h, of in into.items()}
    asked = {h: of[found.places.index("step"), :, 0] for h, of in into.items()}
    for a, b in combinations(heads, 2):
        n = int(wiring.n_before[wiring.receiver_index[Receiver("q", *a)]])
        sent = entered[b][wiring.sender_index[Sender("head", *a)]] / entered[b].sum()
        both = torch.cosine_similarity(asked[a][:n], asked[b][:n], dim=0, eps=1e-30)
        known = bool(asked[a][:n].any() and asked[b][:n].any())
        yield {
            "a": head_name(a),
            "b": head_name(b),
            "feeds": float(sent) if a[0] < b[0] else np.nan,
            "alike": float(both) if known else np.nan,
        }


def _direct(found: DirectEffects, step: int, heads: HeadSet) -> Row:
    """What the dynamic heads add to the logit difference, and what as many others of their layers would on average."""
    effect, on = found.heads[step], heads.mask()
    others = (~on).sum(1)
    mean = torch.where(others > 0, (effect * ~on).sum(1) / others.clamp(min=1), 0.0)
    return {
        "n": len(heads),
        "dynamic": float(effect[on].sum()),
        "matched": float((on.sum(1) * mean).sum()),
        "heads": float(effect.sum()),
        "mlps": float(found.mlps[step].sum()),
        "embed": float(found.embed[step]),
        "bias": float(found.bias[step]),
        "logit": float(found.logit[step]),
    }


def _records(table: pd.DataFrame) -> list[Row]:
    rows: Any = table.to_dict("records")
    return rows
