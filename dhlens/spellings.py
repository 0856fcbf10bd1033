"""Head sets and head scores as others have published them: read into a HeadSet or a Score, and written for their code.

A set is a list of heads in any spelling of `dhlens.heads.SPELLINGS`: QRHead's one line (`13-18,13-21`) or the YAML
around it, one head a line, what a HeadSet prints, or a JSON or Python list of ids or (layer, head) pairs. Of a whole
circuit, the JSON that EAP-IG writes, the heads that are in it are read. Scores come in three forms:

- "samples": one JSON object from a head to its score in each sample, `{"16-19": [0.5, 1], ...}` (Wu et al., HeadKV).
- "ranking": one JSON list of heads with one score each, the best first, `[["13-18", 0.63], ...]` (QRHead).
- "tsv": a matrix of layers x KV heads (DuoAttention); each value is widened to the query heads of its KV head.

Nothing is guessed: an id that is malformed, doubled, missing or outside the model is refused by its line or entry.
"""

import ast
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, product
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dhlens.heads import SPELLINGS, Head, HeadSet, head_name, parse_head
from dhlens.scores import Score
from dhlens.store import replacing

_FORMS = ("samples", "ranking", "tsv")


def read_head_set(path: str | PathLike[str], shape: tuple[int, int]) -> HeadSet:
    """A published list of heads of a model with `shape` = (layers, query heads).

    Raises:
        ValueError: an entry is no head, is doubled or outside the model; the message names its line or entry.
    """
    path = Path(path)
    return parse_head_set(_text(path), shape, name=path.name)


def parse_head_set(text: str, shape: tuple[int, int], *, name: str = "text") -> HeadSet:
    """`read_head_set` of a text; errors call it `name`."""
    graph = _graph(text)
    if graph is not None:
        return _in_graph(graph, shape, name)
    entries = _listed(text, name) if text.lstrip().startswith(("[", "(")) else _words(text)
    return HeadSet(_heads(name, entries, shape), shape)


def content_of(path: str | PathLike[str]) -> str:
    """What a file holds: "scores" by head or "gates" (a TSV), both for `read_head_scores`, else a "set".

    Cells of a TSV are parted by tabs; lines such as `16 19` are none, and as a set they are refused by their line.
    """
    text = _text(Path(path)).strip()
    if text.startswith("{"):  # a set prints as {L0H1, L2H3}
        return "scores" if '"' in text and _graph(text) is None else "set"
    if text.startswith("["):
        return "scores" if re.match(r"\[\s*\[\s*[\"']", text) else "set"
    try:
        float(re.split(r"[\t\n]", text, maxsplit=1)[0])  # "16-19" is no number
    except ValueError:
        return "set"
    return "gates"


def spell(heads: HeadSet, spelling: str = "L16H19") -> str:
    """The heads in the order of layers on one line, as one of `dhlens.heads.SPELLINGS` or as "pairs" (JSON).

    Raises:
        ValueError: an unknown spelling.
    """
    if spelling == "pairs":
        return json.dumps([list(head) for head in heads])
    if spelling not in SPELLINGS:
        raise ValueError(f"spelling must be one of {', '.join(SPELLINGS)} or pairs, got {spelling!r}")
    return ",".join(head_name(head, spelling) for head in heads)


def write_head_set(heads: HeadSet, path: str | PathLike[str], spelling: str = "L16H19") -> None:
    """Write what `spell` gives.

    Raises:
        ValueError: an unknown spelling, or `path` exists.
    """
    _write(Path(path), spell(heads, spelling) + "\n")


def read_head_scores(
    path: str | PathLike[str], shape: tuple[int, int] | None = None, *, n_kv_heads: int | None = None
) -> Score:
    """Published static scores in any of the three forms; rows are samples, each its own group.

    Args:
        path: the file.
        shape: (layers, query heads) of the model that the scores must be of; a TSV needs it, JSON tells it by its ids.
        n_kv_heads: KV heads of the model; needed for a TSV only.

    Raises:
        ValueError: not such a file, or of another model; the message names the line, the entry or the heads.
    """
    path = Path(path)
    text = _text(path)
    if text.lstrip().startswith(("{", "[")):
        return Score("head_scores", _samples(path.name, text, shape), False, path.name)
    if shape is None or n_kv_heads is None:
        missing = " and ".join(name for name, given in (("shape", shape), ("n_kv_heads", n_kv_heads)) if given is None)
        raise ValueError(f"{path.name}: a TSV holds values of KV heads: say the model's {missing}")
    width = _queries(shape, n_kv_heads)
    gates = _gates(path.name, text, shape[0], n_kv_heads)
    source = f"{path.name}: values of {n_kv_heads} KV heads a layer, each widened to its {width} query heads"
    return Score("head_scores", gates.repeat_interleave(width, dim=1)[None], False, source)


def write_head_scores(
    score: Score, path: str | PathLike[str], form: str = "samples", *, n_kv_heads: int | None = None
) -> None:
    """Write the rows that `Score.mean` averages ("samples"), or that mean ("ranking", "tsv").

    In a TSV a KV head gets the largest value of its query heads: it is needed where one of them is. Only there reading
    back can give other values.

    Raises:
        ValueError: an unknown form, `path` exists, or a TSV without an `n_kv_heads` that divides the query heads.
    """
    if form not in _FORMS:
        raise ValueError(f"form must be one of {_FORMS}, got {form!r}")
    names = [head_name(head, "16-19") for head in product(range(score.shape[0]), range(score.shape[1]))]
    if form == "samples":
        rows = score.values[score.answer_rows()].flatten(1).T.tolist()
        text = json.dumps(dict(zip(names, rows, strict=True)))
    elif form == "ranking":
        ranked = sorted(zip(names, score.mean().flatten().tolist(), strict=True), key=lambda entry: -entry[1])
        text = json.dumps(ranked, indent=4)
    else:
        gates = score.mean().unflatten(1, (-1, _queries(score.shape, n_kv_heads))).amax(-1)
        text = "\n".join("\t".join(map(repr, row)) for row in gates.tolist())
    _write(Path(path), text + "\n")


def _queries(shape: tuple[int, int], n_kv_heads: int | None) -> int:
    """How many query heads share a KV head."""
    if n_kv_heads is None or n_kv_heads < 1 or shape[1] % n_kv_heads:
        raise ValueError(f"a TSV needs n_kv_heads that divide the model's {shape[1]} query heads, got {n_kv_heads}")
    return shape[1] // n_kv_heads


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} holds neither heads nor scores: it is no text") from None


def _write(path: Path, text: str) -> None:
    if path.exists():
        raise ValueError(f"heads are never written over a file, and {path} exists")
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def _graph(text: str) -> dict[str, Any] | None:
    """The circuit that a text holds, if it holds one."""
    if not text.lstrip().startswith("{") or '"nodes"' not in text:
        return None
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found.get("nodes"), dict) and "edges" in found else None


def _in_graph(graph: Mapping[str, Any], shape: tuple[int, int], name: str) -> HeadSet:
    """The heads of a circuit as EAP-IG writes it: nodes `a16.h19`, `m3`, `input`, `logits`, each in it or not."""
    cfg = graph.get("cfg") or {}
    made_for = (cfg.get("n_layers", shape[0]), cfg.get("n_heads", shape[1]))
    if made_for != shape:
        raise ValueError(f"{name}: a circuit of {made_for[0]} layers x {made_for[1]} heads, the model has {shape}")
    entries = []
    for node, kept in graph["nodes"].items():
        kept = kept.get("in_graph") if isinstance(kept, dict) else kept
        if not isinstance(kept, bool):
            raise ValueError(f"{name}, node {node!r}: must be in the circuit or not (true or false), got {kept!r:.60}")
        if kept and node.startswith("a"):
            entries.append((f"node {node!r}", node))
    return HeadSet(_heads(name, entries, shape), shape)


def _words(text: str) -> Iterator[tuple[str, Any]]:
    """Each id with its line. In YAML that names a set, the other settings are left out."""
    yaml = re.search(r"^attn_head_set\s*:", text, re.MULTILINE) is not None
    for number, line in enumerate(text.splitlines(), start=1):
        ids = line.partition("#")[0]
        if yaml and (setting := re.match(r"(\w+)\s*:(.*)", ids)):
            ids = setting[2] if setting[1] == "attn_head_set" else ""
        for word in ids.translate(str.maketrans(",;{}\"'", "      ")).split():
            yield f"line {number}", word


def _listed(text: str, name: str) -> Iterator[tuple[str, Any]]:
    above = "\n" * text[: len(text) - len(text.lstrip())].count("\n")
    try:
        entries = ast.parse(above + text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{name}, line {error.lineno}: no list of heads: {error.msg}") from None
    for number, entry in enumerate(getattr(entries, "elts", [entries]), start=1):
        place = f"line {entry.lineno}, entry {number}"
        try:
            yield place, ast.literal_eval(entry)
        except ValueError:
            raise ValueError(f"{name}, {place}: a list must hold quoted ids or (layer, head) pairs") from None


def _lines(text: str, keys: Iterable[Any]) -> Iterator[str]:
    """Where each of the keys stands in a JSON text that holds them in this order, as "line 3, "; "" if not found."""
    line, at = 1, 0
    for key in keys:
        found = text.find(json.dumps(key), at)
        if found >= 0:
            line, at = line + text.count("\n", at, found), found + 1
        yield f"line {line}, " if found >= 0 else ""


def _heads(name: str, entries: Iterable[tuple[str, Any]], shape: tuple[int, int] | None) -> list[Head]:
    """The head of each (place, id), all different and inside `shape` where one is given."""
    found: dict[Head, str] = {}
    for place, entry in entries:
        try:
            head = parse_head(entry)
        except ValueError as error:
            raise ValueError(f"{name}, {place}: {error}") from None
        if head in found:
            raise ValueError(f"{name}, {place}: head {entry!r} is given twice, first in {found[head]}")
        if shape is not None and not (0 <= head[0] < shape[0] and 0 <= head[1] < shape[1]):
            raise ValueError(f"{name}, {place}: {head_name(head)} is outside {shape[0]} layers x {shape[1]} heads")
        found[head] = place
    return list(found)


def _samples(name: str, text: str, shape: tuple[int, int] | None) -> Float[Tensor, "n layer head"]:
    """The values of the two JSON forms."""
    try:
        entries = json.loads(text, object_pairs_hook=lambda pairs: tuple(pairs))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    if not entries or not all(isinstance(e, list | tuple) and len(e) == 2 for e in entries):
        raise ValueError(f"{name} must hold one JSON object from heads to lists of scores, or a list of [head, score]")
    ranked = isinstance(entries, list)
    keys = [key for key, _ in entries]
    named = [f"entry {i}" if ranked else f"key {key!r}" for i, key in enumerate(keys, start=1)]
    places = [line + name for line, name in zip(_lines(text, keys), named, strict=True)]
    heads = _heads(name, zip(places, keys, strict=True), shape)
    rows = [
        _numbers(f"{name}, {place}", [value] if ranked else value)
        for place, (_, value) in zip(places, entries, strict=True)
    ]
    samples = dict(zip(heads, rows, strict=True))
    layers, width = shape or (1 + max(axis) for axis in zip(*heads, strict=True))
    grid = product(range(layers), range(width))
    _refuse(name, f"of {layers} layers x {width} heads are missing", (h for h in grid if h not in samples))
    n = len(samples[0, 0])
    grid = sorted(samples)
    _refuse(name, f"have another number of samples than L0H0 ({n})", (h for h in grid if len(samples[h]) != n))
    return torch.tensor([samples[h] for h in grid], dtype=torch.float64).T.reshape(n, layers, width)


def _gates(name: str, text: str, n_layers: int, n_kv_heads: int) -> Float[Tensor, "layer kv_head"]:
    lines = text.rstrip().split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = [float(cell) for cell in line.split("\t")]
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from None
        if len(row) != n_kv_heads:
            raise ValueError(f"{name}, line {number}: {len(row)} KV heads, the model has {n_kv_heads}")
        rows.append(_numbers(f"{name}, line {number}", row))
    if len(rows) != n_layers:
        raise ValueError(f"{name}: {len(rows)} lines, the model has {n_layers} layers")
    return torch.tensor(rows, dtype=torch.float64)


def _numbers(place: str, values: Any) -> list[float]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{place}: must be a list of at least one score, got {values!r:.60}")
    for value in values:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{place}: scores must be finite numbers, got {value!r:.60}")
    return [float(value) for value in values]


def _refuse(name: str, fault: str, heads: Iterator[Head]) -> None:
    names = [head_name(head) for head in islice(heads, 6)]
    if names:
        raise ValueError(f"{name}: heads {', '.join(names[:5])}{' and more' if len(names) > 5 else ''} {fault}")
