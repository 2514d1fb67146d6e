"""Ways to run a job on a machine: as configured, and what may be better."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ssdtune.schedule.outcome import Choices, Outcome, Refusal, outcome, smallest_change
from ssdtune.schedule.plan import Tier

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig
    from ssdtune.schedule.job import Job
    from ssdtune.schedule.machine import Machine


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """One way to run the job. words: what is special; flags: the keys that say so to `ssdtune train`."""

    words: str
    flags: str
    found: Outcome | Refusal


def ways_of(job: Job, machine: Machine, config: TrainConfig) -> Iterator[Way]:
    """Yields the job as configured, then what may be better: fewer or more tokens a step, inputs elsewhere."""
    base = _configured(job, machine, config)
    first = outcome(job, machine, base)
    yield Way("as configured", "", first)
    if isinstance(first, Refusal):
        change = smallest_change(job, machine, base)
        if change is not None:
            words, found = change
            yield Way(words, _flags(words), found)
        return
    other = first.hidden_at
    if other is not None and other != base.micro_batches and job.num_steps is None:
        words = f"gradient_accumulation_steps: {other}"
        changed = dataclasses.replace(base, micro_batches=other)
        yield Way(words, _flags(words), outcome(job, machine, changed))
    if base.block_inputs is not Tier.NVME and job.kind == "train":
        words = "offload.block_inputs: nvme"
        changed = dataclasses.replace(base, block_inputs=Tier.NVME)
        yield Way(words, _flags(words), outcome(job, machine, changed))


def _configured(job: Job, machine: Machine, config: TrainConfig) -> Choices:
    offload = config.offload
    tier = Tier.DEVICE if offload.block_inputs == "auto" else Tier(offload.block_inputs)
    if tier is Tier.RAM and machine.device is None:
        tier = Tier.DEVICE  # the same memory
    return Choices(
        micro_batches=job.micro_batches,
        block_inputs=tier,
        ram_bytes=offload.ram,
        device_bytes=offload.vram,
        activation_bytes=offload.activations,
        prefetch=offload.prefetch,
    )


def _flags(words: str) -> str:
    """ "offload.ram: auto, a: 2" -> "--offload.ram auto --a 2"."""
    pairs = (part.split(": ") for part in words.split(", "))
    return " ".join(f"--{key} {value}" for key, value in pairs)


def knows_steps(job: Job) -> bool:
    """Whether the run's length is known: from its rows, or given."""
    return job.num_steps is not None or job.data.num > 0
