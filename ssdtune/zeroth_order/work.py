"""What a zeroth-order step computes besides forward passes, in operators that a profile has rates of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from ssdtune.kernels.noise import GAUSSIAN, PART
from ssdtune.schedule.cost import Moves, Operator, Work
from ssdtune.schedule.profile import PERTURB, PERTURB_SIGNS
from ssdtune.zeroth_order.estimators import Estimator
from ssdtune.zeroth_order.updates import Family

Shapes = Mapping[int, Sequence[tuple[int, ...]]]  # block -> of its tensors that train


def moves_of(
    shapes: Shapes, estimator: Estimator, *, trains_blocks: bool, num_missed: float = 1.0
) -> Moves:
    """Making all variants of each block's tensors, and each update that a streamed block has missed.

    trains_blocks: whether the tensors are streamed weights; adapters take their updates between steps. num_missed: as
    in `Moves`. Rounding bfloat16 at random, which updates do, is not counted.
    """
    shifts = sum(shift is not None for shift in estimator.variants)
    directions = len({shift.direction for shift in estimator.variants if shift is not None})

    def times(num: int) -> dict[int, Work]:
        return {
            block: Work(
                _counted([shape for shape in each if math.prod(shape)], estimator.family, num)
            )
            for block, each in shapes.items()
        }

    return Moves(
        shifts=times(shifts),
        updates=times(directions) if trains_blocks else {},
        num_missed=num_missed,
    )


def _counted(tensors: Sequence[tuple[int, ...]], family: Family, num: int) -> dict[Operator, int]:
    """Moving all of these along so many directions."""
    perturb = PERTURB if family.kind == GAUSSIAN else PERTURB_SIGNS
    counts: Counter[Operator] = Counter()
    for shape in tensors:
        numel = math.prod(shape)
        if not family.rank or len(shape) < 2:
            counts[Operator(perturb, float(numel))] += num
            continue
        counts[Operator(perturb, float(family.rank * (shape[0] + numel // shape[0])))] += num
        # A product of two vectors and a sum for each rank (`noise.add_low_rank`): one pass writes, one reads two and
        # writes one, in float32, a part at a time.
        part = min(numel, PART)
        counts[Operator("pointwise", 4.0 * 4 * part)] += num * family.rank * -(-numel // part)
    return dict(counts)
