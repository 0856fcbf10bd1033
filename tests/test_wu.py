import dataclasses
import json

import pytest
import torch
from toy_traces import FIRST, STOP, toy_trace

from dhlens.episode import Span
from dhlens.heads import HeadSet
from dhlens.raster import share_entropy
from dhlens.wu import copy_paste_wu, read_head_scores

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
        ({"0-0": [1], "0+1": [1]}, r"key '0\+1': a head id reads like"),
        ({"0-0": []}, "key '0-0': must be a list of at least one score"),
        ({"0-0": 0.5}, "key '0-0': must be a list of at least one score"),
        ({"0-0": [1, None]}, "key '0-0': scores must be finite numbers, got None"),
        ('{"0-0": [NaN]}', "key '0-0': scores must be finite numbers, got nan"),
        ({"0-0": [1], "L0H0": [1]}, "head 'L0H0' is given twice"),
        ({"0-0": [1], "1-1": [1]}, "heads L0H1, L1H0 of 2 layers x 2 heads are missing"),
        ({"0-0": [1], "0-1": [1, 2]}, r"heads L0H1 have another number of samples than L0H0 \(1\)"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_head_scores(write(tmp_path, text))


def test_a_head_that_copies_the_whole_needle_scores_one():
    active = torch.zeros(2, 6, 2, 2, dtype=torch.bool)
    active[:, :, 1, 0] = True
    active[:, :3, 0, 1] = True
    score = copy_paste_wu(toy_trace(active, groups=["a", "b"]))
    assert score.values.tolist() == [[[0, 0.5], [1, 0]]] * 2
    assert score.trace is None and score.groups == ("a", "b")


def test_the_count_is_per_span_token_and_leaves_out_the_stop_step():
    """Two steps copy, and the stop step looks at a stop token in the needle; the needle is three tokens long."""
    trace = toy_trace(torch.ones(1, 2, 1, 1, dtype=torch.bool), needle=[FIRST, STOP], before=3)
    wide = dataclasses.replace(trace.episodes[0], spans=(Span("needle", 3, 6),))
    peaks = trace.peak_key.clone()
    peaks[-1] = 4
    trace = dataclasses.replace(trace, episodes=(wide,), peak_key=peaks, peak_token=wide.tokens[peaks])
    assert copy_paste_wu(trace).values.item() == pytest.approx(2 / 3)


def test_counts_count_a_token_again_and_set_recall_does_not():
    """Needle a b a c: heads copy all of it, the first a only, both a."""
    active = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 1], [1, 0, 0]], dtype=torch.bool)[None, :, None]
    trace = toy_trace(active, needle=[FIRST, FIRST + 1, FIRST, FIRST + 2])
    assert copy_paste_wu(trace).values.flatten().tolist() == [1, 0.25, 0.5]
    assert copy_paste_wu(trace, mode="set_recall").values.flatten().tolist() == pytest.approx([1, 1 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("reply", "kept"), [("a quick brown foxes", True), ("the quick dog", False), ("nothing of the kind", False)]
)
def test_rouge_keeps_replies_that_recall_more_than_half(reply, kept):
    """The reference is "the quick brown fox": three, two (exactly half) and one of its four words."""
    trace = toy_trace(torch.ones(2, 3, 1, 1, dtype=torch.bool), groups=["a", "b"])
    said = dataclasses.replace(trace.outcomes[1], text=reply)
    trace = dataclasses.replace(trace, outcomes=(trace.outcomes[0], said))
    assert copy_paste_wu(trace).groups == (("a", "b") if kept else ("a",))


def test_keep_by_verdict():
    trace = toy_trace(torch.ones(3, 3, 1, 1, dtype=torch.bool), groups=["a", "b", "c"], correct=[False, True, None])
    assert copy_paste_wu(trace, keep="answered").groups == ("b",)
    assert copy_paste_wu(trace, keep="all").groups == ("a", "b", "c")
    with pytest.raises(ValueError, match="keep='answered' leaves none of 1 episodes"):
        copy_paste_wu(trace.pick([0]), keep="answered")
    bare = dataclasses.replace(trace.episodes[0], meta={})
    with pytest.raises(ValueError, match="episode 'toy-0' has neither"):
        copy_paste_wu(dataclasses.replace(trace.pick([0]), episodes=(bare,)))


def test_misspelt_options_are_refused():
    trace = toy_trace(torch.ones(1, 2, 1, 1, dtype=torch.bool))
    for options in ({"mode": "counts"}, {"keep": "answred"}):
        with pytest.raises(ValueError, match="mode must be one of"):
            copy_paste_wu(trace, **options)
