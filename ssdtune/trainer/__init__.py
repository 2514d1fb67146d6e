"""Trainers and the run that a YAML file describes.

`SSDTrainer` is `transformers.Trainer` whose micro-batches of a step pass each block together;
`train_from_config` is what `ssdtune train` does. Importing this costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssdtune.trainer.config import SSDConfig
    from ssdtune.trainer.results import TrainResult
    from ssdtune.trainer.run import train_from_config
    from ssdtune.trainer.trainer import SSDTrainer, TrainerError
    from ssdtune.trainer.zeroth_order import ZOTrainer

__all__ = [
    "SSDConfig",
    "SSDTrainer",
    "TrainResult",
    "TrainerError",
    "ZOTrainer",
    "train_from_config",
]

_HOMES = {
    "SSDConfig": "ssdtune.trainer.config",
    "SSDTrainer": "ssdtune.trainer.trainer",
    "ZOTrainer": "ssdtune.trainer.zeroth_order",
    "TrainerError": "ssdtune.trainer.trainer",
    "TrainResult": "ssdtune.trainer.results",
    "train_from_config": "ssdtune.trainer.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ssdtune.trainer' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
