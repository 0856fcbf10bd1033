"""Comparing methods: hand-worked overlaps, chance levels against their slow judge, and the published numbers."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import kendalltau, spearmanr
from typer.testing import CliRunner

from dhlens.cli import app
from dhlens.compare import chance_jaccard, compare, tops
from dhlens.heads import HeadSet
from dhlens.render.overlap import overlap_map
from dhlens.scores import Score
from dhlens.spellings import parse_head_set, read_head_scores

QR_HEADS = {
    "8B LME": "13-18,13-21,8-11,14-13,17-29,13-1,13-13,14-29,14-31,13-8,16-1,17-21,13-3,10-31,13-4,14-22",
    "8B NQ": "14-22,13-16,14-28,14-31,16-19,14-1,16-26,17-24,14-0,13-0,16-25,13-12,13-1,13-10,17-27,20-14",
    "3B LME": "15-18,15-22,16-15,18-19,13-23,12-1,21-20,20-11,18-11,18-18,13-16,16-16,18-15,19-8,15-17,17-2",
    "3B NQ": "13-16,12-12,13-23,13-21,15-18,12-3,21-20,12-1,13-2,13-1,12-6,12-11,13-0,15-22,18-19,18-11",
}


def toy(values, groups=None, name="toy"):
    """A score of one row per group from [row heads], as one layer."""
    values = torch.tensor(values, dtype=torch.float64)[:, None]
    return Score(name, values, False, name, groups=groups)


def row(table: pd.DataFrame, a: str, b: str) -> pd.Series:
    return table.loc[(table["a"] == a) & (table["b"] == b)].iloc[0]


@pytest.mark.parametrize(
    ("model", "shape", "both", "jaccard"), [("8B", (32, 32), 3, 0.1034), ("3B", (28, 24), 8, 0.3333)]
)
def test_published_query_heads_of_two_tasks(model, shape, both, jaccard):
    sets = {f"{model} {task}": parse_head_set(QR_HEADS[f"{model} {task}"], shape) for task in ("LME", "NQ")}
    found = row(compare(sets).overlap, f"{model} LME", f"{model} NQ")
    assert found["both"] == both and found["jaccard"] == pytest.approx(jaccard, abs=5e-5)
    assert found["coverage"] == both / 16 and found["jaccard_max"] == 1 and np.isnan(found["low"])
    assert found["coverage_chance"] == 16 / (shape[0] * shape[1]) > found["jaccard_chance"] > 0


def test_means_that_differ_by_rounding_tie():
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in their last bit."""
    thirds = torch.tensor([[0.1, 0.3, 0.9, 0], [0.2, 0.2, 0.9, 0], [0.3, 0.1, 0.9, 0]], dtype=torch.float64)[:, None]
    score = Score("toy", thirds, False, "toy")
    assert score.mean()[0, 0] != score.mean()[0, 1]
    assert list(compare({"a": score, "b": score}, k=2).sets["a"]) == [(0, 2)]


@pytest.mark.parametrize("model", ["llama-2-7b-80k", "Mixtral-8x7B-v0.1"])
def test_odd_and_even_published_samples_find_the_same_heads(data, model):
    score = read_head_scores(data / "head_scores" / f"{model}.json")
    odd = torch.arange(len(score.values)) % 2 == 1
    found = row(compare({"odd": score.select(odd), "even": score.select(~odd)}, n_boot=20).overlap, "odd", "even")
    assert found["both"] in (18, 19, 20) and found["jaccard"] == found["both"] / (40 - found["both"])


def test_two_published_models_share_no_head(data):
    """Against scipy and plain sorting; other families of one shape agree at chance, as the known pairs of them do."""
    names = ("llama-2-7b-80k", "Mixtral-8x7B-v0.1")
    scores = {name: read_head_scores(data / "head_scores" / f"{name}.json") for name in names}
    found = compare(scores, k=20, n_boot=50)
    x, y = (scores[name].values.mean(0).flatten().numpy().round(12) for name in names)
    best = [set(np.argsort(-v, kind="stable")[:20].tolist()) for v in (x, y)]
    assert [found.sets[name] for name in names] == [HeadSet.top_k(scores[name].mean(), 20) for name in names]
    assert row(found.overlap, *names)["both"] == len(best[0] & best[1]) == 0
    ranks = row(found.ranks, *names)
    assert ranks["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1]) and abs(ranks["pearson"]) < 0.05
    assert ranks["spearman"] == pytest.approx(spearmanr(x, y)[0])
    assert ranks["kendall"] == pytest.approx(kendalltau(x, y)[0])
    assert list(found.methods["rows"]) == [586, 390] and (found.methods["jaccard_halves"] > 0.85).all()


def test_overlap_worked_by_hand():
    """Of six heads a score's best two are 0 and 1; the set holds 1, 2 and 3."""
    score = toy([[6, 5, 4, 3, 2, 1]])
    found = compare({"score": score, "set": HeadSet([(0, 1), (0, 2), (0, 3)], (1, 6))}, k=2)
    there, back = row(found.overlap, "score", "set"), row(found.overlap, "set", "score")
    assert there["both"] == 1 and there["jaccard"] == back["jaccard"] == 1 / 4
    assert there["coverage"] == 1 / 2 and back["coverage"] == 1 / 3
    assert there["coverage_chance"] == 3 / 6 and back["coverage_chance"] == 2 / 6
    assert there["jaccard_max"] == 2 / 3
    # 2 of 6 against 3 of 6: 3, 9 and 3 of 15 ways share 0, 1 and 2 heads
    assert there["jaccard_chance"] == pytest.approx((9 * 1 / 4 + 3 * 2 / 3) / 15)
    assert found.ranks.empty and list(found.methods["groups"]) == [1, 0]


def test_chance_is_what_random_sets_reach():
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(4000):
        a, b = (set(rng.choice(30, size=n, replace=False).tolist()) for n in (7, 4))
        drawn.append(len(a & b) / len(a | b))
    assert chance_jaccard(7, 4, 30) == pytest.approx(np.mean(drawn), abs=0.005)
    assert chance_jaccard(30, 30, 30) == 1 and chance_jaccard(1, 1, 4) == 1 / 4


def test_heads_that_tie_across_the_border_are_left_out():
    """Two sparse scores share no head but their zeros: top-k of the zeros would let them agree."""
    assert tops(np.array([[3.0, 0, 0, 1, 0, 0]]), 3).nonzero()[1].tolist() == [0, 3]
    assert tops(np.array([[3.0, 2, 2, 1]]), 1).sum() == 1 and tops(np.array([[3.0, 2, 2, 1]]), 4).all()
    a, b = toy([[0, 0, 0, 0, 1, 2]]), toy([[0, 0, 1, 2, 0, 0]])
    found = row(compare({"a": a, "b": b}, k=4).overlap, "a", "b")
    assert (found["size_a"], found["size_b"], found["jaccard"]) == (2, 2, 0)
    with pytest.raises(ValueError, match="'b' stands for no head at k=2: it is empty, or all its best heads tie"):
        compare({"a": a, "b": toy([[1, 1, 1, 1, 1, 1]])}, k=2)


def noisy(seed, groups, n=8):
    rng = np.random.default_rng(seed)
    return toy(rng.normal(np.arange(12) / 4, 1, size=(n, 12)), groups)


def test_groups_of_one_name_are_drawn_together():
    """Two scores of the same noise differ by nothing in any draw; with nameless samples their draws differ."""
    windows = tuple("ABCDEFGH")
    found = compare({"a": noisy(0, windows), "b": noisy(0, windows)}, k=3, n_boot=200)
    assert tuple(row(found.overlap, "a", "b")[["low", "high"]]) == (1, 1)
    assert row(found.ranks, "a", "b")["low"] == pytest.approx(1)
    apart = compare({"a": noisy(0, None), "b": noisy(0, None)}, k=3, n_boot=200)
    assert row(apart.overlap, "a", "b")["low"] < 1 and row(apart.ranks, "a", "b")["low"] < 0.99


def test_groups_count_and_not_rows():
    """Eight rows of two windows are two units: means are over rows, draws and halves over windows."""
    score = toy([[4, 0, 1.5]] * 6 + [[0, 4, 1.5]] * 2, groups=("A",) * 6 + ("B",) * 2)
    found = compare({"a": score, "b": toy([[3, 2, 1]], groups=("A",))}, k=1, n_boot=300)
    assert list(found.methods["groups"]) == [2, 1] and list(found.methods["rows"]) == [8, 1]
    assert found.methods["jaccard_halves"].iloc[0] == 0
    assert list(found.sets["a"]) == [(0, 0)]
    ranks = row(found.ranks, "a", "b")
    # draws are AA, AB or BB: means 4 0 1.5, 3 1 1.5 and 0 4 1.5 against 3 2 1
    assert (ranks["low"], ranks["high"]) == pytest.approx((-0.5, 0.5))


def test_the_same_seed_gives_the_same_tables():
    methods = {"a": noisy(0, tuple("ABCDEFGH")), "b": noisy(1, tuple("ABCDEFGH")), "c": noisy(2, None)}
    one, two, other = (compare(methods, k=3, n_boot=50, seed=seed) for seed in (0, 0, 1))
    for name in ("methods", "overlap", "ranks"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name))
    assert not one.ranks.equals(other.ranks)


def test_a_constant_score_has_no_rank():
    found = compare({"a": noisy(0, None), "b": toy([[1.0] * 12])}, k=12)
    assert row(found.ranks, "a", "b")[["spearman", "low", "high", "kendall", "pearson"]].isna().all()


def test_bad_comparisons_are_refused():
    a, b = toy([[1, 2, 3]]), toy([[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="at least 2 methods, got 1"):
        compare({"a": a})
    with pytest.raises(ValueError, match=r"of one model .* got a 1 x 3, b 1 x 4"):
        compare({"a": a, "b": b})
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"k must lie within 1..3 .* got {k}"):
            compare({"a": a, "b": a}, k=k)


def test_a_matrix_has_both_triangles_and_itself_on_the_diagonal():
    found = compare({"b": noisy(0, None), "a": noisy(1, None), "set": HeadSet([(0, 0)], (1, 12))}, k=3, n_boot=20)
    ranks, cover = found.matrix("spearman"), found.matrix("coverage")
    assert list(ranks.index) == list(ranks.columns) == ["b", "a", "set"]
    assert ranks.loc["a", "b"] == ranks.loc["b", "a"] == row(found.ranks, "b", "a")["spearman"]
    assert ranks.loc["b", "b"] == found.methods["spearman_halves"].iloc[0] and ranks["set"].isna().all()
    assert cover.loc["set", "b"] == row(found.overlap, "set", "b")["coverage"] and np.isnan(cover.loc["a", "a"])
    with pytest.raises(ValueError, match="column of overlap or ranks, got 'kappa'"):
        found.matrix("kappa")


def cells(figure: Figure) -> list[list[str]]:
    return [[t.get_text() for t in axes.texts] for axes in figure.axes if axes.texts]


def test_the_picture_shows_every_value_in_its_cell():
    found = compare(
        {"one": toy([[6, 5, 4, 3, 2, 1]]), "two": toy([[6, 5, 3, 4, 2, 0]]), "$x": toy([[1, 2, 3, 4, 5, 6]])}, k=2
    )
    figure = overlap_map(found)
    assert cells(figure) == [
        ["1.00", "0.00", "1.00", "0.00", "0.00", "0.00"],
        ["0.94", "-1.00", "0.94", "-0.94", "-1.00", "-0.94"],
    ]
    assert figure.axes[0].get_title() == "Jaccard of the head sets\n(2 heads; by chance 0.24)"
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["one", "two", "$x"]
    figure.draw_without_rendering()
    with pytest.raises(ValueError, match=r"measures must be some of .* got kappa"):
        overlap_map(found, ("kappa",))


def test_the_picture_sets_itself_apart():
    found = compare({"a": noisy(0, None), "b": HeadSet([(0, 11)], (1, 12))}, k=3, n_boot=20)
    own, *_ = overlap_map(found, ("jaccard",)).axes[0].texts
    assert own.get_style() == "italic" and own.get_text() == f"{found.methods['jaccard_halves'].iloc[0]:.2f}"


def command(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_the_command_compares_published_files(data, tmp_path):
    """The numbers of the two files as they were published: their best heads, and none in common."""
    files = [data / "head_scores" / f"{model}.json" for model in ("llama-2-7b-80k", "Mixtral-8x7B-v0.1")]
    (tmp_path / "nq.txt").write_text(QR_HEADS["8B NQ"])
    found = json.loads(command(*files, tmp_path / "nq.txt", "--top-k", 20, "--boot", 20, "--json").stdout)
    assert [m["rows"] for m in found["methods"]] == [586, 390, 0]
    both = {(r["a"], r["b"]): r["both"] for r in found["overlap"]}
    assert both["llama-2-7b-80k", "Mixtral-8x7B-v0.1"] == 0 and both["nq", "llama-2-7b-80k"] == 1
    llama = (
        "16-19 11-15 8-26 6-9 7-12 17-22 11-2 6-16 19-15 21-30 18-30 24-29 7-4 15-14 16-1 20-30 17-0 14-18 24-30 21-1"
    )
    assert HeadSet([tuple(head) for head in found["sets"]["llama-2-7b-80k"]], (32, 32)) == HeadSet(
        llama.split(), (32, 32)
    )
    mixtral = HeadSet([tuple(head) for head in found["sets"]["Mixtral-8x7B-v0.1"]], (32, 32))
    assert HeadSet("12-7 18-0 18-2 12-6 18-3 30-8 28-0 18-1 26-5 12-4".split(), (32, 32)).coverage(mixtral) == 1
    (pair,) = found["ranks"]
    assert abs(pair["pearson"]) < 0.05


def test_the_command_writes_tables_and_a_picture(tmp_path):
    for name, task in (("lme.txt", "8B LME"), ("nq.txt", "8B NQ")):
        (tmp_path / name).write_text(QR_HEADS[task])
    files, out = (tmp_path / "lme.txt", tmp_path / "nq.txt"), tmp_path / "out"
    run = command(*files, "--shape", "32x32", "--out", out)
    assert "0.1034" in run.stdout and "ranks" not in run.stdout
    assert pd.read_csv(out / "overlap.csv")["jaccard"].round(4).tolist() == [0.1034, 0.1034]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG") and (out / "methods.csv").is_file()
    for arguments, message in (
        ((*files, "--shape", "32x32", "--out", out), "results are never written over others"),
        (files, "holds a set of heads: say the model's --shape"),
        ((*files, "--shape", "32x32", "--boot", "-1"), "--boot is a number of draws, 0 or more, got -1"),
        ((*files, "--shape", "32"), "--shape reads like 32x32, layers x heads, got '32'"),
        ((files[0], files[0], "--shape", "32x32"), "a file is given twice"),
        ((files[0], "--shape", "32x32"), "at least 2 methods, got 1"),
        ((*files, "--shape", "12x12"), "lme.txt, line 1: L13H18 is outside 12 layers x 12 heads"),
    ):
        assert message in str(command(*arguments).exception)


def test_the_command_widens_gates_and_tells_files_of_one_name_apart(tmp_path):
    for folder, gates in (("a", "1\t0\n0.5\t0\n"), ("b", "0\t1\n0\t0.5\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "gates.tsv").write_text(gates)
    files = [tmp_path / folder / "gates.tsv" for folder in ("a", "b")]
    found = json.loads(command(*files, "--shape", "2x4", "--kv-heads", 2, "--top-k", 4, "--json").stdout)
    assert [m["name"] for m in found["methods"]] == [str(file) for file in files]
    assert found["sets"][str(files[0])] == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_gates_take_the_shape_of_a_score_file_and_the_command_asks_only_for_what_is_missing(tmp_path):
    gates, scores = tmp_path / "gates.tsv", tmp_path / "scores.json"
    gates.write_text("1\t0\n0.5\t0\n")
    scores.write_text(json.dumps({f"{layer}-{head}": [layer + head / 4] for layer in range(2) for head in range(4)}))
    found = json.loads(command(gates, scores, "--kv-heads", 2, "--top-k", 4, "--boot", 0, "--json").stdout)
    assert found["sets"]["gates"] == [[0, 0], [0, 1], [1, 0], [1, 1]] and len(found["ranks"]) == 1
    shape, heads = "--shape, layers x heads, as 32x32", "--kv-heads, KV heads of a layer"
    for arguments, missing in (
        ((gates, scores), heads),
        ((gates, gates.parent / "gates.tsv", scores, "--shape", "2x4"), "a file is given twice"),
        ((gates, tmp_path / "more.tsv", "--kv-heads", 2), shape),
        ((gates, tmp_path / "more.tsv"), f"{shape}, and {heads}"),
    ):
        (tmp_path / "more.tsv").write_text(gates.read_text())
        assert str(command(*arguments).exception).endswith(missing)
