"""How many blocks of full fine-tuning are updated in the next forward: as many as make the step the shortest.

Backward reads and writes the optimizer's states besides the weights, forward reads weights alone. What is delayed into
the next forward (GreedySnake, arXiv 2512.17570) is taken from the longer pass and added to the shorter one, until that is
the longer; and each block's gradient waits in RAM for it. So the best number lies between none and all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from ssdtune.schedule.decisions import Full, Shape
from ssdtune.schedule.grid import best_of
from ssdtune.schedule.hunt import AT_LIMIT
from ssdtune.schedule.outlook import Outlook, Rates, foresee_full
from ssdtune.schedule.plan import Lane

COARSE, FINE = 8, 32  # parts of all blocks in which the search goes at first, and at last


def best_delayed(
    shape: Shape, decision: Full, rates: Rates, fits: Callable[[Outlook], bool]
) -> tuple[Full, Outlook]:
    """The decision with the share of delayed blocks that makes the step the shortest, and what comes of it; of steps as
    short, the one that holds the least. Nothing is delayed where one
    lane, or the drive, is busy all the time anyway, or nothing fits.

    fits: whether there is memory for it.
    """
    tried: dict[int, Outlook] = {}

    def with_delayed(num: int) -> Full:
        return dataclasses.replace(decision, delayed_share=num / shape.num_blocks)

    def step_s(num: int) -> float:
        if not 0 <= num <= shape.num_blocks:
            return math.inf
        if num not in tried:
            tried[num] = foresee_full(shape, with_delayed(num), rates)
        return tried[num].step_s if fits(tried[num]) else math.inf

    best, num_blocks = 0, shape.num_blocks
    if step_s(0) < math.inf:
        enough_s = (1 + AT_LIMIT) * _least_s(tried[0], rates)
        stride = max(1, num_blocks // COARSE)
        while step_s(best) > enough_s and step_s(best + stride) < step_s(best):
            best += stride
        while step_s(best) > enough_s and stride > max(1, num_blocks // FINE):
            stride = -(-stride // 2)
            best = min((best, best - stride, best + stride), key=step_s)
    fitting = [num for num in tried if step_s(num) < math.inf] or [0]
    chosen = best_of(fitting, step_s, lambda num: (tried[num].memory.ram,))
    assert chosen is not None
    return with_delayed(chosen), tried[chosen]


def _least_s(outlook: Outlook, rates: Rates) -> float:
    """What a step takes however its updates are spread over the passes: its longest lane, or the drive that two share."""
    busy = outlook.simulation.busy_s
    drive_s = sum(busy.get(lane, 0.0) for lane in (Lane.NVME_READ, Lane.NVME_WRITE))
    shared_s = drive_s / rates.drive_overlap if rates.is_drive_shared else 0.0
    return max(outlook.simulation.one_pass_s, shared_s)
