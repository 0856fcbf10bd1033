import base64
import inspect
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from dhlens.card import RunCard
from dhlens.render.report import _text, report

EVIL = "<script>alert('x')</script>&\"'"


def small(marks: int = 3) -> Figure:
    figure = Figure(figsize=(4, 3))
    axes = figure.add_subplot(xlabel="time lag (steps)", ylabel="Jaccard")
    axes.scatter(np.linspace(0, 1, marks), np.linspace(0, 1, marks) ** 2)
    return figure


def images(page: str) -> list[tuple[str, bytes]]:
    return [
        (kind, base64.b64decode(data)) for kind, data in re.findall(r'src="data:image/([a-z+]+);base64,([^"]+)"', page)
    ]


def evil_page() -> str:
    table = pd.DataFrame({EVIL: [EVIL, "b"], "value": [1.0, 2.0]})
    card = RunCard(model=EVIL, settings={EVIL: EVIL}, versions={})
    return report(EVIL, tables={EVIL: table}, figures={EVIL: (small(), EVIL)}, card=card, notes=[EVIL]).html


def test_whatever_is_written_is_escaped_everywhere():
    page = evil_page()
    assert "<script" not in page and "alert(&#x27;x&#x27;)" in page
    # title, h1, note; table heading, column, cell; picture heading, alt (2), caption; card summary, model, setting (2)
    assert page.count("&lt;script&gt;") == 14
    assert not re.search(r'alt="[^"]*<', page)


def test_the_page_asks_for_nothing_from_outside():
    page = evil_page()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<iframe", re.sub(r"base64,[^\"]+", "", page))
    assert "default-src 'none'" in page and "script-src" not in page


def test_figures_are_embedded_as_vectors_and_large_ones_as_pixels():
    page = report("t", figures={"small": small(), "large": small(20_000)}).html
    (kind, vector), (other, pixels) = images(page)
    assert kind == "svg+xml" and b"<svg" in vector
    assert other == "png" and pixels.startswith(b"\x89PNG")
    assert len(page) < 600_000


def test_pictures_have_alternative_text_from_caption_or_axes():
    page = report("t", figures={"Lag": small(), "Again": (small(), "falls with time")}).html
    assert re.findall(r'alt="([^"]*)"', page) == ["Lag: Jaccard against time lag (steps)", "Again: falls with time"]
    assert "<figcaption>falls with time</figcaption>" in page


def test_the_same_figure_gives_the_same_page():
    assert report("t", figures={"a": small()}).html == report("t", figures={"a": small()}).html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.351234, "0.3512"),
        (12.9712, "12.97"),
        (1234.567, "1,235"),
        (2000.0, "2,000"),
        (1024, "1,024"),
        (np.int64(7), "7"),
        (3.2e-6, "3.2e-06"),
        (8.1234567e9 + 0.5, "8.12e+09"),
        (0.0, "0"),
        (-0.0, "0"),
        (65.0, "65"),
        (270.0, "270"),
        (np.float32(1.0), "1"),
        (float("nan"), "\u2014"),
        (None, "\u2014"),
        (True, "True"),
        (np.float32(-2.5), "-2.500"),
        (float("inf"), "inf"),
        ("L1H2", "L1H2"),
    ],
)
def test_numbers_are_short(value, text):
    assert _text(value) == text


def test_long_tables_are_cut_and_counted():
    page = report("t", tables={"heads": pd.DataFrame({"head": range(1500)})}, max_rows=30).html
    assert page.count("<td") == 30 and "First 30 of 1,500 rows." in page


def test_one_wide_row_stands_upright():
    row = pd.DataFrame([{"a": 1, "b": 2.5, "c": "x", "d": None, "e": 0.25}])
    page = report("t", tables={"dynamics": row}).html
    assert re.findall(r"<td[^>]*>([^<]*)</td>", page) == [
        "a",
        "1",
        "b",
        "2.500",
        "c",
        "x",
        "d",
        "\u2014",
        "e",
        "0.2500",
    ]


def test_numbers_stand_right_and_words_left():
    page = report("t", tables={"x": pd.DataFrame({"head": ["L1H2"], "rate": [0.5]})}).html
    assert "<th class=t>head</th><th>rate</th>" in page and "<td class=t>L1H2</td><td>0.5000</td>" in page


def test_columns_of_one_name_are_both_shown():
    page = report("t", tables={"x": pd.DataFrame([[1, "a"]], columns=["x", "x"])}).html
    assert "<th>x</th><th class=t>x</th>" in page and "<td>1</td><td class=t>a</td>" in page


def test_a_named_index_is_a_column():
    page = report("t", tables={"x": pd.DataFrame({"a": [1.0]}, index=pd.Index(["row"], name="policy"))}).html
    assert ">policy</th>" in page and ">row</td>" in page


def test_the_card_is_folded_and_whole():
    card = RunCard(model="toy", seed=7, settings={"sink": 4}, versions={"torch": "2"})
    page = report("t", card=card).html
    folded = page[page.index("<details>") : page.index("</details>")]
    assert card.fingerprint()[:12] in folded and "&quot;sink&quot;: 4" in folded and "&quot;seed&quot;: 7" in folded


def test_save_refuses_a_file_that_is_there(tmp_path):
    page = report("first")
    path = page.save(tmp_path / "report.html")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        report("second").save(path)
    assert path.read_text(encoding="utf-8") == page.html
    report("second").save(path, overwrite=True)
    assert "second" in path.read_text(encoding="utf-8")


def test_a_notebook_shows_the_page_in_a_frame_of_its_own():
    shown = report(EVIL)._repr_html_()
    assert shown.startswith("<iframe srcdoc=") and shown.count("<") == 2 and "<script" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"figures": {"x": "str"}}, "figure 'x' must be a Figure, got str"),
        ({"figures": {"x": (small(), 3)}}, "the caption of figure 'x' must be a str, got int"),
        ({"figures": [small()]}, "figures must be a mapping, got list"),
        ({"tables": {"x": [1]}}, "table 'x' must be a DataFrame, got list"),
        ({"notes": "one note"}, "notes must be a sequence of texts, got str"),
        ({"card": {}}, "card must be a RunCard, got dict"),
    ],
)
def test_what_is_something_else_is_named(options, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        inspect.unwrap(report)("t", **options)


def test_a_limit_without_rows_is_refused():
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        report("t", max_rows=0)
