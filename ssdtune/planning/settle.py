"""Before a run: what a configuration leaves to prediction is decided as `ssdtune plan` decides it, and said. From then
on bits are bits, each block's where they differ, and `offload.micro_batch_size` and `zo_num_directions` are numbers.

A run that goes on keeps what its checkpoint was made with: other bits are other weights, another cut of a step's rows has
other bits in its sums, and other directions are other steps.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ssdtune.config import ConfigError, load_config
from ssdtune.jobs import AUTO, Jobs, Source, opens_directions
from ssdtune.machines import own_machine
from ssdtune.packing.widths import mean_of
from ssdtune.planning.bits import bits_lines, chosen_for, error_words, read_as
from ssdtune.planning.ways import DIRECTIONS, ROWS, decide
from ssdtune.report import say
from ssdtune.run_files import CONFIG_NAME
from ssdtune.schedule.changes import smallest_change
from ssdtune.schedule.outcome import Outcome, Refusal

if TYPE_CHECKING:
    from ssdtune.config import Loaded, TrainConfig
    from ssdtune.planning.ways import Decided
    from ssdtune.schedule.job import Job
    from ssdtune.schedule.machine import Machine

BITS = "quantization"


def settled(loaded: Loaded) -> Loaded:
    """The configuration with nothing left open; prints what was decided.

    Raises ConfigError where several processes train: each would decide by what is free when it looks; and where what
    fits would write more to the drive than the run may.
    """
    config = loaded.config
    if _open_keys(config):
        _check_alone(config)
        config = _kept(config)
    left = _open_keys(config)
    if _is_alone() and (left or config.offload.max_writes is not None):
        config = _decided(config, left)
    return dataclasses.replace(loaded, config=_listed(config))


def _open_keys(config: TrainConfig) -> frozenset[str]:
    """What is left to prediction."""
    is_open = {
        BITS: config.quantization == AUTO,
        ROWS: config.offload.micro_batch_size == AUTO,
        DIRECTIONS: opens_directions(config),
    }
    return frozenset(key for key, holds in is_open.items() if holds)


def _is_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) < 2


def _check_alone(config: TrainConfig) -> None:
    """Random directions that are left open are no fault: several processes take the usual number."""
    if _is_alone():
        return
    if config.quantization == AUTO:
        raise ConfigError(
            f"{BITS}: auto is chosen by one process, and there are several.\n"
            f"Give the bits that `ssdtune plan` prints, for instance {BITS}: 4."
        )
    if config.offload.micro_batch_size == AUTO:
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
    if opens_directions(config) and before.zo_estimator == config.zo_estimator:
        num = _num_directions(before)
        say(f"decided   {DIRECTIONS}: auto is {num}, as when the run began")
        config = dataclasses.replace(config, zo_num_directions=num)
    return config


def _num_directions(config: TrainConfig) -> int:
    """The usual number, where a run had nothing to decide it by."""
    from ssdtune.trainer.zeroth_order import estimator_of

    return config.zo_num_directions or len(estimator_of(config).variants) - 1


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


def _decided(config: TrainConfig, left: frozenset[str]) -> TrainConfig:
    """With what is predicted to be best on this machine; prints it. The model is opened once for all. left: keys that are
    open."""
    machine = own_machine(config.offload.path or config.output_dir)
    if left == {DIRECTIONS} and machine.profile is None and config.offload.max_writes is None:
        return config  # without times there is nothing to decide them by
    jobs = Jobs(Source.of(config, None, on_device=machine.device is not None))
    read: Callable[..., Job] = jobs
    if config.quantization == AUTO:
        chosen = chosen_for(jobs(), machine, config)
        for line in bits_lines(chosen, str(config.model_name_or_path)):
            say(f"decided   {line}")
        config = dataclasses.replace(config, quantization=chosen.reading.quantization)
        read = read_as(chosen.reading, jobs)
    if left == {BITS} and config.offload.max_writes is None:
        return config
    decided = decide(read, machine, config)
    _check_writes(decided, machine)
    for key in (ROWS, DIRECTIONS):
        if key in left and key in decided.said:
            say(f"decided   {decided.said[key]}")
    if ROWS in left:
        config = _with_rows(config, decided.job.rows_at_once)
    if DIRECTIONS in left and decided.job.directions is not None:
        config = dataclasses.replace(config, zo_num_directions=decided.job.directions.num)
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
