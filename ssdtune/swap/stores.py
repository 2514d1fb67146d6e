"""Blocks on their way back: from a slot to a file of ours, or to where RAM keeps them, while compute goes on.

Only recipes that say so (`BlockRecipe.is_ours`) are written to: a user's files never are. On a device the bytes leave
the slot by a copy on the caller's stream, which the slot's next fill waits for like any reader.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter

import torch

from ssdtune.errors import reason_of
from ssdtune.schedule.plan import Direction, Kind, Lane
from ssdtune.schedule.trace import UNPLANNED, TraceOp
from ssdtune.swap.fills import SwapError
from ssdtune.swap.recipe import BlockRecipe
from ssdtune.swap.scratch import write_all
from ssdtune.swap.slots import Slots
from ssdtune.swap.storage import aligned_bytes


@dataclasses.dataclass(slots=True)
class Store:
    """One block being stored.

    is_staged: whether `memory` is the one for staging. done: called when its bytes are where the next fill finds them.
    """

    block: int
    step: int
    memory: torch.Tensor
    copied: torch.cuda.Event | None
    is_staged: bool
    done: Callable[[], None]


class Stores:
    """Writes blocks, one after the other, in a thread of its own.

    Args:
        slots: whose content is stored.
        recipes: where each block lies in a file.
        record: takes a TraceOp of each that ended.
        cached: block -> memory that keeps its file bytes for good: it is brought up to date, nothing is written.
        is_direct: whether files are written past the page cache.
        on_ended: told which block's store has ended, well or not.
    """

    def __init__(
        self,
        slots: Slots,
        recipes: Sequence[BlockRecipe],
        record: Callable[[TraceOp], None],
        *,
        cached: Mapping[int, torch.Tensor],
        is_direct: bool,
        on_ended: Callable[[int], None],
    ) -> None:
        self._slots, self._recipes, self._record = slots, recipes, record
        self._cached, self._on_ended = cached, on_ended
        self._flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_DIRECT if is_direct else 0)
        self._files: dict[Path, int] = {}
        self._staging: torch.Tensor | None = None  # on a device: pinned, for one block at a time
        self._staged = 0  # the block that is there
        self._is_staging_free = threading.Event()
        self._is_staging_free.set()
        self._error: SwapError | None = None
        self._todo: queue.SimpleQueue[Store | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ssdtune-store", daemon=True)
        self._thread.start()

    def begin(
        self, block: int, slot: int, step: int, done: Callable[[], None], *, timeout_s: float
    ) -> None:
        """Stores what the slot holds of the block. timeout_s: the longest wait for an earlier one to be written; past it
        SwapError is raised."""
        assert self._recipes[block].is_ours, "nobody else's file is written to"
        content = self._slots.memory[slot][: self._recipes[block].file_bytes]
        is_staged, copied = False, None
        if content.device.type != "cpu":
            is_staged = block not in self._cached
            memory = self._claimed_staging(block, timeout_s) if is_staged else self._cached[block]
            content, copied = _off_the_device(content, memory)
        self._todo.put(Store(block, step, content, copied, is_staged, done))

    def _claimed_staging(self, block: int, timeout_s: float) -> torch.Tensor:
        """The memory for staging, for this block alone until it is written."""
        if self._staging is None:
            largest = max(recipe.file_bytes for recipe in self._recipes)
            self._staging = aligned_bytes(largest, pin=True)
        if not self._is_staging_free.wait(timeout_s):
            name, before = (self._recipes[b].name for b in (block, self._staged))
            raise SwapError(
                f"{name} waited {timeout_s:g} s to be stored, for {before} to be written to its working copy.\n"
                "The drive hangs or is slower than planned: see `ssdtune doctor`."
            )
        self._is_staging_free.clear()
        self._staged = block
        return self._staging

    def check(self) -> None:
        """Raises SwapError where a store has failed: what the drive has of that block is of no use."""
        if self._error is not None:
            raise self._error

    def close(self, timeout_s: float) -> None:
        """Ends the thread after what was begun. Files are closed by the thread itself: it may write for longer than
        anybody waits here, and a descriptor that is closed under it could by then be another file's."""
        self._todo.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def free(self) -> None:
        """Gives memory back, once closed."""
        self._cached, self._staging = {}, None

    def _run(self) -> None:
        while (store := self._todo.get()) is not None:
            try:
                self._write(store)
                store.done()
            except Exception as error:
                self._error = self._told(store, error)
            finally:
                if store.is_staged:
                    self._is_staging_free.set()
                self._on_ended(store.block)
            del store  # an idle thread must not keep memory alive
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def _write(self, store: Store) -> None:
        start = perf_counter()
        if store.copied is not None:
            store.copied.synchronize()
        if store.block in self._cached:
            kind, lane = Kind.DOWNLOAD, Lane.D2H
        else:
            kind, lane = Kind.STORE_WEIGHTS, Lane.NVME_WRITE
            (extent,) = self._recipes[store.block].extents
            write_all(self._file(extent.path), extent.file_offset, store.memory.numpy().data)
        self._record(
            TraceOp(
                op_id=UNPLANNED,
                kind=kind,
                lane=lane,
                block=self._recipes[store.block].name,
                direction=Direction.FORWARD,
                step=store.step,
                start_s=start,
                end_s=perf_counter(),
                num_bytes=store.memory.nbytes,
            )
        )

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, self._flags)
        return self._files[path]

    def _told(self, store: Store, error: Exception) -> SwapError:
        reason = reason_of(error) if isinstance(error, OSError) else error
        return SwapError(
            f"could not write {self._recipes[store.block].name} to its working copy: {reason}.\n"
            "What the drive holds of it is not to be trusted: start again; the run goes on from its last checkpoint."
        )


def _off_the_device(
    content: torch.Tensor, memory: torch.Tensor
) -> tuple[torch.Tensor, torch.cuda.Event]:
    """The same bytes in RAM, in that memory, once the event has come."""
    memory = memory[: content.nbytes]
    memory.copy_(content, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(content.device))
    return memory, event
