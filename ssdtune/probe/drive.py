"""The drive: reads by the engine's own readers, writes past the page cache, both at once, and writes past its cache."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from ssdtune.errors import SSDTuneError
from ssdtune.probe.timing import SLOW, quantile, time_all
from ssdtune.schedule.curve import Curve
from ssdtune.sizes import format_size

if TYPE_CHECKING:
    from ssdtune.swap.readers import Ticket

READ_BYTES = (2**20, 2**22, 2**24, 2**25, 2**26)
READ_STRIDE = 97 * 2**20  # from one read to the next, so that a drive's own cache helps little
SUSTAINED_CHUNK = 2**26
LAST_SHARE = 0.25  # of a sustained write: what counts
LEFT_FREE = 0.1  # of a sustained write, beside it
WAIT_S = 60.0


class DriveError(SSDTuneError):
    """A drive without room for what is to be measured."""


class _Reads(NamedTuple):
    """Reads all over a large file: of which sizes, and what begins one."""

    sizes: list[int]
    begin: Callable[[int], Ticket]

    def __call__(self, num_bytes: int) -> None:
        self.begin(num_bytes).wait(WAIT_S)


def measure_reads(file: Path) -> Curve:
    """Reads all over a large file by the engine's readers, the way that files there are read."""
    import torch

    with _reads(file) as reads:
        return time_all({float(n): partial(reads, n) for n in reads.sizes}, torch.device("cpu"))


def measure_writes(folder: Path) -> Curve:
    """Writes into a scratch file that has its blocks already."""
    import torch

    with _writes(folder, max(READ_BYTES)) as write:
        return time_all({float(n): partial(write, 0, n) for n in READ_BYTES}, torch.device("cpu"))


def measure_both(folder: Path, file: Path) -> Curve:
    """Bytes of which half are read while the other half is written."""
    import torch

    with _reads(file) as reads, _writes(folder, max(READ_BYTES)) as write:

        def both(num_bytes: int) -> None:
            ticket = reads.begin(num_bytes)
            write(0, num_bytes)
            ticket.wait(WAIT_S)

        return time_all({2.0 * n: partial(both, n) for n in reads.sizes}, torch.device("cpu"))


def measure_sustained(folder: Path, num_bytes: int, say: Callable[[str], Any]) -> Curve:
    """Writes so many bytes one after the other, and what the last of them took: by then a drive's cache is full.

    The file has no name and is gone afterwards, however that comes about. Raises DriveError before anything is written
    where there is not a tenth more room.
    """
    free_bytes = shutil.disk_usage(folder).free
    if (1 + LEFT_FREE) * num_bytes > free_bytes:
        raise DriveError(
            f"{format_size(num_bytes)} can't be written to {folder}: {format_size(free_bytes)} are free, and a tenth "
            "more than is written is wanted.\nGive --sustained a smaller size, or a folder on another drive."
        )
    num_chunks = max(4, num_bytes // SUSTAINED_CHUNK)
    times: list[float] = []
    with _writes(folder, num_chunks * SUSTAINED_CHUNK, chunk=SUSTAINED_CHUNK) as write:
        for i in range(num_chunks):
            start = perf_counter()
            write(i * SUSTAINED_CHUNK, SUSTAINED_CHUNK)
            times.append(perf_counter() - start)
    num_last = max(1, round(LAST_SHARE * num_chunks))
    first, last = median(times[:num_last]), median(times[-num_last:])
    say(
        f"sustained {SUSTAINED_CHUNK / first / 1e9:.3g} GB/s at first, {SUSTAINED_CHUNK / last / 1e9:.3g} GB/s at the "
        f"end of {format_size(num_chunks * SUSTAINED_CHUNK)}"
    )
    return Curve(((float(SUSTAINED_CHUNK), last),), (quantile(times[-num_last:], SLOW),))


@contextmanager
def _reads(file: Path) -> Iterator[_Reads]:
    from ssdtune.swap.readers import ReaderPool
    from ssdtune.swap.storage import Extent, aligned_bytes, choose_storage

    storage = choose_storage(file).storage
    end = file.stat().st_size
    sizes = [n for n in READ_BYTES if n * 2 <= end] or [end // 2 // 4096 * 4096]
    memory = aligned_bytes(max(sizes))
    steps = itertools.count()
    with ReaderPool(storage) as pool:

        def begin(num_bytes: int) -> Ticket:
            last = (end - num_bytes) // storage.alignment * storage.alignment
            place = next(steps) * READ_STRIDE % max(last, storage.alignment)
            return pool.submit([Extent(file, place, num_bytes, 0)], memory, label="probe")

        yield _Reads(sizes, begin)


@contextmanager
def _writes(
    folder: Path, num_bytes: int, chunk: int | None = None
) -> Iterator[Callable[[int, int], None]]:
    """What writes (offset, bytes) into a scratch file that has its blocks already. chunk: the most at once."""
    from ssdtune.swap.scratch import ScratchFile
    from ssdtune.swap.storage import aligned_bytes

    memory = aligned_bytes(chunk or num_bytes)
    view = memory.numpy().data
    view[:] = os.urandom(len(view))  # zeros would measure a file system's compression
    file = ScratchFile(folder)
    try:
        file.reserve(num_bytes)
        yield lambda offset, n: file.write(offset, view[:n])
    finally:
        file.close()
