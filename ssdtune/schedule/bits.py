"""`quantization: auto`: in how many bits a job's weights are best read on a machine. A pure function.

What is packed without loss counts as the bits that it takes, 12: all bits as they are stored are read rather, where that is
hidden too, since nothing is packed for them.

Of the ways that fit, the one with the most bits whose reading is hidden (`outcome.HIDDEN`): whose step takes little
more than its compute. Where none is, the fastest of at least LEAST_FOR_SPEED bits; of several as fast, the one with the
most bits. Fewer bits than that are taken only where nothing wider fits: they cost the model too much for time alone.
Where times are not known, the most bits that fit.

Readings whose blocks have widths of their own lie between two of one width. They are tried once the rule has chosen
among the latter: those between its choice and the next wider one, of the file of either, by the same rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from ssdtune.schedule.job import Job, Reading
from ssdtune.schedule.machine import Machine
from ssdtune.schedule.outcome import Choices, Outcome, outcome
from ssdtune.schedule.plan import Lane
from ssdtune.sizes import format_size

LEAST_FOR_SPEED = 4
SAME_TIME = 1.02  # steps that differ by less count as equally fast


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A reading and what came of it. found: None where it does not fit."""

    reading: Reading
    found: Outcome | None

    @property
    def step_s(self) -> float | None:
        """None where it does not fit, or times are not known."""
        step = None if self.found is None else self.found.simulation
        return None if step is None else step.step_s

    @property
    def compute_s(self) -> float | None:
        """Of a step that waits for nothing."""
        step = None if self.found is None else self.found.simulation
        return None if step is None else step.compute_s

    @property
    def is_hidden(self) -> bool:
        """Whether its step waits for compute alone."""
        return self.found is not None and self.found.is_hidden


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The reading that was chosen, why, in words, and all that were tried for it."""

    reading: Reading
    why: str
    tried: tuple[Tried, ...]


def _known(seconds: float | None) -> float:
    assert seconds is not None
    return seconds


def choose_bits(job: Job, machine: Machine, choices: Choices) -> Chosen:
    """The reading for a job whose `readings` are its possible ones, the widest first."""
    alike = [reading for reading in job.readings if not reading.is_mixed]
    tried: list[Tried] = []
    for each in _tried(job, alike, machine, choices):
        tried.append(each)
        if each.is_hidden:
            break  # no narrower one is wanted
    best, why = _best(tried)
    between = _between(job.readings, best, tried)
    if best.found is not None and between:
        tried += _tried(job, between, machine, choices)
        tried.sort(key=lambda each: -each.reading.bits)
        best, why = _best(tried)
    return Chosen(reading=best.reading, why=why, tried=tuple(tried))


def _best(tried: Sequence[Tried]) -> tuple[Tried, str]:
    """The rule, and why in words. tried: the widest first."""
    hidden = next((each for each in tried if each.is_hidden), None)
    if hidden is not None:
        return hidden, _hidden_words(hidden)
    fitting = [each for each in tried if each.found is not None]
    if not fitting:
        return tried[0], "no number of bits makes it fit"
    if fitting[0].compute_s is None:
        return fitting[0], "the most that fit; times are not known (`ssdtune probe`)"
    wide = [each for each in fitting if each.reading.bits >= LEAST_FOR_SPEED]
    if not wide:
        return fitting[0], "the most that fit"
    least_s = min(_known(each.step_s) for each in wide)
    best = next(each for each in wide if _known(each.step_s) <= SAME_TIME * least_s)
    return best, _bound_words(best)


def _between(readings: Sequence[Reading], best: Tried, tried: Sequence[Tried]) -> list[Reading]:
    """Those that are wider than the best one and narrower than the next wider one that was tried, of the file of either."""
    least = best.reading
    wider = [each.reading for each in tried if each.reading.bits > least.bits]
    if not wider:
        return []
    most = min(wider, key=lambda reading: reading.bits)
    return [
        reading
        for reading in readings
        if reading.is_mixed
        and reading.folder in (least.folder, most.folder)
        and least.bits < reading.bits < most.bits
    ]


def _tried(
    job: Job, readings: Sequence[Reading], machine: Machine, choices: Choices
) -> Iterator[Tried]:
    for reading in readings:
        found = None
        if _has_room(reading, machine):
            own = dataclasses.replace(
                job, blocks=reading.blocks, packed_bytes=reading.missing_bytes
            )
            come = outcome(own, machine, choices)
            found = come if isinstance(come, Outcome) else None
        yield Tried(reading=reading, found=found)


def _has_room(reading: Reading, machine: Machine) -> bool:
    """Whether the drive has room for the file that would have to be packed."""
    free = machine.drive.free_bytes
    return free is None or reading.missing_bytes <= free


def _hidden_words(each: Tried) -> str:
    assert each.found is not None
    if not each.found.read_bytes:
        return "all weights stay in memory"
    return f"reading {_reading(each)} is hidden behind {each.compute_s:.3g} s of compute"


def _bound_words(each: Tried) -> str:
    return (
        f"the fastest of {LEAST_FOR_SPEED} and more: a step of {each.step_s:.3g} s, reading {_reading(each)} for "
        f"{each.compute_s:.3g} s of compute"
    )


def _reading(each: Tried) -> str:
    """Bytes and seconds of the drive's lane."""
    assert each.found is not None
    assert each.found.simulation is not None
    seconds = each.found.simulation.busy_s.get(Lane.NVME_READ, 0.0)
    return f"{format_size(each.found.read_bytes)} in {seconds:.3g} s"
