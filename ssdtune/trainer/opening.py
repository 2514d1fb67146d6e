"""A configuration's model, streamed, with its adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig
    from ssdtune.trainer.config import SSDConfig

Say = Callable[[str], None]


@contextlib.contextmanager
def streamed_model(
    config: TrainConfig, args: SSDConfig, say: Say, *, begins_anew: bool
) -> Iterator[Any]:
    """The streamed model with its adapter; its threads end with the `with` block."""
    from ssdtune.peft import announce, replace_lora_weights_loftq

    base: Any = open_model(config)
    try:
        for line in base.ssdtune.engine.plan.lines():
            say(line)
        if trains_all(config):
            say("training  all weights, by forward passes alone; their files stay as they are")
            yield base
            return
        model = attached(config, base, seed=args.seed)
        for line in announce(model):
            say(line)
        if config.init_lora_weights == "loftq" and begins_anew:
            say(replace_lora_weights_loftq(model, config.loftq_source).line())
        yield model
    finally:
        base.ssdtune.close()


def attached(config: TrainConfig, base: Any, *, seed: int) -> Any:
    """The base with a new adapter in the first values that a seed stands for; those of LoftQ take their place later."""
    from transformers import set_seed

    from ssdtune.peft import attach, lora_config

    set_seed(seed)
    return attach(base, lora_config(config, base))


def trains_all(config: TrainConfig) -> bool:
    """Whether all weights train, not an adapter."""
    return config.method == "zo" and config.zo_trains != "adapters"


def open_model(config: TrainConfig) -> Any:
    """`ssdtune.stream` with a configuration's keys; no adapter. Raises SSDTuneError."""
    from ssdtune.api import stream_arguments, streamed

    arguments = stream_arguments(config)
    offload = arguments.pop("offload")
    return streamed(config.model_name_or_path, offload, scratch=_scratch(config), **arguments)


def _scratch(config: TrainConfig) -> Path | None:
    """Where block inputs and activations on NVMe lie: in output_dir where no folder was given."""
    offload = config.offload
    is_used = offload.block_inputs == "nvme" or offload.nvme_activations
    return config.output_dir if is_used and offload.path is None else offload.path
