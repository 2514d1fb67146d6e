"""A step's block inputs on their way off the device and back, as ops beside those of the weights.

What the engine's plan leaves out, since the bytes depend on the batch and no slot waits for them; the simulator needs
it, because inputs and weights share the drive and a device's link:

    to RAM beside a device    DOWNLOAD_INPUT after forward's visit, UPLOAD_INPUT before backward's
    to NVMe                   STORE and FETCH; on a device a download before the one, an upload after the other
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ssdtune.schedule.plan import Direction, Kind, Lane, Op, StepPlan, Tier, Visit

AHEAD = 1  # visits by which inputs are fetched before they are needed

Move = tuple[Kind, Lane]


def with_stored_inputs(
    steps: StepPlan, num_bytes: int, *, tier: Tier = Tier.NVME, on_device: bool = False
) -> StepPlan:
    """The step with the inputs of each visit that comes back moved to `tier` and back before they are needed.

    num_bytes: of all of them together, shared evenly. Without any, or where they stay in the memory that compute has,
    the step as it is.
    """
    pairs = pairs_of(steps.visits)
    out, back = _ways(tier, on_device=on_device)
    if not num_bytes or not pairs or not out:
        return steps
    return _Inserted(steps, pairs, num_bytes // len(pairs), (out, back)).steps()


def _ways(tier: Tier, *, on_device: bool) -> tuple[list[Move], list[Move]]:
    """What happens to an input after its forward visit, and before its backward visit, in order."""
    out: list[Move] = []
    back: list[Move] = []
    if on_device and tier is not Tier.DEVICE:
        out, back = [(Kind.DOWNLOAD_INPUT, Lane.D2H)], [(Kind.UPLOAD_INPUT, Lane.H2D)]
    if tier is Tier.NVME:
        out, back = [*out, (Kind.STORE, Lane.NVME_WRITE)], [(Kind.FETCH, Lane.NVME_READ), *back]
    return out, back


def pairs_of(visits: Sequence[Visit]) -> dict[int, int]:
    """Backward visits, each with the forward visit whose inputs it needs."""
    waiting: dict[int, list[int]] = {}
    pairs: dict[int, int] = {}
    for v, visit in enumerate(visits):
        if visit.direction is Direction.FORWARD:
            waiting.setdefault(visit.block, []).append(v)
        elif waiting.get(visit.block):
            pairs[v] = waiting[visit.block].pop()
    return pairs


class _Inserted:
    """The ops as they are numbered anew. ways: of an input, out and back."""

    def __init__(
        self,
        steps: StepPlan,
        pairs: dict[int, int],
        num_bytes: int,
        ways: tuple[Sequence[Move], Sequence[Move]],
    ) -> None:
        self._steps, self._pairs, self._num_bytes = steps, pairs, num_bytes
        self._out, self._back = ways
        self._names = {op.visit: op.block for op in steps.ops}
        self._ops: list[Op] = []
        self._previous: dict[int, tuple[int, ...]] = {}  # new id -> old ids in the step before
        self._new: dict[int, int] = {}  # an op's id -> its new one
        self._computed: dict[int, int] = {}  # visit -> new id of its COMPUTE
        self._stored: dict[
            int, int
        ] = {}  # forward visit -> id of the last op that moves its input out

    def steps(self) -> StepPlan:
        """The step with all of them."""
        stored = set(self._pairs.values())
        for op in self._steps.ops:
            extra = ()
            if op.kind is Kind.COMPUTE and op.visit in self._pairs:
                # After the weights of this visit, before those of the next: with three slots they wait for the same.
                extra = (self._brought(op.visit),)
            after = (*[self._new[i] for i in op.after], *extra)
            self._new[op.id] = self._add(op, after, op.after_previous)
            if op.kind is Kind.COMPUTE:
                self._computed[op.visit] = self._new[op.id]
                if op.visit in stored:
                    self._stored[op.visit] = self._moved(op.visit, self._out, [self._new[op.id]])
        for i, previous in self._previous.items():
            after = tuple(self._new[a] for a in previous)
            self._ops[i] = dataclasses.replace(self._ops[i], after_previous=after)
        return StepPlan(visits=self._steps.visits, ops=tuple(self._ops))

    def _brought(self, v: int) -> int:
        """Inputs of backward visit `v`, not before the visit AHEAD + 1 before it is over."""
        after = [self._stored[self._pairs[v]]]
        before = self._computed.get(v - AHEAD - 1)
        if before is not None:
            after.append(before)
        return self._moved(v, self._back, after)

    def _moved(self, v: int, way: Sequence[Move], after: Sequence[int]) -> int:
        """One op after the other; the id of the last."""
        for kind, lane in way:
            op = Op(
                id=-1,
                kind=kind,
                lane=lane,
                visit=v,
                block=self._names[v],
                direction=self._steps.visits[v].direction,
                num_bytes=self._num_bytes,
            )
            after = [self._add(op, tuple(after), ())]
        return after[-1]

    def _add(self, op: Op, after: tuple[int, ...], previous: tuple[int, ...]) -> int:
        op_id = len(self._ops)
        if previous:
            self._previous[op_id] = previous
        self._ops.append(dataclasses.replace(op, id=op_id, after=after))
        return op_id
