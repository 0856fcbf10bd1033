"""Draw the pictures of README from finished runs.

python assets/make.py scan runs/walden
python assets/make.py ablate runs/ablate
python assets/make.py atlas runs/atlas
python assets/make.py sweep runs/sweep
python assets/make.py predict runs/predict
python assets/make.py rag runs/rag
python assets/make.py rerank runs/rerank
python assets/make.py reason runs/hotpot
python assets/make.py circuit runs/circuit
"""

import sys
from pathlib import Path

from dhlens.recipes import Ablation, Circuit, Prediction, Rag, Reasoning, Reranking, Scan

PICTURES = {
    "scan": (Scan, {"raster": "One episode", "long_tail": "The long tail"}),
    "ablate": (Ablation, {"ablation": "What is left"}),
    "atlas": (Ablation, {"causal": "Every head, every step"}),
    "sweep": (Ablation, {"sweep": "How many heads"}),
    "rag": (Rag, {"selection": "What the heads find"}),
    "rerank": (Reranking, {"reranking": "Who ranks gold passages first"}),
    "reason": (Reasoning, {"reasoning": "Where the heads are"}),
    "circuit": (Circuit, {"circuit": "What a circuit is worth"}),
    "predict": (Prediction, {"correlations": "Canonical correlations: the largest"}),
}


def main(kind: str, run: str) -> None:
    """Write each picture of the run as PNG beside this file."""
    recipe, names = PICTURES[kind]
    pictures = recipe.load(run).figures()
    for name, title in names.items():
        figure, _ = pictures[title]
        figure.savefig(Path(__file__).with_name(f"{name}.png"), dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
