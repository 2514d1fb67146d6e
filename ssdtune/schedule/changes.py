"""The smallest change with which a job fits that does not. A pure function."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ssdtune.schedule.job import Job
from ssdtune.schedule.machine import Machine
from ssdtune.schedule.outcome import Choices, Outcome, outcome, writes_of
from ssdtune.schedule.plan import Tier
from ssdtune.schedule.writes import as_key
from ssdtune.sizes import parse_size


def smallest_change(job: Job, machine: Machine, choices: Choices) -> tuple[str, Outcome] | None:
    """The first of a few changes, the least costly first, with which the job fits; and what comes of it. The last one is
    to allow the writes of the first way that fits but for them."""
    too_many: list[tuple[str, Job, Choices]] = []
    for words, other, changed in [("", job, choices), *_changes(job, machine, choices)]:
        found = outcome(other, machine, changed)
        if isinstance(found, Outcome):
            return words, found
        if found.needed_writes:
            allowed = f"offload.max_writes: {as_key(found.needed_writes)}"
            more = dataclasses.replace(
                changed, most_written=parse_size(as_key(found.needed_writes))
            )
            too_many.append((", ".join(filter(None, (words, allowed))), other, more))
    for words, other, changed in too_many:
        found = outcome(other, machine, changed)
        if isinstance(found, Outcome):
            return words, found
    return None


def _changes(job: Job, machine: Machine, choices: Choices) -> Iterator[tuple[str, Job, Choices]]:
    """Yields each in words, with what it makes of the job and of the choices."""
    if choices.most_written is not None:
        yield from _fewer_writes(job, machine, choices)
    base = choices
    if choices.ram_bytes is not None or choices.device_bytes is not None:
        base = dataclasses.replace(choices, ram_bytes=None, device_bytes=None)
        yield "offload.ram: auto, offload.vram: auto", job, base
    if machine.device is not None and base.block_inputs is Tier.DEVICE:
        yield "offload.block_inputs: ram", job, dataclasses.replace(base, block_inputs=Tier.RAM)
    on_nvme = dataclasses.replace(base, block_inputs=Tier.NVME)
    if base.block_inputs is not Tier.NVME:
        yield "offload.block_inputs: nvme", job, on_nvme
    fewer = base.micro_batches
    while fewer > 1:
        fewer //= 2
        less = dataclasses.replace(on_nvme, micro_batches=fewer)
        yield f"offload.block_inputs: nvme, gradient_accumulation_steps: {fewer}", job, less


def _fewer_writes(
    job: Job, machine: Machine, choices: Choices
) -> Iterator[tuple[str, Job, Choices]]:
    """Yields block inputs in memory, and a working copy that is written less often."""
    if job.kind == "train" and choices.block_inputs is Tier.NVME:
        for tier in (Tier.RAM, Tier.DEVICE) if machine.device is not None else (Tier.DEVICE,):
            nearer = dataclasses.replace(choices, block_inputs=tier)
            yield f"offload.block_inputs: {tier}", job, nearer
    if job.folded_every(choices.micro_batches):
        fewest = writes_of(job, choices).fewest_between
        moves = None if job.work is None else job.work.moves
        window = 1 if moves is None else moves.window
        every = 0 if fewest is None else -(-fewest // window) * window
        words = f"zo_fold_steps: {every or 'never'}"
        yield words, dataclasses.replace(job, fold_steps=every), choices
