"""Before the first step: the run's peak and the time of a step, said; RAM that is short, saved; disk, reserved."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssdtune.memory import free_ram
from ssdtune.profiles import own_profile
from ssdtune.report import LANE_LABELS
from ssdtune.schedule.cost import predict_step
from ssdtune.schedule.memory import INPUTS
from ssdtune.sizes import format_size
from ssdtune.visit.memory import hold_to, predict, resident_set_bytes
from ssdtune.visit.rehearsal import Rehearsed, rehearse

if TYPE_CHECKING:
    from ssdtune.schedule.memory import Peak
    from ssdtune.schedule.simulate import Simulation
    from ssdtune.trainer.trainer import SSDTrainer

# Of the optimizers that a configuration may name: states as large as the parameter. Adafactor's are its factors.
NUM_STATES = {"adafactor": 0, "sgd": 0, "adagrad": 1, "rmsprop": 1}
SHORT = 1.3  # RAM is short where less than so many times what is predicted is free


def forecast(
    trainer: SSDTrainer, *, longest_row: int, base_bytes: int, say: Callable[[str], None]
) -> Peak:
    """The peak of a step whose micro-batches are all of the longest row.

    Where free RAM is short of it, the heap is held to it from now on, and where it is not enough that is said. Room for
    block inputs on NVMe is reserved now. Raises ScratchError where the drive has no such room.

    longest_row: tokens. base_bytes: what the process held before the model was opened.
    """
    args: Any = trainer.args
    footprint = _rehearsed(trainer, longest_row).footprint
    peak = predict(
        trainer.model,
        footprint,
        num_micro_batches=args.gradient_accumulation_steps,
        base_bytes=base_bytes,
        num_states=NUM_STATES.get(getattr(args.optim, "value", args.optim), 2),
    )
    for line in peak.lines():
        say(line)
    _save_ram(trainer, peak, say)
    assert trainer.streamer is not None
    store = trainer.streamer.input_store
    if store is not None:
        store.reserve(_kept_bytes(peak))
    return peak


def forecast_step(
    trainer: SSDTrainer, lengths: Sequence[int], say: Callable[[str], None]
) -> Simulation | None:
    """The time of a step whose micro-batches are as long as these rows make them on average, said.

    None where this machine has no profile, or the model's work could not be counted. lengths: tokens of every row.
    Raises ProfileError for a profile that is broken.
    """
    profile = own_profile()
    if profile is None or trainer.streamer is None:
        return None
    args: Any = trainer.args
    rows, num_micro_batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
    padded = [max(lengths[i : i + rows]) for i in range(0, len(lengths), rows)]
    length = round(statistics.mean(padded))
    work = _rehearsed(trainer, length).work
    if work is None:
        return None
    plan = trainer.streamer.engine.plan
    found = predict_step(plan, "train", work, profile, num_micro_batches=num_micro_batches)
    for line in found.lines(rows * length * num_micro_batches, LANE_LABELS):
        say(line)
    return found


def _rehearsed(trainer: SSDTrainer, length: int) -> Rehearsed:
    """One micro-batch whose first row has so many tokens and the others one less, so that there is padding to mask."""
    args: Any = trainer.args
    row, shorter = (
        {name: [0] * n for name in ("input_ids", "labels")} for n in (length, length - 1)
    )
    rows = [row, *[shorter] * (args.per_device_train_batch_size - 1)]
    return rehearse(trainer.model, trainer.data_collator(rows))


def _save_ram(trainer: SSDTrainer, peak: Peak, say: Callable[[str], None]) -> None:
    """Holds the heap to the prediction where RAM is short of it, and says where it is not enough."""
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    to_come = max(0, peak.ram_bytes - resident_set_bytes())
    free = free_ram() // num_processes
    if SHORT * to_come > free:
        hold_to(trainer.model, peak)
    if to_come > free:
        say(
            f"warning: {format_size(to_come)} of RAM more are to be held and {format_size(free)} are free: "
            "lower offload.ram, per_device_train_batch_size or gradient_accumulation_steps, or set "
            "offload.block_inputs: nvme"
        )


def _kept_bytes(peak: Peak) -> int:
    parts: tuple[Mapping[str, int], ...] = (peak.nvme, peak.ram)
    return next((p[INPUTS] for p in parts if INPUTS in p), 0)
