"""Blocks that go back to a working copy of the weights, as ops beside those of the plan.

In zeroth-order training of all weights every block that a step reads is written back once in so many steps, a like share
of them in each (`zeroth_order/weights.py`). What the engine's plan leaves out, since it is the method that knows when a
block is due; the simulator needs it, because writes share the drive with the weights that are read, and a slot is not
filled again before its block is stored (`swap/stores.py`):

    from a slot in RAM                     STORE_WEIGHTS while the visit computes
    from a device's slot                   DOWNLOAD, which compute waits for, then STORE_WEIGHTS; one block at a time
    of a block that RAM keeps beside one   DOWNLOAD alone
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ssdtune.schedule.plan import Kind, Lane, Op, Plan, StepPlan, Tier


def with_stored_weights(steps: StepPlan, plan: Plan, every: int) -> StepPlan:
    """The step with the blocks that go back in it; without any, the step as it is.

    every: steps from one time that a block goes back to the next; 0: none does. Each step writes other blocks, whole
    ones. This one writes as many bytes as a step does on average: evenly over the visits a whole block whenever the
    bytes are due, at the last visit what is left.
    """
    due = _due_bytes(steps, plan, every)
    return _Inserted(steps, plan, due).steps() if due else steps


def mean_bytes(steps: StepPlan, plan: Plan, every: int) -> float:
    """Bytes of the drive that go back in a step, on average."""
    blocks = {steps.visits[v].block for v in _returning(steps)}
    num_bytes = sum(plan.blocks[b].slot_bytes for b in blocks if plan.tiers[b] is Tier.NVME)
    return num_bytes / every if every else 0.0


def _returning(steps: StepPlan) -> list[int]:
    """The first visit of each block that it is filled for."""
    first: dict[int, int] = {}
    for v, visit in enumerate(steps.visits):
        if visit.is_filled_for:
            first.setdefault(visit.block, v)
    return [*first.values()]


def _due_bytes(steps: StepPlan, plan: Plan, every: int) -> dict[int, int]:
    """Visit -> bytes that go back in it. Blocks of NVMe and those that RAM keeps, each for themselves."""
    due: dict[int, int] = {}
    returning = _returning(steps) if every else []
    for tier in Tier:
        own = [v for v in returning if plan.tiers[steps.visits[v].block] is tier]
        left = 0.0
        for v in own:
            num_bytes = plan.blocks[steps.visits[v].block].slot_bytes
            left += num_bytes / every
            if left >= num_bytes - 0.5 or v == own[-1]:
                due[v] = math.ceil(left - 1e-6) if v == own[-1] else num_bytes
                left -= due[v]
    return {v: num_bytes for v, num_bytes in due.items() if num_bytes}


class _Inserted:
    """The ops as they are numbered anew. due: visit -> bytes that go back in it."""

    def __init__(self, steps: StepPlan, plan: Plan, due: Mapping[int, int]) -> None:
        self._steps, self._plan, self._due = steps, plan, due
        self._ops: list[Op] = []
        self._new: list[int] = []  # an op's id -> its new one
        self._fills: dict[int, int] = {}  # slot -> its first fill's first op
        self._stores: dict[int, int] = {}  # slot -> the last op that stores what it holds
        self._staging: list[int] = []  # on a device: what enters and leaves the memory for staging

    def steps(self) -> StepPlan:
        """The step with all of them."""
        filling = computed = -1  # the visit whose fill was seen last; the last COMPUTE
        for op in self._steps.ops:
            after = [self._new[i] for i in op.after]
            slot = self._steps.visits[op.visit].slot
            if op.kind is Kind.COMPUTE and op.visit in self._due:
                after += self._store(op, after if computed < 0 else [*after, computed])
            elif op.kind is not Kind.COMPUTE and op.visit != filling:
                filling = op.visit
                if slot in self._stores:
                    after.append(self._stores.pop(slot))
                self._fills.setdefault(slot, len(self._ops))
            number = len(self._ops)
            self._new.append(number)
            self._ops.append(op.renumbered(number, tuple(after)))
            if op.kind is Kind.COMPUTE:
                computed = number
        return StepPlan(visits=self._steps.visits, ops=self._linked())

    def _store(self, computing: Op, after: list[int]) -> list[int]:
        """Of the block that is computed with, once it is there and the visit before is over; ids of what this one's
        compute waits for."""
        visit, waits = self._steps.visits[computing.visit], list[int]()
        goes_on = self._plan.tiers[visit.block] is Tier.NVME
        if self._plan.on_device:
            if goes_on and self._staging:
                after = [*after, self._staging[-1]]
            waits = after = [self._add(computing, Kind.DOWNLOAD, Lane.D2H, after)]
        if goes_on:
            after = [self._add(computing, Kind.STORE_WEIGHTS, Lane.NVME_WRITE, after)]
            self._staging += [*waits, *after]
        self._stores[visit.slot] = after[-1]
        return waits

    def _add(self, computing: Op, kind: Kind, lane: Lane, after: list[int]) -> int:
        number = len(self._ops)
        op = computing._replace(
            id=number,
            kind=kind,
            lane=lane,
            num_bytes=self._due[computing.visit],
            after=tuple(after),
            after_previous=(),
        )
        self._ops.append(op)
        return number

    def _linked(self) -> tuple[Op, ...]:
        """The ops, those that wait for the step before by its new numbers: also a slot's first fill for what was stored
        from there last, and what is staged first for what was last."""
        waits = {self._fills[s]: store for s, store in self._stores.items() if s in self._fills}
        if self._plan.on_device and self._staging:
            waits[self._staging[0]] = self._staging[-1]
        for op in self._ops:
            if op.after_previous or op.id in waits:
                previous = [self._new[i] for i in op.after_previous]
                previous += [waits[op.id]] if op.id in waits else []
                self._ops[op.id] = op._replace(after_previous=tuple(previous))
        return tuple(self._ops)
