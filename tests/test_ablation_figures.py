import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import colors, pyplot
from matplotlib.collections import FillBetweenPolyCollection
from test_figures import marks, texts, ticks
from test_figures import overlaps as overlaps_of_panels

from dhlens.render import figures
from dhlens.render.conditions import EDITS, POLICIES, styles

MEASURES = ("accuracy", "rouge_l", "kept", "kl")


def answers_table(policies=("none", "dynamic"), lengths=(500, 1000, 2000), depths=(0.0, 0.5, 1.0), n=2) -> pd.DataFrame:
    """Right at half the places; ROUGE-L tells them all apart."""
    rows = [(p, x, d, i) for p in policies for x in lengths for d in depths for i in range(n)]
    table = pd.DataFrame(rows, columns=["policy", "length", "depth", "episode"])
    table = table.assign(edit="zero", commit="edited", k=np.nan, correct=np.arange(len(rows)) % 2 == 0)
    table["rouge_l"] = np.linspace(0, 1, len(rows))
    table.loc[table["policy"] == "none", ["edit", "commit"]] = "none"
    return table


def summary_table(policies=("dynamic", "none"), edits=("zero",), commits=("edited",)) -> pd.DataFrame:
    touched = [(p, e, c) for p in policies for e in edits for c in commits if p != "none"]
    rows = touched + [("none", "none", "none")] * ("none" in policies)
    table = pd.DataFrame(rows, columns=["policy", "edit", "commit"])
    for i, name in enumerate((*MEASURES, "heads")):
        table[name] = np.linspace(0.3 + 0.1 * i, 0.4 + 0.1 * i, len(rows))
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.05, table[name] + 0.05
    return table


def contrast_table() -> pd.DataFrame:
    rows = [
        ("dynamic", "random", "-", "kl", False, 0.9, 0.7, 1.1, 0.001, 0.0004),
        ("dynamic", "static", "-", "kl", True, 0.4, -0.1, 0.8, 0.021, np.nan),
        ("dynamic", "static", "edited", "accuracy", True, -0.2, -0.4, -0.1, 0.004, np.nan),
        ("dynamic", "random", "edited", "accuracy", False, -0.5, -0.6, -0.4, 0.01, 0.03),
        ("dynamic", "tail", "edited", "accuracy", False, 0.1, np.nan, np.nan, 0.5, np.nan),
    ]
    columns = "first second commit measure primary difference low high p p_holm"
    return pd.DataFrame(rows, columns=columns.split()).assign(edit="zero")


def sweep_table() -> pd.DataFrame:
    rows = [(p, k) for p in ("dynamic", "random") for k in (0.0, 10.0, 5.0)]
    table = pd.DataFrame(rows, columns=["policy", "k"]).assign(edit="zero", commit="edited")
    for i, name in enumerate(("accuracy", "rouge_l", "comp_max", "comp_mean")):
        table[name] = np.linspace(0.1, 0.9, len(rows)) * (1 + i)
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.1, table[name] + 0.1
    return table


def overlaps(figure) -> list[tuple[str, str]]:
    """Those of the panels, and where a legend or a text of the whole figure covers something or is cut off."""
    found = overlaps_of_panels(figure)
    whole = [("legend", x.get_window_extent()) for x in figure.legends]
    whole += [(t.get_text(), t.get_window_extent()) for t in figure.texts]
    panels = [("panel", a.get_tightbbox()) for a in figure.axes]
    found += [
        (a, "edge") for a, box in whole if not all(figure.bbox.padded(2).contains(*x) for x in (box.min, box.max))
    ]
    return found + [
        (a, b) for i, (a, x) in enumerate(whole) for b, y in panels + whole[:i] if x.padded(-1).overlaps(y.padded(-1))
    ]


def dots(axes) -> list[tuple[float, float]]:
    """Where the single marks of a panel stand, from the top."""
    points = [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xydata()) == 1]
    return sorted(((float(x), round(float(y), 6)) for x, y in points), key=lambda p: p[1])


def whiskers(axes) -> list[tuple[float, float, float]]:
    lines = [line.get_xydata() for line in axes.lines if line.get_linestyle() == "-"]
    return [(float(a[0]), float(b[0]), round(float(a[1]), 6)) for a, b in (xy for xy in lines if len(xy) == 2)]


def panel(figure, title: str):
    """The panel whose title begins with `title`."""
    found = [a for a in figure.axes if (a.get_title() or a.get_title(loc="left")).startswith(title)]
    assert len(found) == 1, title
    return found[0]


def test_grids_show_the_mean_and_number_of_each_cell():
    table = answers_table()
    table["correct"] = table["correct"].astype(object)
    table.loc[0, "correct"] = None
    figure = figures.answer_grids(table, policies=["dynamic", "none"])
    assert [a.get_title() for a in figure.axes[:2]] == ["dynamic\n50%, n=18", "none\n47%, n=17"]
    for policy in ("dynamic", "none"):
        drawn = panel(figure, policy).images[0].get_array()
        judged = table[(table["policy"] == policy) & table["correct"].notna()]
        wanted = judged.assign(correct=judged["correct"].astype(float)).pivot_table("correct", "depth", "length")
        assert drawn.tolist() == wanted.to_numpy().tolist()
        assert panel(figure, policy).images[0].get_clim() == (0, 1)
    assert texts(panel(figure, "none"))[0] == "0%\nn=1" and set(texts(panel(figure, "dynamic"))) == {"50%\nn=2"}
    assert ticks(figure.axes[0].xaxis) == ["500", "1,000", "2,000"] and ticks(figure.axes[0].yaxis) == [
        "0%",
        "50%",
        "100%",
    ]
    assert overlaps(figure) == []


def test_grids_of_many_policies_wrap_and_keep_their_outer_labels():
    figure = figures.answer_grids(answers_table([f"policy {i}" for i in range(7)]), value="rouge_l")
    panels = figure.axes[:7]
    rows = [a.get_subplotspec().rowspan.start for a in panels]
    assert rows == [0, 0, 0, 1, 1, 1, 2]
    assert [any(ticks(a.xaxis)) for a in panels] == [False] * 4 + [True] * 3
    assert [any(ticks(a.yaxis)) for a in panels] == [True, False, False, True, False, False, True]
    assert texts(panels[0])[0].startswith("0.00\n") and "ROUGE-L" in figure.axes[-1].get_xlabel()
    assert overlaps(figure) == []


def test_grids_give_each_edit_of_a_policy_its_panel_and_leave_the_sweep_out():
    table = answers_table(["dynamic", "none"])
    both = pd.concat(
        [table, table[table["policy"] == "dynamic"].assign(edit="mean"), table.assign(k=5.0, correct=False)]
    )
    titles = [a.get_title() for a in figures.answer_grids(both).axes[:-1]]
    assert titles == ["none\n50%, n=18", "dynamic, zero\n50%, n=18", "dynamic, mean\n50%, n=18"]


def test_grids_hatch_cells_without_an_answer_and_wrap_long_names():
    table = answers_table(["(dynamic top 20 - static like dynamic)", "static", "random"])
    table = table[(table["policy"] != "static") | (table["length"] == 1000)]
    figure = figures.answer_grids(table)
    axes = panel(figure, "static")
    assert axes.images[0].get_array().mask.tolist() == [[True, False, True]] * 3 and axes.patch.get_hatch()
    assert len(texts(axes)) == 3 and overlaps(figure) == []


def test_grids_bin_all_panels_alike_and_drop_text_that_does_not_fit():
    rng = np.random.default_rng(0)
    table = answers_table(["dynamic", "static"], lengths=range(10), depths=range(10), n=1)
    table = table.assign(length=rng.integers(100, 9000, 200), depth=rng.random(200))
    figure = figures.answer_grids(table)
    shapes = {a.images[0].get_array().shape for a in figure.axes[:2]}
    assert shapes == {(8, 8)} and texts(figure.axes[0]) == [] and overlaps(figure) == []
    assert [a.get_title().partition("n=")[2] for a in figure.axes[:2]] == ["100", "100"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"value": "kl"}, "value must be one of correct, rouge_l, f1, mass, got 'kl'"),
        ({}, {"policies": ["dynamic", "statik"]}, "got none under statik"),
        ({"correct": None}, {}, "got none under any policy"),
    ],
)
def test_grids_refuse(change, options, message):
    with pytest.raises(ValueError, match=message):
        figures.answer_grids(answers_table().assign(**change), **options)


def test_dots_stand_where_the_table_says_with_the_untouched_model_first():
    table = summary_table(("static", "dynamic", "none"))
    figure = figures.effect_dots(table)
    wanted = table.set_index("policy").loc[["none", "static", "dynamic"]]
    assert ticks(figure.axes[0].yaxis) == ["none", "static", "dynamic"]
    for axes, measure in zip(figure.axes, ("accuracy", "kept", "kl"), strict=True):
        assert dots(axes) == [(value, row) for row, value in enumerate(wanted[measure])]
        low, high = wanted[f"{measure}_low"], wanted[f"{measure}_high"]
        assert sorted(whiskers(axes), key=lambda w: w[2]) == list(zip(low, high, range(3), strict=True))
    assert overlaps(figure) == []


def test_dots_draw_one_step_measures_once_and_clean_commits_hollow():
    table = summary_table(("dynamic", "none"), edits=("zero", "own"), commits=("edited", "clean"))
    accuracy, kept, _ = figures.effect_dots(table).axes
    assert (len(dots(accuracy)), len(dots(kept))) == (5, 3)
    faces = {line.get_markerfacecolor() for line in accuracy.lines if len(line.get_xydata()) == 1}
    assert "white" in faces and "white" not in {line.get_markerfacecolor() for line in kept.lines}
    heights = [y for _, y in dots(accuracy)]
    assert len(set(heights)) == 5 and all(0.5 < y < 1.5 for y in heights[1:])
    names = [t.get_text() for t in figures.effect_dots(table).legends[0].get_texts()]
    assert names == ["zero", "own", "commit: edited", "commit: clean"]


def test_dots_have_a_log_axis_with_a_place_for_0_where_effects_differ_much():
    table = summary_table(("random", "static", "dynamic", "none")).assign(
        kl=[0.002, 0.1, 3.0, 0.0], kl_low=0.0, kl_high=4.0
    )
    axes = figures.effect_dots(table).axes[2]
    assert axes.get_xscale() == "symlog" and dots(axes)[0] == (0.0, 0.0)
    assert ticks(axes.xaxis) == ["0", "0.01", "1", "3"] and axes.get_xlabel().endswith("log scale")
    near = figures.effect_dots(table.assign(kl=[0.1, 0.2, 0.3, 0.0])).axes[2]
    assert near.get_xscale() == "linear"


def test_dots_leave_open_what_was_not_measured():
    table = summary_table().assign(kept=np.nan, accuracy_low=np.nan, accuracy_high=np.nan)
    figure = figures.effect_dots(table)
    assert texts(figure.axes[1]) == ["not measured"] and dots(figure.axes[1]) == []
    assert len(dots(figure.axes[0])) == 2 and overlaps(figure) == []
    with pytest.raises(ValueError, match="effects need a measured accuracy, kept or kl, got none"):
        figures.effect_dots(table.assign(accuracy=np.nan, kl=np.nan))


def test_forest_sets_primary_contrasts_apart_and_prints_the_right_p():
    figure = figures.contrast_forest(contrast_table())
    kl, accuracy = panel(figure, "one-step KL"), panel(figure, "right answers")
    assert ticks(kl.yaxis) == ["dynamic − static", "dynamic − random"]
    assert texts(kl) == ["p = .021", "p < .001"] and texts(accuracy) == ["p = .004", "p = .030", ""]
    assert dots(accuracy) == [(-0.2, 0), (-0.5, 1), (0.1, 2)]
    assert whiskers(kl)[:2] == [(-0.1, 0.8, 0), (0.7, 1.1, 1)]
    assert [t.get_fontweight() for t in accuracy.get_yticklabels()] == ["bold", "normal", "normal"]
    drawn = {line.get_marker(): line.get_color() for line in kl.lines if len(line.get_xydata()) == 1}
    assert drawn.keys() == {"D", "o"} and drawn["D"] != drawn["o"]
    names = [t.get_text() for t in figure.legends[0].get_texts()]
    assert names == ["primary (p as it is)", "p after Holm"]
    assert overlaps(figure) == []


def test_forest_gives_each_edit_and_commit_a_panel_on_the_scale_of_its_measure():
    table = contrast_table()
    figure = figures.contrast_forest(pd.concat([table, table.assign(edit="mean", primary=False, difference=5.0)]))
    titles = [a.get_title(loc="left") for a in figure.axes]
    assert titles == [
        "one-step KL (nats), zero",
        "right answers, zero",
        "one-step KL (nats), mean",
        "right answers, mean",
    ]
    limits = [a.get_xlim() for a in figure.axes]
    assert limits[0] == limits[2] and limits[1] == limits[3] and all(low < 0 < 5 < high for low, high in limits)


def test_forest_of_one_row_and_of_none():
    figure = figures.contrast_forest(contrast_table().tail(1))
    assert dots(figure.axes[0]) == [(0.1, 0)] and overlaps(figure) == []
    with pytest.raises(ValueError, match="a forest needs a known difference"):
        figures.contrast_forest(contrast_table().assign(difference=np.nan))


def test_k_sweep_draws_each_policy_in_the_order_of_k_with_its_band():
    table = sweep_table()
    figure = figures.k_sweep(table)
    axes = figure.axes[0]
    for line in axes.lines:
        part = table[table["policy"] == line.get_label()].sort_values("k")
        assert line.get_xydata().tolist() == part[["k", "accuracy"]].to_numpy().tolist()
    assert [line.get_label() for line in axes.lines] == ["dynamic", "random"]
    bands = [c for c in axes.collections if isinstance(c, FillBetweenPolyCollection)]
    assert len(bands) == 2 and bands[0].get_paths()[0].vertices[:, 1].min() == pytest.approx(0.0)
    assert overlaps(figure) == []
    assert [a.get_ylabel() for a in figure.axes] == ["right answers", "ROUGE-L"]
    three = figures.k_sweep(table.assign(kl=table["rouge_l"]))
    assert three.axes[2].get_ylabel() == "one-step KL (nats)" and overlaps(three) == []


def test_k_sweep_of_one_point_without_bounds():
    figure = figures.k_sweep(sweep_table()[["policy", "k", "accuracy"]].head(1))
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0.0, 0.1]] and overlaps(figure) == []


def test_compensation_has_a_panel_for_the_most_and_the_mean_under_each_edit():
    table = sweep_table()
    most, mean = figures.compensation(table).axes
    first = table[table["policy"] == "dynamic"].sort_values("k")
    assert most.lines[0].get_ydata().tolist() == first["comp_max"].tolist()
    assert mean.lines[0].get_ydata().tolist() == first["comp_mean"].tolist()
    both = figures.compensation(pd.concat([table, table.assign(edit="mean")]))
    assert [a.get_title() for a in both.axes] == ["zero", "zero", "mean", "mean"] and overlaps(both) == []
    with pytest.raises(ValueError, match="a sweep needs a measured comp_max or comp_mean, got none"):
        figures.compensation(table.assign(comp_max=np.nan, comp_mean=np.nan))


def test_atlas_prints_accuracy_and_heads_and_hatches_what_was_not_run():
    table = summary_table(("dynamic", "static", "none"), edits=("zero", "mean"), commits=("edited", "clean"))
    table = table.drop(index=table[(table["policy"] == "static") & (table["edit"] == "mean")].index)
    figure = figures.atlas(table)
    edited = panel(figure, "commit: edited")
    grid = edited.images[0].get_array()
    wanted = table[table["commit"] == "edited"].set_index(["policy", "edit"])
    assert grid[0].tolist() == [wanted.loc[("dynamic", e), "accuracy"] for e in ("zero", "mean")]
    assert grid.mask.tolist() == [[False, False], [False, True]] and edited.patch.get_hatch()
    heads = wanted.loc[("dynamic", "zero"), "heads"]
    assert len(texts(edited)) == 3 and texts(edited)[0] == f"{grid[0, 0]:.0%}\n{heads:.1f} h"
    assert edited.get_title() == "commit: edited (untouched: 40%)"
    assert ticks(edited.yaxis) == ["dynamic", "static"] and ticks(figure.axes[1].xaxis) == ["zero", "mean"]
    assert overlaps(figure) == []


def test_atlas_refuses_where_nothing_was_edited():
    with pytest.raises(ValueError, match="an atlas needs the accuracy of a policy"):
        figures.atlas(summary_table(("none",)))


def causal_toy(steps=6, shape=(4, 5)) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """L1H2 has the largest effect, L3H0 a small one and is active at all steps but the last; L0H4 is active once."""
    kl, active = torch.zeros(steps, *shape), torch.zeros(steps, *shape, dtype=torch.bool)
    kl[:, 1, 2] = torch.linspace(0.1, 2.0, steps)
    kl[0, 3, 0] = 0.01
    active[:-1, 3, 0] = True
    active[2, 0, 4] = True
    return kl, active, [f" t{i}" for i in range(steps)]


def test_causal_raster_aligns_effects_and_active_heads():
    kl, active, tokens = causal_toy()
    figure = figures.causal_raster(kl, active, tokens)
    left, right = figure.axes[:2]
    assert ticks(left.yaxis) == ["L0H4", "L1H2", "L3H0"] and left.get_ylabel() == "head (3 of 20)"
    rows = [kl[:, layer, head].double().tolist() for layer, head in ((0, 4), (1, 2), (3, 0))]
    assert left.images[0].get_array().tolist() == rows and isinstance(left.images[0].norm, colors.LogNorm)
    assert marks(right) == sorted([(2.0, 0.0)] + [(float(s), 2.0) for s in range(5)])
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    assert not any(t.get_visible() for t in right.get_yticklabels())
    assert ticks(right.xaxis) == [t.strip() for t in tokens]
    assert overlaps(figure) == []


def test_causal_raster_keeps_the_strongest_and_the_most_active_by_turns():
    kl, active, tokens = causal_toy()
    assert ticks(figures.causal_raster(kl, active, tokens, max_heads=2).axes[0].yaxis) == ["L1H2", "L3H0"]


def test_causal_raster_of_a_large_model_and_long_tokens():
    generator = torch.Generator().manual_seed(0)
    kl = torch.rand(30, 32, 32, generator=generator) ** 8
    tokens = [" $a_1", "\n", "你", "<|im_end|>", "x" * 40, ""] * 5
    figure = figures.causal_raster(kl, kl > 0.9, tokens)
    left, right = figure.axes[:2]
    names = ticks(left.yaxis)
    heads = [tuple(map(int, name[1:].split("H"))) for name in names]
    assert len(names) == 40 and heads == sorted(heads) and left.get_ylabel() == "head (40 of 1024)"
    assert divmod(int(kl.amax(0).argmax()), 32) in heads
    assert marks(right) == sorted((s, r) for r, (x, h) in enumerate(heads) for s in range(30) if kl[s, x, h] > 0.9)
    labels = [t for t in left.get_xticklabels()]
    assert [t.get_text() for t in labels[:5]] == ["$a_1", "↵", "U+4F60", "<|im_end|>", "x" * 11 + "…"]
    assert not any(t.get_parse_math() for t in labels) and overlaps(figure) == []


def test_causal_raster_where_only_one_side_has_something():
    kl, active, tokens = causal_toy()
    assert marks(figures.causal_raster(kl, active & False, tokens).axes[1]) == []
    silent = figures.causal_raster(kl * 0, active, tokens)
    assert ticks(silent.axes[0].yaxis) == ["L0H4", "L3H0"] and overlaps(silent) == []
    with pytest.raises(ValueError, match="a head with an effect or an active head, got none"):
        figures.causal_raster(kl * 0, active & False, tokens)


def test_causal_raster_refuses():
    kl, active, tokens = causal_toy()
    with pytest.raises(ValueError, match=r"a token per step, got \(6, 4, 5\), \(6, 4, 5\) and 5 tokens"):
        figures.causal_raster(kl, active, tokens[:-1])
    with pytest.raises(ValueError, match="kl must be numbers, got NaN"):
        figures.causal_raster(kl * torch.nan, active, tokens)


@pytest.mark.parametrize("draw", ["answer_grids", "effect_dots", "contrast_forest", "k_sweep", "compensation", "atlas"])
def test_a_missing_column_is_named(draw):
    with pytest.raises(ValueError, match=r"must have the columns .*; it lacks "):
        getattr(figures, draw)(pd.DataFrame({"policy": ["dynamic"]}))


@pytest.mark.parametrize("known", [EDITS, POLICIES])
def test_known_names_keep_their_look_and_no_two_share_it(known):
    looks = styles(["own", *known], known)
    assert len(set(looks.values())) == len(known) + 1
    assert styles([known[2]], known)[known[2]] == looks[known[2]]


def test_ablation_figures_leave_no_state_behind():
    before = dict(pyplot.rcParams)
    figures.atlas(summary_table()).draw_without_rendering()
    assert pyplot.get_fignums() == [] and dict(pyplot.rcParams) == before
