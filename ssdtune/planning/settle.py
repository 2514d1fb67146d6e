"""Before a run: what a configuration leaves to prediction is decided as `ssdtune plan` decides it, and said. From then
on bits are bits, and `offload.micro_batch_size` is a number."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from ssdtune.config import ConfigError, load_config
from ssdtune.jobs import Jobs, Source
from ssdtune.machines import own_machine
from ssdtune.planning.bits import with_bits
from ssdtune.planning.ways import decide
from ssdtune.report import say
from ssdtune.run_files import CONFIG_NAME

if TYPE_CHECKING:
    from ssdtune.config import Loaded, TrainConfig

KEY = "offload.micro_batch_size"


def settled(loaded: Loaded) -> Loaded:
    """The configuration with nothing left open. Raises SSDTuneError where several processes would have to agree."""
    return with_rows_at_once(with_bits(loaded))


def with_rows_at_once(loaded: Loaded) -> Loaded:
    """The configuration with a number of rows at once; prints which. A run that is resumed keeps that of its first
    start, since its checkpoints are of these micro-batches.

    Raises ConfigError where several processes train: each would decide by what is free when it looks.
    """
    config = loaded.config
    if config.offload.micro_batch_size != "auto":
        return loaded
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"{KEY}: auto is for one process; several must cut their rows alike.\n"
            f"Write a number; `ssdtune plan` on one of the machines says which is the fastest."
        )
    before = _of_earlier_run(config)
    if before is not None:
        say(f"decided   {KEY}: auto is {before}, as when the run began")
        return dataclasses.replace(loaded, config=_with(config, before))
    machine = own_machine(config.offload.path or config.output_dir)
    jobs = Jobs(Source.of(config, None, on_device=machine.device is not None))
    decided = decide(jobs, machine, config)
    say(f"decided   {decided.lines[0]}")
    return dataclasses.replace(loaded, config=_with(config, decided.job.rows_at_once))


def _with(config: TrainConfig, rows_at_once: int) -> TrainConfig:
    offload = dataclasses.replace(config.offload, micro_batch_size=rows_at_once)
    return dataclasses.replace(config, offload=offload)


def _of_earlier_run(config: TrainConfig) -> int | None:
    """What a run in the same folder, with as many rows in a step, has settled on; None: there is none to go on with."""
    path = config.output_dir / CONFIG_NAME
    if config.resume_from_checkpoint is False or not path.is_file():
        return None
    try:
        before = load_config(path).config
    except ConfigError:
        return None  # another version's, or edited by hand: the checkpoint itself is checked later
    is_alike = before.step_rows == config.step_rows
    return before.per_device_train_batch_size if is_alike else None
