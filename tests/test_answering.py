"""The loop of dynamic retrieval, on scripted drafts: what is kept, what is looked up, and when it ends."""

import pytest
import torch

import dhlens.answering
from dhlens.answering import Arm, answer
from dhlens.heads import HeadSet
from dhlens.lookup import Found
from dhlens.model import Model
from dhlens.triggers import Draft, every_sentence, never
from dhlens.views import View

ARM = Arm("trigger", "mask", "static")


def draft(*pieces, stopped=True):
    starts = tuple(sum(map(len, pieces[:i])) for i in range(len(pieces)))
    return Draft(tuple(hash(p) for p in pieces), "".join(pieces), starts, torch.ones(len(pieces)), stopped)


def blank():
    """A view that nobody looks into."""
    return object.__new__(View)


@pytest.fixture
def scripted(monkeypatch):
    """Runs the loop on drafts that are given one after the other; returns the answer and what each was asked with."""

    def run(trigger, *drafts, room=20):
        left, asked, names = list(drafts), [], {}
        start = blank()
        names[id(start)] = "blind"

        def generate(model, views, said, *, max_new_tokens, read=(), batch=16):
            asked.extend((names[id(view)], list(s), n) for view, s, n in zip(views, said, max_new_tokens, strict=True))
            return [left.pop(0) for _ in views]

        monkeypatch.setattr(dhlens.answering, "generate", generate)
        looks, views = [], []

        def lookup(policy, said, draft, at):
            looks.append((policy, list(said), at))
            views.append(blank())
            names[id(views[-1])] = f"view {len(looks)}"
            return Found(views[-1], HeadSet([], (1, 1)), 8, 1.0, 1.0)

        model = object.__new__(Model)  # nobody asks it anything
        answers = answer(
            model, {ARM: start}, triggers={"trigger": trigger}, lookups={"mask": lookup}, max_new_tokens=room
        )
        assert not left, "every draft was asked for"
        return answers[ARM], asked, looks

    return run


def said(*pieces):
    return [hash(p) for p in pieces]


def test_only_the_first_sentence_is_kept_of_what_is_written_anew(scripted):
    once = iter([0, None])
    one, asked, looks = scripted(
        lambda d: next(once),
        draft("Cats", " sleep", ".", " Owls", "."),
        draft("Ships", ".", " Boats", "."),
        draft(" Zebras", "."),
    )
    assert one.said == said("Ships", ".", " Zebras", ".")
    assert looks == [("static", [], 0)]
    # the last draft goes on behind the kept sentence, and still sees what was looked up for it
    assert asked == [("blind", [], 20), ("view 1", [], 20), ("view 1", said("Ships", "."), 18)]
    assert [(event.step, event.kept, event.found is not None) for event in one.events] == [
        (0, 0, False),
        (0, 2, True),
        (2, 2, False),
    ]


def test_what_stands_before_the_doubtful_sentence_is_kept(scripted):
    once = iter([3, None])
    one, _, looks = scripted(
        lambda d: next(once),
        draft("Cats", " sleep", ".", " Owls", "."),
        draft(" Ships", ".", stopped=False),
        draft(" Zebras", "."),
    )
    assert one.said == said("Cats", " sleep", ".", " Ships", ".", " Zebras", ".") and looks == [
        ("static", said("Cats", " sleep", "."), 3)
    ]


def test_an_answer_ends_where_the_sentence_written_anew_ends_it(scripted):
    one, _, looks = scripted(every_sentence, draft("Cats", "."), draft("Ships", "."))
    assert one.said == said("Ships", ".") and len(looks) == 1 and len(one.events) == 2


def test_an_answer_ends_at_its_room_and_where_nothing_is_written(scripted):
    one, asked, _ = scripted(every_sentence, draft("Cats", "."), draft("Ships", ".", stopped=False), room=2)
    assert one.said == said("Ships", ".") and asked[-1] == ("view 1", [], 2)
    one, _, _ = scripted(every_sentence, draft("Cats", "."), draft())
    assert one.said == [] and one.done


def test_without_a_trigger_the_draft_stands(scripted):
    one, _, looks = scripted(never, draft("Cats", ".", " Dogs", "."))
    assert one.said == said("Cats", ".", " Dogs", ".") and not looks and one.lookups == []
