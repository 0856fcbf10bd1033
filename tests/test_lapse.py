"""The time-lapse page: its data are the graphs, hostile texts stay texts, and in a browser its keys and taps work."""

import inspect
import json
import re

import pandas as pd
import pytest
from test_circuit_figures import EDGES, graph
from test_player_browser import PHONE, browser, frame, show  # noqa: F401

from dhlens.graphs import Graph
from dhlens.heads import HeadSet
from dhlens.nodes import Wiring, parse_edge
from dhlens.render.lapse import Film, films, lapse

EVIL = ["</script><script>alert(1)</script>", "<!--", "${data}$script", "&lt;", "\u2028", "'\"`\n", "{{x}}", "<b>w</b>"]
LATER = {**EDGES, "L1H1->logits@step": 1.5, "L0H3->logits@step": -2.0}
del LATER["L1H0->L2.mlp@step"]
HEADS = {1: HeadSet(["L1H0"], (3, 4)), 3: HeadSet(["L1H1", "L0H3"], (3, 4))}


def film(name="e0", pieces=tuple("abcd")):
    return Film(name, pieces, [graph(LATER, step=3), graph(step=1)], HEADS)


def data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.html, re.S)[1])


def test_the_data_are_the_graphs():
    first = graph({**EDGES, "L0H1->L2KV0.v@needle": -0.1}, step=1)
    (found,) = data(lapse("toy", [Film("e0", list("abcd"), [graph(LATER, step=3), first], HEADS)]))
    names = [node[0] for node in found["nodes"]]
    assert [s["step"] for s in found["steps"]] == [1, 3] and found["pieces"] == list("abcd")
    for step, want in zip(found["steps"], (first, graph(LATER, step=3)), strict=True):
        net = want.to_networkx()
        got = {(names[a], names[b]): score for a, b, score, _ in step["edges"]}
        assert got == {(a, b): s for a, b, s in net.edges(data="score") if s is not None}
        sizes = [abs(score) for _, _, score, _ in step["edges"]]
        assert sizes == sorted(sizes, reverse=True)
        links = {(names[a], names[b]) for a, b in step["links"]}
        assert links == {(a, b) for a, b, s in net.edges(data="score") if s is None}
        assert step["heads"] == [f"L{n}H{h}" for n, h in HEADS[want.step]]
        assert {names[i] for i in step["ringed"]} == {f"{h}@step" for h in step["heads"] if f"{h}@step" in net}
    assert found["levels"] == ["embedding", "L0", "L1", "L2", "L2 mlp", "logits"]


def test_heads_of_another_step_alone_are_not_ringed():
    heads = {1: HeadSet(["L1H0", "L0H3", "L0H0"], (3, 4)), 3: HEADS[3]}
    (found,) = data(lapse("toy", [Film("e0", "abcd", [graph(step=1), graph(LATER, step=3)], heads)]))
    names = [node[0] for node in found["nodes"]]
    assert "L0H3@step" in names
    assert [[names[i] for i in step["ringed"]] for step in found["steps"]] == [
        ["L1H0@step"],
        ["L0H3@step", "L1H1@step"],
    ]


def test_hostile_texts_stay_texts():
    page = lapse(EVIL[0], [Film(EVIL[7], EVIL, [graph(step=2)], {})])
    (found,) = data(page)
    assert found["pieces"] == EVIL and found["name"] == EVIL[7]
    assert page.html.count("<script") == 2 and "alert(1)</script>" not in page.html
    assert "connect-src" not in page.html and "default-src 'none'" in page.html
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.html)


def test_a_long_answer_fits():
    wiring = Wiring(30, 9, 3)
    names = [f"L{n}H{h}->L{n + 1 + k}H{(h + k) % 9}.q@step" for k in range(5) for n in range(24) for h in range(9)]
    edges = [parse_edge(name) for name in names]
    graphs = [
        Graph.of({edges[(37 * i + 13 * s) % len(edges)]: -1.2345678 * i for i in range(200)}, wiring, step=s)
        for s in range(10)
    ]
    page = lapse("big", [Film("e0", ["piece"] * 10, graphs, {})])
    # 40 steps may take four times as much
    assert len(page.html.encode()) < 250_000 and sum(len(s["edges"]) for s in data(page)[0]["steps"]) == 2000


def test_films_are_of_the_answers_that_have_graphs():
    answers = pd.DataFrame({"episode": ["e0", "e1"], "pieces": [["a", "b"], ["c"]]})
    found = films(answers, {("e0", 1): graph(step=1)}, {("e0", 1): HEADS[1], ("e1", 0): HEADS[3]})
    assert [(f.name, list(f.pieces), [g.step for g in f.graphs], dict(f.heads)) for f in found] == [
        ("e0", ["a", "b"], [1], {1: HEADS[1]})
    ]


@pytest.mark.parametrize(
    ("some", "message"),
    [
        ([], "at least one answer, got none"),
        ([Film("e", ["a"], [], {})], "got none"),
        ([Film("e", ["a"], [graph(step=1)], {})], r"the 1 that were said, got \[1\]"),
        ([Film("e", ["a"], [graph(), graph()], {})], r"different steps .* got \[0, 0\]"),
    ],
)
def test_what_is_no_film_is_refused(some, message):
    with pytest.raises(ValueError, match=message):
        lapse("toy", some)


@pytest.mark.parametrize(
    ("some", "message"),
    [(film(), "films must be a sequence, got Film"), ([graph()], "each of films must be a Film, got Graph")],
)
def test_what_is_something_else_is_named(some, message):
    with pytest.raises(TypeError, match=message):
        inspect.unwrap(lapse)("toy", some)


def test_a_notebook_shows_the_page_in_a_frame_without_rights():
    shown = lapse("toy", [film()])._repr_html_()
    assert shown.startswith('<iframe sandbox="allow-scripts" srcdoc=') and shown.count("<") == 2


def now(tab):
    frame(tab)
    return tab.inner_text("#now")


def test_keys_slider_and_answers_move_it(show):  # noqa: F811
    tab = show(lapse("toy", [film(), film("e1", ["x"] * 4)]))
    assert now(tab) == "Step 1, ‘b’: 6 edges, the first graph. 1 dynamic head: L1H0."
    tab.keyboard.press("ArrowRight")
    # of six edges one is gone and one came; the one whose sign turned stays
    assert now(tab) == "Step 3, ‘d’: 5 stay, 1 came, 1 are gone since step 1. 2 dynamic heads: L0H3 L1H1."
    assert tab.locator("#graph .edge.stays").count() == 5 and tab.locator("#graph .edge.goes").count() == 1
    assert tab.locator("#graph .edge.comes").count() == 1 and tab.locator("#graph .edge.against").count() == 1
    assert tab.locator("#graph .node.on").count() == 2
    tab.keyboard.press("ArrowRight")
    assert "Step 3" in now(tab)
    tab.click("#said span >> nth=1")
    assert "Step 1" in now(tab)
    tab.select_option("#film", "1")
    assert now(tab).startswith("Step 1, ‘x’")
    tab.select_option("#most", "20")
    tab.click("#play")
    tab.wait_for_timeout(1400)
    assert "Step 3" in now(tab) and tab.inner_text("#play") == "Stop"


def test_dynamic_heads_without_a_node_are_counted(show):  # noqa: F811
    heads = {1: HeadSet(["L1H0", "L0H3", "L0H0"], (3, 4)), 3: HeadSet(["L0H3", "L2H0"], (3, 4))}
    tab = show(lapse("toy", [Film("e0", "abcd", [graph(step=1), graph(LATER, step=3)], heads)]))
    assert now(tab).endswith("3 dynamic heads: L0H0 L0H3 L1H0. 2 of 3 dynamic heads are not in this graph.")
    assert tab.locator("#graph .node.on").count() == 1
    tab.keyboard.press("ArrowRight")
    assert now(tab).endswith("2 dynamic heads: L0H3 L2H0. 1 of 2 dynamic heads is not in this graph.")


def test_a_tap_keeps_the_edges_of_a_node_on_a_phone(show):  # noqa: F811
    tab = show(lapse("toy", [film(pieces=[EVIL[0], EVIL[7], EVIL[5], "d" * 60])]), **PHONE)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    for control in tab.locator("button:visible, select:visible, input:visible").all():
        assert control.bounding_box()["height"] >= 40
    texts = tab.locator("#graph text.name").all_text_contents()
    tab.locator("#graph .node").nth(texts.index("↑")).tap()
    frame(tab)
    assert tab.inner_text("#its h2") == "logits at the step"
    rows = [r.split("\t")[:3] for r in tab.locator("#its tr").all_inner_texts()[1:]]
    assert rows == [["L2.mlp@step", "logits@step", "-5"], ["L1H1@step", "logits@step", "-1"]]
    assert tab.locator("#graph .edge.its").count() == 2
    tab.keyboard.press("Escape")
    frame(tab)
    assert tab.locator("#its h2").count() == 0 and tab.locator("#graph .edge.its").count() == 0
