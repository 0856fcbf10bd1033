"""Draw the pictures that README shows, from a finished scan: `python assets/make.py runs/walden`."""

import sys
from pathlib import Path

from dhlens.recipes import Scan


def main(run: str) -> None:
    """Write raster.png and long_tail.png beside this file."""
    pictures = Scan.load(run).figures()
    for name, title in (("raster", "One episode"), ("long_tail", "The long tail")):
        figure, _ = pictures[title]
        figure.savefig(Path(__file__).with_name(f"{name}.png"), dpi=130)


if __name__ == "__main__":
    main(sys.argv[1])
