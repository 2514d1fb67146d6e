"""One thread, fixed seeds, temporary folders on a disk, nothing from the network."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
QUIET = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
ON_DISK = Path("/var/tmp")  # by the file hierarchy standard it survives a reboot: no tmpfs


def pytest_configure(config: pytest.Config) -> None:
    """Before torch and transformers are imported: they read these once."""
    for name in OFFLINE + QUIET:
        os.environ.setdefault(name, "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if os.access(ON_DISK, os.W_OK):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(ON_DISK))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests wait for `-m slow`, GPU tests for a GPU."""
    wants_slow = "slow" in str(config.getoption("markexpr")) or any(
        "::" in arg for arg in config.args
    )
    has_device = None
    for item in items:
        if item.get_closest_marker("slow") and not wants_slow:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if item.get_closest_marker("gpu"):
            if has_device is None:
                import torch

                has_device = torch.cuda.is_available()
            if not has_device:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is available"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers whatever ran before. Tests that never import torch stay fast."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture
def stream() -> Iterator[Callable[..., Any]]:
    """`support.streamed`, whose models are closed after the test."""
    import support

    made = []

    def make(folder: Path, **options: Any) -> Any:
        made.append(support.streamed(folder, **options))
        return made[-1]

    yield make
    for model in made:
        model.ssdtune.close()
