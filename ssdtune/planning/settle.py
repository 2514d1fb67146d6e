"""Before a run: what a configuration leaves to prediction is decided as `ssdtune plan` decides it, and said. From then
on bits are bits, each block's where they differ, and `offload.micro_batch_size` is a number.

A run that goes on keeps what its checkpoint was made with: other bits are other weights, and another cut of a step's
rows has other bits in its sums.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ssdtune.config import ConfigError, load_config
from ssdtune.jobs import AUTO, Jobs, Source
from ssdtune.machines import own_machine
from ssdtune.packing.widths import mean_of
from ssdtune.planning.bits import bits_lines, chosen_for, error_words, read_as
from ssdtune.planning.ways import decide
from ssdtune.report import say
from ssdtune.run_files import CONFIG_NAME
from ssdtune.schedule.changes import smallest_change
from ssdtune.schedule.outcome import Outcome, Refusal

if TYPE_CHECKING:
    from ssdtune.config import Loaded, TrainConfig
    from ssdtune.planning.ways import Decided
    from ssdtune.schedule.job import Job
    from ssdtune.schedule.machine import Machine

BITS, ROWS = "quantization", "offload.micro_batch_size"


def settled(loaded: Loaded) -> Loaded:
    """The configuration with nothing left open; prints what was decided.

    Raises ConfigError where several processes train: each would decide by what is free when it looks; and where what
    fits would write more to the drive than the run may.
    """
    config = loaded.config
    if _is_open(config):
        _check_alone(config)
        config = _kept(config)
    if _is_open(config) or (config.offload.max_writes is not None and _is_alone()):
        config = _decided(config)
    return dataclasses.replace(loaded, config=_listed(config))


def _is_open(config: TrainConfig) -> bool:
    return AUTO in (config.quantization, config.offload.micro_batch_size)


def _is_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) < 2


def _check_alone(config: TrainConfig) -> None:
    if _is_alone():
        return
    if config.quantization == AUTO:
        raise ConfigError(
            f"{BITS}: auto is chosen by one process, and there are several.\n"
            f"Give the bits that `ssdtune plan` prints, for instance {BITS}: 4."
        )
    raise ConfigError(
        f"{ROWS}: auto is for one process; several must cut their rows alike.\n"
        "Write a number; `ssdtune plan` on one of the machines says which is the fastest."
    )


# ------------------------------------------------------------------ a run that goes on


def _kept(config: TrainConfig) -> TrainConfig:
    """With what an earlier run settled on, where this one goes on with it; prints which."""
    before = _earlier(config)
    if before is None:
        return config
    is_same_model = before.model_name_or_path == config.model_name_or_path
    if config.quantization == AUTO != before.quantization and is_same_model:
        say(f"decided   {BITS}: auto is {before.quantization}, as when the run began")
        config = dataclasses.replace(config, quantization=before.quantization)
    if config.offload.micro_batch_size == AUTO and before.step_rows == config.step_rows:
        rows = before.per_device_train_batch_size
        say(f"decided   {ROWS}: auto is {rows}, as when the run began")
        config = _with_rows(config, rows)
    return config


def _earlier(config: TrainConfig) -> TrainConfig | None:
    """The resolved configuration of the checkpoint that this run goes on from; None: it begins, or none can be read."""
    from ssdtune.trainer.checkpoint import newest

    wanted = config.resume_from_checkpoint
    if not wanted:
        return None
    folder = newest(config.output_dir) if wanted in (True, AUTO) else Path(str(wanted)).expanduser()
    if folder is None:
        return None
    for record in (folder / CONFIG_NAME, config.output_dir / CONFIG_NAME):
        try:
            if record.is_file():
                return load_config(record).config
        except ConfigError:
            return (
                None  # another version's, or edited by hand: the checkpoint itself is checked later
            )
    return None


# ------------------------------------------------------------------ what is decided


def _decided(config: TrainConfig) -> TrainConfig:
    """With what is predicted to be best on this machine; prints it. The model is opened once for both."""
    machine = own_machine(config.offload.path or config.output_dir)
    jobs = Jobs(Source.of(config, None, on_device=machine.device is not None))
    read: Callable[..., Job] = jobs
    if config.quantization == AUTO:
        chosen = chosen_for(jobs(), machine, config)
        for line in bits_lines(chosen, str(config.model_name_or_path)):
            say(f"decided   {line}")
        config = dataclasses.replace(config, quantization=chosen.reading.quantization)
        read = read_as(chosen.reading, jobs)
    has_rows = config.offload.micro_batch_size == AUTO
    if has_rows or config.offload.max_writes is not None:
        decided = decide(read, machine, config)
        _check_writes(decided, machine)
        if has_rows:
            say(f"decided   {decided.lines[0]}")
            config = _with_rows(config, decided.job.rows_at_once)
    return config


def _check_writes(decided: Decided, machine: Machine) -> None:
    """Raises ConfigError where nothing fits that writes as little as it may."""
    found = [point.found for point in decided.points]
    refused = [each for each in found if isinstance(each, Refusal) and each.needed_writes]
    if not refused or any(isinstance(each, Outcome) for each in found):
        return
    change = smallest_change(decided.job, machine, refused[0].choices)
    way_out = "" if change is None else f"\nThe nearest change that fits: {change[0]}."
    raise ConfigError(f"{refused[0].why}.{way_out}", keys=("offload.max_writes",))


def _with_rows(config: TrainConfig, rows_at_once: int) -> TrainConfig:
    offload = dataclasses.replace(config.offload, micro_batch_size=rows_at_once)
    return dataclasses.replace(config, offload=offload)


def _listed(config: TrainConfig) -> TrainConfig:
    """With bits on average replaced by those of each block; prints them. The same in every process."""
    if mean_of(config.quantization) is None:
        return config
    from ssdtune.api import build_arguments
    from ssdtune.packing.once import listed

    found = listed(config.model_name_or_path, **build_arguments(config))
    if os.environ.get("RANK", "0") == "0":
        say(f"decided   {BITS}: {config.quantization} is {found.quantization}")
        say(f"decided   {error_words(found.error, found.alike, found.reference)}")
    return dataclasses.replace(config, quantization=found.quantization)
