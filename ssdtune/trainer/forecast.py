"""Before the first step: the run's peak and the time of a step, said; RAM that is short, saved; the drive, reserved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ssdtune.memory import free_ram, processes_here
from ssdtune.profiles import own_profile
from ssdtune.schedule.job import mean_padded
from ssdtune.schedule.memory import ACTIVATIONS, INPUTS, MOST_STATES, NUM_STATES, STORED
from ssdtune.sizes import format_size
from ssdtune.trainer.scheduling import Schedule
from ssdtune.visit.memory import hold_to, predict, resident_set_bytes
from ssdtune.visit.rehearsal import Rehearsed, autocast_of, rehearse

if TYPE_CHECKING:
    from ssdtune.schedule.memory import Peak
    from ssdtune.schedule.plan import Plan
    from ssdtune.trainer.trainer import SSDTrainer

SHORT = 1.3  # RAM is short where less than so many times what is predicted is free
# The same where activations stay: what is freed between them leaves holes as large as themselves.
SHORT_OF_KEPT = 2.5


class Rehearsals:
    """Micro-batches of a trainer, rehearsed once for each length. lengths: tokens of the rows that will come."""

    def __init__(self, trainer: SSDTrainer, lengths: Sequence[int] = ()) -> None:
        self.trainer = trainer
        self.lengths_vary = len(set(lengths)) > 1
        self._known: dict[int, Rehearsed] = {}

    def __call__(self, length: int) -> Rehearsed:
        """Of one micro-batch whose first row has so many tokens and the others one less, so that there is padding to
        mask."""
        if length not in self._known:
            args: Any = self.trainer.args
            row, shorter = (
                {name: [0] * n for name in ("input_ids", "labels")} for n in (length, length - 1)
            )
            collator: Any = self.trainer.data_collator
            num = args.per_device_train_batch_size * getattr(collator, "sequences_per_row", 1)
            rows = [row, *[shorter] * (num - 1)]
            streamer = self.trainer.streamer
            assert streamer is not None
            with autocast_of(args, streamer.engine.slots.device):
                self._known[length] = rehearse(self.trainer.model, collator(rows))
        return self._known[length]


def schedule_of(
    rehearsals: Rehearsals, lengths: Sequence[int], *, depth: int | None = None
) -> Schedule | None:
    """What steps cost whose micro-batches are as long as these rows make them on average.

    None where this machine has no profile, or the model's work could not be counted. lengths: tokens of every row.
    depth: fills that may run ahead; None: as many as are best. Raises ProfileError for a profile that is broken.
    """
    profile, trainer = own_profile(), rehearsals.trainer
    if profile is None or trainer.streamer is None:
        return None
    args: Any = trainer.args
    rows = args.per_device_train_batch_size
    length = round(mean_padded(lengths, rows))
    rehearsed = rehearsals(length)
    if rehearsed.work is None:
        return None
    work = dataclasses.replace(rehearsed.work, moves=trainer.moves(len(lengths)))
    rehearsed = dataclasses.replace(rehearsed, work=work)
    return Schedule(
        trainer.streamer,
        rehearsed,
        profile,
        trainer.passes(),
        num_tokens=rows * length * args.gradient_accumulation_steps,
        depth=depth,
    )


def forecast(
    rehearsals: Rehearsals, *, longest_row: int, base_bytes: int, say: Callable[[str], None]
) -> Peak:
    """The peak of a step whose micro-batches are all of the longest row.

    Where free RAM is short of it, the heap is held to it from now on, and where it is not enough that is said. Room for
    block inputs and activations on NVMe is reserved now. Raises ScratchError where the drive has no such room.

    longest_row: tokens. base_bytes: what the process held before the model was opened.
    """
    trainer = rehearsals.trainer
    peak = predicted(rehearsals, longest_row, base_bytes)
    for line in peak.lines():
        say(line)
    _save_ram(trainer, peak, say)
    assert trainer.streamer is not None
    store = trainer.streamer.input_store
    if store is not None:
        store.reserve(_kept_bytes(peak))
    activations = trainer.streamer.activations.store
    if activations is not None:
        activations.reserve(peak.nvme.get(STORED, 0))
    return peak


def predicted(
    rehearsals: Rehearsals, longest_row: int, base_bytes: int, plan: Plan | None = None
) -> Peak:
    """The peak with a plan; None: with the one that is carried out now."""
    trainer = rehearsals.trainer
    args: Any = trainer.args
    assert trainer.streamer is not None
    footprint = rehearsals(longest_row).footprint
    with autocast_of(args, trainer.streamer.engine.slots.device):
        return predict(
            trainer.model,
            footprint,
            dataclasses.replace(trainer.passes(), lengths_vary=rehearsals.lengths_vary),
            base_bytes=base_bytes,
            num_states=NUM_STATES.get(getattr(args.optim, "value", args.optim), MOST_STATES),
            plan=plan,
        )


def _save_ram(trainer: SSDTrainer, peak: Peak, say: Callable[[str], None]) -> None:
    """Holds the heap to the prediction where RAM is short of it, and says where it is not enough."""
    coming, free = to_come(peak), free_ram_share()
    short = SHORT_OF_KEPT if ACTIVATIONS in peak.ram else SHORT
    if short * coming > free:
        hold_to(trainer.model, peak)
    if coming > free:
        say(
            f"warning: {format_size(coming)} of RAM more are to be held and {format_size(free)} are free: "
            "lower offload.ram, offload.activations, per_device_train_batch_size or gradient_accumulation_steps, or set "
            "offload.block_inputs: nvme"
        )
    device = trainer.streamer.engine.slots.device if trainer.streamer is not None else None
    if device is not None and device.type == "cuda" and spare_vram(peak, device) < 0:
        say(
            f"warning: {format_size(peak.device_bytes)} of the device are to be held, "
            f"{format_size(-spare_vram(peak, device))} more than is free: lower offload.vram or "
            "per_device_train_batch_size, or set offload.block_inputs: ram"
        )


def to_come(peak: Peak) -> int:
    """Bytes of RAM that are to be held beyond what is held now."""
    return max(0, peak.ram_bytes - resident_set_bytes())


def free_ram_share() -> int:
    """This process's share."""
    return free_ram() // processes_here()


def free_vram(device: torch.device) -> int:
    """Bytes of the device that are free, or this process's already."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def spare_vram(peak: Peak, device: torch.device) -> int:
    """Bytes of the device that are free and not to be held: negative where it will be short."""
    return free_vram(device) - max(peak.device_bytes, torch.cuda.memory_allocated(device))


def _kept_bytes(peak: Peak) -> int:
    parts: tuple[Mapping[str, int], ...] = (peak.nvme, peak.ram)
    return next((p[INPUTS] for p in parts if INPUTS in p), 0)
