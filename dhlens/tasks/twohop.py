"""Two-hop questions of our own: invented people, towns and novels, so that the tasks work without any data set.

`generate(200, seed=0)` gives questions in the shape of HotpotQA's distractor setting: two gold documents, eight
distractors of the same kinds that share words and names with them, five sentences each. Everything a document says
follows from one small world per question, so no two contradict, and nothing is known to a model beforehand. The texts
are far more alike than an encyclopedia's: what holds here must be shown on real questions
(`dhlens.tasks.multihop.read_questions`) as well. A thousand questions take a fraction of a second.
"""

import random
from dataclasses import dataclass

from dhlens.tasks.questions import Document, Question

_N_EACH = 4
_N_DISTRACTORS = 8
_FIRST = "Abril Bexon Coryd Demra Esmond Faryl Gwenth Hesk Ilvar Jorun Kessia Lorvin Mirel Nolth Ondry Pelia".split()
_LAST = "Ambrick Bolvane Cravish Dorlem Elstow Fennick Garrowd Hulme Istvale Jarrick Kolbeck Luspen Marwyth".split()
_ROOTS = (
    "Vark Zelt Quor Drun Ylm Brask Thoom Ferv Osk Jarn Plev Skor Umb Nax Grel Wyv Cald Tresk Horb Lusk Mord Pyr Sarn"
).split()
_ADJECTIVES = "Amber Borrowed Crooked Distant Empty Frozen Golden Hollow Iron Quiet Silver Upper".split()
_NOUNS = "Anchor Bridge Candle Door Garden Harp Ladder Mirror Orchard Road Tower Window".split()
_TRADES = "baker carpenter clerk doctor gardener glazier lawyer locksmith miller pilot printer tailor teacher".split()
_WARES = "barley cheese glass honey linen paper pottery rope salt timber wax wool".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday".split()
_BEASTS = "bees doves goats geese hens hounds ponies rabbits".split()
_COLOURS = "blue brown green grey red white yellow".split()


@dataclass(frozen=True)
class _Town:
    name: str
    region: str
    river: str


@dataclass(frozen=True)
class _Person:
    first: str
    name: str
    trade: str
    town: _Town
    year: int


@dataclass(frozen=True)
class _Novel:
    name: str
    author: _Person
    year: int


_Entity = _Town | _Person | _Novel


@dataclass(frozen=True)
class _Asked:
    """A question, its answer, and the evidence: which sentence of which document."""

    kind: str
    text: str
    answer: str
    facts: tuple[tuple[_Entity, str], tuple[_Entity, str]]


def generate(n: int, *, seed: int) -> list[Question]:
    """`n` questions; those of a smaller `n` are the first of a larger one.

    Returns:
        Questions of the kinds "bridge" (a region, river, town or year that takes two documents) and "comparison" (the
        earlier of two, or yes and no), each with two supporting facts.

    Raises:
        ValueError: `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"n must be positive, got {n}")
    return [_question(random.Random(f"{seed}/{i}"), f"twohop-{seed}-{i:04d}") for i in range(n)]


def _question(rng: random.Random, name: str) -> Question:
    towns, people, novels = _world(rng)
    asked = _asked(rng, people, novels)
    gold = [entity for entity, _ in asked.facts]
    others = [entity for entity in (*towns, *people, *novels) if entity not in gold]
    shown = [*gold, *rng.sample(others, _N_DISTRACTORS)]
    rng.shuffle(shown)
    told = {entity.name: _told(rng, entity) for entity in shown}
    return Question(
        id=name,
        question=asked.text,
        answer=asked.answer,
        documents=tuple(
            Document(title, tuple(f" {s}" if i else s for i, (_, s) in enumerate(said))) for title, said in told.items()
        ),
        facts=tuple(
            (shown.index(entity), [topic for topic, _ in told[entity.name]].index(topic))
            for entity, topic in asked.facts
        ),
        kind=asked.kind,
        source="dhlens.tasks.twohop",
    )


def _world(rng: random.Random) -> tuple[list[_Town], list[_Person], list[_Novel]]:
    """Towns, people and novels, by the first two people; two of each share a word of their names."""
    roots = rng.sample(_ROOTS, 3 * _N_EACH - 1)
    ending = rng.choice(("mere", "wick", "holm", "stead"))
    names = [f"Old {roots[0]}{ending}", f"New {roots[0]}{ending}", *(root + ending for root in roots[1 : _N_EACH - 1])]
    places = zip(names, roots[_N_EACH - 1 : -_N_EACH], roots[-_N_EACH:], strict=True)
    towns = [_Town(town, f"{region}land", river) for town, region, river in places]
    rng.shuffle(towns)
    homes = [towns[0], rng.choice(towns[:2]), *towns[2:]]
    firsts, lasts = rng.sample(_FIRST, _N_EACH), rng.sample(_LAST, _N_EACH - 1)
    names = [f"{first} {last}" for first, last in zip(firsts, [lasts[0], *lasts], strict=True)]
    years = rng.sample(range(1710, 1790), _N_EACH)
    people = [*map(_Person, firsts, names, rng.sample(_TRADES, _N_EACH), homes, years)]
    adjectives, nouns = rng.sample(_ADJECTIVES, _N_EACH), rng.sample(_NOUNS, _N_EACH - 1)
    titles = [f"The {adjective} {noun}" for adjective, noun in zip(adjectives, [nouns[0], *nouns], strict=True)]
    novels = [*map(_Novel, titles, people, rng.sample(range(1810, 1830), _N_EACH))]
    return towns, people, novels


def _told(rng: random.Random, entity: _Entity) -> list[tuple[str, str]]:
    """What the document of an entity says, by topic: an opening, then the rest in a drawn order."""
    if isinstance(entity, _Town):
        opening = f"{entity.name} is a market town of {rng.randrange(20, 90)}00 people."
        rest = [
            ("region", f"It lies in the region of {entity.region}."),
            ("river", f"The river that runs through it is the {entity.river}."),
            ("", f"Its {rng.choice(_WARES)} is sold on {rng.choice(_DAYS)}s."),
            ("", f"The roofs of the oldest houses are {rng.choice(_COLOURS)}."),
        ]
    elif isinstance(entity, _Person):
        opening = f"{entity.name} was a {entity.trade} who wrote in the evenings."
        rest = [
            ("town", f"{entity.first} was born in the town of {entity.town.name}."),
            ("year", f"The parish book gives {entity.year} as the year of {entity.first}'s birth."),
            ("", f"Friends remember {entity.first} for the {rng.choice(_BEASTS)} behind the house."),
            ("", f"{entity.first} had {rng.choice(('two', 'three', 'four', 'five'))} children."),
        ]
    else:
        opening = f"{entity.name} is a novel in {rng.randrange(12, 60)} chapters."
        rest = [
            ("author", f"It was written by {entity.author.name}."),
            ("printed", f"It came out in {entity.year}."),
            ("", f"The story is told by a {rng.choice(_TRADES)}."),
            ("", f"The first copies were bound in {rng.choice(_COLOURS)} cloth."),
        ]
    rng.shuffle(rest)
    return [("", opening), *rest]


def _asked(rng: random.Random, people: list[_Person], novels: list[_Novel]) -> _Asked:
    one, other = people[:2]
    novel, rival = novels[:2]
    home, author = one.town, novel.author
    elder, earlier = min(one, other, key=lambda p: p.year), min(novel, rival, key=lambda w: w.year)
    same = "yes" if one.town == other.town else "no"
    born, come = ((one, "year"), (other, "year")), ((novel, "printed"), (rival, "printed"))
    housed, told_by = ((one, "town"), (other, "town")), (novel, "author")
    region, river = ((one, "town"), (home, "region")), ((one, "town"), (home, "river"))
    forms = [
        _Asked("bridge", f"In which region lies the town where {one.name} was born?", home.region, region),
        _Asked("bridge", f"Which river runs through the town where {one.name} was born?", home.river, river),
        _Asked(
            "bridge",
            f"In which town was the author of {novel.name} born?",
            author.town.name,
            (told_by, (author, "town")),
        ),
        _Asked(
            "bridge",
            f"In which year was the author of {novel.name} born?",
            str(author.year),
            (told_by, (author, "year")),
        ),
        _Asked("comparison", f"Who was born first, {one.name} or {other.name}?", elder.name, born),
        _Asked("comparison", f"Which novel came out first, {novel.name} or {rival.name}?", earlier.name, come),
        _Asked("comparison", f"Were {one.name} and {other.name} born in the same town?", same, housed),
    ]
    return rng.choice(forms)
