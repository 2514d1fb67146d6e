"""Before the first step: what the run will hold at its peak, said; RAM that is short, saved; disk, reserved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ssdtune.memory import free_ram
from ssdtune.schedule.memory import INPUTS
from ssdtune.sizes import format_size
from ssdtune.visit.memory import hold_to, predict, resident_set_bytes
from ssdtune.visit.rehearsal import rehearse

if TYPE_CHECKING:
    from ssdtune.schedule.memory import Peak
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
    row = {"input_ids": [0] * longest_row, "labels": [0] * longest_row}
    shorter = {"input_ids": [0] * (longest_row - 1), "labels": [0] * (longest_row - 1)}
    rows = [
        row,
        *[shorter] * (args.per_device_train_batch_size - 1),
    ]  # so that there is padding to mask
    footprint = rehearse(trainer.model, trainer.data_collator(rows)).footprint
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
