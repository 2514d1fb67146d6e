"""From the drive straight into device memory, through kvikio's CuFile, where that is faster.

cuFile takes a slower road without a word where it cannot do direct transfers (GeForce cards, no
nvidia-fs, unaligned offsets), so no property of the driver decides but a self-test that compares
bytes and times. kvikio's own compatibility mode reads through the page cache and is never used.

API: kvikio 25.12-26.10, python/kvikio/kvikio/cufile.py and defaults.py. Not in its documentation:
* a future is good for one get(): after it get() and done() raise (_lib/future.pyx);
* a read of several tasks is done() when one of them has failed, though the others still write
  (parallel_operation.hpp), so each read here is one task;
* pread first waits, on the host, for what is queued on the device's default stream
  (file_handle.cpp: sync_default_stream, which Python cannot switch off): torch's stream, unless the
  caller has set another. A read so begins only after the compute that was queued before it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from ssdtune.swap import storage as host
from ssdtune.swap.readers import ReaderPool, Ticket

if TYPE_CHECKING:
    import torch

TEST_BYTES: Final = 64 * host.MIB
WORK_S: Final = 0.03  # of compute queued before each read: longer than a read of TEST_BYTES
MIN_GAIN: Final = 1.05  # less is noise, and not worth another code path
REQUEST_BYTES: Final = 16 * host.MIB  # the most that cuFile moves at once (max_direct_io_size_kb)
POLL_S: Final = 2e-4  # a future tells nobody when it is done


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """One read under way. `part`: where it writes; memory that must not be freed meanwhile."""

    path: Path
    file_offset: int
    part: torch.Tensor
    future: Any

    def end(self) -> None:
        """Takes its result, which can be taken once. Raises StorageError."""
        place = f"at offset {self.file_offset:,} of {self.path}"
        try:
            got = self.future.get()
        except Exception as error:
            what = f"cuFile cannot read {self.part.nbytes:,} bytes {place}: {error}."
            raise host.StorageError(what) from error
        if got < self.part.nbytes:
            raise host.StorageError(
                f"cuFile gave {got:,} of {self.part.nbytes:,} bytes {place}.\n"
                "It was cut short since its header was read. Restore or download it again."
            )


class GdsTicket(Ticket):
    """A readers.Ticket over kvikio's futures.

    Nobody is told when they are done: `finished` is when somebody asked first after that. `started`
    is when the first of them was handed to kvikio, which may have others to read before it.
    """

    def __init__(self, label: str, files: Sequence[str], num_reads: int):
        super().__init__(label, files, num_reads)
        self._num_open += 1  # until all_begun()
        self._reads: list[_Read] = []  # begun, and not known to be over
        self._ending = threading.RLock()  # a finalizer may close the pool in the midst of done()
        self._is_given_up = False

    def add(self, read: _Read) -> None:
        """One more read has begun."""
        self._begin()
        with self._ending:
            self._reads.append(read)

    def all_begun(self, num_left_out: int, error: Exception | None) -> None:
        """No read is added any more, for want of reads or because of an error."""
        for _ in range(1 + num_left_out):
            self._end(error)

    def give_up(self) -> None:
        """Ends all waiting, though reads may still write: with StorageTimeout."""
        self._is_given_up = True

    def done(self) -> bool:
        """See Ticket. Takes note of reads that have ended: no thread does."""
        with self._ending:  # several threads may ask, and a result can be taken once
            for read in list(self._reads):
                if read in self._reads and read.future.done():
                    self._reads.remove(read)
                    self._take(read)
        return super().done()

    def _take(self, read: _Read) -> None:
        try:
            read.end()
        except host.StorageError as error:
            self._end(error)
        else:
            self._end()

    def wait(self, timeout_s: float) -> None:
        """See Ticket. Ends early, too, where all was given up."""
        start = time.perf_counter()
        deadline = start + timeout_s
        while not self.done() and not self._is_given_up and time.perf_counter() < deadline:
            time.sleep(POLL_S)
        self._conclude(super().done(), min(timeout_s, time.perf_counter() - start))


class GdsPool:
    """ReaderPool's twin whose buffers are device tensors (uint8, contiguous).

    A read is ordered by no stream: the host must have waited for the event of the buffer's last
    reader before submit(); after wait() any stream may read the buffer."""

    def __init__(self, kvikio: Any, *, request_bytes: int = REQUEST_BYTES):
        self.name = "cuFile"
        self.alignment = 4096  # the GPU page; other offsets take the slow road
        self._kvikio = kvikio
        self._request_bytes = request_bytes
        self._files: dict[Path, Any] = {}
        self._open: list[GdsTicket] = []  # not known to be over
        self._lock = threading.RLock()  # a finalizer may close in the midst of a submit
        self._is_closed = False

    def submit(
        self, extents: Sequence[host.Extent], buffer: torch.Tensor, *, label: str
    ) -> GdsTicket:
        """Begin to read extents into a buffer (uint8, on a device); does not wait for the bytes.

        For one thread only. What goes wrong comes out of the ticket's wait(). Raises StorageError
        after close()."""
        parts = [part for extent in extents for part in self._split(extent, buffer)]
        files = list(dict.fromkeys(extent.path.name for extent in extents))
        ticket = GdsTicket(label, files, len(parts))
        error: Exception | None = None
        num_begun = 0
        with self._lock:
            if self._is_closed:
                raise host.StorageError(f"{label}: the readers are closed.")
            self._open = [other for other in self._open if not other.done()]
            self._open.append(ticket)
        # Without the lock: a read may be long in beginning. Files stay open as long as the ticket is.
        try:
            for path, file_offset, part in parts:
                future = self._begin(path, file_offset, part)
                ticket.add(_Read(path, file_offset, part, future))
                num_begun += 1
        except Exception as caught:  # what has begun goes on: the ticket is over only after it
            error = caught
        ticket.all_begun(len(parts) - num_begun, error)
        return ticket

    def close(self, timeout_s: float = 10.0) -> None:
        """Let what has begun end, close the files. kvikio can take no read back.

        Reads that the drive keeps longer than `timeout_s` keep their memory and their files until
        they have ended; who waits for them gets StorageTimeout at once."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            begun, self._open = self._open, []
        deadline = time.perf_counter() + timeout_s
        while (begun := [t for t in begun if not t.done()]) and time.perf_counter() < deadline:
            time.sleep(POLL_S)
        if not begun:
            self._close_files()
            return
        for ticket in begun:
            ticket.give_up()
        threading.Thread(
            target=self._outlast, args=(begun,), name="ssdtune-cufile", daemon=True
        ).start()

    def _outlast(self, late: list[GdsTicket]) -> None:
        """Holds the memory that late reads write into until they have ended."""
        while late := [ticket for ticket in late if not ticket.done()]:
            time.sleep(0.05)
        self._close_files()

    def _close_files(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _split(
        self, extent: host.Extent, buffer: torch.Tensor
    ) -> Iterator[tuple[Path, int, torch.Tensor]]:
        """(file, offset, where to), one kvikio task each; not past the bytes that must come, since
        kvikio may take the end of the file for an error."""
        needed = extent.num_bytes if extent.needed_bytes is None else extent.needed_bytes
        assert extent.buffer_offset + needed <= buffer.nbytes, (extent, buffer.nbytes)
        for begin in range(0, needed, self._request_bytes):
            end = min(begin + self._request_bytes, needed)
            part = buffer[extent.buffer_offset + begin : extent.buffer_offset + end]
            yield extent.path, extent.file_offset + begin, part

    def _begin(self, path: Path, file_offset: int, part: torch.Tensor) -> Any:
        """The future of one read. Raises StorageError."""
        if self._is_closed:  # since this submit began
            raise host.StorageError("the readers were closed before it was read.")
        try:
            if path not in self._files:
                self._files[path] = self._kvikio.CuFile(path, "r")
            return self._files[path].pread(part, part.nbytes, file_offset, part.nbytes)
        except Exception as error:
            what = f"cuFile cannot begin to read {path} at offset {file_offset:,}: {error}."
            raise host.StorageError(what) from error


@dataclass(frozen=True)
class GdsChoice:
    """How a pool is opened, or None; and one line saying why."""

    open_pool: Callable[[], GdsPool] | None
    reason: str


def choose_gds(path: Path, *, device: str = "cuda", num_threads: int = 4) -> GdsChoice:
    """Offer cuFile if it reads `path` (a large file) byte-identically and faster than our readers.

    Sets kvikio's thread count, which is one per process. What is missing is a reason, no error."""
    import torch

    if not torch.cuda.is_available():
        return GdsChoice(None, "no CUDA device (torch.cuda.is_available() is false)")
    kvikio: Any = None
    try:
        import kvikio  # pyright: ignore[reportMissingImports]
        import kvikio.defaults  # pyright: ignore[reportMissingImports]

        if kvikio.defaults.is_compat_mode_preferred():
            return GdsChoice(None, "kvikio is in compatibility mode: no cuFile on this system")
        kvikio.defaults.set("num_threads", num_threads)
        pool = GdsPool(kvikio)
        try:
            is_better, reason = _self_test(pool, path, device)
        finally:
            pool.close()
    except Exception as error:  # a missing package or library, a driver's refusal, a failed read
        lines = str(error).strip().splitlines() or [type(error).__name__]
        is_better, reason = False, f"kvikio: {lines[-1]}"
    return GdsChoice((lambda: GdsPool(kvikio)) if is_better else None, reason)


def _self_test(pool: GdsPool, path: Path, device: str) -> tuple[bool, str]:
    """Read the end of the file both ways, its unaligned tail included, while the device computes as
    it will in training (see the module's docstring for what waits); alternate, take medians."""
    import torch

    needed = path.stat().st_size
    if needed < 8 * host.MIB:
        return False, f"{path.name} is too small to time"
    begin = max(0, needed - TEST_BYTES) // pool.alignment * pool.alignment
    needed -= begin
    extent = host.Extent(path, begin, -(-needed // pool.alignment) * pool.alignment, 0, needed)
    pinned = host.aligned_bytes(extent.num_bytes, pin=True)
    ours, theirs = (torch.full((len(pinned),), i, dtype=torch.uint8, device=device) for i in (1, 2))
    our_s, their_s = [], []
    copies, work = torch.cuda.Stream(ours.device), _Work(ours.device)
    storage = host.choose_storage(path).storage
    with ReaderPool(storage) as readers:
        for _ in range(5):
            work.queue()
            start = time.perf_counter()
            readers.submit([extent], pinned, label="self-test").wait(60)
            with torch.cuda.stream(copies):
                ours.copy_(pinned, non_blocking=True)
            copies.synchronize()
            our_s.append(time.perf_counter() - start)
            work.wait()
            work.queue()
            start = time.perf_counter()
            pool.submit([extent], theirs, label="self-test").wait(60)
            their_s.append(time.perf_counter() - start)
            work.wait()
    if not torch.equal(ours[:needed], theirs[:needed]):
        return False, "cuFile's bytes differ from the file's"
    our_rate, their_rate = (needed / median(seconds) / 1e9 for seconds in (our_s, their_s))
    reason = (
        f"beside compute cuFile {their_rate:.2f} GB/s, {storage.name} + copy {our_rate:.2f} GB/s"
    )
    return their_rate > MIN_GAIN * our_rate, reason


class _Work:
    """Matrix products on the stream that torch computes on, as long as a read of the test takes."""

    def __init__(self, device: torch.device) -> None:
        import torch

        values = torch.ones((4096, 4096), dtype=torch.float16, device=device)
        self._product = partial(torch.mm, values, values)
        self._stream = torch.cuda.current_stream(device)
        self._count = 1
        self.queue()  # loads the library
        self.wait()
        start = time.perf_counter()
        self.queue()
        self.wait()
        self._count = max(1, min(1000, int(WORK_S / max(time.perf_counter() - start, 1e-6))))

    def queue(self) -> None:
        for _ in range(self._count):
            self._product()

    def wait(self) -> None:
        self._stream.synchronize()
