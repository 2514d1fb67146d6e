"""What a zeroth-order step computes besides forward passes, in operators that a profile has rates of."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ssdtune.kernels.kinds import NARROW, kind_of
from ssdtune.kernels.noise import GAUSSIAN, PART
from ssdtune.schedule.cost import Moves, Operator, Work
from ssdtune.schedule.profile import DECODE, DEVICE_DECODE, PERTURB, PERTURB_SIGNS
from ssdtune.swap.recipe import BlockRecipe, PackedView, Unpacking
from ssdtune.zeroth_order.estimators import Estimator
from ssdtune.zeroth_order.packed import KEPT
from ssdtune.zeroth_order.rules import FOLLOW, SIGN, Rule
from ssdtune.zeroth_order.updates import Family, as_matrix


class Passes(NamedTuple):
    """Over a part's values in float32, in torch (`rules.py`): for each estimate that a step hangs on, and for a step."""

    of_estimate: int
    of_step: int


SIGN_PASSES = Passes(of_estimate=1, of_step=3)
ADAM_PASSES = Passes(of_estimate=6, of_step=5)
PASS_BYTES = 8.0  # a number read and one written
Shapes = Mapping[int, Sequence[tuple[int, ...]]]  # block -> of its tensors that train
Counts = Mapping[Operator, int]


def moves_of(
    shapes: Shapes,
    estimator: Estimator,
    *,
    trains_blocks: bool,
    num_missed: float = 1.0,
    low_rank: bool = False,
    rule: Rule = FOLLOW,
) -> Moves:
    """Making all variants of each block's tensors, and each update that a streamed block has missed.

    trains_blocks: whether the tensors are streamed weights; adapters take their updates between steps. num_missed: as
    in `Moves`. low_rank: whether windows are held as matrices of low rank. rule: of updates. Rounding 16 bits at
    random, which updates do, is not counted, nor is drawing again what the steps of an earlier window came to.
    """
    family = estimator.family
    shifts = sum(shift is not None for shift in estimator.variants)
    directions = len({shift.direction for shift in estimator.variants if shift is not None})
    tensors = {block: [s for s in each if math.prod(s)] for block, each in shapes.items()}
    if not low_rank:
        return Moves(
            shifts={b: Work(_moved(each, family, shifts)) for b, each in tensors.items()},
            updates={
                b: Work(_updated(each, family, directions, rule)) for b, each in tensors.items()
            }
            if trains_blocks
            else {},
            num_missed=num_missed,
        )
    # A step draws what it adds to the window's sum; a window that is over is one product.
    return Moves(
        shifts={
            b: Work(_both(_moved(each, family, shifts), _drawn(each, family, directions)))
            for b, each in tensors.items()
        },
        updates={
            b: Work(_moved([s for s in each if len(s) > 1], family, 1))
            for b, each in tensors.items()
        },
        num_missed=num_missed,
        window=family.window,
    )


def with_decoding(
    moves: Moves,
    recipes: Sequence[BlockRecipe],
    estimator: Estimator,
    *,
    way: str,
    trains_blocks: bool,
    on_device: bool,
) -> Moves:
    """The same where blocks stay packed in their slots, as these recipes say: what compute reads of them is decoded for
    each variant, or once a visit for all, where it is not the blocks that train.

    way: of `packed.WAYS`. Those that are KEPT take all steps so far anew each time; codes that are MOVED take each step
    once, which counts like one of what they are decoded to.
    """
    num = len(estimator.variants) if trains_blocks else 1
    kind = DEVICE_DECODE if on_device else DECODE
    shifts, updates = dict(moves.shifts), dict(moves.updates)
    packed = {b: r.unpacking for b, r in enumerate(recipes) if r.unpacking is not None}
    for block, unpacking in packed.items():
        counts = {op: num * n for op, n in Counter(_decoded(unpacking, kind)).items()}
        known = shifts[block].operators if block in shifts else {}
        shifts[block] = Work(_both(known, counts))
        if way == KEPT and block in updates:
            anew = {op: num * times for op, times in updates[block].operators.items()}
            updates[block] = Work(anew)
    return dataclasses.replace(
        moves,
        shifts=shifts,
        updates=updates,
        anew=frozenset(packed) if way == KEPT else frozenset(),
    )


def _decoded(unpacking: Unpacking, kind: str) -> Iterator[Operator]:
    """Yields the decoding of each tensor that is made of packed ones. kind: on the CPU or by a device."""
    for index, tensor in enumerate(unpacking.tensors):
        sources = (copy.source for copy in unpacking.of(index))
        packed = [source for source in sources if isinstance(source, PackedView)]
        if packed:
            weights = kind_of(packed[0].format)
            name = kind if weights == NARROW else f"{kind}:{weights}"
            yield Operator(name, float(tensor.num_bytes))


def _updated(
    tensors: Sequence[tuple[int, ...]], family: Family, num: int, rule: Rule
) -> dict[Operator, int]:
    """One step with so many directions, as the rule has it, once the steps that it hangs on have been taken."""
    num_estimates = rule.num_earlier + 1
    if rule.is_linear:
        return _moved(tensors, family, num * num_estimates)
    counts: Counter[Operator] = Counter()
    passes = SIGN_PASSES if rule.kind == SIGN else ADAM_PASSES
    for numel in map(math.prod, tensors):
        counts[_perturb(family, numel)] += num * num_estimates
        part = min(numel, PART)
        num_passes = num_estimates * passes.of_estimate + passes.of_step
        counts[Operator("pointwise", PASS_BYTES * part)] += num_passes * -(-numel // part)
    return dict(counts)


def _moved(tensors: Sequence[tuple[int, ...]], family: Family, num: int) -> dict[Operator, int]:
    """Moving all of these along so many directions."""
    counts: Counter[Operator] = Counter()
    for shape in tensors:
        numel = math.prod(shape)
        if not family.rank or len(shape) < 2:
            counts[_perturb(family, numel)] += num
            continue
        counts[_perturb(family, family.rank * sum(as_matrix(shape)))] += num
        # Products and sums of all ranks in one pass (`noise.add_low_rank`, native).
        counts[Operator("pointwise", PASS_BYTES * numel)] += num
    return dict(counts)


def _drawn(tensors: Sequence[tuple[int, ...]], family: Family, num: int) -> dict[Operator, int]:
    """Adding so many directions to the sums of a window."""
    counts: Counter[Operator] = Counter()
    for shape in tensors:
        numel = family.rank * as_matrix(shape)[0] if len(shape) > 1 else math.prod(shape)
        counts[_perturb(family, numel)] += num
    return dict(counts)


def _both(one: Counts, other: Counts) -> dict[Operator, int]:
    return dict(Counter(one) + Counter(other))


def _perturb(family: Family, numel: int) -> Operator:
    return Operator(PERTURB if family.kind == GAUSSIAN else PERTURB_SIGNS, float(numel))
