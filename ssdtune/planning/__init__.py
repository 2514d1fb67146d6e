"""`ssdtune plan`: will it fit, how fast, what limits it, what does it cost the drive. Nothing is read but headers and
rows; nothing is trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.jobs import Jobs, Source
from ssdtune.machines import machine_from, own_machine
from ssdtune.planning.bits import bits_lines, chosen_for, read_as
from ssdtune.planning.export import as_mapping, check_name, draw
from ssdtune.planning.prices import Offer, Prices, beside_each_other
from ssdtune.planning.text import Answer, lines_of
from ssdtune.planning.ways import alternatives, decide
from ssdtune.report import say
from ssdtune.schedule.methods import foreseen
from ssdtune.schedule.outcome import Outcome

if TYPE_CHECKING:
    from ssdtune.config import Loaded, TrainConfig
    from ssdtune.schedule.machine import Machine

EXIT_DOES_NOT_FIT = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked for besides the configuration.

    hardware: machines that one does not have, else this one. model: a folder or config.json instead of the
    configuration's. timeline: a PNG or JSON file for the lanes and the memory of a step. as_json: one object on standard
    output. compares: other methods too, also those that the engine does not run yet. prices: the user's.
    """

    hardware: Sequence[str] = ()
    model: str | None = None
    timeline: Path | None = None
    as_json: bool = False
    compares: bool = False
    prices: Prices = Prices()  # noqa: RUF009 - frozen


def print_plan(loaded: Loaded, wanted: Wanted) -> int:
    """Prints what the job comes to on each machine; returns 0, or EXIT_DOES_NOT_FIT where it fits none.

    Raises SSDTuneError as training would before it starts.
    """
    config = loaded.config
    if wanted.timeline is not None:
        check_name(wanted.timeline)
    machines = [machine_from(spec) for spec in wanted.hardware] or [_here(config)]
    answers = [_answer(machine, config, wanted) for machine in machines]
    if wanted.as_json:
        tables: list[dict[str, Any]] = [as_mapping(answer) for answer in answers]
        say(json.dumps(tables[0] if len(tables) == 1 else tables, indent=1))
    else:
        _tell(answers, loaded, wanted)
    if wanted.timeline is not None:
        draw(answers[-1], wanted.timeline, say=None if wanted.as_json else say)
    fits = any(isinstance(way.found, Outcome) for answer in answers for way in answer.ways)
    return 0 if fits else EXIT_DOES_NOT_FIT


def _here(config: TrainConfig) -> Machine:
    return own_machine(config.offload.path or config.output_dir)


def _answer(machine: Machine, config: TrainConfig, wanted: Wanted) -> Answer:
    jobs = Jobs(Source.of(config, wanted.model, on_device=machine.device is not None))
    as_configured = jobs()
    chosen = chosen_for(as_configured, machine, config) if as_configured.readings else None
    decided = decide(jobs if chosen is None else read_as(chosen.reading, jobs), machine, config)
    told = () if chosen is None else bits_lines(chosen, jobs.source.name)
    return Answer(
        job=decided.job,
        machine=machine,
        decisions=(*told, *decided.lines),
        chosen=chosen,
        ways=list(alternatives(decided.job, machine, decided.points)),
        others=foreseen(decided.job, machine, config.offload.max_writes) if wanted.compares else [],
        prices=wanted.prices,
    )


def _tell(answers: Sequence[Answer], loaded: Loaded, wanted: Wanted) -> None:
    for answer in answers:
        if answer is not answers[0]:
            say()
        for line in lines_of(answer, loaded):
            say(line)
    if len(answers) > 1:
        say()
        offers = [Offer.of(a.job, a.machine, a.ways) for a in answers]
        for line in beside_each_other(offers, wanted.prices):
            say(line)
