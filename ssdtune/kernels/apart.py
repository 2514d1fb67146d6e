"""Pieces of work on several threads, each of which computes alone.

Torch shares one operation among its threads, which meet at its end. Where a piece takes hundreds of operations of a
megabyte each, they wait for each other more than they compute, the more so beside other programs: threads that take
whole pieces do not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

from ssdtune.kernels.team import compute_alone

MOST_THREADS = 16  # each has temporaries of its own
START_S = 60.0
CPU = torch.device("cpu")
Item = TypeVar("Item")
Made = TypeVar("Made")


def in_order(
    function: Callable[[Item], Made], items: Sequence[Item], device: torch.device = CPU
) -> Iterator[Made]:
    """function of each item, in their order, on as many threads as torch has here, at most MOST_THREADS.

    Every operation of torch takes one thread, so that results do not hang on how many there are. device: where they
    are carried out; beside a GPU, which takes one after the other, one thread is enough. Raises what the function
    raises; items behind that one may have been taken."""
    num_threads = min(torch.get_num_threads(), MOST_THREADS) if device.type == "cpu" else 1
    threads = _threads(num_threads) if num_threads > 1 and len(items) > 1 else None
    return map(function, items) if threads is None else threads.map(function, items)


@cache
def _threads(number: int) -> ThreadPoolExecutor | None:
    """So many, each of which computes by itself; None where that can't be had."""
    threads = ThreadPoolExecutor(number, thread_name_prefix="apart")
    all_there = threading.Barrier(number)

    def begin() -> bool:
        all_there.wait(START_S)  # none takes another one's turn
        return compute_alone()

    begun = [threads.submit(begin) for _ in range(number)]
    if all(each.result() for each in begun):
        return threads
    threads.shutdown()
    return None
