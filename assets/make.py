"""Draw the pictures of README from finished runs: `python assets/make.py runs/walden runs/ablate runs/atlas`."""

import sys
from pathlib import Path

from dhlens.recipes import Ablation, Scan

SCAN = {"raster": "One episode", "long_tail": "The long tail"}
ABLATION = {"ablation": "What is left"}
ATLAS = {"causal": "Every head, every step"}


def main(scan: str, ablation: str, atlas: str) -> None:
    """Write each picture as PNG beside this file."""
    for run, names in (
        (Scan.load(scan), SCAN),
        (Ablation.load(ablation), ABLATION),
        (Ablation.load(atlas), ATLAS),
    ):
        pictures = run.figures()
        for name, title in names.items():
            figure, _ = pictures[title]
            figure.savefig(Path(__file__).with_name(f"{name}.png"), dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
