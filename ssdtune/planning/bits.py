"""`quantization: auto`: the choice for a job on a machine, and what is said of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ssdtune.fidelity.record import checks_of
from ssdtune.planning.ways import configured
from ssdtune.schedule.bits import Chosen, choose_bits
from ssdtune.schedule.job import ALL_BITS, WEIGHTS

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig
    from ssdtune.schedule.job import Job, Reading
    from ssdtune.schedule.machine import Machine


def chosen_for(job: Job, machine: Machine, config: TrainConfig) -> Chosen:
    """The choice for a job with readings."""
    readings = tuple(
        dataclasses.replace(r, is_there=not r.packed_bytes or _is_packed(r)) for r in job.readings
    )
    job = dataclasses.replace(job, readings=readings)
    return choose_bits(job, machine, configured(job, machine, config))


def read_as(reading: Reading, jobs: Callable[..., Job]) -> Callable[..., Job]:
    """The same jobs, their weights read in this way. jobs: as `Jobs`."""

    def read(*cut: int) -> Job:
        job = jobs(*cut)
        return dataclasses.replace(
            job,
            blocks=reading.blocks,
            packed_bytes=reading.missing_bytes,
            source_bytes=sum(block.file_bytes for block in job.blocks),
        )

    return read


def _is_packed(reading: Reading) -> bool:
    return (Path(reading.folder) / "config.json").is_file()


def bits_lines(chosen: Chosen, model: str) -> Iterator[str]:
    """Yields what was chosen and why, and what is known of its cost. model: the configuration's."""
    reading = chosen.reading
    average = " on average" if reading.is_mixed else ""
    yield f"quantization: auto is {reading.quantization} ({reading.bits:g} bits{average}): {chosen.why}"
    if not reading.folder:
        return
    if reading.is_exact:
        yield "that costs nothing: the weights keep all their bits"
        return
    if reading.error:
        reference = WEIGHTS if reading.packed_bytes else ALL_BITS
        yield error_words(reading.error, _alike(chosen) if reading.is_mixed else {}, reference)
    check = checks_of(Path(reading.folder)).get(_name_of_check(reading))
    if check is None:
        yield f"what that costs is not measured: {_how_to_measure(reading, model)}"
        return
    more, error = check["packed_loss"] - check["source_loss"], check["standard_error"]
    uncertain = "" if error is None else f" ± {error:.4f}"
    yield (
        f"that costs {more / check['source_loss']:+.1%} loss ({more:+.4f}{uncertain} on {check['tokens']:,} tokens, "
        "by `ssdtune pack --check`)"
    )


def error_words(error: float, alike: Mapping[float, float], reference: str) -> str:
    """What a reading loses, beside all blocks at one width. alike: the latter's errors by bits; nothing is said of those
    that lose more than four times as much, or less than a quarter. reference: what errors are to."""
    beside = [
        f"{other:.2e} at {bits:g} bits everywhere"
        for bits, other in sorted(alike.items())
        if error / 4 <= other <= 4 * error
    ]
    told = f" ({', '.join(beside)})" if beside else ""
    return f"relative squared error to {reference}, by a sample: {error:.2e}{told}"


def _alike(chosen: Chosen) -> dict[float, float]:
    tried = (each.reading for each in chosen.tried)
    return {r.bits: r.error for r in tried if r.error is not None and not r.is_mixed}


def _name_of_check(reading: Reading) -> str:
    """What the folder's record of checks calls the reading."""
    if reading.label:
        return reading.label
    return reading.quantization if reading.is_mixed else f"{reading.bits:g}"


def _how_to_measure(reading: Reading, model: str) -> str:
    if not reading.is_there:
        return "`ssdtune pack --check` tells, once it is packed"
    source = model if reading.packed_bytes else "SOURCE"
    bits = "" if reading.label else f" --check_bits {_name_of_check(reading)}"
    return f"ssdtune pack {source} --out {reading.folder} --check{bits}"
