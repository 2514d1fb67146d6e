"""A step's block inputs on their way to NVMe and back, as ops beside those of the weights.

What the engine's plan leaves out, since the bytes depend on the batch and no slot waits for them; the simulator needs
it, because inputs and weights share the drive.
"""

from __future__ import annotations

import dataclasses

from ssdtune.schedule.plan import Direction, Kind, Lane, Op, StepPlan

AHEAD = 1  # visits by which inputs are fetched before they are needed


def with_stored_inputs(steps: StepPlan, num_bytes: int) -> StepPlan:
    """The step with a STORE after each forward visit whose block comes back, and a FETCH before it does.

    num_bytes: of all of them together, shared evenly. Without any, the step as it is.
    """
    pairs = _pairs(steps)
    if not num_bytes or not pairs:
        return steps
    return _Inserted(steps, pairs, num_bytes // len(pairs)).steps()


def _pairs(steps: StepPlan) -> dict[int, int]:
    """Backward visits, each with the forward visit whose inputs it needs."""
    waiting: dict[int, list[int]] = {}
    pairs: dict[int, int] = {}
    for v, visit in enumerate(steps.visits):
        if visit.direction is Direction.FORWARD:
            waiting.setdefault(visit.block, []).append(v)
        elif waiting.get(visit.block):
            pairs[v] = waiting[visit.block].pop()
    return pairs


class _Inserted:
    """The ops as they are numbered anew."""

    def __init__(self, steps: StepPlan, pairs: dict[int, int], num_bytes: int) -> None:
        self._steps, self._pairs, self._num_bytes = steps, pairs, num_bytes
        self._names = {op.visit: op.block for op in steps.ops}
        self._ops: list[Op] = []
        self._previous: dict[int, tuple[int, ...]] = {}  # new id -> old ids in the step before
        self._new: dict[int, int] = {}  # an op's id -> its new one
        self._computed: dict[int, int] = {}  # visit -> new id of its COMPUTE
        self._stored: dict[int, int] = {}  # forward visit -> id of its STORE

    def steps(self) -> StepPlan:
        """The step with all of them."""
        stored = set(self._pairs.values())
        for op in self._steps.ops:
            extra = ()
            if op.kind is Kind.COMPUTE and op.visit in self._pairs:
                # After the weights of this visit, before those of the next: with three slots they wait for the same.
                extra = (self._fetch(op.visit),)
            after = (*[self._new[i] for i in op.after], *extra)
            self._new[op.id] = self._add(op, after, op.after_previous)
            if op.kind is Kind.COMPUTE:
                self._computed[op.visit] = self._new[op.id]
                if op.visit in stored:
                    self._stored[op.visit] = self._move(
                        Kind.STORE, Lane.NVME_WRITE, op.visit, (self._new[op.id],)
                    )
        for i, previous in self._previous.items():
            after = tuple(self._new[a] for a in previous)
            self._ops[i] = dataclasses.replace(self._ops[i], after_previous=after)
        return StepPlan(visits=self._steps.visits, ops=tuple(self._ops))

    def _fetch(self, v: int) -> int:
        """Inputs of backward visit `v`, not before the visit AHEAD + 1 before it is over."""
        after = [self._stored[self._pairs[v]]]
        before = self._computed.get(v - AHEAD - 1)
        if before is not None:
            after.append(before)
        return self._move(Kind.FETCH, Lane.NVME_READ, v, tuple(after))

    def _move(self, kind: Kind, lane: Lane, v: int, after: tuple[int, ...]) -> int:
        visit = self._steps.visits[v]
        moved = Op(
            id=-1,
            kind=kind,
            lane=lane,
            visit=v,
            block=self._names[v],
            direction=visit.direction,
            num_bytes=self._num_bytes,
        )
        return self._add(moved, after, ())

    def _add(self, op: Op, after: tuple[int, ...], previous: tuple[int, ...]) -> int:
        op_id = len(self._ops)
        if previous:
            self._previous[op_id] = previous
        self._ops.append(dataclasses.replace(op, id=op_id, after=after))
        return op_id
