"""How many blocks of each kind stay where: the least step time as a small integer program.

Blocks of one kind are alike: bytes and seconds. A step is as long as its passes, a pass as long as its longest lane
(the two-pass bound of `simulate.py`; FlexGen, arXiv 2303.06865, solves shares the same way). How many stay matters here, which
ones is the arrangement's part (`search.py`). Solved by HiGHS; where `highspy` is missing there is no such answer, and
the greedy ones do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ssdtune.schedule.plan import Direction, Lane

READ_WEIGHT = 1e-6  # of a tie: of two plans as fast, the one that reads less
NOTHING = 1e-8  # HiGHS refuses matrix entries below 1e-9
SOLVE_S = 2.0  # the solver's limit; it takes milliseconds

Load = Mapping[tuple[Direction, Lane], float]  # seconds of one block


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockKind:
    """Blocks that are alike.

    Attributes:
        num: how many.
        slot_bytes: of one where slots live.
        file_bytes: of one in RAM, as the file has it.
        streamed, cached, resident: seconds of one on each lane in each pass, fetched from NVMe, kept in RAM beside a
            device, and in a slot of its own.
    """

    num: int
    slot_bytes: int
    file_bytes: int
    streamed: Load
    cached: Load
    resident: Load

    @property
    def reading_s(self) -> float:
        """Of the drive in a whole step, for one that is streamed."""
        return sum(s for (_, lane), s in self.streamed.items() if lane is Lane.NVME_READ)


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """How many of each kind stay in slots of their own, and in RAM beside a device."""

    resident: tuple[int, ...]
    cached: tuple[int, ...]


def promising_counts(
    kinds: Sequence[BlockKind], room: tuple[int, int], *, on_device: bool
) -> Iterator[Counts]:
    """Yields the solver's counts, where there is one, and greedy ones from both ends.

    room: bytes for slots and in RAM, beside the shared slots and buffers; one and the same without a device.
    """
    solved = best_counts(kinds, slot_room=room[0], ram_room=room[1], on_device=on_device)
    if solved is not None:
        yield solved
    by_worth = sorted(range(len(kinds)), key=lambda k: -_worth(kinds[k]))
    yield _greedy(kinds, by_worth, room, on_device=on_device)
    yield _greedy(kinds, by_worth[::-1], room, on_device=on_device)


def best_counts(
    kinds: Sequence[BlockKind], *, slot_room: int, ram_room: int, on_device: bool
) -> Counts | None:
    """The counts with the least bound; None where no solver is installed, or it found nothing.

    slot_room, ram_room: bytes beside the shared slots and buffers; one and the same without a device.
    """
    try:
        import highspy
    except ImportError:
        return None
    solver: Any = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("time_limit", SOLVE_S)
    resident = [solver.addIntegral(lb=0, ub=kind.num) for kind in kinds]
    cached = [solver.addIntegral(lb=0, ub=kind.num if on_device else 0) for kind in kinds]
    passes = {direction: solver.addVariable(lb=0) for direction in Direction}
    scale = _longest(kinds)  # seconds and bytes as shares: a solver's tolerances are absolute
    for r, c, kind in zip(resident, cached, kinds, strict=True):
        solver.addConstr(r + c <= kind.num)
    for direction, lane in sorted({key for kind in kinds for key in kind.streamed}):
        work: Any = 0.0
        key = (direction, lane)
        for r, c, kind in zip(resident, cached, kinds, strict=True):
            streamed = kind.streamed.get(key, 0.0)
            work += streamed * kind.num / scale
            work += _share(kind.resident.get(key, 0.0) - streamed, scale) * r
            work += _share(kind.cached.get(key, 0.0) - streamed, scale) * c
        solver.addConstr(passes[direction] >= work)
    solver.addConstr(_total(resident, [k.slot_bytes for k in kinds], slot_room) <= 1)
    if on_device:
        solver.addConstr(_total(cached, [k.file_bytes for k in kinds], ram_room) <= 1)
    reading = [kind.reading_s for kind in kinds]
    saved = _total(resident, reading, scale) + _total(cached, reading, scale)
    solver.minimize(sum(passes.values()) - READ_WEIGHT * saved)
    if solver.getModelStatus() not in (
        highspy.HighsModelStatus.kOptimal,
        highspy.HighsModelStatus.kTimeLimit,
    ):
        return None
    return Counts(
        resident=tuple(round(solver.val(r)) for r in resident),
        cached=tuple(round(solver.val(c)) for c in cached),
    )


def _total(variables: Sequence[Any], weights: Sequence[float], whole: float) -> Any:
    """Of `whole`, which may be nothing."""
    total: Any = 0.0
    for variable, weight in zip(variables, weights, strict=True):
        total += _share(weight, max(whole, 1e-6 * weight)) * variable
    return total


def _share(part: float, whole: float) -> float:
    """Less than the solver takes for a number is nothing."""
    share = part / whole if whole else 0.0
    return share if abs(share) > NOTHING else 0.0


def _longest(kinds: Sequence[BlockKind]) -> float:
    """Seconds of the busiest lane in one pass."""
    keys = {key for kind in kinds for key in kind.streamed}
    return max((sum(k.num * k.streamed.get(key, 0.0) for k in kinds) for key in keys), default=1.0)


def _greedy(
    kinds: Sequence[BlockKind], order: Sequence[int], room: tuple[int, int], *, on_device: bool
) -> Counts:
    """As many as there is room for, kind after kind."""
    slot_left, ram_left = room
    resident, cached = [0] * len(kinds), [0] * len(kinds)
    for k in order:
        kind = kinds[k]
        resident[k] = min(kind.num, slot_left // max(kind.slot_bytes, 1))
        slot_left -= resident[k] * kind.slot_bytes
        if on_device:
            cached[k] = min(kind.num - resident[k], ram_left // max(kind.file_bytes, 1))
            ram_left -= cached[k] * kind.file_bytes
    return Counts(tuple(resident), tuple(cached))


def _worth(kind: BlockKind) -> float:
    """Seconds of reading that a byte saves."""
    return kind.reading_s / max(kind.slot_bytes, 1)
