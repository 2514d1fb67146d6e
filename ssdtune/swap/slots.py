"""Slots and buffers: all memory that weights pass through, allocated once, exactly as planned."""

from __future__ import annotations

import threading
from time import perf_counter

import torch

from ssdtune.schedule.plan import Plan
from ssdtune.swap.readers import Ticket
from ssdtune.swap.recipe import BlockRecipe
from ssdtune.swap.storage import StorageError, aligned_bytes

PAGE = 4096  # of a device: cuFile takes a slower road to memory that starts elsewhere
LATE_POLL_S = 0.1  # a buffer whose read timed out tells nobody when it is free after all


class Slots:
    """The plan's slots on a device, and a block's tensors inside a slot (made once, reused)."""

    def __init__(self, plan: Plan, recipes: tuple[BlockRecipe, ...], device: torch.device) -> None:
        self.device = device
        self.recipes = recipes
        # A device's allocator gives memory on 512-byte boundaries, RAM comes in pages.
        self.memory = [self._slot(n) for n in plan.slots]
        self.buffers_on_device = plan.buffers_on_device
        self.buffers = Buffers([self._buffer(n) for n in plan.buffers])
        # Packed blocks come here from RAM, to be decoded by the device: one at a time, in the order of one stream.
        self._staging = torch.empty(plan.staging_bytes, dtype=torch.uint8, device=device)
        self._packed = [recipe.packed for recipe in recipes]
        if plan.buffers_on_device and device.type == "cuda":
            # Kernels that used the buffers' memory when it was another tensor's -> first reads into
            # them, which no stream orders. Once, before any work of ours is queued.
            torch.cuda.current_stream(device).synchronize()
        self._tensors: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._lock = threading.Lock()  # the filling and the computing thread may ask at once

    def _slot(self, num_bytes: int) -> torch.Tensor:
        if self.device.type == "cpu":
            return aligned_bytes(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        if self.buffers_on_device:
            return page_aligned(num_bytes, self.device)
        return aligned_bytes(num_bytes, pin=self.device.type != "cpu")

    def free(self) -> None:
        """Gives the memory back; whoever still holds a block's tensors keeps its slot."""
        self.memory.clear()
        self.buffers = Buffers([])
        self._staging = self._staging[:0].clone()
        self._tensors.clear()

    def tensors(self, block: int, slot: int) -> list[torch.Tensor]:
        """The block's tensors in that slot, in the recipe's order; the same objects every time."""
        key = (block, slot)
        with self._lock:
            if key not in self._tensors:
                memory = self.memory[slot]
                with torch.inference_mode(False):  # they outlive whoever asks first
                    made = [view.of(memory) for view in self.recipes[block].tensors]
                self._tensors[key] = made
            return self._tensors[key]

    def unpack(self, block: int, buffer: torch.Tensor, slot: int) -> None:
        """Copies a block from a filled buffer into a slot, decoding what is packed, on the current stream if there is one.

        Checksums are not looked at here: bytes that stay in RAM are copied many times and read once.
        """
        targets, recipe = self.tensors(block, slot), self.recipes[block]
        if self._packed[block] and buffer.device != self.device:
            there = self._staging[: recipe.file_bytes]
            buffer = there.copy_(buffer[: recipe.file_bytes], non_blocking=True)
        with torch.no_grad():
            for copy in recipe.copies:
                copy.run(buffer, targets)


class Buffer:
    """One staging buffer. `copied`: the copy out of it, which the next read into it waits for.
    `late`: a read that timed out and may still write into it."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.copied: torch.cuda.Event | None = None
        self.late: Ticket | None = None
        self.is_taken = False

    def is_free(self) -> bool:
        """Whether nothing is read into it or copied by the host any more."""
        return not self.is_taken and (self.late is None or self.late.done())


class Buffers:
    """The staging buffers, the one unused longest first."""

    def __init__(self, memories: list[torch.Tensor]) -> None:
        self._buffers = [Buffer(memory) for memory in memories]
        self._changed = threading.Condition()
        self._is_closed = False

    def take(self, num_bytes: int, timeout_s: float) -> Buffer:
        """A free buffer of at least so many bytes; waits for one. Raises StorageError."""
        deadline = perf_counter() + timeout_s
        with self._changed:
            while True:
                if self._is_closed:
                    raise StorageError("the engine was closed")
                buffer = next(
                    (b for b in self._buffers if b.is_free() and _fits(b, num_bytes)), None
                )
                if buffer is not None:
                    break
                if perf_counter() > deadline:
                    raise StorageError(self._why_none(timeout_s))
                self._changed.wait(min(LATE_POLL_S, max(deadline - perf_counter(), 0.001)))
            buffer.is_taken = True
        if buffer.copied is not None:
            buffer.copied.synchronize()  # copy out of the buffer -> next read into it
        return buffer

    def give(self, buffer: Buffer, *, late: Ticket | None = None) -> None:
        """The buffer is free, once `late`, a read that may still write into it, is over."""
        with self._changed:
            buffer.late = late
            buffer.is_taken = False
            self._buffers.remove(buffer)
            self._buffers.append(buffer)
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the waiting."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _why_none(self, timeout_s: float) -> str:
        late = [b.late.label for b in self._buffers if b.late is not None and not b.late.done()]
        why = f"waited {timeout_s:g} s for one of {len(self._buffers)} staging buffers"
        return f"{why}; reads of {', '.join(late)} did not end" if late else why


def page_aligned(num_bytes: int, device: torch.device) -> torch.Tensor:
    """A uint8 tensor [num_bytes] of the device's allocator that starts on a page; a page more is taken."""
    memory = torch.empty(num_bytes + PAGE, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % PAGE
    return memory[start : start + num_bytes]


def _fits(buffer: Buffer, num_bytes: int) -> bool:
    return buffer.memory.nbytes >= num_bytes
