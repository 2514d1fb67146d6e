"""Whether the machine keeps its pace while it is measured: what was measured while it was slow is measured again.

Times of compute are told at one pace instead: each is divided by what the look right before it took, and in the end all
are multiplied by what a look usually takes. So products, and the models that are made of them, agree with each other
however the pace changed in between.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from statistics import median
from time import perf_counter, sleep
from typing import TYPE_CHECKING, TypeVar

from ssdtune.probe.machine import waiter
from ssdtune.probe.matrices import by_next

if TYPE_CHECKING:
    import torch

# Of the square matrices that a few rows are multiplied by, one after the other: 67 MB, more than caches hold. A layer's
# passes follow the time of such products within 4 %, where they take a fifth longer for a while.
ROWS, WIDTH, NUM = 64, 1024, 16
CALLS, TIMES = 2, 3  # in one look
SLOWER = 1.15  # than the least time that was seen: a slow machine
DISTURBED = 1.6  # times the least: no pace of a processor, but another process
LOOKS = 5  # at most, until one is not disturbed
FIRST_LOOKS_S, WAIT_S = 0.5, 0.2
AGAIN_S = 15.0  # all that may go to waiting and to measuring again

Found = TypeVar("Found")


class Watch:
    """What one product takes, looked at again and again. Neighbours on a host or a hot processor take a third of the pace
    away for seconds, longer than all rounds of a curve last, so that their median knows nothing of it."""

    def __init__(self, device: torch.device) -> None:
        import torch

        values = torch.ones(ROWS, WIDTH, device=device)
        weights = torch.randn(NUM * WIDTH * WIDTH, device=device)
        self._run = by_next(torch.nn.functional.linear, values, weights, (WIDTH, WIDTH))
        self._wait = waiter(device)
        self._looks: list[float] = []
        self._of_second: dict[int, list[float]] = {}
        self._least = math.inf
        self._left_s = AGAIN_S
        until = perf_counter() + FIRST_LOOKS_S
        self.look()
        while perf_counter() < until:
            self.look()
        self._first = median(self._looks)

    def look(self) -> bool:
        """Takes the product's time now; whether it is a slow one."""
        self._looks.append(min(self._seconds() for _ in range(TIMES)))
        self._of_second.setdefault(int(perf_counter()), []).append(self._looks[-1])
        self._least = min(self._least, self._looks[-1])
        return self._looks[-1] > SLOWER * self._least

    def pace(self) -> float:
        """How long the product takes now, over what it took at first."""
        for _ in range(LOOKS):
            self.look()
            if self._looks[-1] <= DISTURBED * self._least:
                break
        return min(self._looks[-1], DISTURBED * self._least) / self._first

    @property
    def usual_pace(self) -> float:
        """The middle of all seconds so far, over what the product took at first."""
        return median(map(median, self._of_second.values())) / self._first

    def steadiest(self, measure: Callable[[], Found]) -> Found:
        """Of several times that it was measured, the one in which the machine was least slow. measure: looks now and
        then."""
        tries = [self._once(measure)]
        while tries[-1][0] > SLOWER * self._least and self._left_s > 0:
            start = perf_counter()
            tries.append(self._once(measure))
            self._left_s -= perf_counter() - start
        return min(tries, key=lambda each: each[0])[1]

    def _once(self, measure: Callable[[], Found]) -> tuple[float, Found]:
        """The middle of the looks meanwhile, and what was found."""
        while self.look() and self._left_s > 0:
            sleep(WAIT_S)
            self._left_s -= WAIT_S
        self._looks = []
        found = measure()
        return median(self._looks), found

    def _seconds(self) -> float:
        start = perf_counter()
        for _ in range(CALLS):
            self._run()
        self._wait()
        return perf_counter() - start


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextlib.contextmanager
def watching(device: torch.device) -> Iterator[None]:
    """What is measured `steadily` within it is measured again where the machine was slow meanwhile."""
    token = _watch.set(Watch(device))
    try:
        yield
    finally:
        _watch.reset(token)


def look() -> None:
    """To be called now and then by what `steadily` measures."""
    if (watch := _watch.get()) is not None:
        watch.look()


def pace() -> float:
    """What times of compute that are measured now are to be divided by, to be those of one pace."""
    watch = _watch.get()
    return 1.0 if watch is None else watch.pace()


def usual_pace() -> float:
    """What times of that one pace are to be multiplied by, to be those of this machine as it usually is."""
    watch = _watch.get()
    return 1.0 if watch is None else watch.usual_pace


def steadily(measure: Callable[[], Found]) -> Found:
    """What it finds, on a machine that isn't slow if that can be had. measure: calls `look` at least once."""
    watch = _watch.get()
    return measure() if watch is None else watch.steadiest(measure)
