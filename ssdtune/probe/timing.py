"""How long pieces of work take: sizes in turn, the middle and the slow end of a few rounds; and the best of many runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ssdtune.probe.machine import waiter
from ssdtune.probe.steady import look, pace, steadily
from ssdtune.schedule.curve import Curve, curve_of

if TYPE_CHECKING:
    import torch

ROUNDS, FEW_ROUNDS = 5, 3
LONG_S = 0.04  # pieces that take longer vary less from round to round: FEW_ROUNDS do
MAX_PIECE_S = 0.1  # larger sizes of what takes longer than this are left out: the last rate goes on
TRIES = 3
SLOW = 0.9  # of a piece's rounds are no slower than the second time of its point

Run = Callable[[], Any]


def time_all(
    pieces: Mapping[float, Run],
    device: torch.device,
    *,
    rounds: int | None = None,
    longest_s: float | None = None,
    is_compute: bool = False,
) -> Curve:
    """Size -> seconds of each piece, p50 and p90 of its rounds. Sizes take turns, so that a load that comes and goes
    hits all of them. What is larger than a piece that takes `longest_s` (MAX_PIECE_S) is left out, and what would take
    far longer.

    is_compute: as long as the processor's pace says, so that times are told at one pace. Others are measured again where
    the machine was slow.
    """
    times_of = partial(_times, pieces, waiter(device), rounds or ROUNDS, longest_s or MAX_PIECE_S)
    kept = times_of(pace) if is_compute else steadily(partial(times_of, _looked))
    return curve_of((size, median(times), quantile(times, SLOW)) for size, times in kept.items())


def _looked() -> float:
    look()
    return 1.0


def _times(
    pieces: Mapping[float, Run],
    wait: Run,
    rounds: int,
    longest_s: float,
    divisor: Callable[[], float],
) -> dict[float, list[float]]:
    """Size -> seconds of each round, over the divisor that was asked for right before it."""
    slower = divisor()
    kept: dict[float, list[float]] = {}
    for size, run in sorted(pieces.items()):
        before = max(kept, default=None)
        if before and _takes_too_long(
            size / before, kept[before], longest_s, partial(timed, pieces[before], wait)
        ):
            break
        run()  # allocates, compiles, warms up
        wait()
        kept[size] = [timed(run, wait) / slower]
    for num in range(1, rounds):
        slower = divisor()
        for size, times in kept.items():
            if num < FEW_ROUNDS or times[0] <= LONG_S:
                times.append(timed(pieces[size], wait) / slower)
    return kept


def _takes_too_long(
    growth: float, times: list[float], longest_s: float, again: Callable[[], float]
) -> bool:
    """Whether a piece so many times larger than the one that took these times would. They get a few more: they may have
    met another process. Latency alone says nothing of larger pieces, so this one must take a while itself."""
    for _ in range(TRIES):
        best = min(times)
        if best <= longest_s and (best < longest_s / 4 or best * growth <= 2 * longest_s):
            return False
        times.append(again())
    return True


def quantile(values: Sequence[float], share: float) -> float:
    """What so large a share of the values lies below, on straight lines between them."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


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
