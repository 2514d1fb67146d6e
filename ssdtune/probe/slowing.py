"""What compute loses to what goes on beside it: reading, and copies in RAM. Cores and memory are shared."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

from ssdtune.probe.drive import READ_STRIDE
from ssdtune.probe.machine import waiter
from ssdtune.probe.timing import Run

if TYPE_CHECKING:
    import torch

SLOWING_ROUNDS, SLOWING_S, SLOWING_BUFFERS = 7, 0.2, 8
COPY_ROUNDS, COPY_S, COPY_PIECES = 5, 0.08, 8
PIECE_BYTES = 16 * 2**20


def measure_slowing(file: Path, device: torch.device) -> float:
    """Seconds that matrix products lose for each byte that a reader reads meanwhile, 0 or more: as in training, the
    products of weights that no cache holds, the reads from all over the file into memory that none holds either."""
    from ssdtune.swap.readers import ReaderPool
    from ssdtune.swap.storage import Extent, aligned_bytes, choose_storage

    run, wait = _products(device), waiter(device)
    storage, end = choose_storage(file).storage, file.stat().st_size
    num_bytes = min(PIECE_BYTES, end // 2 // 4096 * 4096)
    memory = aligned_bytes(SLOWING_BUFFERS * num_bytes)
    counted = itertools.count()
    with ReaderPool(storage) as pool:

        def read() -> None:
            num = next(counted)
            place = num * READ_STRIDE % (end - num_bytes) // 4096 * 4096
            at = num % SLOWING_BUFFERS * num_bytes
            to = memory[at : at + num_bytes]
            pool.submit([Extent(file, place, num_bytes, 0)], to, label="probe").wait(60)

        lost: list[float] = []
        for _ in range(SLOWING_ROUNDS):
            alone, _ = _for_a_while(run, wait, SLOWING_S)
            with _Beside(read) as reads:
                beside, seconds = _for_a_while(run, wait, SLOWING_S)
                num_bytes_read = reads.num * num_bytes
            lost.append((1 - alone / beside) * seconds / max(num_bytes_read, num_bytes))
    return max(0.0, median(lost))


def measure_copy_overlap(device: torch.device) -> float | None:
    """Seconds of matrix products alone and of a copy in RAM alone that are done in a second of both, from 1, they take
    turns, to 2, neither slows the other. None where a device computes: copies in RAM take nothing of it.

    The copy is made as slots are filled, by a thread of its own, between memory that no cache holds.
    """
    if device.type != "cpu":
        return None
    from ssdtune.swap.storage import aligned_bytes

    run, wait = _products(device), waiter(device)
    source, target = (aligned_bytes(COPY_PIECES * PIECE_BYTES) for _ in range(2))
    for memory in (source, target):
        memory.fill_(1)  # gives it its pages
    pieces = itertools.cycle(zip(target.split(PIECE_BYTES), source.split(PIECE_BYTES), strict=True))

    def copy() -> None:
        to, of = next(pieces)
        to.copy_(of)

    found = [_overlap(run, copy, wait) for _ in range(COPY_ROUNDS)]
    return min(2.0, max(1.0, median(found)))


def _overlap(run: Run, other: Run, wait: Callable[[], None]) -> float:
    """Seconds of each alone that are done in a second of both. other: in a thread of its own."""
    run_s, _ = _for_a_while(run, wait, COPY_S)
    with _Beside(other) as others:
        start = perf_counter()
        sleep(COPY_S)
        alone = max(others.num, 1) / (perf_counter() - start)
    with _Beside(other) as others:
        run_beside_s, seconds = _for_a_while(run, wait, COPY_S)
        beside = others.num / seconds
    return run_s / run_beside_s + beside / alone


def _products(device: torch.device) -> Run:
    """One product of a layer's shape, each time with other weights."""
    import torch

    values = torch.randn(128, 1024, device=device)
    weights = itertools.cycle([torch.randn(2816, 1024, device=device) for _ in range(8)])
    return lambda: torch.nn.functional.linear(values, next(weights))


class _Beside:
    """Does one thing again and again in a thread of its own while it is entered. num: how often it has."""

    def __init__(self, run: Run) -> None:
        self.num = 0
        self._run, self._stop = run, threading.Event()
        self._thread = threading.Thread(target=self._again)

    def __enter__(self) -> _Beside:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _again(self) -> None:
        while not self._stop.is_set():
            self._run()
            self.num += 1


def _for_a_while(run: Run, wait: Callable[[], None], at_least_s: float) -> tuple[float, float]:
    """Seconds of one run, over many, and of all of them."""
    count, start = 0, perf_counter()
    while perf_counter() - start < at_least_s:
        run()
        wait()
        count += 1
    seconds = perf_counter() - start
    return seconds / count, seconds
