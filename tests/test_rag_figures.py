"""Figures of dynamic retrieval: what stands in them is what the tables say."""

import pandas as pd
import pytest

from dhlens.render.answers import answer_curves, answer_points
from dhlens.render.rag import leak_curves, rag_pictures, selection_curves, timeline

QUESTION = pd.Series(
    {"question": "Who?", "answer": "Ann", "context": [4, 52], "documents": [[4, 30], [30, 52]], "facts": [[8, 12]]}
)
EVENTS = pd.DataFrame(
    [
        {
            "kind": "draft",
            "step": 0,
            "kept": 1,
            "pieces": ["It", " is", "\n", "$x^{2", "你"],
            "entropy": [2.0, 1.0, 0.5, 0.2, 0.1],
            "values": [0.0, 2.5, 0.0, 0.4, 0.0],
            "threshold": 1.5,
            "windows": [],
        },
        {
            "kind": "looked up",
            "step": 1,
            "kept": 1,
            "pieces": [" Ann", "."],
            "entropy": [0.3, 0.1],
            "values": [],
            "threshold": 1.5,
            "windows": [[10, 20], [40, 45]],
        },
    ]
)


def selection(*policies):
    rows = [(p, 2.0**k, 0.1 * k, 0.1 * k - 0.05, 0.1 * k + 0.05) for p in policies for k in (6, 7, 8)]
    return pd.DataFrame(rows, columns=["policy", "visible", "facts", "facts_low", "facts_high"])


def summary():
    rows = [
        ("rind", v, p, f1)
        for v in ("mask", "concat")
        for p, f1 in (("static", 0.1), ("oracle", 0.3 - 0.25 * (v == "mask")))
    ]
    rows += [("never", v, p, 0.2) for v in ("mask", "concat") for p in ("none", "full", "gold")]
    table = pd.DataFrame(rows, columns=["trigger", "visibility", "policy", "f1"])
    return table.assign(f1_low=table["f1"] - 0.05, f1_high=table["f1"] + 0.05, visible=256.0)


def test_a_curve_for_every_policy_with_its_numbers():
    figure = selection_curves(selection("predicted", "static", "mine", "yours"))
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["predicted", "static", "mine", "yours"]
    assert axes.lines[0].get_xdata().tolist() == [64, 128, 256]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["64", "128", "256"]


def test_worth_places_f1_at_its_visible_tokens_and_sets_policies_side_by_side():
    table = summary().assign(visible=[256.0] * 4 + [0.0, 1000.0, 90.0] * 2)
    figure = answer_curves(table)
    for axes, at in zip(figure.axes, (0, 2), strict=True):
        dotted, *points = axes.lines
        assert dotted.get_xdata().tolist() == [0, 90, 1000] and set(dotted.get_ydata()) == {0.2}
        placed = {p.get_label(): (float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in points}
        assert placed["static"][1] == table["f1"][at] and placed["oracle"][1] == table["f1"][at + 1]
        assert placed["static"][0] < 256 < placed["oracle"][0]
    with pytest.raises(ValueError, match="need an arm with a trigger"):
        answer_curves(table.query("trigger == 'never'"))


def test_panels_share_one_order_of_policies_and_place_their_own_numbers():
    figure = answer_points(summary())
    first, second = figure.axes
    assert [t.get_text() for t in first.get_yticklabels()] == ["oracle", "static", "none", "full", "gold"]
    assert first.collections[1].get_offsets()[:, 0].tolist() == pytest.approx([0.05, 0.1, 0.2, 0.2, 0.2])
    assert second.collections[1].get_offsets()[:, 0].tolist() == pytest.approx([0.3, 0.1, 0.2, 0.2, 0.2])


def test_triggers_stand_side_by_side_a_line_for_each_visibility():
    table = pd.concat([summary(), summary().query("trigger == 'rind'").assign(trigger="every")])
    table = table.sort_values("visibility", kind="stable", ascending=False)
    places = [axes.get_subplotspec() for axes in answer_points(table).axes]
    titles = [axes.get_title() for axes in answer_points(table).axes]
    assert titles == ["rind, mask", "every, mask", "rind, concat", "every, concat"]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_references_alone_make_no_picture():
    with pytest.raises(ValueError, match="an arm with a trigger"):
        answer_points(summary().query("trigger == 'never'"))


def test_a_timeline_has_a_bar_for_every_token_and_a_box_for_every_window():
    figure = timeline(QUESTION, EVENTS)
    draft, written, ribbon = figure.axes
    assert [bar.get_height() for bar in draft.patches] == EVENTS["entropy"][0]
    assert [t.get_text() for t in draft.get_xticklabels()] == ["It", "is", "↵", "$x^{2", "U+4F60"]
    assert draft.patches[0].get_facecolor() != draft.patches[1].get_facecolor(), "what was not kept is pale"
    assert len(ribbon.collections[0].get_paths()) == 2 and ribbon.get_xlim() == (4, 52)
    figure.canvas.draw()
    assert "1 of 5 kept" in draft.get_title(loc="left") and "from token 1 on" in written.get_title(loc="left")


def test_a_timeline_shows_what_the_trigger_read_and_where_the_answer_went_back():
    draft, written, _ = timeline(QUESTION, EVENTS).axes
    assert draft.collections[0].get_offsets()[:, 1].tolist() == EVENTS["values"][0]
    colors = [tuple(color) for color in draft.collections[0].get_facecolor()]
    assert [color == colors[1] for color in colors] == [False, True, False, False, False], "one value is above it"
    assert [(set(line.get_xdata()), set(line.get_ydata())) for line in draft.lines] == [
        ({0, 1}, {1.5}),
        ({0.5}, {0, 1}),
    ]
    assert not written.lines and not written.collections, "what was looked up is under no trigger"
    high = timeline(QUESTION, EVENTS.assign(threshold=9.0)).axes[0]
    assert high.get_ylim()[1] > 9 and len(set(map(tuple, high.collections[0].get_facecolor()))) == 1
    assert timeline(QUESTION, EVENTS.assign(values=[[-1.0, 0, 0, 0, 0], []])).axes[0].get_ylim()[0] == -1
    older = EVENTS.drop(columns=["values", "threshold"])
    for unread in (older, pd.concat([older, EVENTS]).iloc[:2]):  # a run begun before these were kept
        assert not timeline(QUESTION, unread).axes[0].collections
    plain = EVENTS.assign(values=[[], []], threshold=float("nan"))
    assert len(timeline(QUESTION, plain).axes[0].lines) == 1, "a trigger without values"


def test_without_events_there_is_no_timeline():
    with pytest.raises(ValueError, match="needs the events"):
        timeline(QUESTION, EVENTS.iloc[:0])


def test_a_leak_of_nothing_lies_on_the_floor():
    leak = pd.DataFrame(
        [(v, s, 0.0 if v == "mask" else 0.1 * s + 0.01) for v in ("mask", "mask_decode") for s in (0.0, 0.1, 1.0)],
        columns=["visibility", "share", "kl"],
    )
    axes = leak_curves(leak).axes[0]
    floor, leaking = axes.lines[1], axes.lines[3]
    assert set(floor.get_ydata()) == {1e-9} and leaking.get_ydata()[-1] == pytest.approx(0.11)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["one", "10%", "100%"]


def test_pictures_without_anything_looked_up_leave_the_timeline_out():
    answers = pd.DataFrame([{"retrievals": 0, "f1": 0.1}])
    found = rag_pictures({"selection": selection("static"), "summary": summary(), "answers": answers}, budget=256)
    assert list(found) == ["What the heads find", "What answers gain", "What visible text is worth"]
