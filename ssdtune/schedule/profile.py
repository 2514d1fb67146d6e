"""What a machine can do: rates that were measured (`ssdtune probe`) or published, as one value.

A *curve* says how long one piece of work of a given size takes: measured at a few sizes, straight lines between them,
the last rate beyond the largest, the smallest one's time below the smallest. So it holds latency and caches as they
are. Sizes are FLOP or bytes; times are seconds.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ssdtune.errors import SSDTuneError


class ProfileError(SSDTuneError):
    """A profile that can't be used; the message names the entry and what it should be."""


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by size. points: (size, seconds), sizes rising, both above 0."""

    points: tuple[tuple[float, float], ...]

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


# Kinds of operators, each measured per number format, and of transfers.
OPERATORS = (
    "matmul",
    "matmul_transposed",
    "attention",
    "attention_backward",
    "pointwise",
    "special",
)
FRESH = "fresh"  # bytes of memory that the kernel has just given: what its pages take beyond being written
TRANSFERS = ("nvme_read", "nvme_write", "unpack", "decode", "h2d", "d2h", "d2d")
# What stands in for it in a profile that is older: decoding writes as many bytes as a copy and reads fewer.
STAND_INS = {"decode": "unpack", "d2h": "h2d"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InModel:
    """What operators take inside a model beyond their curves, which are of one operator again and again.

    overhead_s: of each call that a model's code makes: that code, the framework's own work, threads that wake up.
    autograd_overhead_s: the same of calls that autograd makes. factor: on the curves: caches that other operators have
    used. is_hidden: whether the calls' overhead passes while a device computes: the longer of the two counts, not
    their sum.
    """

    overhead_s: float = 0.0
    autograd_overhead_s: float = 0.0
    factor: float = 1.0
    is_hidden: bool = False

    def seconds(self, num_calls: float, num_autograd_calls: float, curves_s: float) -> float:
        """So many calls by a model's code and by autograd, whose curves say `curves_s` in all."""
        calls = num_calls * self.overhead_s + num_autograd_calls * self.autograd_overhead_s
        work = self.factor * curves_s
        return max(calls, work) if self.is_hidden else calls + work


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A machine's curves.

    Attributes:
        name: for people.
        operators: dtype -> kind -> curve. "matmul": FLOP of matrix products of blocks' shapes;
            "matmul_transposed": of those whose right matrix lies by columns; "attention" and "attention_backward": FLOP
            of fused attention; "pointwise": bytes read and written; "special": the same, of exp, tanh, rsqrt and their
            like.
        transfers: lane's work -> curve over bytes. Those of a device are missing where there is none.
        in_model: dtype -> what is to be added inside a model; nothing where it was not measured.
        reading_takes: seconds that compute loses for each byte that is read meanwhile: cores and memory are shared.
        price_per_hour: dollars that the machine costs; nothing measures it, its owner may write it into the file.
    """

    name: str
    operators: Mapping[str, Mapping[str, Curve]]
    transfers: Mapping[str, Curve]
    in_model: Mapping[str, InModel] = dataclasses.field(default_factory=dict[str, InModel])
    reading_takes: float = 0.0
    price_per_hour: float | None = None

    def operator(self, dtype: str, kind: str) -> Curve:
        """Raises ProfileError where it was not measured."""
        try:
            return self.operators[dtype][kind]
        except KeyError:
            raise ProfileError(
                f"profile {self.name}: operators.{dtype}.{kind} is missing.\n"
                "Measure this machine with `ssdtune probe`."
            ) from None

    def transfer(self, name: str) -> Curve:
        """Raises ProfileError where it was not measured."""
        if name not in self.transfers:
            name = STAND_INS.get(name, name)
        if name not in self.transfers:
            raise ProfileError(
                f"profile {self.name}: transfers.{name} is missing.\n"
                "Measure this machine with `ssdtune probe`."
            )
        return self.transfers[name]

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for YAML, times to four digits; `profile_from` reads them."""
        priced = {} if self.price_per_hour is None else {"price_per_hour": self.price_per_hour}
        return {
            "name": self.name,
            "operators": {
                dtype: {kind: _listed(curve) for kind, curve in curves.items()}
                for dtype, curves in self.operators.items()
            },
            "transfers": {name: _listed(curve) for name, curve in self.transfers.items()},
            "in_model": {dtype: dataclasses.asdict(each) for dtype, each in self.in_model.items()},
            "reading_takes": self.reading_takes,
            **priced,
        }


def profile_from(content: Any, where: str) -> Profile:
    """The profile that a mapping holds. `where`: its file. Raises ProfileError naming the entry."""
    entries = _mapping(content, where)
    known = {field.name for field in dataclasses.fields(Profile)}
    for key in entries:
        if key not in known:
            names = ", ".join(sorted(known))
            raise ProfileError(
                f"{where}: {key!r} is no entry of a profile: {names}.\n"
                "Measure this machine anew with `ssdtune probe`."
            )
    operators = {
        str(dtype): _curves(curves, f"{where}: operators.{dtype}")
        for dtype, curves in _mapping(entries.get("operators"), f"{where}: operators").items()
    }
    takes: Any = entries.get("reading_takes", 0.0)
    if not isinstance(takes, int | float) or not 0 <= takes < math.inf:
        raise ProfileError(
            f"{where}: reading_takes is {takes!r}; it is in seconds a byte, 0 or more."
        )
    price: Any = entries.get("price_per_hour")
    if price is not None and not _is_positive(price):
        raise ProfileError(f"{where}: price_per_hour is {price!r}; it is in dollars, above 0.")
    return Profile(
        price_per_hour=None if price is None else float(price),
        name=str(entries.get("name", where)),
        operators=operators,
        transfers=_curves(entries.get("transfers"), f"{where}: transfers"),
        in_model=_in_model(entries.get("in_model", {}), f"{where}: in_model"),
        reading_takes=float(takes),
    )


def _in_model(found: Any, where: str) -> dict[str, InModel]:
    if not found:
        return {}
    made: dict[str, InModel] = {}
    for dtype, content in _mapping(found, where).items():
        each = _mapping(content, f"{where}.{dtype}")
        overheads = [each.get(name, 0.0) for name in ("overhead_s", "autograd_overhead_s")]
        factor = each.get("factor", 1.0)
        if not all(o == 0 or _is_positive(o) for o in overheads) or not _is_positive(factor):
            raise ProfileError(
                f"{where}.{dtype}: overheads must be 0 or more and factor above 0, got {each!r:.80}."
            )
        made[str(dtype)] = InModel(
            overhead_s=float(overheads[0]),
            autograd_overhead_s=float(overheads[1]),
            factor=float(factor),
            is_hidden=bool(each.get("is_hidden")),
        )
    return made


def _mapping(found: Any, where: str) -> dict[Any, Any]:
    if not isinstance(found, Mapping) or not found:
        raise ProfileError(
            f"{where}: must be a mapping with entries, got {found!r:.60}.\n"
            "Make a profile with `ssdtune probe`."
        )
    return dict(found)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _curves(found: Any, where: str) -> dict[str, Curve]:
    return {str(k): _curve(points, f"{where}.{k}") for k, points in _mapping(found, where).items()}


def _curve(found: Any, where: str) -> Curve:
    wanted = f"{where}: must be a list of [size, seconds], sizes rising, both above 0"
    if not isinstance(found, list | tuple) or not found:
        raise ProfileError(f"{wanted}, got {found!r:.60}.")
    points: list[Any] = list(found)  # pyright: ignore[reportUnknownArgumentType]
    pairs = [_pair(point) for point in points]
    for point, pair in zip(points, pairs, strict=True):
        if pair is None:
            raise ProfileError(f"{wanted}, got {point!r:.60}.")
    measured = [pair for pair in pairs if pair is not None]
    if any(b[0] <= a[0] for a, b in itertools.pairwise(measured)):
        raise ProfileError(f"{wanted}; they don't rise.")
    return Curve(tuple(measured))


def _pair(point: Any) -> tuple[float, float] | None:
    if not isinstance(point, list | tuple):
        return None
    numbers: list[Any] = list(point)  # pyright: ignore[reportUnknownArgumentType]
    if len(numbers) != 2 or not all(_is_positive(number) for number in numbers):
        return None
    return float(numbers[0]), float(numbers[1])


def _is_positive(number: Any) -> bool:
    return (
        isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf
    )


def _listed(curve: Curve) -> list[list[float]]:
    return [[float(size), float(f"{seconds:.4g}")] for size, seconds in curve.points]


def curve_of(points: Iterable[tuple[float, float]]) -> Curve:
    """A curve from measured points in any order. Larger work never takes less time: what noise says else is levelled."""
    levelled: list[tuple[float, float]] = []
    for size, seconds in sorted(points):
        least = levelled[-1][1] if levelled else 0.0
        levelled.append((size, max(seconds, least)))
    return Curve(tuple(levelled))
