"""How long pieces of work take: sizes in turn, the middle and the slow end of a few rounds; and the best of many runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ssdtune.schedule.profile import Curve, curve_of

if TYPE_CHECKING:
    import torch

ROUNDS = 5
MAX_PIECE_S = 0.3  # larger sizes of what takes longer than this are left out: the last rate goes on

Run = Callable[[], Any]


def time_all(
    pieces: Mapping[float, Run], device: torch.device, *, rounds: int | None = None
) -> Curve:
    """Size -> seconds of each piece. Sizes take turns, so that a load that comes and goes hits all of them."""
    wait = waiter(device)
    kept: dict[float, list[float]] = {}
    for size, run in sorted(pieces.items()):
        run()  # allocates, compiles, warms up
        wait()
        kept[size] = []
        if timed(run, wait) > MAX_PIECE_S:
            break
    for _ in range(rounds or ROUNDS):
        for size, times in kept.items():
            times.append(timed(pieces[size], wait))
    return curve_of((size, median(times)) for size, times in kept.items())


def timed(run: Run, wait: Run) -> float:
    """Seconds of one run; short ones are repeated until the clock can tell."""
    count = 1
    while True:
        start = perf_counter()
        for _ in range(count):
            run()
        wait()
        seconds = perf_counter() - start
        if seconds > 2e-3 or count >= 256:
            return seconds / count
        count *= 4


def best_of(run: Run, seconds: float) -> float:
    """Seconds of the fastest of all runs that fit into so many seconds, of one at least. run: waits for the device."""
    best, until = float("inf"), perf_counter() + seconds
    while best == float("inf") or perf_counter() < until:
        start = perf_counter()
        run()
        best = min(best, perf_counter() - start)
    return best


def waiter(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done what it was given."""
    import torch

    if device.type == "cuda":
        return lambda: torch.cuda.current_stream(device).synchronize()
    return lambda: None
