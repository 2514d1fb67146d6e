"""Whether `quantization: lossless` would make a step shorter: the same bits in fewer bytes, to be read, to cross the link
to a device, and to stay in RAM."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ssdtune.schedule.outcome import Outcome, outcome

if TYPE_CHECKING:
    from ssdtune.schedule.job import Job
    from ssdtune.schedule.machine import Machine

ASSUMED_RATIO = 1.35  # of trained weights; 1.33 to 1.42 were seen
PAYS = 0.95  # of the step at most, less is no reason to pack
LOSSLESS_DTYPE = "BF16"  # of files, whatever is computed in


@dataclasses.dataclass(frozen=True, slots=True)
class Saving:
    """Seconds of a step as it is and as it would be. ratio: of the bytes; is_measured: on this model's weights."""

    ratio: float
    is_measured: bool
    before_s: float
    after_s: float

    def line(self) -> str:
        """For people."""
        how = "measured on a sample" if self.is_measured else "assumed"
        return (
            f"quantization: lossless would pay: the same bits in 1/{self.ratio:.2f} of the bytes ({how}), "
            f"{self.before_s:.3g} s a step → {self.after_s:.3g} s"
        )


def saving(job: Job, machine: Machine, now: Outcome) -> Saving | None:
    """What packing without loss saves of the step `now`; None where it does not pay: files are not bfloat16 or packed
    already, compute is the bound, or decoding would be."""
    step = now.simulation
    is_plain = job.file_dtype == LOSSLESS_DTYPE and not any(block.is_packed for block in job.blocks)
    if not is_plain or step is None or step.compute_s > PAYS * step.step_s:
        return None
    ratio = job.lossless_ratio or ASSUMED_RATIO
    blocks = (
        dataclasses.replace(
            block,
            file_bytes=round(block.file_bytes / ratio),
            is_staged=True,
            is_packed=True,
            decoding=(("lossless", block.slot_bytes),),
        )
        for block in job.blocks
    )
    packed = dataclasses.replace(job, blocks=tuple(blocks))
    found = outcome(packed, machine, now.choices)
    if not isinstance(found, Outcome) or found.simulation is None:
        return None
    after_s = found.simulation.step_s
    if after_s > PAYS * step.step_s:
        return None
    return Saving(ratio, job.lossless_ratio is not None, step.step_s, after_s)
