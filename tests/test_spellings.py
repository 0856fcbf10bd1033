"""Published head sets and scores: what comes back is what was written, and a fault is named by its line or entry."""

import json

import pytest
import torch
from toy_traces import toy_trace

from dhlens.heads import SPELLINGS, HeadSet
from dhlens.raster import share_entropy
from dhlens.scores import Score, copy_paste
from dhlens.spellings import (
    content_of,
    parse_head_set,
    read_head_scores,
    read_head_set,
    spell,
    write_head_scores,
    write_head_set,
)

ORACLES = {
    "llama-2-7b-80k": dict(
        n=586, above={0.1: 33, 0.2: 14, 0.3: 11, 0.5: 6}, zero=719, always=12, total=14.4242, shares=4.3422,
        top="16-19 .9426, 11-15 .9201, 8-26 .7995, 6-9 .6178, 7-12 .6135, 17-22 .5574, 11-2 .4586, 6-16 .4367, "
        "19-15 .4201, 21-30 .4000, 18-30 .3122, 24-29 .2610, 7-4 .2236, 15-14 .2068, 16-1 .1779, 20-30 .1674, "
        "17-0 .1618, 14-18 .1613, 24-30 .1593, 21-1 .1489",
        after="6-30 17-18 21-16 29-19 13-23",
    ),
    "Mixtral-8x7B-v0.1": dict(
        n=390, above={0.1: 63, 0.2: 25, 0.3: 13, 0.5: 7}, zero=590, always=40, total=21.8961, shares=4.8172,
        top="12-7 .9455, 18-0 .9260, 18-2 .9230, 12-6 .8469, 18-3 .6511, 30-8 .5355, 28-0 .5045, 18-1 .4008, "
        "26-5 .4000, 12-4 .3959",
        after="",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", ORACLES)
def test_published_scores_give_the_published_heads(data, model):
    oracle = ORACLES[model]
    score = read_head_scores(data / "head_scores" / f"{model}.json")
    mean = score.mean()
    assert score.values.shape == (oracle["n"], 32, 32)
    assert {t: int((mean > t).sum()) for t in oracle["above"]} == oracle["above"]
    assert int((mean == 0).sum()) == oracle["zero"]
    assert int(score.heads().all(0).sum()) == oracle["always"]
    assert not (~score.heads().flatten(1).any(1)).any()
    assert float(mean.sum()) == pytest.approx(oracle["total"], abs=5e-5)
    assert float(share_entropy(mean.flatten().numpy())) == pytest.approx(oracle["shares"], abs=5.1e-5)
    top = [entry.split() for entry in oracle["top"].split(", ")]
    assert HeadSet.top_k(mean, len(top)) == HeadSet([head for head, _ in top], (32, 32))
    following = HeadSet.top_k(mean, len(top) + len(oracle["after"].split())) - HeadSet.top_k(mean, len(top))
    assert following == HeadSet(oracle["after"].split(), (32, 32))
    ranked = mean.flatten().sort(descending=True).values[: len(top)]
    assert ranked.tolist() == pytest.approx([float(value) for _, value in top], abs=5.1e-5)


def write(tmp_path, text):
    path = tmp_path / "scores.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_reads_heads_in_any_order_and_spelling(tmp_path):
    score = read_head_scores(write(tmp_path, {"L0H1": [1, 2], "1-0": [3, 4], "0-0": [5, 6], "a1.h1": [7, 8.5]}))
    assert score.values.tolist() == [[[5, 1], [3, 7]], [[6, 2], [4, 8.5]]]
    assert score.trace is None and score.row_groups.tolist() == ["0", "1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0-0": [1,\n 2', r"scores.json, line 2, column 3: not JSON"),
        ("[1, 2]", "one JSON object from heads to lists"),
        ("{}", "one JSON object from heads to lists"),
        ([["0-0", 1], ["0~1", 2]], "entry 2: a head id reads like"),
        ([["0-0", 1], ["a0.h0", 2]], "line 1, entry 2: head 'a0.h0' is given twice, first in line 1, entry 1"),
        ([["0-0", 1], ["0-1", "2"]], "entry 2: scores must be finite numbers, got '2'"),
        ({"0-0": [1], "0+1": [1]}, r"key '0\+1': a head id reads like"),
        ({"0-0": []}, "key '0-0': must be a list of at least one score"),
        ({"0-0": 0.5}, "key '0-0': must be a list of at least one score"),
        ({"0-0": [1, None]}, "key '0-0': scores must be finite numbers, got None"),
        ('{"0-0": [NaN]}', "key '0-0': scores must be finite numbers, got nan"),
        ({"0-0": [1], "L0H0": [1]}, "key 'L0H0': head 'L0H0' is given twice, first in line 1, key '0-0'"),
        ('{"0-0": [1],\n "0-1": [1],\n\n "0-0": [1]}', "line 4, key '0-0': .* twice, first in line 1, key '0-0'"),
        ('{"0-0": [1],\n "0+1": [1]}', r"scores.json, line 2, key '0\+1': a head id reads like"),
        ('[["0-0", 1],\n["L0H0", 1]]', "line 2, entry 2: head 'L0H0' is given twice, first in line 1, entry 1"),
        ({"0-0": [1], "99999-99999": [1]}, "heads L0H1, L0H2, L0H3, L0H4, L0H5 and more of 100000 layers"),
        ({"0-0": [1], "1-1": [1]}, "heads L0H1, L1H0 of 2 layers x 2 heads are missing"),
        ({"0-0": [1], "0-1": [1, 2]}, r"heads L0H1 have another number of samples than L0H0 \(1\)"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_head_scores(write(tmp_path, text))


def test_scores_of_another_model_are_refused(tmp_path):
    path = write(tmp_path, {"0-0": [1], "0-1": [2], "1-0": [3], "1-1": [4]})
    assert read_head_scores(path, (2, 2)).shape == (2, 2)
    with pytest.raises(ValueError, match="key '1-0': L1H0 is outside 1 layers x 2 heads"):
        read_head_scores(path, (1, 2))
    with pytest.raises(ValueError, match="heads L0H2, L1H2 of 2 layers x 3 heads are missing"):
        read_head_scores(path, (2, 3))


GATES = "6.05e-01\t0.0\n1.0\t2.5e-02\n"


def test_a_kv_head_lends_its_value_to_each_of_its_query_heads(tmp_path):
    score = read_head_scores(write(tmp_path, GATES), (2, 6), n_kv_heads=2)
    assert score.values.tolist() == [[[0.605] * 3 + [0.0] * 3, [1.0] * 3 + [0.025] * 3]]
    assert score.source == "scores.json: values of 2 KV heads a layer, each widened to its 3 query heads"


@pytest.mark.parametrize(
    ("text", "shape", "kv", "message"),
    [
        (GATES, None, None, "say the model's shape and n_kv_heads"),
        (GATES, None, 2, "say the model's shape$"),
        (GATES, (2, 6), None, "say the model's n_kv_heads$"),
        (GATES, (2, 6), 4, "n_kv_heads that divide the model's 6 query heads, got 4"),
        (GATES, (2, 6), 3, "scores.json, line 1: 2 KV heads, the model has 3"),
        ("1\t0\n1\n", (2, 6), 2, "scores.json, line 2: 1 KV heads, the model has 2"),
        (GATES, (3, 6), 2, "scores.json: 2 lines, the model has 3 layers"),
        ("1\t0\n1\tx\n", (2, 6), 2, "line 2: could not convert string to float: 'x'"),
        ("1\t0\n1\tnan\n", (2, 6), 2, "line 2: scores must be finite numbers, got nan"),
        ("", (2, 6), 2, "line 1: could not convert string to float: ''"),
    ],
)
def test_a_bad_tsv_is_refused_by_its_line(tmp_path, text, shape, kv, message):
    with pytest.raises(ValueError, match=message):
        read_head_scores(write(tmp_path, text), shape, n_kv_heads=kv)


SAMPLES = torch.tensor([[[0.1, 0.2], [0.5, 0.5]], [[0.3, 0.0], [0.5, 1.0]]], dtype=torch.float64)


def test_samples_come_back_as_they_were(tmp_path):
    write_head_scores(Score("toy", SAMPLES, False, "toy"), tmp_path / "wu.json")
    assert json.loads((tmp_path / "wu.json").read_text())["1-0"] == [0.5, 0.5]
    assert torch.equal(read_head_scores(tmp_path / "wu.json").values, SAMPLES)


def test_only_rows_that_the_mean_counts_are_written(tmp_path):
    """Of two answers the second is wrong; stop steps and prompt rows count in neither."""
    score = copy_paste(toy_trace(torch.ones(2, 3, 1, 2, dtype=torch.bool), correct=[True, False]))
    write_head_scores(score, tmp_path / "steps.json")
    back = read_head_scores(tmp_path / "steps.json")
    assert len(back.values) == 3 and torch.equal(back.mean(), score.mean())


def test_a_ranking_stands_best_first_and_comes_back_as_the_mean(tmp_path):
    score = Score("toy", SAMPLES, False, "toy")
    write_head_scores(score, tmp_path / "qr.json", "ranking")
    assert json.loads((tmp_path / "qr.json").read_text()) == [["1-1", 0.75], ["1-0", 0.5], ["0-0", 0.2], ["0-1", 0.1]]
    assert torch.equal(read_head_scores(tmp_path / "qr.json").values[0], score.mean())


def test_a_tsv_comes_back_and_keeps_the_best_query_head(tmp_path):
    read = read_head_scores(write(tmp_path, GATES), (2, 6), n_kv_heads=2)
    write_head_scores(read, tmp_path / "duo.tsv", "tsv", n_kv_heads=2)
    assert torch.equal(read_head_scores(tmp_path / "duo.tsv", (2, 6), n_kv_heads=2).values, read.values)
    write_head_scores(Score("toy", SAMPLES, False, "toy"), tmp_path / "max.tsv", "tsv", n_kv_heads=1)
    assert (tmp_path / "max.tsv").read_text() == "0.2\n0.75\n"
    for kv in (None, 0, 4):
        with pytest.raises(ValueError, match=f"divide the model's 2 query heads, got {kv}"):
            write_head_scores(Score("toy", SAMPLES, False, "toy"), tmp_path / "bad.tsv", "tsv", n_kv_heads=kv)


SHAPE = (28, 24)
HEADS = HeadSet([(2, 22), (16, 19), (0, 0)], SHAPE)


@pytest.mark.parametrize("spelling", [*SPELLINGS, "pairs"])
def test_a_set_comes_back_in_every_spelling(tmp_path, spelling):
    write_head_set(HEADS, tmp_path / "heads.txt", spelling)
    text = (tmp_path / "heads.txt").read_text()
    assert (spelling if spelling != "pairs" else "[16, 19]") in text
    assert read_head_set(tmp_path / "heads.txt", SHAPE) == HEADS


@pytest.mark.parametrize(
    "text",
    [
        "0-0,2-22,16-19",
        "L0H0\nL2-H22\nA16.19\n",
        " a0.h0 ; a2.h22, a16.h19",
        '["0-0", "2-22", [16, 19]]',
        "[(0, 0), (2, 22), (16, 19)]",
        "(0, 0), (2, 22), (16, 19)",
        str(HEADS),
        '# Default configuration\n\nattn_head_set: "0-0,2-22,16-19" # top16\nmodel_base_class: "Llama-3"\n'
        'model_name_or_path: "meta-llama/Llama-3"',
    ],
)
def test_lists_as_people_write_them(text):
    assert parse_head_set(text, SHAPE) == HEADS
    assert spell(parse_head_set(text, SHAPE), "16-19") == "0-0,2-22,16-19"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-0,2-22\n16_19", "heads.txt, line 2: a head id reads like L16H19, .* got '16_19'"),
        ("0-0\n\nL0H0", "heads.txt, line 3: head 'L0H0' is given twice, first in line 1"),
        ("0-0\n28-1", "heads.txt, line 2: L28H1 is outside 28 layers x 24 heads"),
        ("0-24", "heads.txt, line 1: L0H24 is outside 28 layers x 24 heads"),
        ('["0-0", "L0H0"]', "heads.txt, line 1, entry 2: head 'L0H0' is given twice, first in line 1, entry 1"),
        ("[[0, 0], [1.5, 2]]", r"heads.txt, line 1, entry 2: a head is a pair of whole numbers, .* got \[1.5, 2\]"),
        ("[[0, 0, 1]]", "entry 1: a head is a pair of whole numbers"),
        ("[[0, -1]]", "entry 1: L0H-1 is outside"),
        ('[["13-18", 0.63]]', "entry 1: a head is a pair of whole numbers"),
        ("[3]", "entry 1: a head is a pair of whole numbers"),
        ("[0-0, 2-22]", "heads.txt, line 1, entry 1: a list must hold quoted ids"),
        ("\n[[0, 0],\n[0, 0]]", "heads.txt, line 3, entry 2: .* twice, first in line 2, entry 1"),
        ("(3)", "heads.txt, line 1, entry 1: a head is a pair of whole numbers"),
        ("16 19\n3 4", "heads.txt, line 1: a head id reads like .* got '16'"),
        ('# one\nattn_head_set: "0-0,0-99" # top2\n', "heads.txt, line 2: L0H99 is outside"),
        ('attn_head_set: "full_heads"', "heads.txt, line 1: a head id reads like .* got 'full_heads'"),
        ('model_base_class: "Llama"', "heads.txt, line 1: a head id reads like"),
        ("[[0, 0],\n[1, ", "heads.txt, line 2: no list of heads"),
    ],
)
def test_a_bad_set_is_refused_by_its_place(tmp_path, text, message):
    (tmp_path / "heads.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_head_set(tmp_path / "heads.txt", SHAPE)


def test_nothing_is_written_over_or_in_an_unknown_form(tmp_path):
    path = write(tmp_path, "mine")
    score = Score("toy", SAMPLES, False, "toy")
    for call in (lambda: write_head_set(HEADS, path), lambda: write_head_scores(score, path)):
        with pytest.raises(ValueError, match="never written over a file"):
            call()
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match=r"spelling must be one of L16H19, .* or pairs, got 'wu'"):
        spell(HEADS, "wu")
    with pytest.raises(ValueError, match="form must be one of"):
        write_head_scores(score, tmp_path / "new", "yaml")


def circuit(nodes, **cfg):
    """A whole circuit as EAP-IG writes it; older files hold a bare flag per node."""
    edges = {"a0.h0->m0": {"score": 0.5, "in_graph": True}}
    return json.dumps({"cfg": {"n_layers": 28, "n_heads": 24, **cfg}, "nodes": nodes, "edges": edges})


NODES = {"input": True, "a0.h0": True, "a0.h1": False, "a2.h22": True, "m2": True, "a16.h19": True, "logits": True}


@pytest.mark.parametrize("nodes", [NODES, {n: {"in_graph": kept, "score": 0.1} for n, kept in NODES.items()}])
def test_the_heads_of_a_whole_circuit_are_read(nodes):
    assert parse_head_set(circuit(nodes), SHAPE) == HEADS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (circuit(NODES, n_layers=12), r"heads.txt: a circuit of 12 layers x 24 heads, the model has \(28, 24\)"),
        (circuit({"a0.h0": 1}), "heads.txt, node 'a0.h0': must be in the circuit or not .* got 1"),
        (circuit({"a0.h0": {"score": 1}}), "heads.txt, node 'a0.h0': must be in the circuit or not .* got None"),
        (circuit({"a0.h24": True}), "heads.txt, node 'a0.h24': L0H24 is outside 28 layers x 24 heads"),
        (circuit({"attn": True}), "heads.txt, node 'attn': a head id reads like"),
    ],
)
def test_a_circuit_of_another_model_or_form_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_head_set(text, SHAPE, name="heads.txt")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ('{"16-19": [0.5, 1]}', "scores"),
        ('[["13-18", 0.63]]', "scores"),
        ("6.05e-01\t0.0\n", "gates"),
        ("0.5\n0.25\n", "gates"),
        (circuit(NODES), "set"),
        ("{L0H0, L2H22}", "set"),
        ("13-18,13-21", "set"),
        ("13-18\n13-21", "set"),
        ("L0H0", "set"),
        ("[[0, 0], [2, 22]]", "set"),
        ('["0-0"]', "set"),
        ("", "set"),
        ("16 19\n3 4", "set"),
        ('# heads\nattn_head_set: "0-0"', "set"),
    ],
)
def test_scores_are_told_from_sets(tmp_path, text, content):
    (tmp_path / "file").write_text(text)
    assert content_of(tmp_path / "file") == content


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "heads.pt"
    path.write_bytes(b"\x80\x02}q")
    for read in (lambda: read_head_set(path, SHAPE), lambda: read_head_scores(path), lambda: content_of(path)):
        with pytest.raises(ValueError, match=r"heads\.pt holds neither heads nor scores: it is no text"):
            read()
