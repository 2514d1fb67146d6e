"""Which slot is whose: what it holds, what is on its way, what comes next. Decisions alone: no thread, no bytes, and no
lock but the engine's, with which everything here is called."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ssdtune.schedule.plan import Direction, Plan, StepPlan
from ssdtune.schedule.trace import UNPLANNED
from ssdtune.schedule.walk import Walk
from ssdtune.swap.fills import Fill


class Arrival(NamedTuple):
    """The fill that holds a visit's block, or will. op_id: of the visit in the plan. is_own: the fill was begun for it,
    not ahead of it."""

    fill: Fill
    op_id: int
    is_own: bool


class Claims:
    """Slots and the fills that they are promised to.

    held: slot -> the fill that brought, or brings, what it holds. storing: block -> the slot from which it is being
    stored. walk: where compute and the fills ahead of it stand.

    Args:
        plan: whose order is followed.
        names: of its blocks.
    """

    def __init__(self, plan: Plan, names: Sequence[str]) -> None:
        self._names = names
        self.held: dict[int, Fill] = {}
        self.storing: dict[int, int] = {}
        self._demands: deque[Fill] = deque()  # of visits that wait, to be started before all others
        self.follow(plan)

    def follow(self, plan: Plan) -> None:
        """From now on another order of visits to the same slots."""
        self._homes = _homes(plan)
        self.walk = Walk(next(iter(plan.sequences.values())))

    def begin_step(self, steps: StepPlan) -> None:
        """Such a step begins. What failed is forgotten, so that it is read anew."""
        if self.walk.steps is steps:
            self.walk.begin_next()
        else:
            self.walk = Walk(steps)
        failed = [slot for slot, fill in self.held.items() if fill.has_failed()]
        for slot in failed:
            del self.held[slot]
        if failed:
            self.walk.look_again()

    def fills(self) -> Iterator[Fill]:
        """Yields all fills that are known of, some of them twice."""
        yield from self.held.values()
        yield from self._demands

    def forget(self, fill: Fill) -> None:
        """Its slot does not hold its block, if it is still the slot's fill."""
        if self.held.get(fill.slot) is fill:
            del self.held[fill.slot]

    def may_store(self, block: int, slot: int) -> bool:
        """Whether only this slot has the block, or gets it, and it is not being stored already."""
        elsewhere = any(f.block == block and f.slot != slot for f in self.held.values())
        return not elsewhere and block not in self.storing

    # ---- for a visit that begins --------------------------------------------------------------

    def arrive(self, block: int, direction: Direction, step: int) -> Arrival:
        """Where a visit that begins finds its block."""
        position = self.walk.find(block, direction)
        if position is None:
            present = (f for f in self.held.values() if f.block == block and not f.has_failed())
            found = next(present, None)
            fill = found or self._demand(block, direction, self._home(block), step)
            return Arrival(fill, UNPLANNED, is_own=found is None)
        is_in_order = position == self.walk.done
        self.walk.enter(position)
        op_id, slot = self.walk.compute_op_id(position), self.walk.visit(position).slot
        found = self.held.get(slot)
        if found is not None and found.block == block:
            return Arrival(found, op_id, is_own=False)
        fill = self._demand(block, direction, slot, step)
        if is_in_order:  # compute was faster than the walk: no miss, but the plan's own fill
            fill.op_id, fill.is_miss = self.walk.fill_op_id(position), False
        self.walk.filled(position)
        return Arrival(fill, op_id, is_own=True)

    def _home(self, block: int) -> int:
        """Where to put a block that the plan does not expect: best where no fill is under way."""
        homes = self._homes[block]
        idle = (s for s in homes if s not in self.held or self.held[s].is_issued())
        return next(idle, homes[0])

    def _demand(self, block: int, direction: Direction, slot: int, step: int) -> Fill:
        """A new fill of the slot, started before any other. What the slot was to hold is lost."""
        fill = self._claim(block, slot, op_id=UNPLANNED, direction=direction, step=step)
        fill.is_miss = True
        self._demands.append(fill)
        self.walk.look_again()
        return fill

    def _claim(self, block: int, slot: int, *, op_id: int, direction: Direction, step: int) -> Fill:
        """The slot is promised to the block. The walk's thread starts the fill without the lock,
        since starting may wait for a buffer."""
        name = self._names[block]
        fill = Fill(block=block, name=name, slot=slot, op_id=op_id, step=step, direction=direction)
        previous = self.held.get(slot)
        if previous is not None and not previous.is_issued():
            fill.behind = previous
            fill.stage = f"waiting for {previous.name}, which is on its way into the same slot"
        self.held[slot] = fill
        return fill

    # ---- ahead of compute ---------------------------------------------------------------------

    def next_to_start(self, step: int, reading: int | None) -> Fill | None:
        """A fill that compute waits for, else the plan's next; None when there is nothing to do now.

        step: the one under way. reading: the slot of the visit under way, if there is one.
        """
        for fill in self._demands:
            if self._is_storing(fill.block, fill.slot):
                continue
            if fill.behind is None or fill.behind.is_issued():
                self._demands.remove(fill)
                fill.behind = None
                return fill
        return self._claim_next(step, reading) if not self._demands else None

    def _claim_next(self, step: int, reading: int | None) -> Fill | None:
        """The next fill, if its slot's last planned reader is done."""
        while (position := self.walk.next_to_fill()) is not None:
            visit = self.walk.visit(position)
            held = self.held.get(visit.slot)
            if held is None or held.block != visit.block:
                if not self.walk.may_fill(position):
                    return None
                if visit.slot == reading:
                    return None  # by a visit that the plan did not expect there
                if held is not None and not held.is_issued():
                    return None
                if self._is_storing(visit.block, visit.slot):
                    return None
                self.walk.filled(position)
                return self._claim(
                    visit.block,
                    visit.slot,
                    op_id=self.walk.fill_op_id(position),
                    direction=visit.direction,
                    step=step + self.walk.is_in_next_step(position),
                )
            self.walk.filled(position)
        return None

    def _is_storing(self, block: int, slot: int) -> bool:
        """Whether a fill of the slot with the block would meet a store."""
        return block in self.storing or slot in self.storing.values()


def _homes(plan: Plan) -> list[tuple[int, ...]]:
    """The slots of each block's visits, else all that fit: where it goes when fetched on demand."""
    homes: list[dict[int, None]] = [{} for _ in plan.blocks]
    for steps in plan.sequences.values():
        for visit in steps.visits:
            homes[visit.block][visit.slot] = None
    for i, block in enumerate(plan.blocks):
        if not homes[i]:
            homes[i] = {s: None for s, n in enumerate(plan.slots) if n >= block.slot_bytes}
    return [tuple(h) for h in homes]
