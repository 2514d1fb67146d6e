"""The smallest change with which a job fits that does not. A pure function."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ssdtune.schedule.job import Job
from ssdtune.schedule.machine import Machine
from ssdtune.schedule.outcome import Choices, Outcome, Refusal, outcome, writes_of
from ssdtune.schedule.plan import Tier
from ssdtune.schedule.writes import as_key
from ssdtune.sizes import parse_size

Change = tuple[str, Job, Choices]  # in words, and what it makes of the job and of the choices


def smallest_change(job: Job, machine: Machine, choices: Choices) -> tuple[str, Outcome] | None:
    """The first of a few changes, the least costly first, with which the job fits; and what comes of it. The last one is
    to allow the writes of the first way that fits but for them."""
    first = outcome(job, machine, choices)
    if isinstance(first, Outcome):
        return "", first
    refused = [_with_its_writes(("", job, choices), first)]
    for change in [*_fewer_writes(job, machine, first), *_less_memory(job, machine, choices)]:
        words, other, changed = change
        found = outcome(other, machine, changed)
        if isinstance(found, Outcome):
            return words, found
        refused.append(_with_its_writes(change, found))
    for words, other, changed in filter(None, refused):
        found = outcome(other, machine, changed)
        if isinstance(found, Outcome):
            return words, found
    return None


def _with_its_writes(change: Change, found: Refusal) -> Change | None:
    """With so many writes allowed as it makes; None where something else is too much."""
    if not found.needed_writes:
        return None
    words, job, choices = change
    num_bytes = as_key(found.needed_writes)
    allowed = dataclasses.replace(choices, most_written=parse_size(num_bytes))
    return ", ".join(filter(None, (words, f"offload.max_writes: {num_bytes}"))), job, allowed


def _fewer_writes(job: Job, machine: Machine, first: Refusal) -> Iterator[Change]:
    """Yields block inputs in memory, and a working copy that is written less often: as often as is allowed for the blocks
    that go back now, or for all."""
    choices = first.choices
    if not first.needed_writes:
        return
    if job.kind == "train" and choices.block_inputs is Tier.NVME:
        for tier in (Tier.RAM, Tier.DEVICE) if machine.device is not None else (Tier.DEVICE,):
            nearer = dataclasses.replace(choices, block_inputs=tier)
            yield f"offload.block_inputs: {tier}", job, nearer
    if job.folded_every(choices.micro_batches):
        writes = writes_of(job, choices)
        moves = None if job.work is None else job.work.moves
        window = 1 if moves is None else moves.window
        for num_bytes in (writes.going_back(first.needed_writes), writes.copy_bytes):
            fewest = writes.fewest_between(num_bytes)
            every = 0 if fewest is None else -(-fewest // window) * window
            words = f"zo_fold_steps: {every or 'never'}"
            yield words, dataclasses.replace(job, fold_steps=every), choices


def _less_memory(job: Job, machine: Machine, choices: Choices) -> Iterator[Change]:
    """Yields budgets that are what is free, block inputs further away, fewer of them."""
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
