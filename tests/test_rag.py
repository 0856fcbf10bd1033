"""Dynamic retrieval on a tiny model: the loop against its judge, the recipe, its tables, resuming and refusals."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import dhlens as dh
from dhlens import arms
from dhlens.answering import Arm, answer
from dhlens.choosers import CHOOSERS, reasoning_policies
from dhlens.episode import Episode, Span
from dhlens.lookup import VISIBILITIES, ContextLookup
from dhlens.prefix import prefill
from dhlens.recipes import Rag, rag
from dhlens.store import Run
from dhlens.triggers import MeanEntropy, every_sentence, never
from dhlens.views import generate
from dhlens.windows import Windows, fact_recall

ROOM = 6


def question(i):
    tokens = torch.randint(3, tiny.VOCAB, (60,), generator=torch.Generator().manual_seed(i))
    tokens[:4] = torch.arange(4, 8)
    spans = (
        Span("context", 4, 52),
        Span("doc_0", 4, 30),
        Span("doc_1", 30, 52),
        Span("fact_0", 8, 12),
        Span("fact_1", 40, 46),
        Span("question", 53, 58),
    )
    answer = f"w{int(tokens[9])} w{int(tokens[10])}"
    meta = {"group": f"g{i}", "answer_text": answer, "question": "which", "titles": ["a", "b"]}
    return Episode(f"q{i}", tokens, tokens[9:11], spans, meta)


@pytest.fixture(scope="module")
def model():
    return dh.load(tiny.build("llama"), tokenizer=tiny.tokenizer(), check=False)


@pytest.fixture(scope="module")
def questions():
    return [question(i) for i in range(10)]


@pytest.fixture(scope="module")
def policies(model, questions):
    fit = dh.observe(model, questions[:6], max_new_tokens=ROOM, progress=False)
    return reasoning_policies(fit, k=2, seed=0)


SETTINGS = {
    "triggers": {"unsure": MeanEntropy(0.1), "every": every_sentence},
    "visibilities": VISIBILITIES,
    "windows": Windows(reach=3, budget=12, gap=2),
    "budgets": (6, 24),
    "leaks": 1,
    "max_new_tokens": ROOM,
    "progress": False,
}


@pytest.fixture(scope="module")
def result(model, questions, policies):
    return rag(model, questions[6:], policies, **SETTINGS)


def lookup_of(model, episode, policies):
    full = next(prefill(model, [episode]))[1]
    head = model.stream()
    head.feed(episode.tokens[None, :4])
    return ContextLookup(model, full, episode, policies, windows=SETTINGS["windows"], head=head, joint=[7])


def slow_answer(model, lookup, start, trigger, visibility, policy):
    """The loop, written down once more for a single arm."""
    said, view, n_looked = [], start, 0
    while True:
        draft = generate(model, [view], [said], max_new_tokens=ROOM - len(said))[0]
        at = trigger(draft)
        if at is None:
            return said + list(draft.tokens), n_looked
        said = said + list(draft.tokens[:at])
        heads = lookup.heads(policy, said)
        shown = lookup.windows(lookup.attention(heads, said), lookup.episode.span("context"))
        view, n_looked = lookup._view(visibility, shown), n_looked + 1
        written = generate(model, [view], [said], max_new_tokens=ROOM - len(said))[0]
        first = written.sentences()[0][1] if written.tokens else 0
        said = said + list(written.tokens[:first])
        if not first or len(said) >= ROOM or (written.stopped and first == len(written.tokens)):
            return said, n_looked


@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_arms_answered_together_equal_the_loop_of_each(model, questions, policies, visibility):
    lookup = lookup_of(model, questions[7], policies)
    start = lookup.view(visibility, torch.zeros(60, dtype=torch.bool))
    triggers = {"unsure": MeanEntropy(0.1), "every": every_sentence, "never": never}
    names = [(t, p) for t in triggers for p in ("predicted", "static", "oracle")]
    found = answer(
        model,
        {Arm(t, visibility, p): start for t, p in names},
        triggers=triggers,
        lookups={visibility: lookup.through(visibility)},
        max_new_tokens=ROOM,
    )
    for t, p in names:
        one = found[Arm(t, visibility, p)]
        judge = lookup_of(model, questions[7], policies)
        assert (one.said, len(one.lookups)) == slow_answer(model, judge, start, triggers[t], visibility, p)
        assert one.said == [token for event in one.events for token in event.draft.tokens[: event.kept]]
    assert any(one.lookups for one in found.values())


def test_the_attention_that_chooses_is_that_of_the_plain_model(model, questions, policies):
    lookup, episode = lookup_of(model, questions[8], policies), questions[8]
    said = [9, 11]
    heads = lookup.heads("static", said)
    _, patterns, _ = tiny.eager(tiny.build("llama"), torch.cat([episode.tokens, torch.tensor(said)]))
    judge = torch.stack([patterns[layer, head, -1, :60] for layer, head in heads]).mean(0)
    torch.testing.assert_close(lookup.attention(heads, said), judge, atol=1e-3, rtol=0)


def test_the_oracle_names_the_heads_of_largest_mass_on_the_facts(model, questions, policies):
    lookup, episode = lookup_of(model, questions[8], policies), questions[8]
    _, patterns, _ = tiny.eager(tiny.build("llama"), episode.tokens)
    core = patterns[:, :, -1, 4:28]  # without the first 4 keys and the last 32
    share = core[..., 4:8].sum(-1) / core.sum(-1)  # fact_1 lies in the local window
    assert set(lookup.heads("oracle", [])) == set(dh.HeadSet.top_k(share.double(), 2))


def test_a_policy_that_names_no_head_shows_nothing(model, questions):
    lookup = lookup_of(model, questions[7], {"nobody": dh.Static(dh.HeadSet([], model.shape))})
    start = lookup.view("concat", torch.zeros(60, dtype=torch.bool))
    arm = Arm("every", "concat", "nobody")
    lookups = {"concat": lookup.through("concat")}
    triggers = {"every": every_sentence}
    found = answer(model, {arm: start}, triggers=triggers, lookups=lookups, max_new_tokens=ROOM)[arm].lookups
    assert found and all(one.visible == 0 and not one.windows for one in found)


def test_tables_hold_every_question_in_every_arm(result):
    answers = result.answers
    steered, references = answers.query("trigger != 'never'"), answers.query("trigger == 'never'")
    assert len(steered) == 4 * 2 * 3 * len(CHOOSERS) and len(references) == 4 * 3 * 3
    assert set(references["policy"]) == {"none", "full", "gold"}
    at_all = references.set_index(["policy", "visibility"])
    assert (at_all.loc["none", "visible"] == 0).all() and (at_all.loc["full", "visible"] == 48).all()
    assert (at_all.loc["gold", ["facts", "fact_tokens"]] == 1).all(axis=None)
    assert (steered.query("trigger == 'every'")["visible"] == 12).all()
    assert (answers["tokens"] <= ROOM).all() and (answers["calls"] >= answers["retrievals"] + 1).all()


def test_a_draft_is_kept_with_what_its_trigger_read(result):
    events = result.events
    unsure = events.query("trigger == 'unsure' and kind == 'draft'").rename(columns={"values": "compared"})
    assert (unsure["threshold"] == 0.1).all() and unsure["pieces"].map(len).sum()
    for row in unsure.itertuples():
        # sentences share their mean, so that the whole is kept
        assert sum(row.compared) == pytest.approx(sum(row.entropy), abs=1e-3)
        assert len(row.compared) == len(row.pieces)
    others = events.query("trigger != 'unsure' or kind != 'draft'")
    assert not others["values"].map(len).any() and len(others)


def test_all_of_the_context_gives_the_plain_answer_under_every_visibility(model, questions, result):
    plain = dh.generate(model, questions[6:], max_new_tokens=ROOM, progress=False)
    texts = result.answers.query("policy == 'full'").groupby("visibility")["text"].apply(list)
    for visibility in VISIBILITIES:
        assert texts[visibility] == [outcome.text for outcome in plain]


def test_looks_are_compared_at_exact_budgets_and_agree_with_their_recall(model, questions, policies, result):
    looks = result.looks
    assert (looks["visible"] == looks["budget"]).all() and set(looks["budget"]) == {6, 12, 24}
    assert {"random windows", "first tokens"} < set(looks["policy"])
    lookup = lookup_of(model, questions[6], policies)
    shown = Windows(reach=3, budget=24, gap=2)(lookup.attention(lookup.heads("static", []), []), Span("context", 4, 52))
    row = looks.query("episode == 'q6' and policy == 'static' and budget == 24").iloc[0]
    assert (row["facts"], row["fact_tokens"]) == pytest.approx(tuple(fact_recall(shown, questions[6].spans)))


def test_nothing_leaks_through_a_mask_of_every_row(result):
    change = result.leak.groupby("visibility")["logit_change"]
    assert change.max()["mask"] == 0 and change.min()["mask_decode"] > 0


def test_contrasts_are_paired_differences(result):
    table = result.tables["contrasts"]
    primary = table.loc[table["primary"]]
    assert list(primary["second"]) == ["static"] and list(primary["measure"]) == ["facts"]
    at = result.looks.query("budget == 12").pivot(index="episode", columns="policy", values="facts")
    assert primary["difference"].iloc[0] == pytest.approx((at["predicted"] - at["static"]).mean())
    f1 = result.answers.query("trigger in ('every', 'never') and visibility == 'mask'")
    wide = f1.pivot(index="episode", columns="policy", values="f1")
    row = table.query("trigger == 'every' and visibility == 'mask' and measure == 'f1' and second == 'gold'").iloc[0]
    assert row["difference"] == pytest.approx((wide["predicted"] - wide["gold"]).mean()) and row["n"] == 4


def test_detectable_difference_shrinks_with_the_root_of_the_questions():
    rng = np.random.default_rng(0)

    def looks(n):
        rows = [
            {"episode": f"q{i}", "group": f"q{i}", "policy": policy, "budget": 8, "facts": float(rng.random() < p)}
            for i in range(n)
            for policy, p in (("a", 0.5), ("b", 0.5))
        ]
        none = pd.DataFrame(columns=["episode", "group", "trigger", "visibility", "policy", "f1", "em"])
        return arms.contrasts(none, pd.DataFrame(rows), primary=("a", "b"), budget=8, seed=0).iloc[0]

    few, many = looks(100), looks(1600)
    # independent coins: the difference has a variance of a half
    assert few["detectable"] == pytest.approx(2.8 * (0.5 / 100) ** 0.5, rel=0.2)
    assert many["detectable"] == pytest.approx(2.8 * (0.5 / 1600) ** 0.5, rel=0.1)


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(model, questions, policies, result, tmp_path, monkeypatch):
    import dhlens.recipes.retrieval as recipe

    real, calls = recipe.inquire, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(recipe, "inquire", dying)
    with pytest.raises(KeyboardInterrupt):
        rag(model, questions[6:], policies, **SETTINGS, out=tmp_path / "run")
    found = rag(model, questions[6:], policies, **SETTINGS, out=tmp_path / "run")
    assert len(calls) == 3 + 2
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(found.tables[name], table)
    loaded = Rag.load(tmp_path / "run")
    assert loaded.summary() == found.summary() and Run.read(tmp_path / "run").finished
    assert "What the heads find" in loaded.report().html
    json.dumps(loaded.values())


def test_other_settings_do_not_go_on_in_the_same_folder(model, questions, policies, tmp_path):
    rag(model, questions[6:8], policies, **SETTINGS, out=tmp_path / "run")
    other = {**SETTINGS, "windows": Windows(reach=4, budget=12, gap=2)}
    with pytest.raises(ValueError, match="settings"):
        rag(model, questions[6:8], policies, **other, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visibilities": ("hide",)}, "a visibility is mask, mask_decode, concat, retrieve, got 'hide'"),
        ({"visibilities": ("retrieve",)}, "give corpus="),
        ({"budgets": (0, 8)}, "there must be a budget, and each at least 1 token, got 0, 8"),
        ({"triggers": {"never": never}}, "the references, which no trigger moves"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused(model, questions, policies, change, message):
    with pytest.raises(ValueError, match=message):
        rag(model, questions[6:], policies, **{**SETTINGS, **change})


def test_questions_must_have_context_facts_and_answer(model, questions, policies):
    for left_out in ("context", "fact_0"):
        spans = tuple(span for span in questions[6].spans if span.name != left_out)
        with pytest.raises(ValueError, match=f"has no span '{left_out}'"):
            rag(model, [dataclasses.replace(questions[6], spans=spans)], policies, **SETTINGS)
    with pytest.raises(ValueError, match="must have an answer"):
        rag(model, [dataclasses.replace(questions[6], meta={"group": "g"})], policies, **SETTINGS)


def test_a_contrast_is_the_first_less_the_second():
    rows = [
        {"episode": f"q{i}", "group": f"q{i}", "policy": policy, "budget": 8, "facts": facts}
        for i in range(6)
        for policy, facts in (("a", 1.0), ("b", 0.25))
    ]
    none = pd.DataFrame(columns=["episode", "group", "trigger", "visibility", "policy", "f1", "em"])
    table = arms.contrasts(none, pd.DataFrame(rows), primary=("a", "b"), budget=8, seed=0)
    row = table.iloc[0]
    assert (row["first"], row["second"], row["difference"], row["p"]) == ("a", "b", 0.75, 2 / 2**6)


@pytest.mark.parametrize("name", ["none", "gold", "random windows"])
def test_names_of_references_and_controls_are_taken(model, questions, policies, name):
    with pytest.raises(ValueError, match=f"'{name}' stands in the tables for what no policy chooses"):
        rag(model, questions[6:], {name: policies["static"]}, progress=False)


def test_a_constant_difference_leaves_nothing_to_detect_whatever_the_sizes_of_groups():
    groups = [f"g{i}" for i, n in enumerate((1, 2, 3, 7)) for _ in range(n)]
    rows = [
        {"policy": p, "episode": str(i), "group": g, "f1": 0.5 + 0.1 * (p == "a")}
        for p in ("a", "b")
        for i, g in enumerate(groups)
    ]
    row = next(iter(arms.paired(pd.DataFrame(rows), "a", ["f1"], seed=0)))
    assert row["difference"] == pytest.approx(0.1) and np.isnan(row["detectable"])
