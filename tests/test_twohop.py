"""Two-hop questions of our own: answers worked out again from the text alone, no contradictions, fixed by the seed."""

import re
from collections import Counter, defaultdict

import pytest

from dhlens.tasks.questions import groups_of
from dhlens.tasks.twohop import generate

RELATIONS = {
    "home": r"born in the town of ([\w ]+)\.",
    "year": r"gives (\d+) as the year",
    "region": r"lies in the region of (\w+)",
    "river": r"runs through it is the (\w+)",
    "author": r"written by ([\w ]+)\.",
    "printed": r"came out in (\d+)",
}


def read(question):
    """What the documents say, by relation and title; and the sentence that says it."""
    told, where = defaultdict(dict), {}
    for d, document in enumerate(question.documents):
        for s, sentence in enumerate(document.sentences):
            for relation, pattern in RELATIONS.items():
                if match := re.search(pattern, sentence):
                    assert document.title not in told[relation], "said once"
                    told[relation][document.title] = match[1]
                    where[relation, document.title] = (d, s)
    return told, where


def worked_out(question):
    """Answer and evidence, from the words of question and documents only."""
    told, where = read(question)
    asked = question.question
    named = [d.title for d in question.documents if d.title in asked]
    named.sort(key=asked.index)
    if "author" in asked:
        author = told["author"][named[0]]
        relation = "home" if "town" in asked else "year"
        return told[relation][author], {where["author", named[0]], where[relation, author]}
    if "region" in asked or "river" in asked:
        home, relation = told["home"][named[0]], "region" if "region" in asked else "river"
        return told[relation][home], {where["home", named[0]], where[relation, home]}
    relation = "printed" if "novel" in asked else "home" if "same" in asked else "year"
    one, other = (told[relation][name] for name in named)
    facts = {where[relation, name] for name in named}
    if relation == "home":
        return ("yes" if one == other else "no"), facts
    assert one != other
    return named[int(other) < int(one) and 1], facts


MADE = generate(300, seed=5)


def test_every_answer_follows_from_its_two_facts():
    for question in MADE:
        answer, facts = worked_out(question)
        assert question.answer == answer and set(question.facts) == facts and len(question.facts) == 2
        assert len(question.gold) == 2


def test_ten_documents_of_five_sentences_and_names_of_their_own():
    for question in MADE:
        titles = [d.title for d in question.documents]
        assert len(titles) == len(set(titles)) == 10 and all(len(d.sentences) == 5 for d in question.documents)
        told, _ = read(question)
        for relation in ("region", "river", "year", "printed", "author"):
            values = list(told[relation].values())
            assert len(values) == len(set(values)), "nothing that is asked for stands for two"
        people = [t for t in titles if t in told["home"]]
        assert len({p.split()[0] for p in people}) == len(people)
        text = "".join(d.text for d in question.documents)
        assert all(text.count(f"{t} was a") == 1 for t in people)


def test_distractors_share_words_with_the_gold_documents():
    shared = 0
    for question in MADE:
        gold = {w for i in question.gold for w in question.documents[i].title.split()} - {"The", "Old", "New"}
        others = {w for i, d in enumerate(question.documents) if i not in question.gold for w in d.title.split()}
        shared += bool(gold & others)
    assert shared > 0.5 * len(MADE)


def test_kinds_and_positions_are_spread():
    kinds = Counter(q.kind for q in MADE)
    assert set(kinds) == {"bridge", "comparison"} and min(kinds.values()) > 80
    closed = Counter(q.answer for q in MADE if q.answer in ("yes", "no"))
    assert min(closed["yes"], closed["no"]) > 5
    assert set(Counter(d for q in MADE for d, _ in q.facts)) == set(range(10))
    assert set(Counter(s for q in MADE for _, s in q.facts)) == {1, 2, 3, 4}
    first = [
        q.answer == min(q.answer, *re.findall(r"first, (.+) or (.+)\?", q.question)[0], key=q.question.index)
        for q in MADE
        if "first" in q.question
    ]
    assert 0.3 < sum(first) / len(first) < 0.7


def test_a_seed_is_a_text():
    assert generate(20, seed=5) == MADE[:20]
    assert not {q.question for q in generate(20, seed=6)} & {q.question for q in MADE[:20]}
    assert len(set(groups_of(MADE))) == len(MADE) == len({q.id for q in MADE})
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        generate(0, seed=0)
