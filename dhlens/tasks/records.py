"""Records of published data sets: JSON files and folders of them, read with the place of every record and its flaws.

`collect(records_of("dev.jsonl.gz"), parse)` gives what `parse` makes of each record. The first flaw stops it, or is
left out and warned of at the end, as asked. Text comes in Unicode's composed form: tokenizers that compose by
themselves could not give anything else back. Files are read whole.
"""

import codecs
import gzip
import json
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

Record = tuple[str, Any]
"""Where it stands ("dev.jsonl line 3"), and the record; a line that is no JSON, or no UTF-8, as the ValueError that
says so."""

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@runtime_checkable
class Item(Protocol):
    """What records are parsed into."""

    @property
    def id(self) -> str:
        """Unique within a source."""
        ...


T = TypeVar("T", bound=Item)


def records_of(source: str | Path) -> Iterator[Record]:
    """The records of a file, or of a folder's files in order of their names.

    Raises:
        ValueError: nothing is there, or a file as a whole cannot be read.
    """
    root = Path(source).expanduser()
    if root.is_dir():
        paths = sorted(p for p in root.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
        for path in paths:
            yield from _file_records(path)
    elif not root.is_file():
        raise ValueError(f"a source must be a file or a folder of {', '.join(SUFFIXES)}; {str(source)!r} is not there")
    elif not root.name.endswith(SUFFIXES):
        raise ValueError(f"a file of records must end in one of {', '.join(SUFFIXES)}, got {str(source)!r}")
    else:
        yield from _file_records(root)


def _file_records(path: Path) -> Iterator[Record]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = None if ".jsonl" in path.name else json.loads(raw.decode("utf-8-sig"))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    if rows is None:
        lines = ((i, line) for i, line in enumerate(raw.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1) if line.strip())
        yield from ((f"{path.name} line {i}", _parsed(line)) for i, line in lines)
    elif isinstance(rows, list):
        yield from ((f"{path.name} record {i}", row) for i, row in enumerate(rows, 1))
    else:
        raise ValueError(f"{str(path)!r} must hold a list of records, got {type(rows).__name__}")


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return ValueError(f"no UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"broken JSON: {error}")


def collect(
    records: Iterable[Record],
    parse: Callable[[Mapping[str, Any], str], Iterable[T]],
    *,
    on_error: str,
) -> list[T]:
    """What `parse` makes of each record and its place, in order.

    Raises:
        ValueError: `on_error` is "raise" and a record is broken or an id stands twice; or nothing is left; or it is
            neither "raise" nor "skip".
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')
    found: dict[str, T] = {}
    place: dict[str, str] = {}
    flaws: list[str] = []
    for where, record in records:
        try:
            for item in parse(_mapping(record), where):
                if item.id in found:
                    raise ValueError(f"the id {item.id!r} stands already in {place[item.id]}")
                found[item.id], place[item.id] = item, where
        except ValueError as error:
            flaws.append(f"{where}: {error}")
            if on_error == "raise":
                raise ValueError(flaws[0]) from error
    if not found:
        raise ValueError("no record found in the source" + (f": {flaws[0]}" if flaws else ""))
    if flaws:
        warnings.warn(f"{len(flaws)} broken records left out: {'; '.join(flaws)}", stacklevel=4)
    return list(found.values())


def _mapping(record: Any) -> Mapping[str, Any]:
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object with fields, got {type(record).__name__}")
    return record


def text(record: Mapping[str, Any], field: str) -> str:
    """The text in a field.

    Raises:
        ValueError: there is none.
    """
    return composed(record.get(field), field)


def composed(value: Any, field: str) -> str:
    """`value` in composed form; `field` says what it is.

    Raises:
        ValueError: see `whole`.
    """
    return unicodedata.normalize("NFC", whole(value, field))


def whole(value: Any, field: str) -> str:
    """`value` as it came; `field` says what it is.

    Raises:
        ValueError: it is no text, or holds half of a character (a surrogate without its other half).
    """
    if not isinstance(value, str):
        raise ValueError(f"{field} must be text, got {value!r:.80}")
    if half := next((c for c in value if "\ud800" <= c <= "\udfff"), None):
        raise ValueError(f"{field} must be text of whole characters, got half of one, {half!r}, in {value!r:.80}")
    return value


def is_number(value: Any) -> bool:
    """Whether a value of a record is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def rows(record: Mapping[str, Any], field: str) -> list[Any]:
    """The list in a field; empty where the field is not there.

    Raises:
        ValueError: it is no list.
    """
    value = record.get(field)
    if value is not None and not isinstance(value, list | tuple):
        raise ValueError(f"{field} must be a list, got {value!r:.80}")
    return list(value or ())


def objects(record: Mapping[str, Any], field: str) -> list[Mapping[str, Any]]:
    """The list of objects in a field.

    Raises:
        ValueError: it is no list, or something in it has no fields.
    """
    found = rows(record, field)
    for one in found:
        if not isinstance(one, Mapping):
            raise ValueError(f"{field} must be objects with fields, got {one!r:.80}")
    return found
