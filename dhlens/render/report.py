"""One self-contained HTML page from tables, figures and a run card: what `report.html` of every command is.

`report(...)` takes what the maths and `dhlens.render.figures` return and never sees a model. The page asks for nothing
from outside, runs no script (its content policy forbids both) and reads on paper, on a phone and in the dark. A page of
8 figures is about 0.5 MB and a few seconds. For stepping through a generation use the player; for one picture,
`Figure.savefig`.
"""

import base64
import html
import io
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, ClassVar

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from dhlens.card import RunCard
from dhlens.render.check import expect, texts_only
from dhlens.store import replacing

_SVG_LIMIT = 300_000
"""Bytes above which a vector picture is embedded as PNG instead."""
_CSS_DPI = 96
_PNG_DPI = 192


@dataclass(frozen=True)
class Page:
    """A finished page."""

    html: str
    """The whole document."""
    _height: ClassVar[str] = "80vh"
    _sandbox: ClassVar[str] = ""

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the page to `path`, whole or not at all, and return it.

        Raises:
            FileExistsError: the file is there and `overwrite` is false.
            OSError: it could not be written.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists: choose another name or pass overwrite=True")
        with replacing(path) as fresh:
            fresh.write_text(self.html, encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that its style stays out of the notebook."""
        style = f"width:100%;height:{self._height};border:0"
        return f'<iframe {self._sandbox}srcdoc="{html.escape(self.html)}" style="{style}"></iframe>'


class Report(Page):
    """A page of pictures and tables."""


class Live(Page):
    """A page that runs its own script; a notebook's frame lets it reach neither the notebook nor the network."""

    _sandbox = 'sandbox="allow-scripts" '


def report(
    title: str,
    *,
    tables: Mapping[str, pd.DataFrame] | None = None,
    figures: Mapping[str, Figure | tuple[Figure, str]] | None = None,
    card: RunCard | None = None,
    notes: Sequence[str] = (),
    max_rows: int = 20,
) -> Report:
    """A page with `notes`, then figures, tables and the run card.

    Args:
        title: heading of the page.
        tables: heading to table; a single wide row is set upright as name and value.
        figures: heading to figure, or to (figure, caption).
        card: where the numbers come from; shown folded, at the end.
        notes: plain sentences under the heading.
        max_rows: rows shown of a longer table; the rest is counted.

    Raises:
        ValueError: `max_rows` is not positive.
        TypeError: a table, figure, caption, card or note is something else, or `notes` is one text.
    """
    expect(Mapping | None, tables=tables, figures=figures)
    expect(RunCard | None, card=card)
    texts_only(notes=notes)
    for name, table in (tables or {}).items():
        expect(pd.DataFrame, **{f"table {name!r}": table})
    for name, entry in (figures or {}).items():
        figure, caption = _captioned(entry)
        expect(Figure, **{f"figure {name!r}": figure})
        expect(str, **{f"the caption of figure {name!r}": caption})
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    parts = [f"<p>{html.escape(note)}</p>" for note in notes]
    parts += [_section(name, _figure(name, figure)) for name, figure in (figures or {}).items()]
    parts += [_section(name, _table(table, max_rows)) for name, table in (tables or {}).items()]
    parts += [] if card is None else [_card(card)]
    return Report(page(title, "\n".join(parts)))


def page(title: str, body: str, *, scripts: bool = False) -> str:
    """A whole HTML document around `body`, which is trusted; `scripts` lets its inline scripts run, without network."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if scripts:
        policy += "; script-src 'unsafe-inline'"
    template = Template(files("dhlens.render").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), policy=policy, body=body)


def inert_json(value: Any) -> str:
    """`value` as JSON that no markup can leave.

    Raises:
        ValueError: it holds NaN or infinity, which no page can read.
    """
    # ensure_ascii leaves no line separator, bidi mark or lone surrogate; without < and & no tag or entity can begin
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _section(name: str, content: str) -> str:
    return f"<section><h2>{html.escape(name)}</h2>{content}</section>"


def _table(table: pd.DataFrame, max_rows: int) -> str:
    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index()
    if len(table) == 1 and table.shape[1] > 4:
        table = pd.DataFrame({"quantity": table.columns.astype(str), "value": list(table.iloc[0])}, dtype=object)
    shown = table.head(max_rows)
    left = [not all(isinstance(v, numbers.Number) or v is None for v in column) for _, column in table.items()]
    head = _cells("th", [str(c) for c in table.columns], left)
    body = "\n".join(_cells("td", [_text(v) for v in row], left) for row in shown.itertuples(index=False, name=None))
    rest = f"<p class=note>First {max_rows:,} of {len(table):,} rows.</p>" if len(table) > max_rows else ""
    return f"<div class=scroll tabindex=0><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{rest}"


def _cells(tag: str, texts: Sequence[str], left: Sequence[bool]) -> str:
    cells = (f"<{tag}{' class=t' if t else ''}>{html.escape(x)}</{tag}>" for x, t in zip(texts, left, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def _text(value: Any) -> str:
    """A cell: whole numbers as such, others by 4 significant digits, grouped thousands, a dash for what is unknown."""
    if isinstance(value, bool) or value is None or not isinstance(value, numbers.Real):
        return "\u2014" if value is None or value is pd.NA or value is pd.NaT else str(value)
    number = float(value) + 0.0  # -0.0 reads 0
    if math.isnan(number):
        return "\u2014"
    if isinstance(value, numbers.Integral) or number.is_integer():
        return f"{number:,.0f}"
    if not 1e-3 <= abs(number) < 1e6:
        return f"{number:.3g}"
    return f"{number:,.{max(0, 3 - math.floor(math.log10(abs(number))))}f}" if abs(number) >= 1 else f"{number:.4f}"


def _captioned(entry: Any) -> tuple[Any, Any]:
    return entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, "")


def _figure(name: str, entry: Figure | tuple[Figure, str]) -> str:
    figure, caption = _captioned(entry)
    alt = html.escape(f"{name}: {caption or _describe(figure)}")
    width = round(figure.get_figwidth() * _CSS_DPI)
    # a wide picture keeps three quarters of its size on a phone and scrolls in its box: its labels stay readable
    style = f"width:{width}px" + (f";min-width:{round(0.75 * width)}px" if width > 600 else "")
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    image = f'<img src="{_data_uri(figure)}" alt="{alt}" style="{style}">'
    return f"<figure><div class=scroll tabindex=0>{image}</div>{text}</figure>"


def _data_uri(figure: Figure) -> str:
    with matplotlib.rc_context({"svg.hashsalt": "dhlens"}):
        data, kind = _drawn(figure, format="svg", metadata={"Date": None}), "svg+xml"
    if len(data) > _SVG_LIMIT:
        data, kind = _drawn(figure, format="png", dpi=_PNG_DPI, metadata={"Software": None}), "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _drawn(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    return buffer.getvalue()


def _describe(figure: Figure) -> str:
    axes = [f"{a.get_ylabel()} against {a.get_xlabel()}" for a in figure.axes if a.get_xlabel() and a.get_ylabel()]
    return "; ".join(axes) or "picture"


def _card(card: RunCard) -> str:
    text = html.escape(json.dumps(card.to_dict(), indent=2, ensure_ascii=False, default=str))
    summary = html.escape(f"Run card: {card.model}, {card.dtype}, fingerprint {card.fingerprint()[:12]}")
    return f"<details><summary>{summary}</summary><pre>{text}</pre></details>"
