"""Tensors that wait for backward in a scratch file.

Backward takes in exactly the reverse order of keeping, so what was kept last is read back first, and ahead of need.
Compute pays one copy into a small ring of staging chunks on the way out and one out of it on the way back; a thread
does the I/O. The ring is all the memory there is: when it is full, `keep` waits for the drive. Chunks that are written
but not yet needed for others still hold their bytes, so the last blocks of forward, the first of backward, are not read
again.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter

import torch

from ssdtune.schedule.memory import STAGING_BYTES
from ssdtune.schedule.plan import Direction, Lane
from ssdtune.schedule.trace import UNPLANNED, TraceOp
from ssdtune.swap.kept import (
    INPUTS,
    MIB,
    MIN_BYTES,
    SEGMENT_BYTES,
    Contents,
    InputsError,
    InputStore,
    Record,
)
from ssdtune.swap.scratch import ScratchError, ScratchFile, Space
from ssdtune.swap.storage import aligned_bytes

CHUNK_BYTES = 4 * MIB  # one request; the size at which drives reach their rate
NUM_CHUNKS = STAGING_BYTES // CHUNK_BYTES


@dataclasses.dataclass(eq=False, slots=True)
class _Chunk:
    """One staging buffer of the ring. `record` and `piece`: whose bytes it holds, None: nobody's that matter."""

    memory: torch.Tensor
    record: Record | None = None
    piece: int = 0
    is_filled: bool = False
    filled: torch.cuda.Event | None = None  # copy from the device -> write, or copy back
    emptied: torch.cuda.Event | None = None  # copy to the device -> next filling


@dataclasses.dataclass(slots=True)
class _Job:
    """A piece to be written from its chunk, or read into it."""

    chunk: _Chunk
    record: Record
    piece: int
    is_write: bool


class NvmeInputs(InputStore):
    """Inputs in a scratch file, through a ring of staging chunks and one thread that writes and reads."""

    def __init__(  # noqa: PLR0913 - all but the first two are for tests and tuning
        self,
        file: ScratchFile,
        *,
        device: torch.device,
        contents: Contents = INPUTS,
        trace: Callable[[TraceOp], None] = lambda op: None,
        timeout_s: float = 600.0,
        min_bytes: int = MIN_BYTES,
        chunk_bytes: int = CHUNK_BYTES,
        num_chunks: int = NUM_CHUNKS,
    ) -> None:
        super().__init__(device=device, timeout_s=timeout_s, min_bytes=min_bytes)
        assert chunk_bytes % file.alignment == 0, (chunk_bytes, file.alignment)
        self.file, self.chunk_bytes, self._trace = file, chunk_bytes, trace
        self.contents = contents
        pin = device.type != "cpu"
        # Those that nobody needs on the left, those that may be needed, the longest unused first, on the right.
        self._idle = deque(_Chunk(aligned_bytes(chunk_bytes, pin=pin)) for _ in range(num_chunks))
        self._space = Space()
        self._waiting: list[Record] = []  # kept and not yet taken, the last one is wanted first
        self._error: InputsError | None = None
        self._changed = threading.Condition()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="ssdtune-inputs", daemon=True)
        self._thread.start()

    @property
    def reserved_bytes(self) -> int:
        """See InputStore."""
        return self.file.num_bytes

    def reserve(self, num_bytes: int) -> None:
        """See InputStore."""
        self.file.reserve(-(-num_bytes // self.file.alignment) * self.file.alignment)

    def begin_step(self, step: int) -> None:
        """See InputStore. A failure to write ends with its step: the next one may try again."""
        super().begin_step(step)
        with self._changed:
            self._error = None
        self._waiting = [r for r in self._waiting if not r.is_released]

    def read_ahead(self) -> None:
        """Begins to read what backward will want first, as far as there are chunks that nobody needs."""
        waiting = self._waiting
        while waiting and (waiting[-1].is_done or waiting[-1].is_released):
            waiting.pop()
        with self._changed:
            for record in reversed(waiting):
                if record.is_done or record.is_released:
                    continue
                for piece in range(record.num_gone, self._num_pieces(record)):
                    if piece in record.chunks:
                        continue
                    if not self._idle or self._idle[0].record is not None:
                        return
                    self._read(self._own(self._idle.popleft(), record, piece))

    def close(self) -> None:
        """Ends the thread after what is under way and gives the file's space back."""
        super().close()
        self._jobs.put(None)
        self._thread.join(self.timeout_s)
        if not self._thread.is_alive():
            self.file.close()

    # ---- out and back --------------------------------------------------------------------------------------------

    def _put(self, record: Record, content: torch.Tensor) -> None:
        alignment = self.file.alignment
        num_bytes = -(-record.num_bytes // alignment) * alignment
        start = self._space.take(num_bytes)
        assert start is not None
        record.place = (0, start, num_bytes)
        self._reserve_up_to(self._space.end)
        self._waiting.append(record)
        self._leave_device(content)
        for piece in range(self._num_pieces(record)):
            chunk = self._claim(record, piece)
            part = self._part(record, piece)
            room = chunk.memory[: part.stop - part.start]
            if self._out is None:
                room.copy_(content[part])
            else:
                with torch.cuda.stream(self._out):
                    if chunk.emptied is not None:
                        self._out.wait_event(chunk.emptied)
                    room.copy_(content[part], non_blocking=True)
                    chunk.filled = torch.cuda.Event()
                    chunk.filled.record(self._out)
            chunk.is_filled = True
            self._jobs.put(_Job(chunk, record, piece, is_write=True))

    def _get(self, record: Record, target: torch.Tensor) -> None:
        for piece in range(self._num_pieces(record)):
            chunk = self._arrived(record, piece)
            part = self._part(record, piece)
            if self._back is None:
                target[part].copy_(chunk.memory[: part.stop - part.start])
            else:
                if chunk.filled is not None:
                    self._back.wait_event(chunk.filled)
                target[part].copy_(chunk.memory[: part.stop - part.start], non_blocking=True)
                chunk.emptied = torch.cuda.Event()
                chunk.emptied.record(self._back)
            if record.times_taken + 1 >= record.times_kept:
                record.num_gone = piece + 1
                self._disown(record, piece)
                self.read_ahead()

    def _taken(self, record: Record) -> None:
        self.read_ahead()

    def _passed_by(self, record: Record) -> None:
        if record.is_done:
            for piece in list(record.chunks):
                self._disown(record, piece)
        self.read_ahead()

    def _give_up(self, record: Record) -> None:
        for piece in list(record.chunks):
            self._disown(record, piece)
        _, start, num_bytes = record.place
        if num_bytes:
            self._space.give(start, num_bytes)
            record.place = (0, 0, 0)

    def _reserve_up_to(self, num_bytes: int) -> None:
        """Grows in large strides: a file of few extents, and few steps in which it grows at all."""
        if num_bytes > self.file.num_bytes:
            try:
                self.reserve(-(-num_bytes // SEGMENT_BYTES) * SEGMENT_BYTES)
            except ScratchError:
                self.reserve(num_bytes)

    def _num_pieces(self, record: Record) -> int:
        return -(-record.num_bytes // self.chunk_bytes)

    def _part(self, record: Record, piece: int) -> slice:
        """Which bytes of the tensor a piece is."""
        start = piece * self.chunk_bytes
        return slice(start, min(start + self.chunk_bytes, record.num_bytes))

    # ---- chunks --------------------------------------------------------------------------------------------------

    def _claim(self, record: Record, piece: int) -> _Chunk:
        """A chunk for the piece, from one that nobody needs or the one unused longest; waits where all are busy."""
        with self._changed:
            self._wait(
                lambda: bool(self._idle) or self._error is not None,
                "to be written, so that a chunk is free",
            )
            if self._error is not None:
                raise _anew(self._error)
            return self._own(self._idle.popleft(), record, piece)

    def _own(self, chunk: _Chunk, record: Record, piece: int) -> _Chunk:
        if chunk.record is not None:
            del chunk.record.chunks[chunk.piece]
        chunk.record, chunk.piece, chunk.is_filled, chunk.filled = record, piece, False, None
        record.chunks[piece] = chunk
        return chunk

    def _disown(self, record: Record, piece: int) -> None:
        """The piece's chunk, if it has one, is the first to be used for others."""
        with self._changed:
            chunk = record.chunks.pop(piece, None)
            if chunk is None:
                return
            chunk.record = None
            if chunk in self._idle:
                self._idle.remove(chunk)
                self._idle.appendleft(chunk)

    def _arrived(self, record: Record, piece: int) -> _Chunk:
        """The chunk that holds the piece, read on demand where nobody has asked for it yet."""
        with self._changed:
            chunk = record.chunks.get(piece)
        if chunk is None and record.error is None:
            chunk = self._read(self._claim(record, piece))
        with self._changed:
            self._wait(
                lambda: record.error is not None or (chunk is not None and chunk.is_filled),
                f"for {self.contents.one} of {record.label or 'a block'} to be read",
            )
        if record.error is not None:
            raise _anew(record.error)
        assert chunk is not None
        return chunk

    def _wait(self, is_over: Callable[[], bool], what: str) -> None:
        start = perf_counter()
        is_in_time = self._changed.wait_for(is_over, self.timeout_s)
        self.waited_s += perf_counter() - start
        if not is_in_time:
            raise InputsError(
                f"waited {self.timeout_s:.0f} s for {self.contents.many} {what}: {self.file.place} does not answer.\n"
                "The drive hangs or is slower than planned: see `ssdtune doctor`."
            )

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _read(self, chunk: _Chunk) -> _Chunk:
        assert chunk.record is not None
        self._jobs.put(_Job(chunk, chunk.record, chunk.piece, is_write=False))
        return chunk

    def _serve(self) -> None:
        """Carries jobs out in order, so that what is read was written before."""
        while (job := self._jobs.get()) is not None:
            start, error = perf_counter(), None
            place = job.record.place
            is_void = job.record.is_released or not place[2]
            try:
                if not is_void:
                    self._transfer(job, place[1])
            except (
                Exception
            ) as caught:  # surfaces in the caller, at the record or at the next `keep`
                error = self._explained(job, caught)
            with self._changed:
                self._finish(job, error)
                self._changed.notify_all()
            if error is None and not is_void:
                self._record(job, start)
            del job

    def _transfer(self, job: _Job, start: int) -> None:
        part = self._part(job.record, job.piece)
        alignment = self.file.alignment
        num_bytes = -(-(part.stop - part.start) // alignment) * alignment
        view = job.chunk.memory.numpy().data[:num_bytes]
        if job.is_write:
            if job.chunk.filled is not None:
                job.chunk.filled.synchronize()
            self.file.write(start + part.start, view)
        else:
            if job.chunk.emptied is not None:
                job.chunk.emptied.synchronize()
            self.file.read(start + part.start, view)

    def _finish(self, job: _Job, error: InputsError | None) -> None:
        """The chunk is idle again, on the left where nobody needs it. The caller holds the lock."""
        chunk = job.chunk
        if error is not None:
            job.record.error = error
            self._error = self._error or error
            if chunk.record is not None:
                chunk.record.chunks.pop(chunk.piece, None)
                chunk.record = None
        chunk.is_filled = error is None
        if chunk.record is None:
            self._idle.appendleft(chunk)
        else:
            self._idle.append(chunk)

    def _explained(self, job: _Job, error: Exception) -> InputsError:
        part = self._part(job.record, job.piece)
        verb = "write" if job.is_write else "read"
        number = getattr(error, "errno", None)
        reason = f"{getattr(error, 'strerror', None) or error} (errno {number})"
        explained = InputsError(
            f"cannot {verb} {part.stop - part.start:,} bytes of {self.contents.one} of {job.record.label or 'a block'}, "
            f"{'to' if job.is_write else 'from'} {self.file.place}: {reason}.\n"
            "Look at the drive (dmesg), or point offload.path to another one."
        )
        explained.__cause__ = error
        return explained

    def _record(self, job: _Job, start: float) -> None:
        part = self._part(job.record, job.piece)
        self._trace(
            TraceOp(
                op_id=UNPLANNED,
                kind=self.contents.store if job.is_write else self.contents.fetch,
                lane=Lane.NVME_WRITE if job.is_write else Lane.NVME_READ,
                block=job.record.label,
                direction=Direction.FORWARD if job.is_write else Direction.BACKWARD,
                step=self.step,
                start_s=start,
                end_s=perf_counter(),
                num_bytes=part.stop - part.start,
            )
        )


def _anew(error: InputsError) -> InputsError:
    """The same error, to be raised: what was raised holds the frames it passed, and with them what they kept."""
    made = InputsError(str(error))
    made.__cause__ = error.__cause__
    return made
