"""Draw the pictures of README from finished runs.

python assets/make.py scan runs/walden
python assets/make.py player runs/walden                 # needs chromium, as the browser tests do
python assets/make.py ablate runs/ablate
python assets/make.py atlas runs/atlas
python assets/make.py sweep runs/sweep
python assets/make.py predict runs/predict
python assets/make.py reason runs/hotpot
python assets/make.py rag runs/rag
python assets/make.py rerank runs/rerank
python assets/make.py circuit runs/circuit
python assets/make.py tasks runs/tasks/carryover.csv     # what `dhlens carryover --out runs/tasks` wrote
"""

import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd

import dhlens as dh
from dhlens.recipes import Ablation, Circuit, Prediction, Rag, Reasoning, Reranking, Scan

HERE = Path(__file__).parent
PICTURES = {
    "scan": (Scan, {"raster": "One episode", "long_tail": "The long tail"}),
    "ablate": (Ablation, {"ablation": "What is left"}),
    "atlas": (Ablation, {"causal": "Every head, every step"}),
    "sweep": (Ablation, {"sweep": "How many heads"}),
    "predict": (Prediction, {"correlations": "Canonical correlations: the largest"}),
    "reason": (Reasoning, {"reasoning": "Where the heads are"}),
    "rag": (Rag, {"selection": "What the heads find"}),
    "rerank": (Reranking, {"reranking": "Who ranks gold passages first"}),
    "circuit": (Circuit, {"circuit": "What a circuit is worth"}),
}


def player(run: str) -> None:
    """The player half-way through an answer of the longest prompt, a head pinned, photographed in chromium."""
    from playwright.sync_api import sync_playwright

    from dhlens.weights import load_tokenizer, resolve

    scan = Scan.load(run)
    right = [i for i, o in enumerate(scan.trace.outcomes) if o.correct]
    shown = max(right, key=lambda i: len(scan.trace.episodes[i].tokens))
    score = dh.copy_paste(scan.trace)
    static = dh.HeadSet.top_k(score.mean(), 20)
    page = dh.player(
        scan.trace, load_tokenizer(resolve(scan.card.model)), score=score, sets={"static": static}, episode=shown
    )
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        path = page.save(Path(folder) / "run.html")
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(path.as_uri())
        for _ in range(20):
            tab.keyboard.press("ArrowRight")
        tab.get_by_role("button", name="L18H7").first.click()
        tab.screenshot(path=HERE / "player.png")
        browser.close()


def main(kind: str, run: str) -> None:
    """Write each picture of the run as PNG beside this file."""
    if kind == "player":
        player(run)
        return
    if kind == "tasks":
        dh.render.figures.carry_map(pd.read_csv(run)).savefig(HERE / "tasks.png", dpi=130)
        return
    recipe, names = PICTURES[kind]
    pictures = recipe.load(run).figures()
    for name, title in names.items():
        figure, _ = pictures[title]
        figure.savefig(HERE / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
