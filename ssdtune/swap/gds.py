"""From the drive straight into device memory, through kvikio's CuFile, where that is faster.

cuFile takes a slower road without a word where it cannot do direct transfers (GeForce cards, no
nvidia-fs, unaligned offsets), so no property of the driver decides but a self-test that compares
bytes and times. kvikio's own compatibility mode reads through the page cache and is never used.
API: kvikio 25.12-26.10, python/kvikio/kvikio/cufile.py and defaults.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from ssdtune.swap import storage as host
from ssdtune.swap.readers import ReaderPool, Ticket

if TYPE_CHECKING:
    import torch

TEST_BYTES: Final = 64 * host.MIB
MIN_GAIN: Final = 1.05  # less is noise, and not worth another code path


class GdsTicket(Ticket):
    """A readers.Ticket over kvikio futures; `finished` is when wait() saw the last byte."""

    def __init__(self, label: str, reads: Sequence[tuple[Path, int, Any]]):
        super().__init__(label, list(dict.fromkeys(path.name for path, _, _ in reads)), len(reads))
        self.started = time.perf_counter()
        self._reads = reads  # file, bytes that must come, future

    def done(self) -> bool:
        return all(future.done() for _, _, future in self._reads)

    def wait(self, timeout_s: float) -> None:
        deadline = time.perf_counter() + timeout_s
        while not self.done():  # IOFuture.get() itself knows no deadline
            if time.perf_counter() > deadline:
                what = f"cuFile did not read {self._files[:2]} in {timeout_s:g} s"
                raise host.StorageTimeout(f"{self.label}: {what}.")
            time.sleep(1e-4)
        for path, needed, future in self._reads:
            try:
                got = future.get()
            except Exception as error:
                raise host.StorageError(f"{self.label}: cuFile on {path}: {error}.") from error
            if got < needed:
                raise host.StorageError(f"{self.label}: {path} gave {got:,} of {needed:,} bytes.")
        self.finished = self.finished or time.perf_counter()


class GdsPool:
    """ReaderPool's twin whose buffers are device tensors (uint8, contiguous).

    A read is ordered by no stream: the host must have waited for the event of the slot's last
    reader before submit(); after wait() any stream may read the slot."""

    def __init__(self, kvikio: Any):
        self.name = "kvikio"
        self.alignment = 4096  # the GPU page; other offsets take the slow road
        self._kvikio = kvikio
        self._files: dict[Path, Any] = {}

    def submit(
        self, extents: Sequence[host.Extent], slot: torch.Tensor, *, label: str
    ) -> GdsTicket:
        reads: list[tuple[Path, int, Any]] = []
        try:
            for extent in extents:
                if extent.path not in self._files:
                    self._files[extent.path] = self._kvikio.CuFile(extent.path, "r")
                # Not past the end of the file, which kvikio may take for an error.
                needed = extent.num_bytes if extent.needed_bytes is None else extent.needed_bytes
                part = slot[extent.buffer_offset : extent.buffer_offset + needed]
                future = self._files[extent.path].pread(part, needed, extent.file_offset)
                reads.append((extent.path, needed, future))
        except Exception as error:
            GdsTicket(label, reads).wait(60)  # what has begun must not write after we have raised
            raise host.StorageError(f"{label}: cuFile cannot begin to read: {error}.") from error
        return GdsTicket(label, reads)

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()


@dataclass(frozen=True)
class GdsChoice:
    """A pool, or None; and one line saying why."""

    pool: GdsPool | None
    reason: str


def choose_gds(path: Path, *, device: str = "cuda", num_threads: int = 4) -> GdsChoice:
    """Offer cuFile if it reads `path` (a large file) byte-identically and faster than our readers.

    Sets kvikio's thread count, which is one per process. What is missing is a reason, no error."""
    import torch

    if not torch.cuda.is_available():
        return GdsChoice(None, "no CUDA device (torch.cuda.is_available() is false)")
    pool = None
    try:
        import kvikio  # pyright: ignore[reportMissingImports]
        import kvikio.defaults  # pyright: ignore[reportMissingImports]

        if kvikio.defaults.is_compat_mode_preferred():
            return GdsChoice(None, "kvikio is in compatibility mode: no cuFile on this system")
        kvikio.defaults.set("num_threads", num_threads)
        pool = GdsPool(kvikio)
        is_better, reason = _self_test(pool, path, device)
    except Exception as error:  # a missing package or library, a driver's refusal, a failed read
        lines = str(error).strip().splitlines() or [type(error).__name__]
        is_better, reason = False, f"kvikio: {lines[-1]}"
    if pool and not is_better:
        pool.close()
    return GdsChoice(pool if is_better else None, reason)


def _self_test(pool: GdsPool, path: Path, device: str) -> tuple[bool, str]:
    """Read the end of the file both ways, its unaligned tail included; alternate, take medians."""
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
    storage = host.choose_storage(path).storage
    with ReaderPool(storage) as readers:
        for _ in range(5):
            start = time.perf_counter()
            readers.submit([extent], pinned, label="self-test").wait(60)
            ours.copy_(pinned, non_blocking=True)
            torch.cuda.current_stream(ours.device).synchronize()
            middle = time.perf_counter()
            pool.submit([extent], theirs, label="self-test").wait(60)
            our_s.append(middle - start)
            their_s.append(time.perf_counter() - middle)
    if not torch.equal(ours[:needed], theirs[:needed]):
        return False, "cuFile's bytes differ from the file's"
    our_rate, their_rate = (needed / median(seconds) / 1e9 for seconds in (our_s, their_s))
    reason = f"cuFile {their_rate:.2f} GB/s, {storage.name} + copy {our_rate:.2f} GB/s"
    return their_rate > MIN_GAIN * our_rate, reason
