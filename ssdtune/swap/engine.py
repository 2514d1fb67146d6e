"""The engine: carries out a plan. It knows blocks by number, slots and files; nothing of modules or methods.

One thread walks the plan's visits ahead of compute and fills slots as they fall free; `enter` is where compute waits
for a block. Right whatever the caller does: a visit that the plan does not expect finds its block in a slot or has it
fetched on demand (a *miss* in the trace), and the walk goes on from there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import perf_counter

import torch

from ssdtune.schedule.plan import Direction, Kind, Lane, Plan, StepPlan, Tier, Visit
from ssdtune.schedule.trace import UNPLANNED, TraceOp
from ssdtune.swap.fills import Fill, Lanes, SwapError
from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.recipe import BlockRecipe
from ssdtune.swap.slots import Slots
from ssdtune.swap.storage import aligned_bytes


class Engine:
    """Streams blocks into slots as `plan` says.

    Args:
        plan: validated; its blocks are `recipes`, one for one.
        recipes: how each block is read and laid out.
        pool: reads extents of files into memory.
        device: where slots live.
        timeout_s: the longest wait for any block before an error names it.
    """

    def __init__(
        self,
        plan: Plan,
        recipes: Sequence[BlockRecipe],
        pool: ReaderPool,
        *,
        device: torch.device,
        timeout_s: float = 600.0,
    ) -> None:
        self.plan, self.recipes, self.pool, self.timeout_s = plan, tuple(recipes), pool, timeout_s
        self.trace: list[TraceOp] = []
        self.slots = Slots(plan, self.recipes, device)
        cached = {
            i: aligned_bytes(recipe.file_bytes, pin=True)
            for i, (recipe, tier) in enumerate(zip(self.recipes, plan.tiers, strict=True))
            if plan.on_device and tier is Tier.RAM
        }
        self._lanes = Lanes(self.slots, pool, self.trace.append, cached=cached, timeout_s=timeout_s)
        self._homes = _homes(plan)
        self._held: dict[int, Fill] = {}  # slot -> the fill that brought, or brings, what it holds
        self._walk = _Walk(next(iter(plan.sequences.values())))
        self._step = 0
        self._current: tuple[int, Direction, int] | None = (
            None  # block, direction, slot of the visit under way
        )
        self._entered = (0, 0.0, 0.0)  # op id, start, wait of the visit under way
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._fill_ahead, name="ssdtune-walk", daemon=True)
        self._thread.start()

    @property
    def step(self) -> int:
        """Number of the step under way; steps of all kinds count."""
        return self._step

    def begin_step(self, kind: str) -> None:
        """A step of this kind begins: its visits are filled ahead, from the first."""
        with self._changed:
            self._leave()
            self._step += 1
            steps = self.plan.sequences[kind]
            if self._walk.steps is not steps:
                self._walk = _Walk(steps)
            else:
                self._walk.begin_next()
            self._changed.notify_all()

    def enter(self, block: int, direction: Direction) -> int:
        """Makes a block present for its visit and returns its slot, which stays until the next `enter`.

        Any thread may call (backward runs in autograd's own where there is a device). Raises SwapError.
        """
        current = self._current
        if current is not None and current[:2] == (block, direction):
            return current[2]
        start = perf_counter()
        with self._changed:
            self._leave()
            fill, op_id, is_new = self._find(block, direction)
            self._current = (block, direction, fill.slot)
            self._changed.notify_all()
        if is_new:
            self._lanes.start(fill)
        try:
            fill.wait(self.timeout_s)
        except SwapError:
            self._forget(fill)
            raise
        self._entered = (op_id, start, perf_counter() - start)
        return fill.slot

    def leave(self) -> None:
        """The visit under way is over: its slot may be refilled."""
        with self._changed:
            self._leave()
            self._changed.notify_all()

    def read(self, block: int, index: int) -> torch.Tensor:
        """A fresh tensor with the block's tensor number `index`, outside any visit; from a slot where it is held."""
        with self._changed:
            held = next(
                (f for f in self._held.values() if f.block == block and f.is_issued()), None
            )
            if held is not None and held.event is None:
                return self.slots.tensors(block, held.slot)[index].clone()
        return self._read_from_file(block, index)

    def follow(self, plan: Plan) -> None:
        """From the next step on, another plan over the same slots: another order of visits."""
        assert (plan.slots, plan.buffers, plan.tiers) == (self.plan.slots, self.plan.buffers, self.plan.tiers)
        with self._changed:
            self._leave()
            self.plan = plan
            self._homes = _homes(plan)
            self._walk = _Walk(next(iter(plan.sequences.values())))
            self._changed.notify_all()

    def close(self) -> None:
        """Stops the threads and closes the files. The engine is of no use afterwards."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(timeout=self.timeout_s)
        self._lanes.close()
        self.pool.close()

    # ---- the visit under way -------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Ends the visit under way and records it; the caller holds the lock."""
        if self._current is None:
            return
        block, direction, slot = self._current
        op_id, start, wait = self._entered
        if self.slots.device.type == "cuda":
            self._lanes.last_read[slot] = torch.cuda.current_stream().record_event()
        self.trace.append(
            TraceOp(
                op_id=op_id,
                kind=Kind.COMPUTE,
                lane=Lane.COMPUTE,
                block=self.recipes[block].name,
                direction=direction,
                step=self._step,
                start_s=start,
                end_s=perf_counter(),
                wait_s=wait,
            )
        )
        self._walk.leave()
        self._current = None

    def _find(self, block: int, direction: Direction) -> tuple[Fill, int, bool]:
        """The fill that holds the block for this visit, the visit's op id, and whether the fill is still to start."""
        position = self._walk.find(block, direction)
        if position is None:
            held = next((f for f in self._held.values() if f.block == block), None)
            if held is not None:
                return held, UNPLANNED, False
            return self._on_demand(block, direction, slot=self._homes[block][0], is_miss=True), UNPLANNED, True
        is_in_order = position == self._walk.done
        self._walk.enter(position)
        op_id = self._walk.compute_op_id(position)
        held = self._held.get(self._walk.visit(position).slot)
        if held is not None and held.block == block:
            return held, op_id, False
        # In order and not yet claimed: compute was faster than the walk, which is no miss.
        is_miss = not is_in_order or self._walk.ahead > position
        slot = self._walk.visit(position).slot
        fill = self._on_demand(block, direction, slot=slot, is_miss=is_miss)
        if not is_miss:
            fill.op_id = self._walk.fill_op_id(position)
            self._walk.filled(position)
        return fill, op_id, True

    def _on_demand(self, block: int, direction: Direction, *, slot: int, is_miss: bool) -> Fill:
        """A new fill of the slot, now. The caller holds the lock."""
        in_flight = self._held.get(slot)
        if in_flight is not None:
            in_flight.settle(self.timeout_s)
        fill = self._claim(block, slot, op_id=UNPLANNED, direction=direction, step=self._step)
        fill.is_miss = is_miss
        return fill

    def _claim(self, block: int, slot: int, *, op_id: int, direction: Direction, step: int) -> Fill:
        """The slot is promised to the block; the caller starts the fill after it let go of the lock, since starting
        may wait for a buffer."""
        fill = Fill(
            block=block,
            name=self.recipes[block].name,
            slot=slot,
            op_id=op_id,
            step=step,
            direction=direction,
        )
        self._held[slot] = fill
        return fill

    def _forget(self, fill: Fill) -> None:
        with self._changed:
            if self._held.get(fill.slot) is fill:
                del self._held[fill.slot]
            self._current = None

    # ---- the walk ahead ------------------------------------------------------------------------------------------

    def _fill_ahead(self) -> None:
        while True:
            with self._changed:
                fill = self._claim_next()
                while fill is None:
                    if self._is_closing:
                        return
                    self._changed.wait()
                    fill = self._claim_next()
            self._lanes.start(fill)

    def _claim_next(self) -> Fill | None:
        """The next fill whose slot's last planned reader is done; None when there is nothing to do but wait."""
        while (position := self._walk.next_to_fill()) is not None:
            visit = self._walk.visit(position)
            held = self._held.get(visit.slot)
            if held is None or held.block != visit.block:
                if self._current is not None and self._current[2] == visit.slot:
                    return None  # read right now by a visit that the plan did not expect there
                if held is not None and not held.is_issued():
                    return None
                self._walk.filled(position)
                return self._claim(
                    visit.block,
                    visit.slot,
                    op_id=self._walk.fill_op_id(position),
                    direction=visit.direction,
                    step=self._step + (position >= self._walk.num_visits),
                )
            self._walk.filled(position)
        return None

    def _read_from_file(self, block: int, index: int) -> torch.Tensor:
        """Reads one whole block into memory of its own and returns one of its tensors."""
        recipe = self.recipes[block]
        start = perf_counter()
        memory = aligned_bytes(recipe.file_bytes)
        self.pool.submit(recipe.extents, memory, label=recipe.name).wait(self.timeout_s)
        view = recipe.tensors[index]
        if not recipe.is_staged:
            found = view.of(memory).clone()
        else:
            found = torch.empty(view.shape, dtype=view.dtype)
            targets = [found if i == index else torch.empty(0) for i in range(len(recipe.tensors))]
            for copy in recipe.copies:
                if copy.target == index:
                    copy.run(memory, targets)
        self.trace.append(
            TraceOp(
                op_id=UNPLANNED,
                kind=Kind.LOAD,
                lane=Lane.NVME_READ,
                block=recipe.name,
                direction=Direction.FORWARD,
                step=self._step,
                start_s=start,
                end_s=perf_counter(),
                num_bytes=recipe.file_bytes,
                is_miss=True,
            )
        )
        return found.to(self.slots.device)


class _Walk:
    """Where compute and the fills ahead of it stand in a step that repeats. Positions count on from step to step.

    `done`: visits before it are over. `ahead`: visits before it have their slot filled, or on its way.
    """

    def __init__(self, steps: StepPlan) -> None:
        self.steps = steps
        self.num_visits = len(steps.visits)
        self.done = 0
        self.ahead = 0
        self._entered: int | None = None
        self._reuse = _reuse_distances(steps)
        self._first_op = {op.visit: op.id for op in reversed(steps.ops)}
        self._compute_op = {op.visit: op.id for op in steps.ops if op.kind is Kind.COMPUTE}

    def visit(self, position: int) -> Visit:
        """The visit at a position of this step or the next."""
        return self.steps.visits[position % self.num_visits]

    def compute_op_id(self, position: int) -> int:
        """The plan's id of the visit's COMPUTE op."""
        return self._compute_op[position % self.num_visits]

    def fill_op_id(self, position: int) -> int:
        """The plan's id of the first op that fills the visit's slot; UNPLANNED where a steady step needs none."""
        visit = position % self.num_visits
        return self._first_op[visit] if self.steps.visits[visit].is_filled_for else UNPLANNED

    def begin_next(self) -> None:
        """A new step: what the last one left out is over, what was filled ahead for this one stays."""
        self.ahead = max(0, self.ahead - self.num_visits)
        self.done = 0
        self._entered = None

    def find(self, block: int, direction: Direction) -> int | None:
        """The first visit of this step, not yet done, to that block in that direction."""
        for position in range(self.done, self.num_visits):
            visit = self.steps.visits[position]
            if visit.block == block and visit.direction is direction:
                return position
        return None

    def enter(self, position: int) -> None:
        """Compute is at `position`: what lies before it is over, even if it never came."""
        self.done = position
        self.ahead = max(self.ahead, position)
        self._entered = position

    def leave(self) -> None:
        """The visit that was entered is over."""
        if self._entered is not None:
            self.done = self._entered + 1
            self._entered = None

    def next_to_fill(self) -> int | None:
        """The next position to fill whose slot's last planned reader is done; None if there is none now."""
        position = self.ahead
        if (
            position >= 2 * self.num_visits
            or position - self._reuse[position % self.num_visits] >= self.done
        ):
            return None
        return position

    def filled(self, position: int) -> None:
        """The slot of `position` holds its block, or will."""
        self.ahead = position + 1


def _reuse_distances(steps: StepPlan) -> list[int]:
    """For each visit: how many positions back its slot was read last, in a step that repeats."""
    num = len(steps.visits)
    distances = []
    for v, visit in enumerate(steps.visits):
        back = next(d for d in range(1, num + 1) if steps.visits[(v - d) % num].slot == visit.slot)
        distances.append(back)
    return distances


def _homes(plan: Plan) -> list[tuple[int, ...]]:
    """The slots that each block may use when it is fetched on demand: those of its visits, else any that fits."""
    homes: list[dict[int, None]] = [{} for _ in plan.blocks]
    for steps in plan.sequences.values():
        for visit in steps.visits:
            homes[visit.block][visit.slot] = None
    for i, block in enumerate(plan.blocks):
        if not homes[i]:
            homes[i] = {s: None for s, n in enumerate(plan.slots) if n >= block.slot_bytes}
    return [tuple(h) for h in homes]
