"""`offload.max_writes`: what a run may write to the drive, told to whoever plans its steps, and checked before the first.

A packed model that the run makes first is there by now: `planning/settle.py` counts it, before the model is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ssdtune.memory import processes_here
from ssdtune.schedule.hunt import WritesError
from ssdtune.schedule.memory import INPUTS
from ssdtune.schedule.stores import mean_bytes
from ssdtune.schedule.writes import Writes, as_key
from ssdtune.trainer.errors import RunError

if TYPE_CHECKING:
    from ssdtune.schedule.memory import Peak
    from ssdtune.trainer.trainer import SSDTrainer


def num_steps_of(trainer: SSDTrainer, num_rows: int) -> int:
    """Of the run. num_rows: of the data, all processes' together."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * steps_per_epoch(trainer, num_rows))


def steps_per_epoch(trainer: SSDTrainer, num_rows: int) -> int:
    """The last one may have fewer rows."""
    args = trainer.args
    at_once = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return math.ceil(num_rows / at_once)


def writes_of(trainer: SSDTrainer, num_rows: int, most: int | None) -> Writes:
    """What the run writes, and may. most: bytes of all its processes on this machine; None: any number."""
    assert trainer.streamer is not None
    assert trainer.model is not None
    moves = trainer.moves(num_rows)
    return Writes(
        num_steps=num_steps_of(trainer, num_rows),
        trained_bytes=sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad),
        every=0 if moves is None else moves.fold_steps,
        copy_bytes=trainer.streamer.engine.plan.model_bytes,
        most=None if most is None else most // processes_here(),
    )


@contextmanager
def checked(writes: Writes) -> Iterator[None]:
    """For a `with` block in which plans are looked for: RunError where blocks of all plans would go back too often."""
    try:
        yield
    except WritesError as error:
        _check(writes, writes.parts({}, error.num_bytes))
        raise


def check_inputs(writes: Writes, peak: Peak) -> None:
    """Raises RunError where the inputs of blocks alone are too many writes. peak: with these where they wait."""
    _check(writes, writes.parts({INPUTS: peak.nvme.get(INPUTS, 0)}))


def check_writes(trainer: SSDTrainer, writes: Writes, peak: Peak) -> None:
    """Raises RunError for a run that would write more than it may. peak: of the plan that is carried out."""
    assert trainer.streamer is not None
    plan, kind = trainer.streamer.engine.plan, trainer.passes().kind
    _check(writes, writes.parts(peak.nvme, mean_bytes(plan.sequences[kind], plan, writes.every)))


def _check(writes: Writes, parts: Mapping[str, float]) -> None:
    """What writes, and the ways out."""
    if why := writes.excess(parts):
        raise RunError(
            f"{why}.\nSet offload.max_writes: {as_key(sum(parts.values()))}; `ssdtune plan` tells what else would do."
        )
