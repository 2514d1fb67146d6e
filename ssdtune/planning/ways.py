"""Ways to run a job on a machine: as configured, with what is `auto` decided by prediction, and what may be better."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ssdtune.schedule.changes import smallest_change
from ssdtune.schedule.directions import Filled, fill_reading, reading_s
from ssdtune.schedule.grid import (
    UNMEASURED,
    Point,
    best_point,
    divisors,
    grid,
    tiers_for,
    words_of,
)
from ssdtune.schedule.outcome import Choices, Outcome, Refusal, outcome
from ssdtune.schedule.plan import Tier
from ssdtune.sizes import format_size

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig
    from ssdtune.schedule.job import Job
    from ssdtune.schedule.machine import Machine

ROWS, INPUTS = "offload.micro_batch_size", "offload.block_inputs"
DIRECTIONS = "zo_num_directions"


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """One way to run the job. words: what is special; flags: the keys that say so to `ssdtune train`."""

    words: str
    flags: str
    found: Outcome | Refusal


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What was `auto`, settled. job: with its rows at once, and its random directions. points: what was compared for it,
    the chosen one first. said: key -> the decision in words."""

    job: Job
    points: Sequence[Point]
    said: Mapping[str, str]

    @property
    def lines(self) -> tuple[str, ...]:
        """Each decision."""
        return tuple(self.said.values())


def decide(jobs: Callable[..., Job], machine: Machine, config: TrainConfig) -> Decided:
    """Rows at once, the tier of block inputs and random directions, where the configuration leaves them open; else as it
    says. jobs: as `Jobs`."""
    offload = config.offload
    is_open = offload.micro_batch_size == "auto"
    as_configured = jobs()
    cuts = [as_configured]
    if is_open:
        own = as_configured.rows_at_once
        cuts += [jobs(n) for n in divisors(config.step_rows) if n != own]
    tiers = tiers_for(machine) if offload.block_inputs == "auto" else (_tier(config, machine),)
    points = list(grid(cuts, machine, configured(as_configured, machine, config), tiers))
    best = best_point(points) or points[0]
    own_points = [best, *(p for p in points if p.job is best.job and p is not best)]
    said: dict[str, str] = {}
    if is_open:
        said[ROWS] = _rows_line(best, points)
    if len(tiers) > 1 and best.job.kind == "train" and isinstance(best.found, Outcome):
        said[INPUTS] = _tier_line(best, sorted(own_points, key=points.index))
    job = best.job
    if job.directions is not None and isinstance(best.found, Outcome):
        filled = fill_reading(job, machine, best.found)
        job, own_points[0] = filled.job, Point(filled.job, filled.found)
        said[DIRECTIONS] = _directions_line(filled)
    return Decided(job=job, points=own_points, said=said)


def _directions_line(filled: Filled) -> str:
    line = f"{DIRECTIONS}: auto is {filled.num}"
    first, found = filled.first.simulation, filled.found.simulation
    if first is None or found is None:
        return f"{line}, as always: times are not known"
    reading = f"{reading_s(filled.first):.3g} s of reading"
    if filled.found is filled.first:
        return f"{line}, as always: a step of {first.step_s:.3g} s for {reading} has no time or memory left for more"
    return (
        f"{line}, which reading hides: a step of {found.step_s:.3g} s for {reading}, with the usual {filled.usual} "
        f"{first.step_s:.3g} s"
    )


def _rows_line(best: Point, points: Sequence[Point]) -> str:
    line = f"{ROWS}: auto is {best.job.rows_at_once}"
    if best.step_s is None:
        return f"{line}, as configured: times are not known, or nothing fits"
    cuts = sorted({point.job.rows_at_once for point in points})
    told = {str(n): _told([p for p in points if p.job.rows_at_once == n]) for n in cuts}
    return f"{line} rows at once ({words_of(told)})"


def _told(points: Sequence[Point]) -> float | str | None:
    """Seconds of a step of the fastest of these, or why there are none; None where none fits."""
    times = [point.step_s for point in points if point.step_s is not None]
    if times:
        return min(times)
    if any(isinstance(p.found, Outcome) for p in points):
        return UNMEASURED
    writes = [p.found.needed_writes for p in points if isinstance(p.found, Refusal)]
    return f"would write {format_size(round(min(writes)))}" if all(writes) else None


def _tier_line(best: Point, points: Sequence[Point]) -> str:
    line = f"{INPUTS}: auto is {best.tier}"
    if best.step_s is None:
        return f"{line}, the nearest that holds them"
    return f"{line} ({words_of({str(p.tier): _told([p]) for p in points})})"


def alternatives(job: Job, machine: Machine, points: Sequence[Point]) -> Iterator[Way]:
    """Yields the first point as the way that is configured, then what may be better: fewer or more tokens a step,
    inputs elsewhere. points: of this job, those after the first were compared with it already."""
    first = points[0].found
    base = first.choices
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
        known = next((p.found for p in points if p.tier is Tier.NVME), None)
        changed = dataclasses.replace(base, block_inputs=Tier.NVME)
        yield Way(words, _flags(words), known or outcome(job, machine, changed))


def _tier(config: TrainConfig, machine: Machine) -> Tier:
    wanted = config.offload.block_inputs
    tier = Tier.DEVICE if wanted == "auto" else Tier(wanted)
    # Without a device they are the same memory.
    return Tier.DEVICE if tier is Tier.RAM and machine.device is None else tier


def configured(job: Job, machine: Machine, config: TrainConfig) -> Choices:
    """What the configuration says of how to run the job."""
    offload = config.offload
    return Choices(
        micro_batches=job.micro_batches,
        block_inputs=_tier(config, machine),
        ram_bytes=offload.ram,
        device_bytes=offload.vram,
        activation_bytes=offload.activations,
        nvme_activation_bytes=offload.nvme_activations,
        prefetch=offload.prefetch,
        most_written=offload.max_writes,
    )


def _flags(words: str) -> str:
    """ "offload.ram: auto, a: 2" -> "--offload.ram auto --a 2"."""
    pairs = (part.split(": ") for part in words.split(", "))
    return " ".join(f"--{key} {value}" for key, value in pairs)


def knows_steps(job: Job) -> bool:
    """Whether the run's length is known: from its rows, or given."""
    return job.num_steps is not None or job.data.num > 0
