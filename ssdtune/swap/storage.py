"""Ways to read a file: direct I/O where a probe finds it right, else buffered; and memory for it.

storage = choose_storage(path).storage          # direct I/O, or buffered and the reason why
buffer = aligned_bytes(layout.num_bytes, pin=True)
pool = ReaderPool(storage)                      # readers.py
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

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

    def open(self, path: Path) -> int:
        """A descriptor for `read`. OSError."""
        ...

    def read(self, fd: int, offset: int, buffer: memoryview) -> int:
        """Fill the buffer; returns less than its length only at the end of the file. OSError."""
        ...

    def close(self, fd: int) -> None:
        """Gives the descriptor back."""
        ...


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
        """Whether reads go past the page cache."""
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
    got, expected = (memoryview(anonymous(num_bytes)) for _ in range(2))
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


def anonymous(num_bytes: int) -> mmap.mmap:
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
        memory = anonymous(num_bytes)
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
