"""A few threads that read extents of files into buffers, and the tickets on which others wait.

    pool = ReaderPool(storage)
    ticket = pool.submit(layout.extents, buffer, label="layers.7")
    ...                                             # compute something else
    ticket.wait(timeout_s=60)                       # StorageError or StorageTimeout name layers.7

A buffer belongs to the pool from submit() until wait() has returned or raised StorageError: only
then is no thread writing to it. After StorageTimeout it still belongs to the pool until done().
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ssdtune.swap.storage import (
    MIB,
    BufferedStorage,
    Extent,
    Storage,
    StorageError,
    StorageTimeout,
    anonymous,
)

if TYPE_CHECKING:
    import torch


class Ticket:
    """The promise of one submit(); times are perf_counter() seconds of its first and last read."""

    def __init__(self, label: str, files: Sequence[str], num_requests: int):
        self.label = label
        self.started = 0.0  # until the first read begins
        self.finished = 0.0  # until the last one has ended
        self._files = files
        self._num_requests = num_requests
        self._num_open = num_requests
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._all_done = threading.Event()

    @property
    def seconds(self) -> float:
        """From the first read's begin to the last one's end; 0 until then."""
        return self.finished - self.started if self.finished else 0.0

    def done(self) -> bool:
        """Whether wait() would return, or raise a failure, at once."""
        return self._all_done.is_set()

    def wait(self, timeout_s: float) -> None:
        """Return when all bytes are in the buffer. Raises StorageError, or StorageTimeout."""
        self._conclude(self._all_done.wait(timeout_s), timeout_s)

    def _conclude(self, is_over: bool, timeout_s: float) -> None:
        """What wait() does after it has waited."""
        if not is_over:
            num_done = self._num_requests - self._num_open
            more = f" and {len(self._files) - 2} more files" if len(self._files) > 2 else ""
            raise StorageTimeout(
                f"{self.label}: not read after {timeout_s:g} s: {num_done} of "
                f"{self._num_requests} reads done, of {', '.join(self._files[:2])}{more}.\n"
                "The drive does not answer or is slower than planned: see `ssdtune doctor`."
            )
        if self._error is not None:
            is_ours = isinstance(self._error, StorageError)
            what = str(self._error) if is_ours else repr(self._error)
            raise StorageError(f"{self.label}: {what}") from self._error

    def _begin(self) -> bool:
        """Whether there is still a reason to read."""
        with self._lock:
            if not self.started:
                self.started = time.perf_counter()
            return self._error is None

    def _end(self, error: Exception | None = None) -> None:
        with self._lock:
            self._error = self._error or error
            self._num_open -= 1
            if self._num_open > 0:
                return
            self.finished = time.perf_counter()
            self.started = self.started or self.finished
        self._all_done.set()


class _Request(NamedTuple):
    ticket: Ticket
    path: Path
    file_offset: int
    needed_bytes: int
    view: memoryview


class ReaderPool:
    """A few daemon threads that read requests of a few MiB, first come first served.

    Two threads and 4 MiB keep an NVMe drive busy: one request is in flight while the other thread
    hands over its own. Descriptors are opened once per file and closed by close()."""

    def __init__(self, storage: Storage, *, num_threads: int = 2, request_bytes: int = 4 * MIB):
        assert num_threads > 0, num_threads
        assert request_bytes > 0, request_bytes
        self.storage = storage
        self._num_threads = num_threads
        self._request_bytes = -(-request_bytes // storage.alignment) * storage.alignment
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._fds: dict[Path, int] = {}
        self._fds_lock = threading.Lock()
        self._lock = threading.RLock()  # a finalizer may close in the midst of a submit
        self._is_closed = False

    def submit(
        self, extents: Sequence[Extent], buffer: torch.Tensor | memoryview, *, label: str
    ) -> Ticket:
        """Begin to read extents into a buffer (uint8, aligned, writable); does not wait.

        Requests of one submit are read in order, after those of earlier ones. Raises StorageError
        after close()."""
        view = _as_view(buffer)
        requests = [part for extent in extents for part in self._split(extent, view)]
        files = list(dict.fromkeys(extent.path.name for extent in extents))
        ticket = Ticket(label, files, max(1, len(requests)))
        if not requests:
            ticket._begin()
            ticket._end()
            return ticket
        with self._lock:
            if self._is_closed:
                raise StorageError(f"{label}: the readers are closed.")
            self._start_threads()
            for path, file_offset, needed_bytes, part in requests:
                self._queue.put(_Request(ticket, path, file_offset, needed_bytes, part))
        return ticket

    def close(self, timeout_s: float = 10.0) -> None:
        """Fail what has not begun, finish what has, end the threads, close the files.

        A thread that the drive keeps longer than `timeout_s` keeps the files open: a descriptor
        closed under a read could be given to another file meanwhile."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        with suppress(queue.Empty):
            while (request := self._queue.get_nowait()) is not None:
                request.ticket._end(StorageError("the readers were closed before it was read."))
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.perf_counter() + timeout_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.perf_counter()))
        if not any(thread.is_alive() for thread in self._threads):
            for fd in self._fds.values():
                self.storage.close(fd)
            self._fds.clear()

    def __enter__(self) -> ReaderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _split(self, extent: Extent, view: memoryview) -> list[tuple[Path, int, int, memoryview]]:
        alignment = self.storage.alignment
        aligned = (extent.file_offset, extent.num_bytes, extent.buffer_offset)
        assert all(value % alignment == 0 for value in aligned), (extent, alignment)
        assert extent.buffer_offset + extent.num_bytes <= len(view), (extent, len(view))
        needed = extent.num_bytes if extent.needed_bytes is None else extent.needed_bytes
        parts: list[tuple[Path, int, int, memoryview]] = []
        for begin in range(0, extent.num_bytes, self._request_bytes):
            num_bytes = min(self._request_bytes, extent.num_bytes - begin)
            place = extent.buffer_offset + begin
            part = view[place : place + num_bytes]
            num_needed = min(num_bytes, max(0, needed - begin))
            parts.append((extent.path, extent.file_offset + begin, num_needed, part))
        return parts

    def _start_threads(self) -> None:
        while len(self._threads) < self._num_threads:
            name = f"ssdtune-read-{len(self._threads)}"
            thread = threading.Thread(target=self._serve, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self) -> None:
        while (request := self._queue.get()) is not None:
            if not request.ticket._begin():
                request.ticket._end()
                continue
            try:
                self._read(request)
            except Exception as error:  # whatever it is, it belongs to the one who waits
                request.ticket._end(error)
            else:
                request.ticket._end()
            del request  # an idle thread must not keep a buffer alive

    def _read(self, request: _Request) -> None:
        path, offset = request.path, request.file_offset
        try:
            fd = self._fd(path)
            filled = self.storage.read(fd, offset, request.view)
            if filled >= request.needed_bytes:
                return
            file_bytes = os.fstat(fd).st_size
        except OSError as error:
            reason = f"{error.strerror or error} (errno {error.errno})"
            raise StorageError(
                f"cannot read {len(request.view):,} bytes at offset {offset:,} of {path}: {reason}."
            ) from error
        raise StorageError(
            f"{path} gave {filled:,} of {request.needed_bytes:,} bytes at offset {offset:,}; "
            f"it has {file_bytes:,} now.\n"
            "It was cut short since its header was read. Restore or download it again."
        )

    def _fd(self, path: Path) -> int:
        with self._fds_lock:
            fd = self._fds.get(path)
            if fd is None:
                fd = self._fds[path] = self.storage.open(path)
            return fd


def measure_read_rate(storage: Storage, path: Path, seconds: float = 0.5) -> float:
    """GB/s (1e9 bytes) at which a pool of two threads reads a file, over and over, for `seconds`.

    What the page cache holds of the file is dropped first, so that a buffered figure is of the
    drive, as far as the kernel obeys. Raises StorageError; 0.0 for an empty file."""
    request_bytes, depth = 4 * MIB, 4
    try:
        file_bytes = path.stat().st_size
        BufferedStorage().close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
    if file_bytes == 0:
        return 0.0
    step = min(request_bytes, -(-file_bytes // storage.alignment) * storage.alignment)
    memory = memoryview(anonymous(depth * step))
    tickets: list[Ticket] = []
    num_read = offset = turn = 0
    with ReaderPool(storage, request_bytes=step) as pool:
        begin = time.perf_counter()
        while True:
            if len(tickets) == depth:
                tickets.pop(0).wait(timeout_s=60)
                if (elapsed := time.perf_counter() - begin) >= seconds:
                    break
            num_bytes = min(step, file_bytes - offset)
            extent = Extent(path, offset, step, turn % depth * step, num_bytes)
            tickets.append(pool.submit([extent], memory, label="measuring"))
            num_read += num_bytes
            turn += 1
            offset = offset + step if offset + step < file_bytes else 0
        for ticket in tickets:
            ticket.wait(timeout_s=60)
        elapsed = time.perf_counter() - begin
    return num_read / elapsed / 1e9


def _as_view(buffer: torch.Tensor | memoryview) -> memoryview:
    view = buffer if isinstance(buffer, memoryview) else buffer.numpy().data
    return view.cast("B") if view.format != "B" else view
