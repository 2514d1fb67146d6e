"""Fills: a block's bytes on their way into a slot, and the lanes that carry them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from time import perf_counter

import torch

from ssdtune.errors import SSDTuneError
from ssdtune.schedule.plan import Direction, Kind, Lane
from ssdtune.schedule.trace import UNPLANNED, TraceOp
from ssdtune.swap.readers import ReaderPool, Ticket
from ssdtune.swap.slots import Slots


class SwapError(SSDTuneError):
    """A block could not be brought into its slot."""


class Fill:
    """One block on its way into one slot, for one visit. `op_id`: the plan's id of its first op, or UNPLANNED."""

    def __init__(
        self, *, block: int, name: str, slot: int, op_id: int, step: int, direction: Direction
    ) -> None:
        self.block, self.name, self.slot = block, name, slot
        self.op_id, self.step, self.direction = op_id, step, direction
        self.is_miss = False
        self.event: torch.cuda.Event | None = (
            None  # recorded after the copy was issued: copy -> readers of the slot
        )
        self._error: BaseException | None = None
        self._issued = threading.Event()

    def issue(self, error: BaseException | None = None) -> None:
        """The slot's bytes are there, or their copy is queued before `event`; or it failed."""
        self._error = error
        self._issued.set()

    def is_issued(self) -> bool:
        """Whether `wait` would return at once."""
        return self._issued.is_set()

    def settle(self, timeout_s: float) -> None:
        """Waits until nothing more is written into the slot by the host's doing, failed or not."""
        if not self._issued.wait(timeout_s):
            raise SwapError(
                f"waited {timeout_s:.0f} s for {self.name}, on its way into slot {self.slot}"
            )

    def wait(self, timeout_s: float) -> None:
        """Waits until the slot holds the block. Raises SwapError that names the block, its cause chained.

        On a device the host waits until the copy is issued, then the current stream waits for the copy: an event
        that is waited for before it is recorded would be no wait at all.
        """
        if not self._issued.wait(timeout_s):
            raise SwapError(
                f"waited {timeout_s:.0f} s for the weights of {self.name} to arrive in slot {self.slot}"
            )
        if self._error is not None:
            raise SwapError(
                f"could not load the weights of {self.name}: {self._error}"
            ) from self._error
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class _Buffer:
    """A staging buffer: free to be filled again once its last copy has ended."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.is_free = threading.Event()
        self.is_free.set()
        self.copied: torch.cuda.Event | None = None  # copy out of the buffer -> next read into it

    def take(self, timeout_s: float) -> None:
        """Waits in the caller's (worker) thread; the compute thread never comes here on the planned path."""
        if not self.is_free.wait(timeout_s):
            raise SwapError(f"waited {timeout_s:.0f} s for a staging buffer")
        self.is_free.clear()
        if self.copied is not None:
            self.copied.synchronize()


class Lanes:
    """Carries fills: reads by the pool, then, for staged blocks, the copy into the slot by a thread of its own."""

    def __init__(
        self,
        slots: Slots,
        pool: ReaderPool,
        trace: Callable[[TraceOp], None],
        *,
        cached: Mapping[int, torch.Tensor],
        timeout_s: float,
    ) -> None:
        self.slots, self.pool, self.trace, self.timeout_s = slots, pool, trace, timeout_s
        self.last_read: dict[
            int, torch.cuda.Event
        ] = {}  # slot -> last reader of the slot -> refill
        self._upload_stream = (
            torch.cuda.Stream(slots.device) if slots.device.type == "cuda" else None
        )
        self._buffers = [_Buffer(memory) for memory in slots.buffers]
        self._next_buffer = 0
        self._order = threading.Lock()  # buffers are taken in the order in which fills start
        self._cached = dict(cached)  # block -> memory that keeps its file bytes in RAM
        self._is_in_cache: set[int] = set()
        self._todo: queue.SimpleQueue[tuple[Fill, Ticket | None, _Buffer | None] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="ssdtune-fill", daemon=True)
        self._thread.start()

    def start(self, fill: Fill) -> None:
        """Issues a fill's reads; may wait for a free buffer. Failures come out of the fill's `wait`."""
        try:
            with self._order:
                self._start(fill)
        except Exception as error:  # reported where the block is needed, with its name
            fill.issue(error)

    def close(self) -> None:
        """Ends the copying thread after the fills in flight."""
        self._todo.put(None)
        self._thread.join(timeout=self.timeout_s)

    def _start(self, fill: Fill) -> None:
        recipe = self.slots.recipes[fill.block]
        buffer: _Buffer | None = None
        if fill.block in self._cached:
            memory = self._cached[fill.block]
        elif recipe.is_staged:
            buffer = self._buffers[self._next_buffer]
            self._next_buffer = (self._next_buffer + 1) % len(self._buffers)
            buffer.take(self.timeout_s)
            memory = buffer.memory
        else:
            memory = self.slots.memory[fill.slot]
        ticket = None
        if fill.block not in self._is_in_cache:
            try:
                ticket = self.pool.submit(recipe.extents, memory, label=fill.name)
            except BaseException:
                if buffer is not None:
                    buffer.is_free.set()
                raise
        self._todo.put((fill, ticket, buffer))

    def _run(self) -> None:
        while (item := self._todo.get()) is not None:
            fill, ticket, buffer = item
            try:
                self._finish(fill, ticket, buffer)
                fill.issue()
            except (
                Exception
            ) as error:  # a worker's failure surfaces in the caller, with the block's name
                fill.issue(error)
            if buffer is not None:
                buffer.is_free.set()

    def _finish(self, fill: Fill, ticket: Ticket | None, buffer: _Buffer | None) -> None:
        recipe = self.slots.recipes[fill.block]
        if ticket is not None:
            ticket.wait(self.timeout_s)
            self._record(fill, Kind.LOAD, (ticket.started, ticket.finished), recipe.file_bytes)
            if fill.block in self._cached:
                self._is_in_cache.add(fill.block)
        if recipe.is_staged:
            memory = self._cached[fill.block] if buffer is None else buffer.memory
            start = perf_counter()
            self._copy(fill, memory)
            if buffer is not None:
                buffer.copied = fill.event
            kind = Kind.UNPACK if self._upload_stream is None else Kind.UPLOAD
            self._record(fill, kind, (start, perf_counter()), recipe.slot_bytes)

    def _copy(self, fill: Fill, memory: torch.Tensor) -> None:
        """From buffer to slot: at once on a CPU, behind the slot's last reader on the upload stream of a device."""
        if self._upload_stream is None:
            self.slots.unpack(fill.block, memory, fill.slot)
            return
        with torch.cuda.stream(self._upload_stream):
            last_read = self.last_read.get(fill.slot)
            if last_read is not None:
                self._upload_stream.wait_event(last_read)
            self.slots.unpack(fill.block, memory, fill.slot)
            fill.event = self._upload_stream.record_event()

    def _record(self, fill: Fill, kind: Kind, span: tuple[float, float], num_bytes: int) -> None:
        lanes = {Kind.LOAD: Lane.NVME_READ, Kind.UNPACK: Lane.CPU, Kind.UPLOAD: Lane.H2D}
        # A fill's ops follow each other in the plan: LOAD first, then the copy (alone where the bytes are in RAM).
        follows = (
            kind is not Kind.LOAD and fill.op_id != UNPLANNED and fill.block not in self._cached
        )
        self.trace(
            TraceOp(
                op_id=fill.op_id + follows,
                kind=kind,
                lane=lanes[kind],
                block=fill.name,
                direction=fill.direction,
                step=fill.step,
                start_s=span[0],
                end_s=span[1],
                num_bytes=num_bytes,
                is_miss=fill.is_miss,
            )
        )
