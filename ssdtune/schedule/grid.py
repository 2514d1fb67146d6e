"""The outer grid around the search for a plan: how many rows pass a block at once, and where block inputs wait.

Visits are vertical, so how a step's rows are cut changes memory and how well products use the processor, and not a byte
of what is read. Where inputs wait changes memory, what goes over the links and what the drive is written. Every point of
the grid is planned and simulated; the fastest that fits is taken. Among points as fast: the one that writes least, then
the nearest memory, then the least of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from ssdtune.schedule.job import Job
from ssdtune.schedule.machine import Machine
from ssdtune.schedule.outcome import Choices, Outcome, Refusal, outcome
from ssdtune.schedule.plan import Tier

WORTH = 0.02  # of a step's time: less does not pay for writing to a drive, or for another cut than before
NEAREST_FIRST = (Tier.DEVICE, Tier.RAM, Tier.NVME)
UNMEASURED = "was never measured"  # writing to the drive, above all: an older profile lacks it

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One way to cut a step's rows and to keep block inputs, and what comes of it. job: with its rows at once."""

    job: Job
    found: Outcome | Refusal

    @property
    def tier(self) -> Tier:
        """Of block inputs."""
        return self.found.choices.block_inputs

    @property
    def step_s(self) -> float | None:
        """None where it does not fit, or times are not known."""
        step = self.found.simulation if isinstance(self.found, Outcome) else None
        return None if step is None else step.step_s


def tiers_for(machine: Machine) -> tuple[Tier, ...]:
    """Where block inputs may wait, the nearest first. Without a device its memory is RAM."""
    return NEAREST_FIRST if machine.device is not None else (Tier.DEVICE, Tier.NVME)


def divisors(num_rows: int) -> list[int]:
    """All sizes of a micro-batch that cut so many rows evenly."""
    return [n for n in range(1, num_rows + 1) if num_rows % n == 0]


def grid(
    jobs: Iterable[Job], machine: Machine, choices: Choices, tiers: Sequence[Tier]
) -> Iterator[Point]:
    """Yields a point for each job and tier. jobs: the same rows a step, cut one way and another.

    choices: all that is not of the grid.
    """
    for job in jobs:
        for tier in tiers if job.kind == "train" else (Tier.DEVICE,):
            point = dataclasses.replace(choices, micro_batches=job.micro_batches, block_inputs=tier)
            yield Point(job, outcome(job, machine, point))


def best_point(points: Sequence[Point]) -> Point | None:
    """The fastest that fits; without any times the first that fits. None where nothing does."""
    return best_of([p for p in points if isinstance(p.found, Outcome)], lambda p: p.step_s, _costs)


def best_of(
    fitting: Sequence[T],
    step_s: Callable[[T], float | None],
    costs: Callable[[T], tuple[float, ...]],
) -> T | None:
    """The one with the least costs among those whose steps are within WORTH of the fastest. A step whose time is not
    known is none of them, unless no time is known: then the first. None of none."""
    known = [(each, seconds) for each in fitting if (seconds := step_s(each)) is not None]
    if not known:
        return fitting[0] if fitting else None
    limit = min(seconds for _, seconds in known) / (1 - WORTH)
    return min((each for each, seconds in known if seconds <= limit), key=costs)


def _costs(point: Point) -> tuple[float, ...]:
    found = point.found
    assert isinstance(found, Outcome)
    memory = found.peak.ram_bytes + found.peak.device_bytes
    return (found.written_bytes, NEAREST_FIRST.index(point.tier), memory)


def words_of(seconds: Mapping[str, float | str | None]) -> str:
    """What was compared: "device 2.31 s, nvme does not fit". Text is told as it is, None does not fit."""
    told: list[str] = []
    for name, s in seconds.items():
        words = "does not fit" if s is None else s if isinstance(s, str) else f"{s:.3g} s"
        told.append(f"{name} {words}")
    return ", ".join(told)
