"""All keys of a run together, and what follows from some of them for others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ssdtune.foreign_keys import NOT_SUPPORTED
from ssdtune.keys.adapter import AdapterKeys
from ssdtune.keys.batch import BatchKeys
from ssdtune.keys.conflicts import conflicts
from ssdtune.keys.data import DataKeys
from ssdtune.keys.log import LogKeys
from ssdtune.keys.model import ModelKeys
from ssdtune.keys.offload import Offload
from ssdtune.keys.optimizer import OptimizerKeys
from ssdtune.keys.saving import SavingKeys
from ssdtune.keys.zeroth_order import ZerothOrderKeys
from ssdtune.settings import Record, key, read_again


# A dataclass has the fields of its last base first: from the bottom up, this is the order of `--help`. The groups have no
# methods of their own (init, eq, repr), which would take 1 ms each at import.
@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    LogKeys,
    SavingKeys,
    OptimizerKeys,
    BatchKeys,
    DataKeys,
    ZerothOrderKeys,
    AdapterKeys,
    ModelKeys,
):
    """A fine-tuning run. Every value is checked, from YAML, flags and Python alike."""

    offload: Offload = key(  # noqa: RUF009 - key() makes a dataclass field
        Record(Offload),
        "see below",
        default=Offload(),
        example="{path: /nvme/ssdtune, ram: 16GB}",
    )

    groups: ClassVar[Mapping[str, str]] = {  # first key of each -> title
        "model_name_or_path": "Model",
        "method": "Adapter",
        "zo_trains": "Zeroth order",
        "dataset": "Data",
        "per_device_train_batch_size": "Batch and length of the run",
        "optim": "Optimizer",
        "eval_strategy": "Evaluate, save, resume",
        "logging_steps": "Log",
        "offload": "Machine",
    }
    not_supported: ClassVar[Mapping[str, str]] = NOT_SUPPORTED

    @property
    def step_rows(self) -> int:
        """Of one process's optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def __post_init__(self) -> None:
        read_again(self)
        for name, value in _resolved(self).items():
            object.__setattr__(self, name, value)
        for conflict in conflicts(self):
            raise conflict


def _resolved(config: TrainConfig) -> dict[str, Any]:
    """What follows from other keys; the resolved config says it in full."""
    resolved: dict[str, Any] = {}
    if config.method in ("rslora", "dora"):
        resolved |= {"method": "lora", f"use_{config.method}": True}
    if config.method == "qlora":
        resolved["method"] = "lora"
        if config.quantization == "none":
            resolved["quantization"] = "nf4"
    at_once, rows = config.offload.micro_batch_size, config.step_rows
    if isinstance(at_once, int) and rows % at_once == 0:
        resolved["per_device_train_batch_size"] = at_once
        resolved["gradient_accumulation_steps"] = rows // at_once
    if config.eval_steps is None:
        resolved["eval_steps"] = config.save_steps
    if config.per_device_eval_batch_size is None:
        resolved["per_device_eval_batch_size"] = config.per_device_train_batch_size
    return resolved
