import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dhlens.card import RunCard
from dhlens.episode import Episode, Outcome, Span
from dhlens.pack import pack
from dhlens.store import Run, load_table, load_trace, replacing, save_table, save_trace
from dhlens.trace import Trace

LAYERS, HEADS, K = 3, 4, 2
CARD = RunCard("toy", seed=0, versions={"dhlens": "0"}, settings={"sink": 4, "hidden": ("final",)})
PICKLE = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."
"""A pickle that runs a command when it is loaded."""


def some_trace(name, *, steps=5, focus=None, full=False, card=CARD, seed=0):
    """One episode with random records; `focus` is the width of its focus, `full` brings the optional ones."""
    draw = torch.Generator().manual_seed(seed + steps)
    prompt = 7 + steps

    def ints(*shape):
        return torch.randint(0, prompt, shape, generator=draw)

    def floats(*shape):
        return torch.rand(shape, generator=draw)

    mass = floats(steps, 3, LAYERS, HEADS)
    mass[0] = float("nan")
    trace = Trace(
        episodes=(
            Episode(
                name,
                ints(prompt),
                ints(steps - 1),
                (Span("needle", 2, 5),),
                {"group": "w1", "depth": 0.5, "tags": ["a"]},
            ),
        ),
        outcomes=(Outcome(ints(steps), "Antwort: Grüße\n", None, "stop_token"),),
        card=dataclasses.replace(card, counts={"rows": steps}),
        episode=torch.zeros(steps, dtype=torch.long),
        step=torch.arange(steps),
        position=torch.arange(steps) + prompt - 1,
        fed=ints(steps),
        next_token=ints(steps),
        argmax=ints(steps),
        logprob=-floats(steps),
        entropy=floats(steps),
        peak_key=ints(steps, LAYERS, HEADS, K),
        peak_token=ints(steps, LAYERS, HEADS, K).int(),
        peak_weight=floats(steps, LAYERS, HEADS, K),
        span_names=("needle", "prompt", "all"),
        mass=mass,
        mass_core=mass / 2,
        hidden={"final": floats(steps, 6), "resid_1": floats(steps, 6).bfloat16()},
    )
    if focus:
        trace = dataclasses.replace(
            trace, focus_key=ints(steps, focus), focus=floats(steps, LAYERS, HEADS, focus).half()
        )
    if full:
        clean = dataclasses.replace(trace, logprob=floats(steps))
        rows, used = floats(steps, LAYERS, HEADS, prompt).half(), floats(steps, LAYERS, HEADS) > 0.5
        trace = dataclasses.replace(trace, rows=rows, heads_used=used, clean=clean)
    return trace


def assert_same(a, b):
    """Equal in every field, dtype and bit."""
    (values, tensors), (others, other_tensors) = pack(a), pack(b)
    assert json.dumps(values) == json.dumps(others)
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == other_tensors[name].dtype, name
        assert torch.equal(tensor.nan_to_num(-1.0), other_tensors[name].nan_to_num(-1.0)), name


@pytest.mark.parametrize("options", [{}, {"focus": 3}, {"full": True}, {"focus": 3, "full": True}])
def test_a_trace_comes_back_exactly(tmp_path, options):
    trace = some_trace("a", **options)
    save_trace(trace, tmp_path / "t.safetensors")
    back = load_trace(tmp_path / "t.safetensors")
    assert_same(trace, back)
    for field in dataclasses.fields(Trace):
        mine, read = getattr(trace, field.name), getattr(back, field.name)
        assert (mine is None) == (read is None) and type(mine) is type(read), field.name
    assert torch.equal(back.episodes[0].tokens, trace.episodes[0].tokens)
    assert back.episodes[0].span("needle") == Span("needle", 2, 5) and back.episodes[0].meta["tags"] == ["a"]
    assert back.outcomes[0].text == "Antwort: Grüße\n" and back.outcomes[0].correct is None
    assert back.card.fingerprint() == trace.card.fingerprint() and back.card.counts == trace.card.counts
    assert back.hidden["resid_1"].dtype == torch.bfloat16 and back.peak_token.dtype == torch.int32
    if options.get("full"):
        assert torch.equal(back.clean.logprob, trace.clean.logprob) and back.clean.heads_used is None


def test_episodes_of_different_lengths_and_empty_ones_come_back(tmp_path):
    trace = Trace.cat([some_trace("a", steps=1, focus=2), some_trace("b", steps=6, focus=5)])
    for name, part in {"both": trace, "no rows": trace.select(trace.step < 0), "nothing": trace.pick([])}.items():
        save_trace(part, tmp_path / name)
        assert_same(part, load_trace(tmp_path / name))
    assert len(load_trace(tmp_path / "both").episodes[0].answer) == 0


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in "ab":
        save_trace(some_trace("e", full=True), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_trace_is_never_overwritten(tmp_path):
    save_trace(some_trace("a"), tmp_path / "t")
    with pytest.raises(ValueError, match="never overwritten"):
        save_trace(some_trace("b"), tmp_path / "t")
    assert load_trace(tmp_path / "t").episodes[0].id == "a"


def test_a_pickle_is_not_loaded(tmp_path):
    (tmp_path / "t.safetensors").write_bytes(PICKLE)
    with pytest.raises(ValueError, match=r"t\.safetensors is damaged, cut short or foreign"):
        load_trace(tmp_path / "t.safetensors")


def test_what_is_no_trace_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors is no trace"):
        load_trace(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"no trace .*gone"):
        load_trace(tmp_path / "gone")


def test_a_trace_that_lacks_a_record_is_refused(tmp_path):
    from safetensors.torch import save_file

    values, tensors = pack(some_trace("a"))
    del tensors["logprob"]
    save_file({k: t.clone() for k, t in tensors.items()}, tmp_path / "t", {"dhlens.trace": json.dumps(values)})
    with pytest.raises(ValueError, match="logprob"):
        load_trace(tmp_path / "t")


def test_tables_come_back_exactly(tmp_path):
    table = pd.DataFrame(
        {"head": ["L1H2", "L0H3"], "score": [0.1 + 0.2, np.nan], "n": [1, 2], "ok": [True, False], "gap": [None, "x"]}
    )
    save_table(table, tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(load_table(tmp_path / "t.parquet"), table)


@pytest.mark.parametrize("what", ["trace", "table", "text"])
def test_a_full_disk_names_the_file_and_loses_nothing(tmp_path, what):
    """The system's own limit on the size of a file stops the write in its middle, as a full disk does."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "kept"
    path.write_text("from before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not write .*; everything saved before is intact") as raised:
            if what == "trace":
                save_trace(some_trace("a"), tmp_path / "new")
            elif what == "table":
                save_table(pd.DataFrame({"a": range(1000)}), path)
            else:
                with replacing(path) as fresh:
                    fresh.write_text("x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / ("new" if what == "trace" else "kept")) in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"] and path.read_text() == "from before"


def test_an_interrupt_leaves_no_scrap(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x") as fresh:
        fresh.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


IDS = ["needle-uuid_len=500_d=0.1", "b", "c"]
WIDTHS = [2, 5, 3]


def shards():
    return [some_trace(i, steps=n, focus=n, full=True) for i, n in zip(IDS, WIDTHS, strict=True)]


def fill(folder):
    run = Run.open(folder, CARD)
    for trace in shards():
        if not run.done(trace.episodes[0].id):
            run.save_shard(trace)
    return run


def test_a_run_joins_its_shards_in_the_order_asked_for(tmp_path):
    run = fill(tmp_path / "new" / "run")
    order = [2, 0, 1]
    assert_same(run.load_shards([IDS[i] for i in order]), Trace.cat([shards()[i] for i in order]))


def test_a_killed_run_goes_on_to_the_same_trace(tmp_path):
    """A child process is killed while it writes its second shard; opening again does the rest."""
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_store as t
run = t.Run.open({str(tmp_path / "run")!r}, t.CARD)
first, second, _ = t.shards()
run.save_shard(first)
t.os.replace = lambda *paths: os.kill(os.getpid(), 9)
run.save_shard(second)
"""
    killed = subprocess.run([sys.executable, "-c", program], timeout=300, check=False)
    assert killed.returncode == -9
    run = Run.open(tmp_path / "run", CARD)
    assert [run.done(i) for i in IDS] == [True, False, False]
    first = (tmp_path / "run" / "shards" / f"{IDS[0]}.safetensors").stat().st_mtime_ns
    run = fill(tmp_path / "run")
    assert_same(run.load_shards(IDS), Trace.cat(shards()))
    assert (tmp_path / "run" / "shards" / f"{IDS[0]}.safetensors").stat().st_mtime_ns == first
    whole = fill(tmp_path / "whole")
    for i in IDS:
        one, other = (r.folder / "shards" / f"{i}.safetensors" for r in (run, whole))
        assert one.read_bytes() == other.read_bytes()


def test_a_shard_is_never_overwritten_and_holds_one_episode(tmp_path):
    run = fill(tmp_path)
    with pytest.raises(ValueError, match="never overwritten"):
        run.save_shard(shards()[1])
    with pytest.raises(ValueError, match="one episode, got 2"):
        run.save_shard(Trace.cat(shards()[:2]))
    with pytest.raises(ValueError, match=r"other settings.*sink: 4 here, 0 there"):
        run.save_shard(some_trace("d", card=CARD.with_settings(sink=0)))
    with pytest.raises(ValueError, match=r"no trace .*missing\.safetensors"):
        run.load_shards(["missing"])
    assert sorted(p.stem for p in (tmp_path / "shards").iterdir()) == sorted(IDS)


@pytest.mark.parametrize("name", ["../card", "a/b", ".hidden", "", "a b"])
def test_an_episode_id_must_name_a_file(name):
    with pytest.raises(ValueError, match="an episode id is made of"):
        Episode(name, torch.arange(3), torch.arange(0))


def test_other_settings_are_refused_and_listed(tmp_path):
    fill(tmp_path)
    other = dataclasses.replace(CARD.with_settings(sink=0), seed=3)
    with pytest.raises(
        ValueError, match=r"other settings, choose another folder: seed: 0 here, 3 there; settings\.sink"
    ):
        Run.open(tmp_path, other)
    assert Run.open(tmp_path, dataclasses.replace(CARD, counts={"rows": 9})).card == Run.read(tmp_path).card


def test_a_folder_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="exists and is no dhlens run"):
        Run.open(tmp_path, CARD)
    with pytest.raises(ValueError, match="exists and is no dhlens run"):
        Run.open(tmp_path / "thesis.tex", CARD)
    with pytest.raises(ValueError, match="is no dhlens run"):
        Run.read(tmp_path)
    with pytest.raises(ValueError, match="must be a folder that can be written"):
        Run.open(tmp_path / "thesis.tex" / "run", CARD)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "[]", '{"model": "toy", "colour": "blue"}'])
def test_a_damaged_card_is_named(tmp_path, text):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(ValueError, match=r"card\.json is damaged"):
        Run.open(tmp_path, CARD)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def pickled(path):
    path.write_bytes(PICKLE)


def foreign(path):
    path.unlink()
    save_trace(some_trace(IDS[1], card=CARD.with_settings(sink=0)), path)


def misnamed(path):
    path.unlink()
    save_trace(some_trace("z"), path)


@pytest.mark.parametrize("harm", [cut_short, empty, pickled, foreign, misnamed])
def test_a_bad_shard_is_found_when_the_run_is_opened(tmp_path, harm):
    fill(tmp_path)
    path = tmp_path / "shards" / f"{IDS[1]}.safetensors"
    harm(path)
    with pytest.raises(ValueError, match=r"shards/b\.safetensors .*delete the file and run again"):
        Run.open(tmp_path, CARD)
    path.unlink()
    assert_same(fill(tmp_path).load_shards(IDS), Trace.cat(shards()))


def test_a_finished_run_shows_its_tables_and_is_never_overwritten(tmp_path):
    run = fill(tmp_path)
    table = pd.DataFrame({"head": ["L0H1"], "share": [0.25]})
    with pytest.raises(ValueError, match="not finished"):
        run.tables()
    whole = run.load_shards(IDS)
    run.finish({"dynamics": table}, trace=whole, texts={"report.html": "<p>ü</p>"})
    again = Run.open(tmp_path, CARD)
    assert again.finished and again.card.counts == {"rows": sum(WIDTHS)}
    pd.testing.assert_frame_equal(again.tables()["dynamics"], table)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "<p>ü</p>"
    assert_same(load_trace(tmp_path / "trace.safetensors"), whole)
    with pytest.raises(ValueError, match="finished"):
        again.finish({})


def test_a_finish_that_was_cut_off_can_be_done_again(tmp_path, monkeypatch):
    run = fill(tmp_path)
    whole = run.load_shards(IDS)
    with monkeypatch.context() as patch:
        replace = os.replace

        def full(source, target):
            if Path(target).name == "finished.json":
                raise OSError(28, "No space left on device")
            replace(source, target)

        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"could not write .*finished\.json.*No space left"):
            run.finish({"t": pd.DataFrame({"a": [1]})}, trace=whole)
    assert not run.finished
    run.finish({"t": pd.DataFrame({"a": [2]})}, trace=whole)
    assert run.tables()["t"]["a"].item() == 2
