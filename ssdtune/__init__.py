"""Fine-tune language models many times larger than the GPU, streamed between NVMe, RAM and the device.

    model = ssdtune.stream("meta-llama/Llama-3.1-70B", offload={"ram": "54GB", "vram": "21GB"}, micro_batch_size=1)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))

Importing this package costs nothing: torch and transformers are imported when a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssdtune.api import stream
    from ssdtune.config import Offload
    from ssdtune.errors import SSDTuneError
    from ssdtune.trainer import SSDConfig, SSDTrainer, ZOTrainer

__all__ = [
    "Offload",
    "SSDConfig",
    "SSDTrainer",
    "SSDTuneError",
    "ZOTrainer",
    "__version__",
    "stream",
]
__version__ = "0.1.0"

_HOMES = {
    "stream": "ssdtune.api",
    "Offload": "ssdtune.config",
    "SSDTuneError": "ssdtune.errors",
    "SSDConfig": "ssdtune.trainer",
    "SSDTrainer": "ssdtune.trainer",
    "ZOTrainer": "ssdtune.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ssdtune' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
