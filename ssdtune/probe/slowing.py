"""How much compute loses to reading that goes on beside it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from ssdtune.probe.drive import READ_STRIDE
from ssdtune.probe.machine import waiter
from ssdtune.probe.timing import Run

if TYPE_CHECKING:
    import torch

SLOWING_ROUNDS, SLOWING_S, SLOWING_BUFFERS = 7, 0.3, 8


def measure_slowing(file: Path, device: torch.device) -> float:
    """Seconds that matrix products lose for each byte that a reader reads meanwhile, 0 or more: as in training, the
    products of weights that no cache holds, the reads from all over the file into memory that none holds either."""
    import torch

    from ssdtune.swap.readers import ReaderPool
    from ssdtune.swap.storage import Extent, aligned_bytes, choose_storage

    values = torch.randn(128, 1024, device=device)
    weights = itertools.cycle([torch.randn(2816, 1024, device=device) for _ in range(8)])
    wait = waiter(device)

    def run() -> None:
        torch.nn.functional.linear(values, next(weights))

    storage, end = choose_storage(file).storage, file.stat().st_size
    num_bytes = min(16 * 2**20, end // 2 // 4096 * 4096)
    memory = aligned_bytes(SLOWING_BUFFERS * num_bytes)
    stop = threading.Event()
    with ReaderPool(storage) as pool:
        num_reads = 0

        def read() -> None:
            nonlocal num_reads
            while not stop.is_set():
                place = num_reads * READ_STRIDE % (end - num_bytes) // 4096 * 4096
                at = num_reads % SLOWING_BUFFERS * num_bytes
                to = memory[at : at + num_bytes]
                pool.submit([Extent(file, place, num_bytes, 0)], to, label="probe").wait(60)
                num_reads += 1

        lost: list[float] = []
        for _ in range(SLOWING_ROUNDS):
            alone, _ = _for_a_while(run, wait)
            num_reads = 0
            stop.clear()
            reader = threading.Thread(target=read)
            reader.start()
            beside, seconds = _for_a_while(run, wait)
            num_bytes_read = num_reads * num_bytes
            stop.set()
            reader.join()
            lost.append((1 - alone / beside) * seconds / max(num_bytes_read, num_bytes))
    return max(0.0, median(lost))


def _for_a_while(run: Run, wait: Callable[[], None]) -> tuple[float, float]:
    """Seconds of one run, over many, and of all of them."""
    count, start = 0, perf_counter()
    while perf_counter() - start < SLOWING_S:
        run()
        wait()
        count += 1
    seconds = perf_counter() - start
    return seconds / count, seconds
