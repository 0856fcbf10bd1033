"""A time-lapse of circuits: one page to step through the graphs of an answer and see which edges stay, come and go.

    lapse("SmolLM2", [Film("w000", pieces, graphs, dynamic)]).save("lapse.html")

Nodes keep their places from step to step, since all graphs of a film share one layout. The page is one file without
network: data as JSON that no markup can leave, drawn as SVG by its own script. It holds about 20 bytes an edge, 0.3 MB
for 40 steps of 200 edges. For one picture of one step use `dhlens.render.layered`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any

import pandas as pd

from dhlens.graphs import Graph
from dhlens.heads import HeadSet, head_name
from dhlens.render.check import expect
from dhlens.render.layered import bend, layout
from dhlens.render.report import Live, inert_json, page


@dataclass(frozen=True, eq=False)
class Film:
    """The graphs of one answer."""

    name: str
    """Of the episode."""
    pieces: Sequence[str]
    """Texts of the tokens that were said, from step 0 on."""
    graphs: Sequence[Graph]
    """Of some of the steps, in any order."""
    heads: Mapping[int, HeadSet]
    """The dynamic heads by step; steps may be left out. The page says how many of a step's are not in its graph."""


class Lapse(Live):
    """A page to step through."""

    _height = "960px"


def films(
    answers: pd.DataFrame, graphs: Mapping[tuple[str, int], Graph], heads: Mapping[tuple[str, int], HeadSet]
) -> list[Film]:
    """A film of each answer that has graphs; `answers` has episode and pieces, the others are by episode and step."""
    out = []
    for name, pieces in answers[["episode", "pieces"]].itertuples(index=False, name=None):
        own = [graph for (episode, _), graph in graphs.items() if episode == name]
        if own:
            out.append(Film(name, list(pieces), own, {step: on for (e, step), on in heads.items() if e == name}))
    return out


def lapse(title: str, films: Sequence[Film]) -> Lapse:
    """A page to step through the graphs of some answers.

    Args:
        title: heading of the page.
        films: one for each answer; the page shows one at a time.

    Raises:
        ValueError: no film, a film without graphs, or a graph of a step that was not said or stands there twice.
        TypeError: `films` is one film, or holds something else.
    """
    expect(Sequence, films=films)
    if not films:
        raise ValueError("a time-lapse needs the graphs of at least one answer, got none")
    for film in films:
        expect(Film, **{"each of films": film})
        steps = [graph.step for graph in film.graphs]
        if not steps or len(set(steps)) < len(steps) or not all(0 <= s < len(film.pieces) for s in steps):
            raise ValueError(
                f"film {film.name!r} must have graphs of different steps within the {len(film.pieces)} that were said, "
                f"got {sorted(steps) or 'none'}"
            )
    data = inert_json([_packed(film) for film in films])
    folder = files("dhlens.render")
    body = Template(folder.joinpath("lapse.html").read_text(encoding="utf-8"))
    script = folder.joinpath("lapse.js").read_text(encoding="utf-8")
    return Lapse(page(title, body.substitute(data=data, script=script), scripts=True))


def _packed(film: Film) -> dict[str, Any]:
    """What the page's script reads: nodes once, and of each step its edges, strongest first, as numbers of nodes."""
    places = layout(film.graphs)
    number = {name: i for i, name in enumerate(places)}
    levels = {p.y: p.level for p in places.values()}
    steps = []
    for graph in sorted(film.graphs, key=lambda g: g.step):
        net, edges, links = graph.to_networkx(), [], []
        for a, b, score in net.edges(data="score"):
            (links if score is None else edges).append((a, b, score))
        edges.sort(key=lambda e: -abs(e[2]))
        dynamic = film.heads.get(graph.step)
        names = [] if dynamic is None else [head_name(h) for h in dynamic]
        steps.append(
            {
                "step": graph.step,
                "heads": names,
                "ringed": [number[n] for n in (f"{name}@step" for name in names) if n in net],
                "edges": [
                    [number[a], number[b], float(f"{s:.4g}"), round(bend(places[a], places[b]), 3)] for a, b, s in edges
                ],
                "links": [[number[a], number[b]] for a, b, _ in links],
            }
        )
    return {
        "name": film.name,
        "pieces": list(film.pieces),
        "levels": [levels[y] for y in range(len(levels))],
        "nodes": [[name, p.lane, p.x, p.y, p.kind, p.text] for name, p in places.items()],
        "steps": steps,
    }
