"""The drive: reads by the engine's own readers, writes past the page cache."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

from ssdtune.probe.timing import time_all
from ssdtune.schedule.profile import Curve

READ_BYTES = (2**20, 2**22, 2**24, 2**25, 2**26)
READ_STRIDE = 97 * 2**20  # from one read to the next, so that a drive's own cache helps little


def measure_reads(file: Path) -> Curve:
    """Reads all over a large file by the engine's readers, the way that files there are read."""
    import torch

    from ssdtune.swap.readers import ReaderPool
    from ssdtune.swap.storage import Extent, aligned_bytes, choose_storage

    storage = choose_storage(file).storage
    end = file.stat().st_size
    sizes = [n for n in READ_BYTES if n * 2 <= end] or [end // 2 // 4096 * 4096]
    memory = aligned_bytes(max(sizes))
    steps = itertools.count()
    with ReaderPool(storage) as pool:

        def read(num_bytes: int) -> None:
            last = max(
                (end - num_bytes) // storage.alignment * storage.alignment, storage.alignment
            )
            place = next(steps) * READ_STRIDE % last
            pool.submit([Extent(file, place, num_bytes, 0)], memory, label="probe").wait(60)

        pieces = {float(n): partial(read, n) for n in sizes}
        return time_all(pieces, torch.device("cpu"))


def measure_writes(folder: Path) -> Curve:
    """Writes into a scratch file that has its blocks already."""
    import torch

    from ssdtune.swap.scratch import ScratchFile
    from ssdtune.swap.storage import aligned_bytes

    memory = aligned_bytes(max(READ_BYTES))
    memory.fill_(7)
    file = ScratchFile(folder)
    try:
        file.reserve(max(READ_BYTES))
        view = memory.numpy().data
        pieces = {float(n): partial(file.write, 0, view[:n]) for n in READ_BYTES}
        return time_all(pieces, torch.device("cpu"))
    finally:
        file.close()
