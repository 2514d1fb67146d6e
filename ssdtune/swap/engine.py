"""The engine: carries out a plan. It knows blocks by number, slots and files; nothing of modules or
methods.

One thread walks the plan's visits ahead of compute and fills slots as they fall free; `enter` is
where compute waits for a block. Right whatever the caller does: a visit that the plan does not
expect finds its block in a slot or has it fetched on demand (a *miss* in the trace), and the walk
goes on from there.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from ssdtune.errors import SSDTuneError
from ssdtune.schedule.plan import Direction, Kind, Lane, Plan, Tier
from ssdtune.schedule.trace import UNPLANNED, TraceOp
from ssdtune.swap.claims import Claims
from ssdtune.swap.device_clock import DeviceClock
from ssdtune.swap.fills import Fill, Lanes, Pools, SwapError
from ssdtune.swap.reading import read_tensors
from ssdtune.swap.recipe import BlockRecipe, alone
from ssdtune.swap.slots import Slots
from ssdtune.swap.storage import aligned_bytes
from ssdtune.swap.stores import Stores

TRACED_STEPS = 16  # of any kind: their ops are kept, older ones dropped when a step begins
CLOSING_S = 10.0  # how long `close` waits for each thread


@dataclasses.dataclass(slots=True)
class _Visiting:
    """The visit under way.

    `is_own_fill`: its fill was begun for it, not ahead of it. `wait_s`: how long it waited for its
    weights; None: it still does.
    """

    block: int
    direction: Direction
    fill: Fill
    op_id: int
    is_own_fill: bool
    start_s: float
    wait_s: float | None = None
    # On a device: the streams that read the slot, each after it has waited for the copy into it; and
    # marks on the first of them, where the visit begins and where its weights are there.
    streams: dict[torch.cuda.Stream, None] = dataclasses.field(default_factory=dict)
    reached: torch.cuda.Event | None = None
    ready: torch.cuda.Event | None = None


class Engine:
    """Streams blocks into slots as `plan` says.

    `trace`: the ops of the last TRACED_STEPS steps, as they ended; other parts of a run may append.

    Args:
        plan: validated; its blocks are `recipes`, one for one.
        recipes: how each block is read and laid out.
        pools: read extents of files into RAM and, where the plan has buffers there, into the device;
            the engine's own from now on.
        device: where slots live.
        timeout_s: the longest wait for any block before an error names it.
        succeeds: another engine, closed, whose trace and numbers of steps go on.
    """

    def __init__(
        self,
        plan: Plan,
        recipes: Sequence[BlockRecipe],
        pools: Pools,
        *,
        device: torch.device,
        timeout_s: float = 600.0,
        succeeds: Engine | None = None,
    ) -> None:
        self.plan, self.recipes, self.timeout_s = plan, tuple(recipes), timeout_s
        self.pool, self.device_pool = pools
        self.trace: list[TraceOp] = [] if succeeds is None else succeeds.trace
        self.slots = Slots(plan, self.recipes, device)
        self._changed = threading.Condition()  # guards what follows, up to `_is_closing`
        self._claims = Claims(plan, [recipe.name for recipe in self.recipes])
        self._step = 0 if succeeds is None else succeeds.step
        self._visiting: _Visiting | None = None
        self._is_closing = False
        cached = {
            i: aligned_bytes(recipe.file_bytes, pin=True)
            for i, (recipe, tier) in enumerate(zip(self.recipes, plan.tiers, strict=True))
            if plan.on_device and tier is Tier.RAM
        }
        self._lanes = Lanes(
            self.slots,
            pools,
            self._record,
            on_issued=self._notify,
            cached=cached,
            timeout_s=timeout_s,
        )
        self._stores = Stores(
            self.slots,
            self.recipes,
            self._record,
            cached=cached,
            is_direct=self.pool.storage.name == "direct",
            on_ended=self._stored,
        )
        self._thread = threading.Thread(target=self._fill_ahead, name="ssdtune-walk", daemon=True)
        self._thread.start()

    @property
    def step(self) -> int:
        """Number of the step under way; steps of all kinds count."""
        return self._step

    def begin_step(self, kind: str) -> None:
        """A step of this kind begins: its visits are filled ahead, from the first.

        What the last step left out is forgotten, failures too: what failed is read anew.
        """
        with self._changed:
            self._leave()
            self._step += 1
            self._claims.begin_step(self.plan.sequences[kind])
            if self._lanes.clock is not None:
                self._lanes.clock.collect()
            self._trim_trace()
            self._changed.notify_all()

    def enter(self, block: int, direction: Direction) -> int:
        """Makes a block present for its visit; returns its slot, which stays until the next visit.

        Any thread may call, one at a time (backward runs in autograd's own where there is a device),
        and again during the visit. On a device, the caller's current stream waits for the weights.
        Raises SwapError; the visit may then be tried again.
        """
        start = perf_counter()
        while True:
            self._stores.check()
            visiting = self._visit(block, direction, start)
            if self._lanes.clock is not None and visiting.reached is None:
                visiting.reached = self._lanes.clock.mark(
                    torch.cuda.current_stream(self.slots.device)
                )
            left = start + self.timeout_s - perf_counter()
            try:
                visiting.fill.wait(left)
                self._stores.check()  # the fill may have waited for a store
                break
            except SwapError:
                self._give_up(visiting)
                # A fill begun before anybody waited for it may have failed of what is over by now.
                if visiting.is_own_fill or perf_counter() > start + self.timeout_s / 2:
                    raise
        if visiting.wait_s is None:
            visiting.wait_s = perf_counter() - start
        if self._lanes.clock is not None:
            self._wait_on_stream(visiting, self._lanes.clock)
        return visiting.fill.slot

    def leave(self) -> None:
        """The visit under way is over: its slot may be refilled."""
        with self._changed:
            self._leave()
            self._changed.notify_all()

    def read(self, block: int, index: int) -> torch.Tensor:
        """A fresh tensor with the block's tensor number `index`, outside any visit; from a slot that
        holds it, else from the file. Raises SwapError."""
        with self._changed, torch.inference_mode(False), torch.no_grad():
            for fill in self._claims.held.values():
                # A device's slot may be in use by streams that know nothing of this read.
                if fill.block == block and fill.is_present() and fill.event is None:
                    return self.slots.tensors(block, fill.slot)[index].clone()
        return self._read_from_file(block, index)

    def read_stored(self, block: int, index: int) -> torch.Tensor:
        """The same, always from the file: what visits have made of a slot's content is left out, but for what was
        stored. Raises SwapError also where any store has failed."""
        self.await_stored(block)
        with torch.inference_mode(False), torch.no_grad():
            return self._read_from_file(block, index)

    def content(self, slot: int) -> object:
        """Stands for what the slot holds: another object after every fill."""
        with self._changed:
            return self._claims.held[slot]

    def store(self, block: int, slot: int, done: Callable[[], None]) -> bool:
        """Begins to write a block of ours back to where it is read from, as the slot has it now.

        The slot is not filled, and the block not read, before that is over; nobody may change the slot meanwhile.
        False, and nothing begins, where another slot has the block or gets it, as it was. done: called when it is
        written, by another thread. A store that fails makes every later visit fail.
        """
        with self._changed:
            if not self._claims.may_store(block, slot):
                return False
            self._claims.storing[block] = slot
        try:
            self._stores.begin(block, slot, self._step, done, timeout_s=self.timeout_s)
        except BaseException:
            self._stored(block)
            raise
        return True

    def discard(self, slot: int) -> None:
        """What the slot holds is not what it should be: the visit under way did not take place, and whoever comes next
        has the block read anew."""
        with self._changed:
            self._claims.held.pop(slot, None)
            if self._visiting is not None and self._visiting.fill.slot == slot:
                self._visiting = None
                self._claims.walk.give_up()
            self._claims.walk.look_again()
            self._changed.notify_all()

    def await_stored(self, block: int) -> None:
        """Waits until the block is not being stored. Raises SwapError."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: block not in self._claims.storing, self.timeout_s
            ):
                name = self.recipes[block].name
                raise SwapError(f"{name} was not stored within {self.timeout_s:g} s")

    def await_stores(self) -> None:
        """Waits until nothing is being stored. Raises SwapError, also where a store has failed."""
        for block in range(len(self.recipes)):
            self.await_stored(block)
        self._stores.check()

    def follow(self, plan: Plan) -> None:
        """From the next step on, another plan over the same slots: another order of visits."""
        mine = self.plan
        assert (plan.slots, plan.buffers, plan.tiers) == (mine.slots, mine.buffers, mine.tiers)
        assert plan.buffers_on_device == mine.buffers_on_device
        with self._changed:
            self._leave()
            self.plan = plan
            self._claims.follow(plan)
            self._changed.notify_all()

    def close(self) -> None:
        """Stops the threads and closes the files. The engine is of no use afterwards."""
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
            self._changed.notify_all()
        self._stores.close(CLOSING_S)  # what is on its way to the drive gets there
        self._lanes.stop()
        self.pool.close(CLOSING_S)  # fails what is not read yet, so that nobody waits for it
        if self.device_pool is not None:
            self.device_pool.close(CLOSING_S)
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSING_S)
        self._lanes.close(CLOSING_S)
        for fill in list(self._claims.fills()):
            fill.issue(SwapError("the engine was closed"))

    def free(self) -> None:
        """Gives slots, buffers and cached weights back, once closed; what others hold of them stays."""
        assert self._is_closing
        self._claims.held.clear()
        self.slots.free()
        self._lanes.free()
        self._stores.free()

    # ---- the visit under way -----------------------------------------------------------------

    def _visit(self, block: int, direction: Direction, start: float) -> _Visiting:
        """The visit under way if it is this one, else a new one; takes the lock itself."""
        with self._changed:
            if self._is_closing:
                raise SwapError(f"cannot bring {self.recipes[block].name}: the engine is closed")
            visiting = self._visiting
            if visiting is None or (visiting.block, visiting.direction) != (block, direction):
                self._leave()
                fill, op_id, is_own = self._claims.arrive(block, direction, self._step)
                visiting = _Visiting(block, direction, fill, op_id, is_own, start)
                self._visiting = visiting
                self._changed.notify_all()
            return visiting

    # From here on, methods are called with the lock held unless they say otherwise.

    def _leave(self) -> None:
        """Ends the visit under way and records it."""
        visiting, self._visiting = self._visiting, None
        if visiting is None:
            return
        if visiting.wait_s is None:  # interrupted while it waited
            self._claims.walk.give_up()
            return
        self._claims.walk.leave()
        op = TraceOp(
            op_id=visiting.op_id,
            kind=Kind.COMPUTE,
            lane=Lane.COMPUTE,
            block=self.recipes[visiting.block].name,
            direction=visiting.direction,
            step=self._step,
            start_s=visiting.start_s,
            end_s=perf_counter(),
            wait_s=visiting.wait_s,
        )
        if self._lanes.clock is None:
            self._record(op)
        else:
            self._leave_on_device(visiting, op, self._lanes.clock)

    def _leave_on_device(self, visiting: _Visiting, op: TraceOp, clock: DeviceClock) -> None:
        """Marks the end of the visit's reads on every stream that read the slot."""
        ends = {stream: clock.mark(stream) for stream in visiting.streams}
        # last readers of the slot -> its refill
        self._lanes.last_reads.setdefault(visiting.fill.slot, {}).update(ends)
        if visiting.reached is not None and ends:
            clock.add(op, visiting.reached, next(iter(ends.values())), ready=visiting.ready)

    def _give_up(self, visiting: _Visiting) -> None:
        """The visit could not take place. A fill that has failed is forgotten; one that is still
        under way keeps its slot, which it may write into at any time. Takes the lock itself."""
        fill = visiting.fill
        with self._changed:
            if self._visiting is visiting:
                self._visiting = None
                self._claims.walk.give_up()
            if fill.has_failed():
                self._claims.forget(fill)
            self._changed.notify_all()

    def _wait_on_stream(self, visiting: _Visiting, clock: DeviceClock) -> None:
        """The caller's stream waits for the copy into the slot; without the lock."""
        stream = torch.cuda.current_stream(self.slots.device)
        if stream not in visiting.streams:
            if visiting.fill.event is not None:
                stream.wait_event(visiting.fill.event)  # copy -> readers of the slot
            visiting.streams[stream] = None
        if visiting.ready is None:
            visiting.ready = clock.mark(stream)

    # ---- the walk ahead ----------------------------------------------------------------------

    def _fill_ahead(self) -> None:
        """Starts all fills, in one thread's order; takes the lock itself."""
        while True:
            with self._changed:
                while (fill := self._next_to_start()) is None and not self._is_closing:
                    self._changed.wait()
            if fill is None:
                return
            self._lanes.start(fill)
            del fill

    def _next_to_start(self) -> Fill | None:
        """As the claims have it; None where the engine is being closed."""
        if self._is_closing:
            return None
        reading = None if self._visiting is None else self._visiting.fill.slot
        return self._claims.next_to_start(self._step, reading)

    def _stored(self, block: int) -> None:
        """The block's store has ended; takes the lock itself."""
        with self._changed:
            del self._claims.storing[block]
            self._changed.notify_all()

    def _notify(self) -> None:
        """A fill has ended; takes the lock itself."""
        with self._changed:
            self._changed.notify_all()

    # ---- trace, reads outside visits: without the lock ---------------------------------------

    def _record(self, op: TraceOp) -> None:
        self.trace.append(op)

    def _trim_trace(self) -> None:
        """Drops what is older than TRACED_STEPS, in place: others hold the list, or append to it."""
        first = self._step - TRACED_STEPS + 1
        count = next((i for i, op in enumerate(self.trace) if op.step >= first), len(self.trace))
        del self.trace[:count]

    def _read_from_file(self, block: int, index: int) -> torch.Tensor:
        """Reads what one tensor needs, into memory of its own."""
        self._stores.check()
        recipe = self.recipes[block]
        if recipe.unpacking is None:  # else its bytes are one tensor already
            recipe = alone(recipe, index, self.pool.storage.alignment)
        start = perf_counter()
        try:
            with torch.inference_mode(False), torch.no_grad():
                (found,) = read_tensors(recipe, self.pool, timeout_s=self.timeout_s)
                if not recipe.is_staged:
                    found = found.clone()  # without the rest of the pages that it lies in
        except SSDTuneError as error:
            raise SwapError(f"could not read {recipe.name}: {error}") from error
        self._record(
            TraceOp(
                op_id=UNPLANNED,
                kind=Kind.LOAD,
                lane=Lane.NVME_READ,
                block=self.recipes[block].name,
                direction=Direction.FORWARD,
                step=self._step,
                start_s=start,
                end_s=perf_counter(),
                num_bytes=recipe.file_bytes,
            )
        )
        return found.to(self.slots.device)
