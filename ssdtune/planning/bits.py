"""`quantization: auto`, settled: before a run begins, and for each machine that is planned for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ssdtune.errors import SSDTuneError
from ssdtune.jobs import AUTO, Source, job_of
from ssdtune.machines import own_machine
from ssdtune.pack.record import checks_of
from ssdtune.planning.ways import configured
from ssdtune.report import say
from ssdtune.run_files import CONFIG_NAME
from ssdtune.schedule.bits import Chosen, choose_bits

if TYPE_CHECKING:
    from ssdtune.config import Loaded, TrainConfig
    from ssdtune.schedule.job import Job, Reading
    from ssdtune.schedule.machine import Machine


def with_bits(loaded: Loaded) -> Loaded:
    """The configuration with `quantization: auto` replaced by what is chosen for this machine, said in a line or two.

    A run that goes on keeps what it was begun with. Raises SSDTuneError for several processes, whose machines may differ.
    """
    config = loaded.config
    if config.quantization != AUTO:
        return loaded
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SSDTuneError(
            "quantization: auto is chosen by one process, and there are several.\n"
            "Give the bits that `ssdtune plan` prints, for instance quantization: 4."
        )
    begun = _begun_with(config)
    if begun is not None:
        say(f"decided   quantization: auto is {begun}, as when the run began")
        return _with(loaded, begun)
    machine = own_machine(config.offload.path or config.output_dir)
    job = job_of(Source.of(config, None, on_device=machine.device is not None))
    chosen = chosen_for(job, machine, config)
    for line in bits_lines(chosen, str(config.model_name_or_path)):
        say(f"decided   {line}")
    return _with(loaded, chosen.reading.quantization)


def _with(loaded: Loaded, quantization: str) -> Loaded:
    config = dataclasses.replace(loaded.config, quantization=quantization)
    return dataclasses.replace(loaded, config=config)


def _begun_with(config: TrainConfig) -> str | None:
    """What the run that goes on in output_dir has for `quantization`; None where none does."""
    from ssdtune.config import load_config
    from ssdtune.trainer.checkpoint import newest

    record = config.output_dir / CONFIG_NAME
    wanted = config.resume_from_checkpoint
    goes_on = newest(config.output_dir) is not None if wanted == "auto" else bool(wanted)
    if not goes_on or not record.is_file():
        return None
    before = load_config(record).config
    is_same = before.model_name_or_path == config.model_name_or_path
    return before.quantization if is_same and before.quantization != AUTO else None


def chosen_for(job: Job, machine: Machine, config: TrainConfig) -> Chosen:
    """The choice for a job with readings."""
    readings = tuple(
        dataclasses.replace(r, is_there=not r.packed_bytes or _is_packed(r)) for r in job.readings
    )
    job = dataclasses.replace(job, readings=readings)
    return choose_bits(job, machine, configured(job, machine, config))


def read_as(reading: Reading, jobs: Callable[..., Job]) -> Callable[..., Job]:
    """The same jobs, their weights read in this way. jobs: as `Jobs`."""
    return lambda *cut: dataclasses.replace(jobs(*cut), blocks=reading.blocks)


def _is_packed(reading: Reading) -> bool:
    return (Path(reading.folder) / "config.json").is_file()


def bits_lines(chosen: Chosen, model: str) -> Iterator[str]:
    """Yields what was chosen and why, and what is known of its cost. model: the configuration's."""
    reading = chosen.reading
    yield f"quantization: auto is {reading.quantization} ({reading.bits} bits): {chosen.why}"
    if not reading.folder:
        return
    check = checks_of(Path(reading.folder)).get(str(reading.bits))
    if check is None:
        yield f"what that costs is not measured: {_how_to_measure(reading, model)}"
        return
    more, error = check["packed_loss"] - check["source_loss"], check["standard_error"]
    uncertain = "" if error is None else f" ± {error:.4f}"
    yield (
        f"that costs {more / check['source_loss']:+.1%} loss ({more:+.4f}{uncertain} on {check['tokens']:,} tokens, "
        "by `ssdtune pack --check`)"
    )


def _how_to_measure(reading: Reading, model: str) -> str:
    if not reading.is_there:
        return "`ssdtune pack --check` tells, once it is packed"
    source = model if reading.packed_bytes else "SOURCE"
    return f"ssdtune pack {source} --out {reading.folder} --check --check_bits {reading.bits}"
