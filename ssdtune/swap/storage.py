"""Brings extents of files into page-aligned buffers: what can read, how it is chosen, who waits.

    storage = choose_storage(path).storage          # direct I/O, or buffered and the reason why
    pool = ReaderPool(storage)
    buffer = aligned_bytes(layout.num_bytes, pin=True)
    ticket = pool.submit(layout.extents, buffer, label="layers.7")
    ...                                             # compute something else
    ticket.wait(timeout_s=60)                       # StorageError or StorageTimeout name layers.7

A buffer belongs to the pool from submit() until wait() has returned or raised StorageError: only
then is no thread writing to it. After StorageTimeout it still belongs to the pool.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import struct
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from ssdtune.errors import SSDTuneError

if TYPE_CHECKING:
    import torch

MIB: Final = 1 << 20
# Never less, whatever the file system says: btrfs and tmpfs take unaligned buffers in silence, and
# a page-aligned superset costs at most two pages per extent.
MIN_ALIGNMENT: Final = 4096
PROBE_BYTES: Final = 64 * 1024
LATE_S: Final = 0.005  # how much of a late wake-up a throttled reader may catch up


class StorageError(SSDTuneError):
    """Bytes that could not be brought; names the block, the file and the offset."""


class StorageTimeout(StorageError):
    """Bytes that did not come in time; they may still come, so their buffer is not free."""


@dataclass(frozen=True, slots=True)
class Extent:
    """One read: `num_bytes` at `file_offset` go to `buffer_offset`; all three are aligned.

    An extent may pass the end of its file by less than the alignment. `needed_bytes`, counted from
    `file_offset`, are the ones that must come; None: all of them."""

    path: Path
    file_offset: int
    num_bytes: int
    buffer_offset: int
    needed_bytes: int | None = None


class Storage(Protocol):
    """A way to read files; read() may be called from several threads at once."""

    name: str
    alignment: int  # of file offsets, lengths and buffer addresses; a power of two

    def open(self, path: Path) -> int: ...
    def read(self, fd: int, offset: int, buffer: memoryview) -> int:
        """Fill the buffer; returns less than its length only at the end of the file. OSError."""
        ...

    def close(self, fd: int) -> None: ...


# ------------------------------------------------------------------------------- ways of reading


def _read_until_end(fd: int, offset: int, buffer: memoryview, alignment: int) -> int:
    filled = 0
    while filled < len(buffer):
        num_bytes = os.preadv(fd, [buffer[filled:]], offset + filled)
        filled += num_bytes
        # Off the alignment only the tail of a file can stop a direct read, and one that went on
        # from there may be refused (EINVAL).
        if num_bytes == 0 or filled % alignment:
            break
    return filled


class DirectStorage:
    """O_DIRECT: from the drive into the buffer, no copy by the CPU, nothing in the page cache."""

    def __init__(self, alignment: int = MIN_ALIGNMENT):
        self.name = "direct"
        self.alignment = alignment

    def open(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def read(self, fd: int, offset: int, buffer: memoryview) -> int:
        return _read_until_end(fd, offset, buffer, self.alignment)

    def close(self, fd: int) -> None:
        os.close(fd)


class BufferedStorage:
    """Through the page cache, dropping what was read behind itself.

    A model larger than RAM would otherwise evict everything else on the machine, twice a step."""

    def __init__(self, alignment: int = MIN_ALIGNMENT):
        self.name = "buffered"
        self.alignment = alignment  # not needed to read; keeps layouts equal to direct ones

    def open(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, fd: int, offset: int, buffer: memoryview) -> int:
        filled = _read_until_end(fd, offset, buffer, 1)
        _drop_cached(fd, offset, filled)
        return filled

    def close(self, fd: int) -> None:
        _drop_cached(fd, 0, 0)  # 0 bytes: to the end; what readahead brought in beyond the reads
        os.close(fd)


class ThrottledStorage:
    """Any storage as if its drive gave `bytes_per_s` in all, however many threads read.

    For benchmarks and tests of slow drives. Threads sleep until their bytes would have come."""

    def __init__(self, inner: Storage, bytes_per_s: float):
        assert bytes_per_s > 0, bytes_per_s
        self.name = f"{inner.name}, throttled to {bytes_per_s / 1e9:.3g} GB/s"
        self.alignment = inner.alignment
        self.bytes_per_s = bytes_per_s
        self._inner = inner
        self._lock = threading.Lock()
        self._free_at = 0.0  # when the pretended drive has done all it was asked so far

    def open(self, path: Path) -> int:
        return self._inner.open(path)

    def read(self, fd: int, offset: int, buffer: memoryview) -> int:
        with self._lock:
            begin = max(self._free_at, time.perf_counter() - LATE_S)
            self._free_at = due = begin + len(buffer) / self.bytes_per_s
        filled = self._inner.read(fd, offset, buffer)
        time.sleep(max(0.0, due - time.perf_counter()))
        return filled

    def close(self, fd: int) -> None:
        self._inner.close(fd)


def _drop_cached(fd: int, offset: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------------------------------- choice


@dataclass(frozen=True)
class StorageChoice:
    """A storage that works for a file, and one line saying why it is this one."""

    storage: DirectStorage | BufferedStorage
    reason: str

    @property
    def is_direct(self) -> bool:
        return isinstance(self.storage, DirectStorage)


def choose_storage(path: Path) -> StorageChoice:
    """Direct I/O if the file's own bytes come out of it unchanged, else buffered.

    path: a file, or a folder whose largest file is then taken. Compares aligned direct reads with
    buffered ones at start, middle and end (192 KiB in all): the name of a file system proves
    nothing. Raises StorageError if the file cannot be read at all."""
    try:
        file = _largest_file(path) if path.is_dir() else path
        alignment = direct_alignment(file)
        buffered = BufferedStorage(max(alignment, MIN_ALIGNMENT))
        if alignment == 0:
            return StorageChoice(buffered, "the file system says it has no direct I/O")
        direct = DirectStorage(alignment)
        why_not = _why_not_direct(file, direct, buffered)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
    if why_not:
        return StorageChoice(buffered, why_not)
    return StorageChoice(direct, f"direct reads equal buffered ones, alignment {alignment}")


def direct_alignment(path: Path) -> int:
    """What O_DIRECT on this file needs of offsets and addresses, at least 4096; 0 if it can't.

    Asks statx (STATX_DIOALIGN, Linux 6.1; see statx(2)); where that is unknown, says 4096."""
    statx = getattr(ctypes.CDLL(None), "statx", None)
    answer = ctypes.create_string_buffer(256)
    at_fdcwd, dio_align = -100, 0x2000
    if statx is None or statx(at_fdcwd, os.fsencode(path), 0, dio_align, answer) != 0:
        return MIN_ALIGNMENT
    (mask,) = struct.unpack_from("=I", answer, 0x00)
    memory, offset = struct.unpack_from("=II", answer, 0x98)
    if not mask & dio_align:
        return MIN_ALIGNMENT
    return max(MIN_ALIGNMENT, memory, offset) if offset else 0


def _largest_file(folder: Path) -> Path:
    files = [Path(entry.path) for entry in os.scandir(folder) if entry.is_file()]
    if not files:
        raise StorageError(f"cannot probe {folder}: no file in it to read.")
    return max(files, key=lambda file: (file.stat().st_size, file.name))


def _why_not_direct(path: Path, direct: DirectStorage, buffered: BufferedStorage) -> str | None:
    """None if direct reads of a few places equal buffered ones, else the reason."""
    if not hasattr(os, "O_DIRECT"):
        return "this system has no O_DIRECT"
    num_bytes = max(PROBE_BYTES, direct.alignment)
    got, expected = (memoryview(_anonymous(num_bytes)) for _ in range(2))
    plain_fd = buffered.open(path)
    try:
        direct_fd = direct.open(path)
    except OSError as error:
        buffered.close(plain_fd)
        return f"opening with O_DIRECT failed: {error.strerror}"
    try:
        last = max(0, os.fstat(plain_fd).st_size - 1)
        for place in sorted({0, last // 2, last}):
            offset = place // direct.alignment * direct.alignment
            num_expected = buffered.read(plain_fd, offset, expected)
            try:
                num_got = direct.read(direct_fd, offset, got)
            except OSError as error:
                return f"a direct read at offset {offset} failed: {error.strerror}"
            if got[:num_got] != expected[:num_expected]:
                return f"a direct read at offset {offset} differs from a buffered one"
        return None
    finally:
        direct.close(direct_fd)
        buffered.close(plain_fd)


# --------------------------------------------------------------------------------------- buffers


def _anonymous(num_bytes: int) -> mmap.mmap:
    """Zero pages, huge ones where the kernel has them.

    A direct read looks up every page of its buffer: with 4 KiB pages two threads got 0.9 GB/s from
    a drive that gives 2.4 GB/s into 2 MiB pages (virtual NVMe, Linux 6.18, 4 MiB requests)."""
    # MAP_PRIVATE: Python's default is shared memory, which counts as such and has no huge pages.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # best effort: not every kernel or system has them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def aligned_bytes(num_bytes: int, *, pin: bool = False) -> torch.Tensor:
    """A uint8 tensor [num_bytes], page-aligned, zero; exactly these bytes, rounded to a page.

    pin: also page-lock it for CUDA, where there is one (torch's own pinned allocator rounds to a
    power of two). Memory is unpinned and given back when the last tensor or view of it is gone; no
    copy may then be in flight. Raises StorageError if there is not as much memory."""
    import torch

    assert num_bytes >= 0, num_bytes
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    try:
        memory = _anonymous(num_bytes)
    except OSError as error:
        raise StorageError(
            f"cannot reserve {num_bytes:,} bytes of RAM for a buffer: {error.strerror}.\n"
            "Lower offload.ram or close other programs."
        ) from error
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    if pin and torch.cuda.is_available():
        _pin(memory, tensor)
    return tensor


def _pin(memory: mmap.mmap, tensor: torch.Tensor) -> None:
    import torch

    cudart: Any = torch.cuda.cudart()
    status = int(cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
    if status != 0:
        raise StorageError(
            f"CUDA cannot pin {tensor.nbytes:,} bytes of RAM (cudaHostRegister: error {status}).\n"
            "Lower offload.ram; on WSL2 about half of the RAM can be pinned."
        )
    # On the mapping, not the tensor: views keep the mapping alive when the tensor object is gone.
    # Weak callbacks run before the mapping is undone. At exit the driver cleans up by itself.
    weakref.finalize(memory, cudart.cudaHostUnregister, tensor.data_ptr()).atexit = False


def _as_view(buffer: torch.Tensor | memoryview) -> memoryview:
    view = buffer if isinstance(buffer, memoryview) else buffer.numpy().data
    return view.cast("B") if view.format != "B" else view


# --------------------------------------------------------------------------------------- readers


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
        if not self._all_done.wait(timeout_s):
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
        self._lock = threading.Lock()
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
    memory = memoryview(_anonymous(depth * step))
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
