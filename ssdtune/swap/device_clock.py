"""When a device did what the host queued for it: the trace's times for uploads and compute.

The host queues a visit's kernels and goes on; its own clock would tell when that was, not when they
ran. So marks (CUDA events) are queued around the work and read when they have been passed: nothing
waits for them.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch

from ssdtune.schedule.trace import TraceOp

# Marks are told apart in float32 milliseconds: to 4 us within a minute, to 0.25 ms in an hour.
REANCHOR_S = 60.0


class _Timed(NamedTuple):
    """An op whose times are still marks. `ready`: when its weights were there; None: no wait."""

    op: TraceOp
    start: torch.cuda.Event
    ready: torch.cuda.Event | None
    end: torch.cuda.Event


class DeviceClock:
    """Turns marks on a device's streams into seconds of `perf_counter`.

    Waits for the device once, when it is made, to set the two clocks by each other. Any thread may
    call.
    """

    def __init__(self, device: torch.device, record: Callable[[TraceOp], None]) -> None:
        self._record = record
        self._pending: deque[_Timed] = deque()
        self._lock = threading.Lock()
        self._anchor = self.mark(torch.cuda.current_stream(device))
        self._anchor.synchronize()
        self._anchor_s = perf_counter()

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """A mark behind what is queued on the stream by now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def add(
        self,
        op: TraceOp,
        start: torch.cuda.Event,
        end: torch.cuda.Event,
        *,
        ready: torch.cuda.Event | None = None,
    ) -> None:
        """Records the op with the marks' times once `end` is passed; the others lie before it."""
        with self._lock:
            self._pending.append(_Timed(op, start, ready, end))
        self.collect()

    def collect(self) -> None:
        """Records the ops whose work the device has done by now."""
        done: list[TraceOp] = []
        with self._lock:
            for item in list(self._pending):
                if item.end.query():
                    self._pending.remove(item)
                    done.append(self._with_times(item))
        for op in done:
            self._record(op)

    def _with_times(self, item: _Timed) -> TraceOp:
        start, end = self._seconds(item.start), self._seconds(item.end)
        wait = 0.0 if item.ready is None else self._seconds(item.ready) - start
        if end - self._anchor_s > REANCHOR_S:
            self._anchor, self._anchor_s = item.end, end
        return dataclasses.replace(item.op, start_s=start, end_s=end, wait_s=wait)

    def _seconds(self, mark: torch.cuda.Event) -> float:
        return self._anchor_s + self._anchor.elapsed_time(mark) / 1e3
