"""How long one piece of work of a given size takes: a curve through what was measured, and the line fitted to it.

Straight lines between the sizes measured, the last rate beyond the largest, the smallest one's time below the smallest:
latency and caches are as they are. Each point is the median of a few rounds (p50), and where it is known the time that
nine tenths of them stay below (p90).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

from ssdtune.errors import SSDTuneError


class ProfileError(SSDTuneError):
    """A profile that can't be used; the message names the entry and what it should be."""


class Line(NamedTuple):
    """latency_s + size / rate."""

    latency_s: float
    rate: float


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by size. points: (size, seconds), sizes rising, both above 0. slow: p90 at each point, no less than its
    median; empty where it was not measured."""

    points: tuple[tuple[float, float], ...]
    slow: tuple[float, ...] = ()

    def seconds(self, size: float) -> float:
        """How long one piece of this size takes; 0 for none."""
        if size <= 0:
            return 0.0
        sizes = [point[0] for point in self.points]
        at = bisect.bisect_left(sizes, size)
        if at == 0:
            return self.points[0][1]
        if at == len(sizes):
            return size * self.points[-1][1] / self.points[-1][0]
        (low, low_s), (high, high_s) = self.points[at - 1], self.points[at]
        return low_s + (high_s - low_s) * (size - low) / (high - low)

    @property
    def rate(self) -> float:
        """Size per second at the largest size measured."""
        return self.points[-1][0] / self.points[-1][1]

    @property
    def at_p90(self) -> Curve:
        """The curve through the slow ends; itself where they are not known."""
        if not self.slow:
            return self
        sizes = (size for size, _ in self.points)
        return Curve(tuple(zip(sizes, self.slow, strict=True)))

    def times(self, factor: float) -> Curve:
        """The curve of what takes so many times as long."""
        points = tuple((size, factor * seconds) for size, seconds in self.points)
        return Curve(points, tuple(factor * seconds for seconds in self.slow))

    @property
    def line(self) -> Line:
        """Latency and rate, as if the work had no others: the median of the slopes between all pairs of points, then
        the median of what is left (Theil 1950; Sen 1968). One point in three may be off."""
        pairs = itertools.combinations(self.points, 2)
        slopes = [(b_s - a_s) / (b - a) for (a, a_s), (b, b_s) in pairs]
        slope = median(slopes) if slopes else 0.0
        if slope <= 0:  # one point, or times that do not rise
            return Line(0.0, self.rate)
        latency_s = median(seconds - slope * size for size, seconds in self.points)
        return Line(max(latency_s, 0.0), 1 / slope)

    def listed(self) -> list[list[float]]:
        """For a file, times to four digits: [size, p50] or [size, p50, p90] each."""
        rows = [[size, seconds] for size, seconds in self.points]
        for row, slow_s in zip(rows, self.slow, strict=False):
            row.append(slow_s)
        return [[float(size), *(float(f"{s:.4g}") for s in times)] for size, *times in rows]


def curve_of(points: Iterable[tuple[float, ...]]) -> Curve:
    """A curve from measured points, (size, p50) or (size, p50, p90), in any order. Larger work never takes less time:
    what noise says else is levelled."""
    levelled: list[tuple[float, float]] = []
    slow: list[float] = []
    for size, seconds, *rest in sorted(points):
        least = levelled[-1][1] if levelled else 0.0
        levelled.append((size, max(seconds, least)))
        if rest:
            slow.append(max(rest[0], levelled[-1][1], slow[-1] if slow else 0.0))
    return Curve(tuple(levelled), tuple(slow))


def curves_from(found: Any, where: str) -> dict[str, Curve]:
    """Curves by name, from a file's mapping. Raises ProfileError naming the entry."""
    return {
        str(k): curve_from(points, f"{where}.{k}") for k, points in mapping(found, where).items()
    }


def curve_from(found: Any, where: str) -> Curve:
    """What `Curve.listed` wrote. Raises ProfileError naming the entry."""
    wanted = (
        f"{where}: must be a list of [size, p50] or [size, p50, p90], all alike, sizes rising, all above 0, p90 no less "
        "than p50"
    )
    if not isinstance(found, list | tuple) or not found:
        raise ProfileError(f"{wanted}, got {found!r:.60}.")
    points: list[Any] = list(found)  # pyright: ignore[reportUnknownArgumentType]
    measured: list[list[float]] = []
    for point in points:
        numbers = _numbers(point)
        if numbers is None or (measured and len(numbers) != len(measured[0])):
            raise ProfileError(f"{wanted}, got {point!r:.60}.")
        measured.append(numbers)
    if any(b[0] <= a[0] for a, b in itertools.pairwise(measured)):
        raise ProfileError(f"{wanted}; they don't rise.")
    slow = tuple(numbers[2] for numbers in measured if len(numbers) == 3)
    return Curve(tuple((numbers[0], numbers[1]) for numbers in measured), slow)


def _numbers(point: Any) -> list[float] | None:
    """[size, p50] or [size, p50, p90]; None for anything else."""
    if not isinstance(point, list | tuple):
        return None
    numbers: list[Any] = list(point)  # pyright: ignore[reportUnknownArgumentType]
    if len(numbers) not in (2, 3) or not all(is_positive(number) for number in numbers):
        return None
    return None if numbers[-1] < numbers[1] else [float(number) for number in numbers]


def mapping(found: Any, where: str) -> dict[Any, Any]:
    """A mapping with entries. Raises ProfileError."""
    if not isinstance(found, Mapping) or not found:
        raise ProfileError(
            f"{where}: must be a mapping with entries, got {found!r:.60}.\n"
            "Make a profile with `ssdtune probe`."
        )
    return dict(found)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def is_positive(number: Any) -> bool:
    """Whether it is a finite number above 0."""
    return (
        isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf
    )
