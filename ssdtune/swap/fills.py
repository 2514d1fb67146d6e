"""Fills: a block's bytes on their way into a slot, and the lanes that carry them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import NamedTuple

import torch

from ssdtune.errors import SSDTuneError
from ssdtune.schedule.ops import copy_of
from ssdtune.schedule.plan import Direction, Kind, Lane
from ssdtune.schedule.trace import UNPLANNED, TraceOp
from ssdtune.swap.device_clock import DeviceClock
from ssdtune.swap.gds import GdsPool
from ssdtune.swap.readers import ReaderPool, Ticket
from ssdtune.swap.slots import Buffer, Slots
from ssdtune.swap.storage import StorageError, StorageTimeout


class SwapError(SSDTuneError):
    """A block could not be brought into its slot."""


class Fill:
    """One block on its way into one slot, for one visit.

    Attributes:
        op_id: the plan's id of its first op, or UNPLANNED.
        is_miss: fetched on demand, out of the plan's order.
        behind: an earlier fill of the same slot, which must have ended before this one starts.
        stage: what it is waiting for, for messages.
        event: recorded after the copy was issued: copy -> readers of the slot. None without a device.
    """

    def __init__(
        self, *, block: int, name: str, slot: int, op_id: int, step: int, direction: Direction
    ) -> None:
        self.block, self.name, self.slot = block, name, slot
        self.op_id, self.step, self.direction = op_id, step, direction
        self.is_miss = False
        self.behind: Fill | None = None
        self.stage = "not started"
        self.event: torch.cuda.Event | None = None
        self._error: BaseException | None = None
        self._issued = threading.Event()

    def issue(self, error: BaseException | None = None) -> None:
        """The slot's bytes are there, or their copy is queued before `event`; or it failed."""
        if not self._issued.is_set():
            self._error = error
            self._issued.set()

    def is_issued(self) -> bool:
        """Whether it has ended, failed or not: `wait` would not wait."""
        return self._issued.is_set()

    def has_failed(self) -> bool:
        """Whether it has ended and the slot does not hold the block."""
        return self._issued.is_set() and self._error is not None

    def is_present(self) -> bool:
        """Whether it has ended and the slot holds the block."""
        return self._issued.is_set() and self._error is None

    def wait(self, timeout_s: float) -> None:
        """Waits until the slot holds the block, or its copy is queued on the device.

        Raises SwapError that names the block, its cause chained. On a device the reader's stream must
        then wait for `event`: an event waited for before it is recorded would be no wait at all, so
        the host waits first until the copy is issued.
        """
        if not self._issued.wait(timeout_s):
            raise SwapError(
                f"waited {timeout_s:.3g} s for the weights of {self.name} to arrive in slot "
                f"{self.slot}: {self.stage}.\nThe drive does not answer or is slower than planned: "
                "see `ssdtune doctor`."
            )
        if self._error is not None:
            what = f"could not load the weights of {self.name}: {self._error}"
            raise SwapError(what) from self._error


class Pools(NamedTuple):
    """What reads into RAM, and what into buffers on a device where the plan has them there."""

    host: ReaderPool
    device: GdsPool | None = None


class _Item(NamedTuple):
    """A fill under way. `ticket`: None if its bytes are in RAM. `memory`: where they are read to."""

    fill: Fill
    ticket: Ticket | None
    buffer: Buffer | None
    memory: torch.Tensor


class Lanes:
    """Carries fills: reads by the pool, then, for staged blocks, the copy into the slot by a thread
    of its own. `start` is for one thread only, so that reads are in the order of fills.

    Args:
        slots: where to.
        pools: read.
        record: takes a TraceOp of each op that ended.
        on_issued: told when a fill has ended.
        cached: block -> memory that keeps its file bytes for good.
        timeout_s: the longest wait for a read, or for a buffer.
    """

    def __init__(
        self,
        slots: Slots,
        pools: Pools,
        record: Callable[[TraceOp], None],
        *,
        on_issued: Callable[[], None],
        cached: Mapping[int, torch.Tensor],
        timeout_s: float,
    ) -> None:
        assert slots.buffers_on_device == (pools.device is not None)
        self.slots, self.pools, self.timeout_s = slots, pools, timeout_s
        self._shapes = [recipe.shape for recipe in slots.recipes]
        self._record_op, self._on_issued = record, on_issued
        # slot -> stream -> last read on it: last readers of the slot -> its refill
        self.last_reads: dict[int, dict[torch.cuda.Stream, torch.cuda.Event]] = {}
        self.clock: DeviceClock | None = None
        self._uploads: torch.cuda.Stream | None = None
        if slots.device.type == "cuda":
            self.clock = DeviceClock(slots.device, record)
            self._uploads = torch.cuda.Stream(slots.device)
            # Kernels that used the slots' memory when it was another tensor's -> first fills.
            self._uploads.wait_stream(torch.cuda.current_stream(slots.device))
        self._cached = dict(cached)
        self._is_in_cache: set[int] = set()
        # slot -> a read that timed out and may still write into it
        self._late: dict[int, Ticket] = {}
        self._todo: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ssdtune-fill", daemon=True)
        self._thread.start()

    def start(self, fill: Fill) -> None:
        """Issues a fill's reads; may wait for a free buffer. Failures come out of its `wait`."""
        try:
            self._todo.put(self._started(fill))
        except Exception as error:  # reported where the block is needed, with its name
            self._issue(fill, error)

    def stop(self) -> None:
        """Ends the waiting for buffers: no fill starts any more."""
        self.slots.buffers.close()

    def close(self, timeout_s: float) -> None:
        """Ends the copying thread after the fills in flight, and waits for the device's copies:
        whoever gets the memory next knows nothing of these streams."""
        self._todo.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        if self._uploads is not None:
            self._uploads.synchronize()
            for events in self.last_reads.values():
                for event in events.values():
                    event.synchronize()

    def free(self) -> None:
        """Gives the cached weights back, once closed."""
        self._cached.clear()

    def _started(self, fill: Fill) -> _Item:
        recipe = self.slots.recipes[fill.block]
        late = self._late.get(fill.slot)
        if late is not None:
            fill.stage = (
                f"a read of {late.label} into the same slot, which timed out, has not ended"
            )
            _await_end(late, self.timeout_s)
            del self._late[fill.slot]
        buffer: Buffer | None = None
        memory = self._cached.get(fill.block)
        if memory is None and recipe.is_staged:
            fill.stage = "waiting for a staging buffer"
            buffer = self.slots.buffers.take(recipe.file_bytes, self.timeout_s)
            memory = buffer.memory
        elif memory is None:
            memory = self.slots.memory[fill.slot]
        ticket = None
        if recipe.extents and fill.block not in self._is_in_cache:
            files = ", ".join(dict.fromkeys(extent.path.name for extent in recipe.extents))
            fill.stage = f"being read from {files}"
            try:
                pool = self.pools.host if buffer is None else self.pools.device or self.pools.host
                ticket = pool.submit(recipe.extents, memory, label=fill.name)
            except BaseException:
                if buffer is not None:
                    self.slots.buffers.give(buffer)
                raise
        return _Item(fill, ticket, buffer, memory)

    def _run(self) -> None:
        while (item := self._todo.get()) is not None:
            error: Exception | None = None
            late: Ticket | None = None
            try:
                self._finish(item)
            except StorageTimeout as caught:
                error, late = caught, item.ticket
                if item.buffer is None and late is not None and item.fill.block not in self._cached:
                    self._late[item.fill.slot] = late
            except Exception as caught:  # surfaces in the caller, with the block's name
                error = caught
            if item.buffer is not None:
                self.slots.buffers.give(item.buffer, late=late)
            self._issue(item.fill, error)
            del item  # an idle thread must not keep memory alive

    def _issue(self, fill: Fill, error: Exception | None = None) -> None:
        fill.issue(error)
        self._on_issued()

    def _finish(self, item: _Item) -> None:
        fill, recipe = item.fill, self.slots.recipes[item.fill.block]
        if item.ticket is not None:
            item.ticket.wait(self.timeout_s)
            span = (item.ticket.started, item.ticket.finished)
            self._record_op(self._op(fill, (Kind.LOAD, Lane.NVME_READ), span, recipe.file_bytes))
            if item.memory.device.type == "cpu":
                fill.stage = "being checked"
                recipe.check(item.memory)
            if fill.block in self._cached:  # as its file has it, from now on
                self._is_in_cache.add(fill.block)
        if recipe.is_staged:
            fill.stage = "being copied into the slot"
            what = self._copy_of(item)
            if self._uploads is None or self.clock is None:
                start = perf_counter()
                self.slots.unpack(fill.block, item.memory, fill.slot)
                op = self._op(fill, what, (start, perf_counter()), recipe.slot_bytes)
                self._record_op(op)
            else:
                start, end = self._queue_copy(item, self._uploads, self.clock)
                num_bytes = self._shapes[fill.block].uploaded_bytes
                self.clock.add(self._op(fill, what, (0.0, 0.0), num_bytes), start, end)

    def _copy_of(self, item: _Item) -> tuple[Kind, Lane]:
        """What the copy into the slot is, and on which lane."""
        return copy_of(
            self._shapes[item.fill.block],
            on_device=self.clock is not None,
            from_device=item.buffer is not None and self.slots.buffers_on_device,
        )

    def _queue_copy(
        self, item: _Item, uploads: torch.cuda.Stream, clock: DeviceClock
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Queues the copy behind the slot's last readers; marks of its start and end."""
        fill = item.fill
        with torch.cuda.stream(uploads):
            for last_read in self.last_reads.pop(fill.slot, {}).values():
                uploads.wait_event(last_read)  # last reader of the slot -> its refill
            start = clock.mark(uploads)
            try:
                self.slots.unpack(fill.block, item.memory, fill.slot)
            finally:  # also of what was queued before a failure
                end = fill.event = clock.mark(uploads)
                if item.buffer is not None:
                    item.buffer.copied = end
        return start, end

    def _op(
        self, fill: Fill, what: tuple[Kind, Lane], span: tuple[float, float], num_bytes: int
    ) -> TraceOp:
        kind, lane = what
        op_id = fill.op_id
        if op_id != UNPLANNED and fill.block not in self._cached:
            op_id += kind is not Kind.LOAD  # in the plan the copy follows its LOAD
        elif kind is Kind.LOAD:
            op_id = UNPLANNED  # into RAM, for good: no steady step has it
        return TraceOp(
            op_id=op_id,
            kind=kind,
            lane=lane,
            block=fill.name,
            direction=fill.direction,
            step=fill.step,
            start_s=span[0],
            end_s=span[1],
            num_bytes=num_bytes,
            is_miss=fill.is_miss,
        )


def _await_end(late: Ticket, timeout_s: float) -> None:
    """Waits until a read writes no more, whether it brought its bytes or not. StorageTimeout."""
    try:
        late.wait(timeout_s)
    except StorageTimeout:
        raise
    except StorageError:
        pass
