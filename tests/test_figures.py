import dataclasses
import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from matplotlib.collections import FillBetweenPolyCollection
from toy_render import toy_score

from dhlens.dynamics import dynamics
from dhlens.heads import HeadSet
from dhlens.render import figures
from dhlens.render.draw import drawable

SHAPE = (3, 4)


def heads_table(rates: dict[tuple[int, int], float], shape=SHAPE) -> pd.DataFrame:
    rows = [(layer, head, rates.get((layer, head), 0.0)) for layer in range(shape[0]) for head in range(shape[1])]
    return pd.DataFrame(rows, columns=["layer", "head", "rate"])


def marks(axes) -> list[tuple[float, float]]:
    return sorted((float(x), float(y)) for c in axes.collections for x, y in np.asarray(c.get_offsets()))


def texts(axes) -> list[str]:
    return [t.get_text() for t in axes.texts]


def ticks(axis) -> list[str]:
    return [t.get_text() for t in axis.get_ticklabels()]


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of texts that cover one another, or the edge of the picture, once the figure is drawn."""
    figure.draw_without_rendering()
    boxes = []
    for axes in figure.axes:
        left, right = sorted(axes.get_xlim())
        low, high = sorted(axes.get_ylim())
        labels = [t for t in axes.get_xticklabels() if left <= t.get_position()[0] <= right]
        labels += [t for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]
        labels += [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title]
        boxes += [(t.get_text(), t.get_window_extent()) for t in labels if t.get_text() and t.get_visible()]
    page = figure.bbox.padded(2)
    cut = [(text, "edge") for text, b in boxes if not (page.contains(*b.min) and page.contains(*b.max))]
    inner = [(text, box.padded(-1)) for text, box in boxes]
    return cut + [(a, b) for i, (a, x) in enumerate(inner) for b, y in inner[:i] if x.overlaps(y)]


def test_raster_marks_every_firing_and_names_the_heads():
    figure = figures.raster(toy_score())
    axes = figure.axes[0]
    assert ticks(axes.yaxis) == ["L0H1", "L1H2"]
    assert marks(axes) == sorted([(s, 0) for s in (0, 2, 4)] + [(s, 1) for s in range(5)])
    assert axes.get_xlabel() == "generation step" and axes.get_ylabel() == "head"
    assert axes.get_title(loc="left") == "Episode toy: 2 heads fire"


def test_raster_sets_static_heads_apart_by_shape_and_colour():
    axes = figures.raster(toy_score(), static=HeadSet(["L1H2", "L2H3"], SHAPE)).axes[0]
    by_name = {c.get_label(): c for c in axes.collections}
    assert set(by_name) == {"other heads", "static (1 of 2 shown)"}
    other, static = by_name["other heads"], by_name["static (1 of 2 shown)"]
    assert {y for _, y in np.asarray(static.get_offsets())} == {1.0} and len(static.get_offsets()) == 5
    assert not np.array_equal(other.get_facecolor(), static.get_facecolor())
    assert other.get_paths()[0].vertices.tolist() != static.get_paths()[0].vertices.tolist()


def test_raster_keeps_the_most_active_heads_and_counts_the_others():
    axes = figures.raster(toy_score(), max_heads=1).axes[0]
    assert ticks(axes.yaxis) == ["L1H2"] and "the 1 most active of 2 heads" in axes.get_title(loc="left")


def test_raster_names_steps_by_token_without_reading_them_as_mathematics():
    figure = figures.raster(toy_score(), tokens=[" $a_1", "\n", "你", " ", "$" + "x" * 20])
    labels = figure.axes[0].get_xticklabels()
    assert [t.get_text() for t in labels] == ["$a_1", "↵", "U+4F60", "␣", "$xxxxxxxxxx…"]
    assert not any(t.get_parse_math() for t in labels)
    assert overlaps(figure) == []


def test_raster_of_an_episode_where_nothing_fires_says_so():
    score = toy_score()
    silent = dataclasses.replace(score, values=torch.zeros_like(score.values))
    axes = figures.raster(silent).axes[0]
    assert texts(axes) == ["no head fires in this episode"] and marks(axes) == []


def test_raster_takes_a_threshold_for_scores_that_are_not_yes_or_no():
    score = toy_score()
    soft = dataclasses.replace(score, values=score.values * 0.4, binary=False)
    assert len(marks(figures.raster(soft, threshold=0.3).axes[0])) == 8
    assert len(marks(figures.raster(soft, threshold=0.5).axes[0])) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episode": 1}, "episode must lie within 0..0, got 1"),
        ({"tokens": ["a"]}, "tokens must name the 5 steps"),
        ({"static": HeadSet([], (9, 9))}, r"static must come from \(3, 4\) \(layers, heads\), got \(9, 9\)"),
        ({"max_heads": 0}, "max_heads must be at least 1, got 0"),
    ],
)
def test_raster_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        figures.raster(toy_score(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": toy_score().trace}, "score must be a Score, got Trace"),
        ({"static": [(1, 2)]}, "static must be a HeadSet, got list"),
        ({"tokens": "abcde"}, "tokens must be a sequence of texts, got str"),
    ],
)
def test_raster_names_what_is_something_else(options, message):
    with pytest.raises(TypeError, match=message):
        inspect.unwrap(figures.raster)(**({"score": toy_score()} | options))


def test_raster_refuses_a_score_without_steps():
    with pytest.raises(ValueError, match="needs a score with a trace"):
        figures.raster(dataclasses.replace(toy_score(), trace=None))


def test_head_map_places_rates_by_layer_and_head_and_leaves_the_silent_empty():
    figure = figures.head_map(heads_table({(2, 1): 0.5, (0, 3): 0.01}))
    axes, bar = figure.axes
    grid = axes.images[0].get_array()
    assert grid.shape == SHAPE and grid[2, 1] == 0.5 and grid[0, 3] == 0.01 and grid.mask.sum() == 10
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer") and "steps" in bar.get_ylabel()
    assert overlaps(figure) == []


def test_shares_below_one_per_cent_are_not_called_none():
    table = heads_table({(2, 1): 0.5, (0, 3): 0.0004})
    bar, tail = figures.head_map(table).axes[1].yaxis, figures.long_tail(table).axes[0].yaxis
    for axis in (bar, tail):
        assert [axis.get_major_formatter()(x, None) for x in (1.0, 0.1, 0.01, 0.001)] == ["100%", "10%", "1%", "0.1%"]


@pytest.mark.parametrize("draw", ["head_map", "static_curve"])
def test_tables_without_a_row_are_refused(draw):
    columns = "layer head rate k jaccard_static jaccard_max jaccard_over_max coverage".split()
    with pytest.raises(ValueError, match="got none"):
        getattr(figures, draw)(pd.DataFrame({name: [] for name in columns}))


def test_head_map_of_a_model_where_nothing_fires_is_drawn():
    figure = figures.head_map(heads_table({}))
    figure.draw_without_rendering()
    assert figure.axes[0].images[0].get_array().mask.all()


def test_long_tail_ranks_heads_and_counts_those_that_carry_half():
    rates = {(0, 0): 0.4, (1, 1): 0.3, (2, 2): 0.2, (0, 1): 0.1}
    figure = figures.long_tail(heads_table(rates), static=HeadSet(["L1H1", "L2H3"], SHAPE))
    top, bottom = figure.axes
    others, static = top.lines
    assert others.get_ydata().tolist() == [0.4, 0.2, 0.1] and others.get_xdata().tolist() == [1, 3, 4]
    assert static.get_ydata().tolist() == [0.3] and static.get_label() == "static top 2 (1 fire)"
    assert top.get_yscale() == "log" and top.get_title() == "4 of 12 heads fire"
    assert texts(bottom) == ["2 heads carry 50%", "3 heads carry 90%"]
    assert bottom.lines[0].get_ydata() == pytest.approx([0.4, 0.7, 0.9, 1.0])
    assert overlaps(figure) == []


def test_long_tail_takes_the_static_heads_of_the_table():
    table = heads_table({(0, 0): 0.4, (1, 1): 0.3}).assign(in_static_20=lambda t: t["head"] == 1)
    assert figures.long_tail(table).axes[0].lines[1].get_ydata().tolist() == [0.3]


def test_long_tail_refuses_where_nothing_fires():
    with pytest.raises(ValueError, match="at least one head that fires"):
        figures.long_tail(heads_table({}))


def test_lag_curve_shows_both_bands():
    lag = np.arange(1, 6)
    table = pd.DataFrame({"lag": lag, "jaccard": 0.4 / lag, "low": 0.3 / lag, "high": 0.5 / lag, "null": 0.1})
    table = table.assign(null_low=0.05, null_high=0.15)
    axes = figures.lag_curve(table).axes[0]
    assert {line.get_label(): len(line.get_ydata()) for line in axes.lines} == {"shuffled time": 5, "observed": 5}
    assert sum(isinstance(c, FillBetweenPolyCollection) for c in axes.collections) == 2
    assert axes.get_xlabel() == "time lag (generation steps)"
    bare = figures.lag_curve(table.drop(columns=["low", "high"])).axes[0]
    assert len(bare.collections) == 1


def test_static_curve_draws_the_cap_beside_the_measures():
    k = np.array([1, 20, 50, 100])
    cap = np.array([0.1, 0.5, 0.2, 0.1])
    table = pd.DataFrame(
        {"k": k, "jaccard_static": cap / 2, "jaccard_max": cap, "jaccard_over_max": 0.5, "coverage": 0.9}
    )
    figure = figures.static_curve(table)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert len(lines) == 4
    assert lines["cap: largest possible Jaccard"].get_ydata().tolist() == cap.tolist()
    assert lines["Jaccard"].get_ydata() == pytest.approx(cap / 2)
    assert ticks(figure.axes[0].xaxis) == ["1", "2", "5", "10", "20", "50", "100"]
    assert overlaps(figure) == []


def test_answer_grid_counts_judged_episodes_in_each_cell():
    table = pd.DataFrame(
        [(500, 0.1, True), (500, 0.1, False), (500, 0.9, None), (2000, 0.9, True)],
        columns=["length", "depth", "correct"],
    )
    figure = figures.answer_grids(table)
    axes, bar = figure.axes
    assert axes.images[0].get_array().filled(-1).tolist() == [[0.5, -1], [-1, 1.0]]
    assert texts(axes) == ["50%\nn=2", "100%\nn=1"]
    assert ticks(axes.xaxis) == ["500", "2,000"] and ticks(axes.yaxis) == ["10%", "90%"]
    assert figure.get_supxlabel() == "context length (tokens)" and bar.get_xlabel() == "right answers"
    assert axes.get_title() == "all episodes\n67%, n=3"


def test_answer_grid_bins_natural_lengths_and_loses_no_episode():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"length": rng.integers(100, 4000, 80), "depth": rng.random(80), "correct": rng.random(80) < 0.5}
    )
    figure = figures.answer_grids(table)
    counts = [int(t.partition("n=")[2]) for t in texts(figure.axes[0])]
    assert sum(counts) == 80 and figure.axes[0].images[0].get_array().shape[0] <= 8
    assert overlaps(figure) == []


def test_answer_grid_refuses_episodes_that_nobody_judged():
    with pytest.raises(ValueError, match="judged"):
        figures.answer_grids(pd.DataFrame({"length": [1], "depth": [0.5], "correct": [None]}))


def test_accumulation_has_a_panel_for_each_quantity():
    table = pd.DataFrame({"episodes": [1, 2, 3], "activated": [4, 6, 7], "entropy": [1.0, 1.4, 1.5]})
    table = table.assign(activated_low=3, activated_high=8)
    figure = figures.accumulation(table)
    top, bottom = figure.axes
    assert top.lines[0].get_ydata().tolist() == [4, 6, 7] and bottom.lines[0].get_ydata().tolist() == [1.0, 1.4, 1.5]
    assert (len(top.collections), len(bottom.collections)) == (1, 0)
    assert bottom.get_ylabel() == "entropy (nats)" and bottom.get_xlabel() == "episodes drawn"


@pytest.mark.parametrize("draw", ["head_map", "long_tail", "lag_curve", "static_curve", "answer_grids", "accumulation"])
def test_a_missing_column_is_named(draw):
    with pytest.raises(ValueError, match=r"must have the columns .*; it lacks "):
        getattr(figures, draw)(pd.DataFrame({"other": [1]}))


def test_the_tables_of_dynamics_can_be_drawn():
    found = dynamics(toy_score(answer=12), static_from=torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)))
    drawn = [
        figures.head_map(found.heads),
        figures.long_tail(found.heads),
        figures.lag_curve(found.lags),
        figures.static_curve(found.static),
        figures.accumulation(found.accumulation),
    ]
    assert all(overlaps(figure) == [] for figure in drawn)


def test_figures_leave_no_state_behind():
    before = dict(pyplot.rcParams)
    figures.raster(toy_score()).draw_without_rendering()
    assert pyplot.get_fignums() == [] and dict(pyplot.rcParams) == before


def test_drawable_keeps_what_the_font_has():
    assert drawable(" naïve\t") == "naïve⇥" and drawable("a\nb") == "a↵b" and drawable("🦉") == "U+1F989"
    assert [drawable(t) for t in ("", " ", "\r", "\u202ea\x00")] == ["∅", "␣", "␣", "U+202EaU+0000"]
