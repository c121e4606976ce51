"""What do all tests share? One thread each, no hub, and where real data and the real encoder are."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch and huggingface_hub are imported: they read these once. Processes of tests inherit them.
os.environ["OMP_NUM_THREADS"] = "1"  # a second thread of a tiny model costs more than it gives
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import hypothesis
import pytest

from coordinator.errors import ModelError
from peer.display import _SafeFormatter

# No test asserts a time: on a busy machine one example may take any.
hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")


# Of real processes, the longest: begun first, or one process of the test run would end long after the others.
_LONGEST = {f"test_{name}.py" for name in ("swarm", "fault_matrix", "capture", "private_swarm", "join")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process sets up the log for a process of its own."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in root.handlers[:]:
        if isinstance(handler.formatter, _SafeFormatter):
            root.removeHandler(handler)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data sets, one per sub-folder with train.csv, validation.csv and test.csv."""
    folder = os.environ.get("COLD_DATA_DIR")
    if not folder:
        pytest.skip("needs real data: set COLD_DATA_DIR to a folder with sst2/train.csv and others")
    if not (Path(folder) / "sst2" / "train.csv").is_file():
        pytest.skip(f"needs real data: COLD_DATA_DIR={folder} has no sst2/train.csv")
    return Path(folder)


@pytest.fixture(scope="session")
def encoder_dir() -> Path:
    """Folder of the encoder that the demo starts from: 22.7M parameters, real weights."""
    from scripts.demo import embedded_encoder

    try:
        return embedded_encoder()
    except ModelError as error:
        pytest.skip(f"needs the demo's encoder: {error}")
