"""The scan: the same numbers however it is run, stopped or shared out; and the brute-force judge on the real model."""

import dataclasses
import json
import shutil

import pandas as pd
import pytest
import torch
from tiny import build, episode, tokenizer
from typer.testing import CliRunner

import dhlens.recipes.detect as detect
from dhlens import observation
from dhlens.cli import app, main
from dhlens.engine import generate, observe
from dhlens.episode import Episode
from dhlens.executor import Processes, serial
from dhlens.model import load
from dhlens.reads import Capture
from dhlens.recipes import Observation, Scan, scan
from dhlens.tasks import niah

SHORT = Observation(max_new_tokens=6, draft=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk, so that other processes can load it."""
    path = tmp_path_factory.mktemp("tiny")
    build("llama").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def episodes(model):
    """Eight episodes of four windows whose answer is what the model says, so that all count as answered."""
    asked = [episode(60, name=f"e{i}", seed=i % 4, prefix=episode(60, seed=i % 4).tokens[: 59 - i]) for i in range(8)]
    said = generate(model, asked, max_new_tokens=6, progress=False)
    meta = [
        {"group": e.group, "answer_text": o.text, "length": 60, "depth": 0.3} for e, o in zip(asked, said, strict=True)
    ]
    return [Episode(e.id, e.tokens, e.answer, e.spans, m) for e, m in zip(asked, meta, strict=True)]


def same(a, b):
    assert torch.equal(a.trace.mass.nan_to_num(-1), b.trace.mass.nan_to_num(-1))
    assert torch.equal(a.trace.logprob, b.trace.logprob)
    for name, table in a.tables.items():
        pd.testing.assert_frame_equal(table, b.tables[name], obj=name)


def test_in_memory_on_disk_and_read_again(model, episodes, tmp_path):
    memory = scan(model, episodes, observation=SHORT, progress=False)
    disk = scan(model, episodes, out=tmp_path / "run", observation=SHORT, progress=False)
    same(memory, disk)
    same(disk, Scan.load(tmp_path / "run"))
    made = {p.name for p in (tmp_path / "run").iterdir()}
    assert made >= {"card.json", "trace.safetensors", "dynamics.parquet", "report.html", "summary.txt", "shards"}
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    assert card["counts"]["rows"] == len(disk.trace) and len(card["settings"]["episodes_sha256"]) == 64
    assert "<img" in (tmp_path / "run" / "report.html").read_text()


def test_a_killed_run_goes_on_and_ends_the_same(model, episodes, tmp_path, monkeypatch):
    whole = scan(model, episodes, out=tmp_path / "whole", observation=SHORT, progress=False)
    saved = []

    def dies(self, trace, save=detect.Run.save_shard):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(trace.episodes[0].id)
        save(self, trace)

    monkeypatch.setattr(detect.Run, "save_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        scan(model, episodes, out=tmp_path / "cut", observation=SHORT, progress=False)
    monkeypatch.undo()
    done = []
    each = observation.observe_each
    monkeypatch.setattr(
        observation, "observe_each", lambda *a, only, **k: done.extend(only) or each(*a, only=only, **k)
    )
    resumed = scan(model, episodes, out=tmp_path / "cut", observation=SHORT, progress=False)
    assert len(done) == 5 and not {episodes[i].id for i in done} & set(saved)
    same(whole, resumed)


def test_processes_find_what_one_process_finds(model, episodes, tmp_path):
    one = scan(model, episodes, observation=SHORT, progress=False)
    two = scan(model, episodes, out=tmp_path / "two", observation=SHORT, executor=Processes(2), progress=False)
    assert torch.equal(one.trace.next_token, two.trace.next_token)
    torch.testing.assert_close(one.trace.mass, two.trace.mass, atol=1e-6, rtol=0, equal_nan=True)


def test_a_failure_in_another_process_arrives(model, episodes, tmp_path, monkeypatch):
    elsewhere = dataclasses.replace(model, card=dataclasses.replace(model.card, model=str(tmp_path / "gone")))
    with pytest.raises(ValueError, match="gone"):
        scan(elsewhere, episodes, out=tmp_path / "run", observation=SHORT, executor=Processes(2), progress=False)


def test_a_finished_run_is_read_not_run(model, episodes, tmp_path, monkeypatch):
    first = scan(model, episodes, out=tmp_path / "run", observation=SHORT, progress=False)
    monkeypatch.setattr(observation, "observe_each", lambda *a, **k: pytest.fail("it ran again"))
    again = scan(model, episodes, out=tmp_path / "run", observation=SHORT, progress=False)
    assert again.folder == first.folder
    same(first, again)


def test_bad_folders_and_other_settings(model, episodes, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="no dhlens run"):
        scan(model, episodes, out=tmp_path / "mine", observation=SHORT, progress=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    scan(model, episodes, out=tmp_path / "run", observation=SHORT, progress=False)
    with pytest.raises(ValueError, match=r"other settings.*max_new_tokens: 6 here, 5 there"):
        scan(model, episodes, out=tmp_path / "run", observation=Observation(5, draft=False), progress=False)
    other = [*episodes[:-1], episode(60, name="e7", seed=9)]
    with pytest.raises(ValueError, match="episodes_sha256"):
        scan(model, other, out=tmp_path / "run", observation=SHORT, progress=False)
    with pytest.raises(ValueError, match="is not finished"):
        shutil.rmtree(tmp_path / "run" / "shards")
        (tmp_path / "run" / "finished.json").unlink()
        Scan.load(tmp_path / "run")


def test_what_cannot_be_scanned(model, episodes, tmp_path):
    bare = [dataclasses.replace(e, spans=e.spans[1:]) for e in episodes]
    with pytest.raises(ValueError, match="no span 'needle'"):
        scan(model, bare, progress=False)
    with pytest.raises(ValueError, match="give out="):
        scan(model, episodes, executor=Processes(2), progress=False)
    loose = load(build("llama"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="load it from a name or a folder"):
        scan(loose, episodes, out=tmp_path / "run", observation=SHORT, executor=Processes(2), progress=False)
    with pytest.raises(ValueError, match="at least 1 process"):
        Processes(0)
    assert list(serial(lambda indices: iter(indices), [[0, 1], [2]])) == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "a"], "--lengths takes int numbers"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16"),
        (["--draft", "yes"], "--draft must be one of known, lookup, none"),
        (["--needle", "My cat."], "or a sentence with --question and --answer"),
        (["--needle", "uuid", "--question", "What?"], "own needle sentence, not with 'uuid'"),
        (["--model", "smollm"], "smollm2-135m"),
        (["--workers", "0"], "at least 1 process"),
    ],
)
def test_cli_refuses_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dhlens", "scan", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("dhlens: ") and message in err and err.count("\n") == 1


def test_cli_scan_and_show(smollm2, tmp_path):
    run = CliRunner().invoke
    arguments = ["scan", "--lengths", "300", "--depths", "0.2,0.8", "--n", "2", "--seed", "1", "--json"]
    first = run(app, [*arguments, "--out", str(tmp_path / "a")], catch_exceptions=False)
    values = json.loads(first.stdout)
    assert values["model"] == "smollm2-135m" and values["total_heads"] == 270 and values["heads_per_step"] > 1
    shown = run(app, ["show", str(tmp_path / "a")], catch_exceptions=False)
    assert "heads_per_step" in shown.stdout and "Llama-3.1-8B" in shown.stdout and "report.html" in shown.stdout
    again = run(app, ["show", str(tmp_path / "a"), "--json"], catch_exceptions=False)
    assert json.loads(again.stdout) == values
    run(app, [*arguments, "--draft", "none", "--out", str(tmp_path / "b")], catch_exceptions=False)
    both = run(app, ["show", str(tmp_path / "a"), str(tmp_path / "b")], catch_exceptions=False)
    assert "settings.draft: True here, False there" in both.stdout


@pytest.mark.slow
@pytest.mark.data
def test_smollm2_equals_the_eager_pass_over_lengths_and_depths(smollm2, data):
    """Peaks, weights and masses of all steps, layers and heads of six episodes; ties counted."""
    books = data / "haystack_public_domain" / "books"
    episodes = niah.episodes(smollm2.tokenizer, books, lengths=(400, 900, 1500), depths=(0.1, 0.8), n=1, seed=3)
    capture = Capture(rows=False)
    trace = observe(smollm2, episodes, capture=capture, progress=False)
    eager = smollm2.twin
    eager.set_attn_implementation("eager")
    tied = total = 0
    try:
        for i, e in enumerate(episodes):
            part = trace.pick([i])
            tokens = torch.cat([e.tokens, part.outcomes[0].tokens[:-1]])
            with torch.no_grad():
                out = eager(tokens[None], output_attentions=True, use_cache=False)
            pattern = torch.cat([a[:, :, len(e.tokens) - 1 :] for a in out.attentions]).permute(2, 0, 1, 3)
            assert torch.equal(out.logits[0, len(e.tokens) - 1 :].argmax(-1), part.next_token)
            weight, key = pattern.topk(2, dim=-1)
            torch.testing.assert_close(part.peak_weight[..., :2], weight, atol=1e-4, rtol=0)
            tie = weight[..., 0] - weight[..., 1] < 1e-6
            differs = part.peak_key[..., 0] != key[..., 0]
            assert not (differs & (weight[..., 0] - weight[..., 1] > 1e-4)).any()
            tied, total = tied + int((tie | differs).sum()), total + tie.numel()
            for name in ("needle", "answer", "question", "haystack"):
                span = e.span(name)
                mass = part.mass[:, part.span_index(name)]
                torch.testing.assert_close(mass, pattern[..., span.start : span.stop].sum(-1), atol=1e-4, rtol=0)
            del out
    finally:
        eager.set_attn_implementation("sdpa")
    assert len(episodes) == 6 and tied / total < 1e-3


def unjudged(episodes):
    return [dataclasses.replace(e, meta={"group": e.group}) for e in episodes]


def wrong(episodes):
    return [dataclasses.replace(e, meta={**e.meta, "answer_text": "never said"}) for e in episodes]


@pytest.mark.parametrize("change", [unjudged, wrong])
def test_a_scan_ends_with_a_result_whatever_the_model_says(model, episodes, tmp_path, change):
    result = scan(model, change(episodes), out=tmp_path / "run", observation=SHORT, progress=False)
    again = Scan.load(tmp_path / "run")
    assert again.problem == result.problem and (tmp_path / "run" / "report.html").exists()
    if change is wrong:
        assert "none of 8 episodes was answered correctly" in result.summary() and set(result.tables) == {"outcomes"}
        assert list(result.figures()) == ["Accuracy"]
    else:
        assert result.problem is None and "Accuracy" not in result.figures()
    text = CliRunner().invoke(app, ["show", str(tmp_path / "run"), "--json"], catch_exceptions=False).stdout
    assert ("problem" in json.loads(text)) == (change is wrong)


def test_one_window_is_refused_before_any_pass(model, episodes, monkeypatch):
    monkeypatch.setattr(type(model), "stream", lambda self: pytest.fail("a forward pass began"))
    one = [e for e in episodes if e.group == "g0"]
    with pytest.raises(ValueError, match="at least 2, got 1"):
        scan(model, one, progress=False)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        scan(model, episodes, observation=Observation(0), progress=False)


def test_two_processes_do_not_share_a_folder(model, episodes, tmp_path):
    run = detect.Run.open(tmp_path / "run", detect._card(model, episodes, SHORT, static_from=0.5, seed=0))
    with run.alone(), pytest.raises(ValueError, match="another process works on"):
        scan(model, episodes, out=tmp_path / "run", observation=SHORT, progress=False)


def test_other_weights_are_another_model(model, episodes, tmp_path):
    objects = []
    for scale in (1.0, 1.01):
        hf = build("llama")
        with torch.no_grad():
            hf.lm_head.weight *= scale
        objects.append(load(hf, tokenizer=tokenizer()))
    scan(objects[0], episodes, out=tmp_path / "run", observation=SHORT, progress=False)
    with pytest.raises(ValueError, match="weights_sha256"):
        scan(objects[1], episodes, out=tmp_path / "run", observation=SHORT, progress=False)
