"""Saving and loading: a Trace as one safetensors file, tables as parquet, a run as a folder that can be resumed.

`save_trace` and `load_trace` keep every field exactly. `Run` is what recipes write into, one shard per episode: a
killed run goes on where it stopped and ends the same.

    card.json                          where the numbers come from; only the same settings resume a run
    shards/<episode id>.safetensors    the Trace of one episode, or .parquet: a table of one episode
    finished.json                      written last: names of the tables and texts that `Run.finish` made

Files appear whole or not at all, results are never overwritten, and nothing is ever unpickled. Opening a run reads the
headers of its shards, which say how long each file must be; loading reads each shard once.
"""

import dataclasses
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from pyarrow import ArrowException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dhlens.card import RunCard
from dhlens.pack import pack, unpack
from dhlens.trace import Trace

_VALUES = "dhlens.trace"
"""Key of the JSON text in a trace file's metadata."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` when the block ends, and is removed where it fails.

    Raises:
        OSError: it could not be written (disk full, no rights); what stood at `path` is untouched.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield fresh
        with fresh.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {error}; everything saved before is intact") from error
    finally:
        fresh.unlink(missing_ok=True)


def save_trace(trace: Trace, path: str | Path) -> None:
    """Write a Trace as safetensors.

    Raises:
        ValueError: `path` exists.
        OSError: it could not be written.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"a trace is never overwritten, and {path} exists")
    values, tensors = pack(trace)
    # Copied, since safetensors refuses tensors that share storage, as those of a trace and its clean read may.
    apart = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with replacing(path) as fresh:
        save_file(apart, fresh, {_VALUES: json.dumps(values)})


def load_trace(path: str | Path) -> Trace:
    """Read what `save_trace` wrote.

    Raises:
        ValueError: no such file, or it is damaged, cut short or something else.
    """
    with _reading(Path(path)) as (values, file):
        names: list[str] = list(file.keys())
        return unpack(values, {name: file.get_tensor(name) for name in names})


def save_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as parquet; its index is left out.

    Raises:
        OSError: it could not be written.
    """
    with replacing(Path(path)) as fresh:
        table.to_parquet(fresh, index=False)


def load_table(path: str | Path) -> pd.DataFrame:
    """Read a parquet table.

    Raises:
        ValueError: no such file, or it is damaged, cut short or something else.
    """
    try:
        return pd.read_parquet(path)
    except (OSError, ArrowException) as error:
        raise ValueError(f"{path} is no whole parquet table: {error}") from error


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder that a run writes into. `Run.open` begins or resumes one, `Run.read` looks at one that is there."""

    folder: Path
    card: RunCard
    """Where its numbers come from; `counts` are filled when it is finished."""

    @classmethod
    def open(cls, folder: str | Path, card: RunCard) -> "Run":
        """Begin a run, or go on with one of the same settings; every shard that is there is checked first.

        Raises:
            ValueError: the folder holds something else, a run of other settings or a damaged shard, or takes no files.
        """
        run = cls(Path(folder), card)
        if (run.folder / "card.json").is_file():
            run = cls.read(folder)
            _same_settings(run.card, card, f"{folder} holds a run of other settings, choose another folder")
            run._check_shards()
        elif run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
            raise ValueError(f"{folder} exists and is no dhlens run; choose a new or an empty folder")
        try:
            (run.folder / "shards").mkdir(parents=True, exist_ok=True)
            run._write("card.json", json.dumps(run.card.to_dict(), indent=2))
        except OSError as error:
            raise ValueError(f"{folder} must be a folder that can be written: {error}") from error
        return run

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """A run that is there, whatever its settings.

        Raises:
            ValueError: `folder` is no dhlens run, or its card is damaged.
        """
        path = Path(folder) / "card.json"
        if not path.is_file():
            raise ValueError(f"{folder} is no dhlens run: it has no card.json")
        try:
            return cls(Path(folder), RunCard.from_dict(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged or of another version: {error}") from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from working on this run meanwhile.

        Raises:
            ValueError: another one does.
        """
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout:
            raise ValueError(f"another process works on {self.folder}: wait for it, or choose another folder") from None

    def done(self, episode_id: str) -> bool:
        """Whether the episode's shard is there."""
        return self._shard(episode_id).exists() or self._part(episode_id).exists()

    def save_shard(self, trace: Trace) -> None:
        """Write the Trace of one episode.

        Raises:
            ValueError: it holds several episodes or comes from other settings, or the episode is done.
            OSError: it could not be written.
        """
        if len(trace.episodes) != 1:
            raise ValueError(f"a shard holds one episode, got {len(trace.episodes)}")
        _same_settings(self.card, trace.card, f"the trace comes from other settings than {self.folder}")
        save_trace(trace, self._shard(trace.episodes[0].id))

    def load_shards(self, ids: Sequence[str]) -> Trace:
        """One Trace of the shards of `ids`, in this order.

        Raises:
            ValueError: a shard is missing or damaged.
        """
        return Trace.cat([load_trace(self._shard(i)) for i in ids])

    def save_part(self, episode_id: str, table: pd.DataFrame) -> None:
        """Write the table of one episode. Raises ValueError where it is done, OSError where it cannot be written."""
        if self.done(episode_id):
            raise ValueError(f"episode {episode_id!r} is done in {self.folder}, and results are never overwritten")
        marked = table.copy(deep=False)
        marked.attrs.update(self._mark(episode_id))
        save_table(marked, self._part(episode_id))

    def load_part(self, episode_id: str) -> pd.DataFrame:
        """What `save_part` wrote. Raises ValueError where it is missing, damaged, or of another episode or settings."""
        table = load_table(self._part(episode_id))
        if table.attrs != self._mark(episode_id):
            raise ValueError(f"{self._part(episode_id)} comes from another episode, other settings or elsewhere")
        table.attrs.clear()
        return table

    def finish(
        self,
        tables: Mapping[str, pd.DataFrame],
        *,
        trace: Trace | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Write `<name>.parquet` for each table, each text under its file name and `trace.safetensors`; mark the end.

        Raises:
            ValueError: the run is finished.
            OSError: something could not be written; the shards are intact and finishing can be tried again.
        """
        if self.finished:
            raise ValueError(f"{self.folder} is finished, and results are never overwritten")
        for name, table in tables.items():
            save_table(table, self.folder / f"{name}.parquet")
        for name, text in (texts or {}).items():
            self._write(name, text)
        if trace is not None:
            whole = self.folder / "trace.safetensors"
            whole.unlink(missing_ok=True)  # of a finish that was cut off
            save_trace(trace, whole)
            card = dataclasses.replace(self.card, counts=trace.card.counts)
            self._write("card.json", json.dumps(card.to_dict(), indent=2))
        self._write("finished.json", json.dumps({"tables": list(tables), "texts": list(texts or {})}))

    @property
    def finished(self) -> bool:
        """Whether `finish` came to its end."""
        return (self.folder / "finished.json").is_file()

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables of a finished run.

        Raises:
            ValueError: it is not finished.
        """
        if not self.finished:
            raise ValueError(f"{self.folder} is not finished; the command that began it goes on where it stopped")
        names = json.loads((self.folder / "finished.json").read_text(encoding="utf-8"))["tables"]
        return {name: load_table(self.folder / f"{name}.parquet") for name in names}

    def _shard(self, episode_id: str) -> Path:
        return self.folder / "shards" / f"{episode_id}.safetensors"

    def _part(self, episode_id: str) -> Path:
        return self.folder / "shards" / f"{episode_id}.parquet"

    def _mark(self, episode_id: str) -> dict[str, str]:
        return {"episode": episode_id, "settings": self.card.fingerprint()}

    def _write(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as fresh:
            fresh.write_text(text, encoding="utf-8")

    def _check_shards(self) -> None:
        advice = "delete the file and run again: its episode is done anew, all others are kept"
        for path in sorted((self.folder / "shards").glob("*.parquet")):
            try:
                self.load_part(path.stem)
            except ValueError as error:
                raise ValueError(f"{error}; {advice}") from error
        for path in sorted((self.folder / "shards").glob("*.safetensors")):
            try:
                with _reading(path) as (values, _):
                    _same_settings(self.card, RunCard.from_dict(values["card"]), "it comes from other settings")
                    ids = [e["id"] for e in values["episodes"]]
                    if ids != [path.stem]:
                        raise ValueError(f"it must hold the episode {path.stem}, got {ids}")
            except ValueError as error:
                raise ValueError(f"{error}; {advice}") from error


def _same_settings(mine: RunCard, other: RunCard, otherwise: str) -> None:
    differences = mine.differences(other)
    if differences:
        raise ValueError(f"{otherwise}: {'; '.join(differences[:8])}")


@contextmanager
def _reading(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """JSON values and open safetensors file; whatever is wrong with them becomes one ValueError that names the file."""
    try:
        with safe_open(path, "pt") as file:
            yield json.loads((file.metadata() or {})[_VALUES]), file
    except FileNotFoundError as error:
        raise ValueError(f"no trace {path}") from error
    except KeyError as error:
        raise ValueError(f"{path} is no trace of dhlens: {error} is missing") from error
    except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged, cut short or foreign: {error}") from error
