"""Static detectors: toys worked by hand, and one tiny model scored by all of them against its own attention."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score
from toy_traces import toy_trace

from dhlens.compare import compare
from dhlens.detectors import attention_mass, headkv_r2, qr_ndcg, qr_score, query_episodes
from dhlens.episode import Episode, Span
from dhlens.scores import copy_paste
from dhlens.wu import copy_paste_wu

ACTIVE = torch.zeros(2, 3, 1, 2, dtype=torch.bool)


def peaked(keys, weights, **options):
    """A toy trace of one layer and head and a needle of three tokens at 3..5, every row with these peaks."""
    trace = toy_trace(ACTIVE[:1, :, :, :1], **options)
    n = len(trace)
    key = torch.tensor(keys).expand(n, 1, 1, -1)
    weight = torch.tensor(weights).expand(n, 1, 1, -1)
    return dataclasses.replace(
        trace, peak_key=key, peak_token=trace.episodes[0].tokens[key.clamp(min=0)], peak_weight=weight
    )


def test_r2_adds_the_weight_of_the_strongest_keys_inside_the_needle():
    """Three steps; of the first three keys two lie inside, with 0.5 and 0.1; the fourth comes too late."""
    trace = peaked([4, 0, 3, 5], [0.5, 0.2, 0.1, 0.05])
    assert headkv_r2(trace).values.item() == pytest.approx(3 * 0.6 / 3)


def test_r2_stops_at_the_length_of_the_known_answer():
    trace = peaked([4, 0, 3], [0.5, 0.2, 0.1])
    short = dataclasses.replace(trace.episodes[0], answer=torch.tensor([7]))
    assert headkv_r2(dataclasses.replace(trace, episodes=(short,))).values.item() == pytest.approx(0.6 / 3)
    unknown = dataclasses.replace(trace.episodes[0], answer=torch.tensor([], dtype=torch.long))
    assert headkv_r2(dataclasses.replace(trace, episodes=(unknown,))).values.item() == pytest.approx(0.6)


def test_r2_leaves_out_failed_episodes_and_keys_that_are_not_there():
    trace = toy_trace(ACTIVE, groups=["a", "b"])
    said = dataclasses.replace(trace.outcomes[1], text="something else")
    trace = dataclasses.replace(
        trace,
        outcomes=(trace.outcomes[0], said),
        peak_key=torch.full((len(trace), 1, 2, 3), -1),
        peak_token=torch.full((len(trace), 1, 2, 3), -1),
        peak_weight=torch.zeros(len(trace), 1, 2, 3),
    )
    score = headkv_r2(trace)
    assert score.groups == ("a",) and not score.values.any() and score.trace is None
    assert headkv_r2(trace, keep="all").groups == ("a", "b")


def test_r2_needs_as_many_peaks_as_the_needle_has_tokens():
    with pytest.raises(ValueError, match=r"'needle' has 3 tokens, the trace 2 peaks: observe with Capture\(k=3\)"):
        headkv_r2(toy_trace(ACTIVE))


def test_mass_is_what_the_trace_holds_on_the_span():
    trace = toy_trace(ACTIVE)
    trace.mass[:, 0, 0, 1] = 0.75
    score = attention_mass(trace)
    assert score.mean().tolist() == [[0.25, 0.75]] and score.trace is trace
    trace.mass[trace.episode == 1, 0] = float("nan")
    with pytest.raises(ValueError, match="1 episodes lack the span 'needle', first: toy-1"):
        attention_mass(trace)


PROMPT = Episode(
    "q",
    torch.arange(10, 20),
    torch.tensor([11, 12]),
    (Span("needle", 1, 4), Span("doc_1", 5, 6), Span("question", 6, 8), Span("tail", 8, 9)),
    {"group": "w"},
)


def test_query_rows_run_from_the_question_to_the_end():
    (asked,) = query_episodes([PROMPT])
    assert asked.span("query") == Span("query", 6, 10) and torch.equal(asked.tokens, PROMPT.tokens)
    (null,) = query_episodes([PROMPT], null=torch.tensor([90, 91, 92]))
    assert null.tokens.tolist() == [10, 11, 12, 13, 14, 15, 90, 91, 92, 18, 19]
    assert null.spans == (Span("needle", 1, 4), Span("doc_1", 5, 6), Span("question", 6, 9), Span("query", 6, 11))
    assert null.id == asked.id and null.group == "w"
    with pytest.raises(ValueError, match="must hold 0 <= start < stop"):
        query_episodes([PROMPT], null=torch.tensor([], dtype=torch.long))


def looks(episodes, needle, doc=0.0):
    """A trace of the query's rows of each episode, one head, looking alike at all of them: at the needle, at doc_1."""
    trace = toy_trace(ACTIVE[:1, :, :, :1])
    parts = []
    for i, episode in enumerate(episodes):
        query = episode.span("query")
        position = torch.arange(query.start, query.stop)
        n = len(position)
        parts.append(
            {f: getattr(trace, f)[:1].expand(n, *getattr(trace, f).shape[1:]) for f in PER_ROW}
            | {"episode": torch.full((n,), i), "position": position, "step": position - (len(episode.tokens) - 1)}
            | {"focus_key": torch.tensor([1, 2, 3, 5]).expand(n, -1)}
            | {"focus": torch.tensor([*needle, doc]).half().expand(n, 1, 1, -1)}
        )
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return dataclasses.replace(trace, episodes=tuple(episodes), outcomes=trace.outcomes * len(episodes), **columns)


PER_ROW = ("fed", "next_token", "argmax", "logprob", "entropy", "peak_key", "peak_token", "peak_weight")
PER_ROW += ("mass", "mass_core")
NULL = torch.tensor([90])


def test_qr_sums_the_calibrated_attention_of_the_query_on_the_needle():
    asked, null = (looks(query_episodes([PROMPT], null=ids), look) for ids, look in
                   ((None, [0.5, 0.25, 0.125]), (NULL, [0.25, 0.25, 0.25])))  # fmt: skip
    assert qr_score(asked).values.item() == 0.875
    score = qr_score(asked, null)
    assert score.values.item() == 0.125 and score.groups == ("w",) and "less the null" in score.source
    assert qr_score(asked, null, "doc_*").values.item() == 0


def test_qr_is_the_mean_over_the_query_rows_only():
    trace = looks(query_episodes([PROMPT]), [0.5, 0.25, 0.25])
    trace = dataclasses.replace(trace, focus=trace.focus * torch.tensor([1, 0, 0, 0.0])[:, None, None, None].half())
    assert qr_score(trace).values.item() == 0.25
    wide = dataclasses.replace(trace, episodes=(dataclasses.replace(
        trace.episodes[0], spans=(Span("needle", 1, 4), Span("query", 6, 7))),))  # fmt: skip
    assert qr_score(wide).values.item() == 1


def test_qr_drops_tokens_far_below_their_document():
    """Nine tokens of 0.5 and one of -0.5: the floor is -0.23. Eight of 0.5, then 0.25 and 0.23: it is 0.2285, but 0.24
    where the deviation were that of all tokens and not of a sample."""
    for low, total in (((0.5, -0.5), 4.5), ((0.25, 0.23), 4.48)):
        episode = Episode("q", torch.arange(14), torch.tensor([1]), (Span("needle", 1, 11), Span("question", 12, 13)))
        trace = looks(query_episodes([episode]), [0, 0, 0])
        n = len(trace)
        values = torch.tensor([0.5] * 8 + [*low])
        trace = dataclasses.replace(
            trace, focus_key=torch.arange(1, 11).expand(n, -1), focus=values.half().expand(n, 1, 1, -1)
        )
        assert qr_score(trace).values.item() == pytest.approx(total, abs=1e-3)


def test_qr_of_several_documents_is_their_sum_and_several_episodes_are_rows():
    other = dataclasses.replace(PROMPT, id="r", meta={"group": "v"})
    trace = looks(query_episodes([PROMPT, other]), [0.25, 0.25, 0.25], doc=0.125)
    score = qr_score(trace, spans=("needle", "doc_*"))
    assert score.values.flatten().tolist() == [0.875, 0.875] and score.groups == ("w", "v")


def test_qr_refuses_what_it_cannot_score():
    asked = looks(query_episodes([PROMPT]), [0.5, 0.25, 0.25])
    other = dataclasses.replace(PROMPT, tokens=PROMPT.tokens + 1)
    for null, message in (
        (looks(query_episodes([other]), [0, 0, 0]), "prompts of the trace up to the question, episode 'q'"),
        (looks(query_episodes([PROMPT] * 2), [0, 0, 0]), "the same episodes, got 2 for 1"),
    ):
        with pytest.raises(ValueError, match=message):
            qr_score(asked, null)
    with pytest.raises(ValueError, match=r"none of the spans fact_\*"):
        qr_score(asked, spans="fact_*")
    with pytest.raises(ValueError, match="3 of 4 query rows"):
        qr_score(asked.select(asked.step < 0))
    for gone in ({"focus": None, "focus_key": None}, {"focus_key": asked.focus_key + 1}):
        with pytest.raises(ValueError, match="lacks attention by key on 'needle'"):
            qr_score(dataclasses.replace(asked, **gone))


RANKED = Episode(
    "n",
    torch.arange(20),
    torch.tensor([1]),
    (
        *(Span(f"doc_{i}", i, i + 1) for i in range(12)),
        Span("fact_0", 2, 3),
        Span("fact_1", 9, 10),
        Span("question", 15, 17),
    ),
    {"group": "w"},
)


def ranking(values, null=None):
    """A trace in which one head gives each of the twelve documents of `RANKED` a value."""
    trace = looks(query_episodes([RANKED], null=null), [0, 0, 0])
    n = len(trace)
    focus = torch.tensor(values).half().expand(n, 1, 1, -1)
    return dataclasses.replace(trace, focus_key=torch.arange(12).expand(n, -1), focus=focus)


def test_ndcg_worked_by_hand():
    """Gold documents on ranks 1 and 4 of the head's order; the best order would have them on 1 and 2."""
    values = [0.0] * 12
    values[9], values[0], values[1], values[2] = 0.5, 0.25, 0.125, 0.0625
    want = (1 + 1 / np.log2(5)) / (1 + 1 / np.log2(3))
    assert qr_ndcg(ranking(values)).values.item() == pytest.approx(want)
    assert qr_ndcg(ranking(values), k=3).values.item() == pytest.approx(1 / (1 + 1 / np.log2(3)))
    calibrated = qr_ndcg(ranking(values), ranking(values, NULL))
    assert calibrated.groups == ("w",) and "best 10, gold fact_* of doc_*, less the null" in calibrated.source
    # all values are 0 then: the prompt's order counts
    assert calibrated.values.item() == pytest.approx((1 / np.log2(4) + 1 / np.log2(11)) / (1 + 1 / np.log2(3)))


def test_ndcg_is_that_of_sklearn():
    rng = np.random.default_rng(0)
    gold = np.isin(np.arange(12), [2, 9])[None]
    for k in (1, 5, 10):
        values = rng.permutation(12) / 16
        want = ndcg_score(gold, values[None], k=k)
        assert qr_ndcg(ranking(values.tolist()), k=k).values.item() == pytest.approx(want)


def test_ndcg_refuses_what_it_cannot_rank():
    trace = ranking([0.0] * 12)
    with pytest.raises(ValueError, match="k must be at least 1 rank, got 0"):
        qr_ndcg(trace, k=0)
    with pytest.raises(ValueError, match="none of the spans paper_"):
        qr_ndcg(trace, documents="paper_*")
    with pytest.raises(ValueError, match=r"none of its 2 documents holds fact_0"):
        qr_ndcg(trace, documents=("doc_0", "doc_1"), gold="fact_0")


def test_one_model_scored_by_all_methods(smollm2):
    """Their numbers against whole attention rows, and side by side in one table."""
    import dhlens
    from dhlens.tasks import niah

    episodes = niah.episodes(smollm2.tokenizer, lengths=(220,), depths=(0.5,), n=2, needle="number", seed=0)
    k = max(len(e.span("needle")) for e in episodes)
    capture = dhlens.Capture(k=k, rows=True)
    trace = dhlens.observe(smollm2, episodes, max_new_tokens=12, capture=capture, progress=False)
    null = torch.tensor(smollm2.tokenizer("N/A")["input_ids"])
    asked, empty = (
        dhlens.observe(smollm2, query_episodes(episodes, null=ids), rows="query", capture=capture, progress=False)
        for ids in (None, null)
    )
    r2, mass, qr = headkv_r2(trace, keep="all"), attention_mass(trace), qr_score(asked, empty)
    for i, episode in enumerate(episodes):
        needle = slice(episode.span("needle").start, episode.span("needle").stop)
        rows = trace.rows[(trace.episode == i) & trace.answer_rows() & (trace.step < len(episode.answer))].float()
        best = rows.topk(needle.stop - needle.start).indices
        inside = ((best >= needle.start) & (best < needle.stop)) * rows.gather(-1, best)
        n = needle.stop - needle.start
        # whole rows are float16, so a key more or less at the border
        torch.testing.assert_close(r2.values[i], inside.sum((0, -1)) / n, rtol=1e-3, atol=2e-3)
        looks = [t.rows[t.episode == i].float().mean(0)[..., needle] for t in (asked, empty)]
        look = looks[0] - looks[1]
        floor = look.mean(-1, keepdim=True) - 2 * look.std(-1, keepdim=True)
        torch.testing.assert_close(qr.values[i], (look * (look >= floor)).sum(-1), rtol=1e-3, atol=1e-4)
        own = trace.episode == i
        torch.testing.assert_close(mass.values[own], trace.rows[own][..., needle].float().sum(-1), rtol=1e-3, atol=1e-3)
    methods = {"wu": copy_paste_wu(trace, keep="all"), "r2": r2, "mass": mass, "qr": qr, "step": copy_paste(trace)}
    found = compare(methods, k=10, n_boot=20)
    assert len(found.overlap) == 20 and len(found.ranks) == 10 and list(found.methods["groups"]) == [2] * 5
