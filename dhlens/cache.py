"""Where things are kept that can be made again: converted weights, indexes of corpora."""

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """`DHLENS_CACHE`, or the user's cache directory."""
    return Path(os.environ.get("DHLENS_CACHE") or platformdirs.user_cache_dir("dhlens"))
