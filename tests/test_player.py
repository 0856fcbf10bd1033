import base64
import dataclasses
import hashlib
import inspect
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from toy_player import STATIC, Texts, big_trace, edited_trace
from toy_render import HEADS, LAYERS, toy_score, toy_trace
from typer.testing import CliRunner

import dhlens as dh
from dhlens.cli import app
from dhlens.episode import Episode, Outcome, Span
from dhlens.heads import HeadSet
from dhlens.render.player import Player, player
from dhlens.render.report import inert_json
from dhlens.scores import Score, copy_paste, reasoning_mass
from dhlens.trace import Trace

TYPES = {"u1": "<u1", "u2": "<u2", "u4": "<u4"}
EVIL = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!--<script>",
    "\u2028\u2029",
    "\u202e",
    "&lt;b&gt;",
    "$script ${policy}",
    "\"'\\",
    "\ud800",
]


class Page(HTMLParser):
    """The elements of a page, and the text inside each script."""

    def __init__(self, page: Player):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(page.html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def packed(page: Player) -> dict:
    return json.loads(Page(page).scripts[0])


def opened(array: dict, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(array["data"]), TYPES[array["type"]]).reshape(shape)


def test_what_is_packed_can_be_read_again():
    trace = big_trace(prompt=300, steps=6, layers=3, heads=4)
    score = copy_paste(trace)
    data = packed(player(trace, Texts()))
    side, shape = data["sides"][0], (6, 3, 4)
    assert (data["layers"], data["heads"], side["k"]) == (3, 4, 4)
    assert data["prompt"] == [f" t{i}" for i in trace.episodes[0].tokens.tolist()]
    assert side["answer"] == [f" t{i}" for i in trace.next_token.tolist()]
    np.testing.assert_array_equal(opened(side["keys"], *shape, 4), trace.peak_key)
    np.testing.assert_allclose(opened(side["weights"], *shape, 4) / 65535, trace.peak_weight, atol=1e-5)
    np.testing.assert_allclose(opened(side["mass"], *shape) / 65535, trace.mass[:, 0], atol=1e-5)
    np.testing.assert_array_equal(opened(side["score"], *shape) / 65535, score.values)
    np.testing.assert_array_equal(opened(side["flags"], *shape), score.heads())
    np.testing.assert_allclose(side["p"], trace.logprob.exp(), atol=1e-5)


def test_scores_of_any_range_come_back():
    trace = toy_trace()
    values = torch.linspace(-3, 5, len(trace) * LAYERS * HEADS).reshape(-1, LAYERS, HEADS)
    data = packed(player(trace, Texts(), score=Score("own", values, False, "own", trace), threshold=1.0))
    (low, high), side = (data["score"]["low"], data["score"]["high"]), data["sides"][0]
    found = low + opened(side["score"], *values.shape) / 65535 * (high - low)
    np.testing.assert_allclose(found, values, atol=1e-4)
    np.testing.assert_array_equal(opened(side["flags"], *values.shape), values > 1)


def test_positions_beyond_two_bytes_stay_exact():
    trace = toy_trace(prompt=70_000, start=69_000)
    side = packed(player(trace, Texts()))["sides"][0]
    assert side["keys"]["type"] == "u4"
    np.testing.assert_array_equal(opened(side["keys"], 5, LAYERS, HEADS, 2), trace.peak_key)


def test_a_page_of_full_size_stays_below_3_mb():
    trace, texts = big_trace(), Texts({i: f" wörd{i}" for i in range(30_000)})
    assert len(player(trace, texts).html.encode()) < 0.8e6
    assert len(player(trace, texts, compare=trace).html.encode()) < 1.4e6


def test_other_episodes_and_prompt_rows_are_left_out():
    first, second = toy_trace(), toy_trace(prompt=80, start=40)
    both = Trace.cat([first, second])
    with_prompt = dataclasses.replace(both, step=both.step - (both.episode == 0).long())
    data = packed(player(with_prompt, Texts(), episode=1))
    assert len(data["prompt"]) == 80 and data["spans"] == [{"name": "needle", "start": 40, "stop": 45, "main": True}]
    flags = opened(data["sides"][0]["flags"], 5, LAYERS, HEADS)
    np.testing.assert_array_equal(flags, toy_score().heads())
    with pytest.raises(ValueError, match=r"'toy' must have its steps from 0 on"):
        player(with_prompt.select(with_prompt.step > 1), Texts())
    player(with_prompt, Texts())


def test_facts_are_scored_and_marked_where_there_is_no_needle():
    trace = toy_trace()
    episode = dataclasses.replace(
        trace.episodes[0], spans=(Span("fact_0", 3, 6), Span("fact_1", 20, 25), Span("question", 50, 55))
    )
    mass = torch.rand(5, 5, LAYERS, HEADS, generator=torch.Generator().manual_seed(0)) / 2
    names = ("fact_0", "fact_1", "question", "prompt", "all")
    trace = dataclasses.replace(trace, episodes=(episode,), span_names=names, mass=mass, mass_core=mass)
    data = packed(player(trace, Texts()))
    assert [s["main"] for s in data["spans"]] == [True, True, False] and data["main"] == "the facts"
    assert data["score"]["name"] == "reasoning_mass" and not data["score"]["binary"]
    side = data["sides"][0]
    np.testing.assert_allclose(opened(side["mass"], 5, LAYERS, HEADS) / 65535, mass[:, :2].sum(1), atol=1e-4)
    assert data["score"]["high"] == pytest.approx(float(reasoning_mass(trace).values.max()))


def test_masked_heads_are_marked_beside_the_clean_side():
    clean, edited = toy_trace(), edited_trace()
    data = packed(player(clean, Texts(), sets={"static": STATIC}, compare=edited))
    first, second = data["sides"]
    assert [(s["label"], s["edited"], s["correct"]) for s in data["sides"]] == [
        ("clean", False, True),
        ("edited", True, False),
    ]
    assert data["sets"] == [{"name": "static", "heads": [6, 8]}]
    assert second["answer"] == [" t1020", " t1021", " t7"] and len(first["answer"]) == 5
    flags = opened(second["flags"], 3, LAYERS, HEADS)
    assert (flags[:, 1, 2] == 2).all() and flags[0, 0, 1] == 1 and flags.sum() == 8


def test_a_clean_read_of_an_edited_trace_stands_beside_it():
    edited = edited_trace()
    clean = toy_trace()
    edited = dataclasses.replace(
        edited, clean=dataclasses.replace(clean.select(clean.step < 3), outcomes=edited.outcomes)
    )
    assert [s["label"] for s in packed(player(edited, Texts(), compare=edited.clean))["sides"]] == ["edited", "clean"]
    same = packed(player(clean, Texts(), compare=clean))["sides"]
    assert [s["label"] for s in same] == ["first", "second"]
    named = packed(player(clean, Texts(), compare=clean, labels=("a", "b")))["sides"]
    assert [s["label"] for s in named] == ["a", "b"]


def test_the_prompt_is_found_in_the_other_trace():
    wanted, other = toy_trace(), toy_trace(prompt=80, start=40)
    both = Trace.cat([other, wanted])
    data = packed(player(wanted, Texts(), compare=both))
    np.testing.assert_array_equal(opened(data["sides"][1]["keys"], 5, LAYERS, HEADS, 2), wanted.peak_key)


def test_scores_of_ones_own_kind_come_in_pairs():
    trace = toy_trace(focus=True)
    soft = copy_paste(trace, soft=True)
    with pytest.raises(ValueError, match="needs compare= as the Score of the other trace"):
        player(trace, Texts(), score=soft, compare=trace)
    data = packed(player(trace, Texts(), score=soft, compare=soft))
    assert data["sides"][0]["score"] == data["sides"][1]["score"]
    with pytest.raises(ValueError, match=r"both sides must have one score, got .*soft_copy_paste"):
        player(trace, Texts(), score=soft, compare=copy_paste(trace))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episode": 1}, r"episode must lie within 0\.\.0, got 1"),
        ({"episode": -1}, r"episode must lie within 0\.\.0, got -1"),
        ({"sets": {"own": HeadSet([], (2, 2))}}, r"set 'own' must come from \(3, 4\) \(layers, heads\), got \(2, 2\)"),
        (
            {"compare": toy_trace(prompt=61)},
            "compare must hold the prompt of episode 'toy', token by token; it holds toy",
        ),
        ({"compare": big_trace(60, 5, 2, 2)}, r"compare must come from \(3, 4\) \(layers, heads\), got \(2, 2\)"),
        (
            {"score": toy_score().select(torch.arange(5) < 4)},
            r"a value for each row of the trace, \(5, 3, 4\); got \(4",
        ),
        ({"score": toy_score(start=21)}, "of another trace"),
        ({"threshold": float("nan")}, "threshold must be a number, got NaN"),
        ({"labels": ("a", "b")}, "two sides, trace and compare, got 2 of them without compare"),
        *(
            ({"sets": {"own": STATIC, name: STATIC}}, f"set '{name}' must have a name of its own")
            for name in ("dynamic", "masked", "all", "dynamic, not own")
        ),
        ({"compare": Score("samples", torch.zeros(5, 3, 4), True, "file")}, "must have a trace, got one without steps"),
    ],
)
def test_what_does_not_belong_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        player(toy_trace(), Texts(), **options)


UNCHECKED = inspect.unwrap(player)  # without the test run's own checks of types


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace": toy_score()}, "trace must be a Trace, got Score"),
        ({"trace": Texts(), "tokenizer": toy_trace()}, "trace must be a Trace, got Texts"),
        ({"tokenizer": None}, "tokenizer must decode tokens, as model.tokenizer does, got NoneType"),
        ({"tokenizer": "gpt2"}, "tokenizer must decode tokens, as model.tokenizer does, got str"),
        ({"sets": {"s": [(1, 2)]}}, "set 's' must be a HeadSet, got list"),
        ({"sets": STATIC}, "sets must be a mapping, got HeadSet"),
        ({"score": torch.zeros(5, 3, 4)}, "score must be a Score, got Tensor"),
        ({"compare": "x"}, "compare must be a Trace or a Score, got str"),
        ({"labels": "ab"}, "labels must be a sequence of texts, got str"),
        ({"episode": "toy"}, "episode must be a whole number, got str"),
        ({"threshold": None}, "threshold must be a number, got None"),
    ],
)
def test_what_is_something_else_is_named(options, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        UNCHECKED(**({"trace": toy_trace(), "tokenizer": Texts()} | options))


def test_labels_are_two():
    with pytest.raises(ValueError, match="got 1 of them with compare"):
        UNCHECKED(toy_trace(), Texts(), compare=toy_trace(), labels=("a",))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_refused_with_its_place(value):
    trace = toy_trace()
    values = torch.zeros(5, LAYERS, HEADS)
    values[3, 1, 2] = value
    found = str(value).replace("nan", "NaN")
    mine = Score("mine", values, False, "mine", trace)
    with pytest.raises(ValueError, match=f"^score 'mine' must be finite, got {found} at step 3, L1H2$"):
        player(trace, Texts(), score=mine)
    calm = dataclasses.replace(mine, values=torch.zeros_like(values))
    with pytest.raises(ValueError, match="at step 3, L1H2"):
        player(trace, Texts(), score=calm, compare=mine)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("logprob", (2,), float("nan"), "logprob must be finite, got NaN at step 2$"),
        ("logprob", (2,), float("inf"), "logprob must be finite, got inf at step 2$"),
        ("entropy", (1,), -float("inf"), "entropy must be finite, got -inf at step 1$"),
        ("peak_weight", (4, 2, 3, 1), float("nan"), "peak_weight must be finite, got NaN at step 4, L2H3$"),
        ("mass", (0, 0, 2, 1), float("inf"), "mass must be finite, got inf at step 0, L2H1$"),
    ],
)
def test_a_trace_that_is_not_finite_is_refused_with_its_place(name, place, value, message):
    trace = toy_trace()
    values = getattr(trace, name).clone()
    values[place] = value
    with pytest.raises(ValueError, match=message):
        player(dataclasses.replace(trace, **{name: values}), Texts())


def test_a_token_that_could_not_come_has_probability_0():
    trace = toy_trace()
    logprob = torch.tensor([0, -float("inf"), 0, 0, 0])
    assert packed(player(dataclasses.replace(trace, logprob=logprob), Texts()))["sides"][0]["p"] == [1, 0, 1, 1, 1]


def test_what_no_page_can_read_is_never_written():
    with pytest.raises(ValueError, match="JSON"):
        inert_json({"p": [float("nan")]})


def test_an_episode_without_anything_to_score_needs_a_score():
    trace = toy_trace()
    bare = dataclasses.replace(
        trace, episodes=(Episode("bare", trace.episodes[0].tokens, torch.tensor([], dtype=torch.long)),)
    )
    with pytest.raises(ValueError, match="'bare' has neither a needle nor facts to score heads by: pass score="):
        player(bare, Texts())
    own = Score("own", trace.peak_weight[..., 0], False, "own")
    data = packed(player(bare, Texts(), score=own))
    assert data["main"] == "" and data["sides"][0]["mass"] is None


def evil_page() -> Player:
    trace = toy_trace()
    spans = (Span("needle", 20, 25), Span(EVIL[0], 30, 32))
    mass = torch.zeros(5, 4, LAYERS, HEADS)
    evil = dataclasses.replace(
        trace,
        episodes=(dataclasses.replace(trace.episodes[0], spans=spans),),
        outcomes=(Outcome(trace.outcomes[0].tokens, EVIL[0], False, "max_new_tokens"),),
        card=dataclasses.replace(trace.card, model=EVIL[0]),
        span_names=("needle", EVIL[0], "prompt", "all"),
        mass=mass,
        mass_core=mass,
    )
    return player(evil, Texts({1018 + i: text for i, text in enumerate(EVIL)}), sets={EVIL[1]: STATIC})


def test_a_haystack_cannot_leave_its_data():
    page = evil_page()
    read = Page(page)
    assert [tag for tag, _ in read.tags].count("script") == 2
    assert not {"img", "link", "iframe", "object", "base"} & {tag for tag, _ in read.tags}
    assert not [name for _, attrs in read.tags for name in attrs if name.startswith("on")]
    text = read.scripts[0]
    assert text.isascii() and not set(text) & set("<&") and "\\u003c/script" in text
    assert packed(page)["prompt"][18 : 18 + len(EVIL)] == EVIL
    page.html.encode("utf-8")


def test_only_the_players_own_script_may_run_and_nothing_is_fetched():
    page = evil_page()
    read = Page(page)
    policy = next(attrs["content"] for _, attrs in read.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(read.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(
        r"https?:|@import|url\(|fetch\(|XMLHttp|innerHTML|insertAdjacent|eval\(",
        page.html.replace("http://www.w3.org/2000/svg", ""),
    )


def test_save_is_whole_and_never_overwrites_unasked(tmp_path):
    page, other = player(toy_trace(), Texts()), player(edited_trace(), Texts())
    path = page.save(tmp_path / "run.html")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        other.save(path)
    assert path.read_text(encoding="utf-8") == page.html
    other.save(path, overwrite=True)
    assert path.read_text(encoding="utf-8") == other.html and [p.name for p in tmp_path.iterdir()] == ["run.html"]
    with pytest.raises(OSError, match="could not write"):
        page.save(tmp_path / "none" / "run.html")


def test_a_notebook_shows_the_page_in_a_frame_without_rights():
    shown = dh.player(toy_trace(), Texts())._repr_html_()
    assert shown.startswith('<iframe sandbox="allow-scripts" srcdoc=') and shown.count("<") == 2


def test_the_same_trace_gives_the_same_page():
    assert player(toy_trace(), Texts()).html == player(toy_trace(), Texts()).html


@pytest.fixture(scope="module")
def scan(smollm2, tmp_path_factory):
    """A finished scan of two short episodes."""
    folder = tmp_path_factory.mktemp("run") / "scan"
    arguments = ["scan", "--lengths", "300", "--depths", "0.5", "--n", "2", "--seed", "1", "--max-new-tokens", "8"]
    CliRunner().invoke(app, [*arguments, "--out", str(folder)], catch_exceptions=False)
    return folder


def test_show_writes_the_player_of_a_scan_and_needs_no_weights(scan, monkeypatch):
    monkeypatch.setattr("dhlens.model.load", None)
    run = CliRunner().invoke
    said = run(app, ["show", str(scan), "--player"], catch_exceptions=False).stdout
    assert said.strip() == f"player: {scan / 'player.html'}"
    other = scan.parent / "second.html"
    ids = [e.id for e in dh.load_trace(scan / "trace.safetensors").episodes]
    said = run(app, ["show", str(scan), str(other), "--player", "--episode", ids[1], "--json"], catch_exceptions=False)
    assert json.loads(said.stdout) == {"player": str(other)}
    titles = [re.search("<title>(.*)</title>", page.read_text())[1] for page in (scan / "player.html", other)]
    assert titles == [f"smollm2-135m, {i}" for i in ids]
    assert "The magic word" in "".join(json.loads(re.search('json">(.*)</script>', other.read_text())[1])["prompt"])


def test_show_refuses_a_player_it_cannot_write(scan):
    def refused(*arguments):
        return str(CliRunner().invoke(app, ["show", *arguments, "--player"]).exception)

    there = scan.parent / "there.html"
    there.write_text("mine")
    assert "exists: name another file" in refused(str(scan), str(there)) and there.read_text() == "mine"
    assert "--episode takes 0 to 1 or an id such as" in refused(str(scan), str(scan.parent / "x"), "--episode", "2")
    assert "is no dhlens run" in refused(str(scan.parent))
