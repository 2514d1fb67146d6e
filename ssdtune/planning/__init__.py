"""`ssdtune plan`: will it fit, how fast, what limits it, what does it cost the drive. Nothing is read but headers and
rows; nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.jobs import Source, job_of
from ssdtune.machines import machine_from, own_machine
from ssdtune.planning.export import as_mapping, draw
from ssdtune.planning.text import lines_of
from ssdtune.planning.ways import Way, ways_of
from ssdtune.report import say
from ssdtune.schedule.methods import foreseen
from ssdtune.schedule.outcome import Outcome

if TYPE_CHECKING:
    from ssdtune.config import Loaded

EXIT_DOES_NOT_FIT = 1


def print_plan(
    loaded: Loaded,
    *,
    hardware: Sequence[str] = (),
    model: str | None = None,
    timeline: Path | None = None,
    as_json: bool = False,
    compares: bool = False,
) -> int:
    """Prints what the job comes to on each machine; returns 0, or EXIT_DOES_NOT_FIT where it fits none.

    hardware: machines that one does not have, else this one. model: a folder or config.json instead of the
    configuration's. timeline: a PNG or JSON file for the lanes of a step. as_json: one object on standard output.
    compares: other methods too, also those that the engine does not run yet.
    Raises SSDTuneError as training would before it starts.
    """
    config = loaded.config
    here = config.offload.path or config.output_dir
    machines = [machine_from(spec) for spec in hardware] or [own_machine(here)]
    tables: list[dict[str, Any]] = []
    ways: list[Way] = []
    fits = False
    for machine in machines:
        source = Source.of(config, model, on_device=machine.device is not None)
        job = job_of(source)
        ways = list(ways_of(job, machine, config))
        others = foreseen(job, machine) if compares else []
        fits = fits or any(isinstance(way.found, Outcome) for way in ways)
        if as_json:
            tables.append(as_mapping(job, machine, ways, others))
            continue
        if machine is not machines[0]:
            say()
        for line in lines_of(job, machine, ways, others, loaded):
            say(line)
    if timeline is not None:
        draw(ways, timeline, say=None if as_json else say)
    if as_json:
        say(json.dumps(tables[0] if len(tables) == 1 else tables, indent=1))
    return 0 if fits else EXIT_DOES_NOT_FIT
