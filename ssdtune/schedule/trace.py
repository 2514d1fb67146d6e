"""What really happened: one record for each op that the engine ran, in the plan's own terms."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

from ssdtune.schedule.plan import Direction, Kind, Lane, Op

# op_id of work that a steady step does not have: a first filling, a block fetched on demand
UNPLANNED = -1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TraceOp:
    """One op as it ran. Seconds of one monotonic clock.

    `wait_s`: how long COMPUTE stood still for its weights, at its start.
    """

    op_id: int
    kind: Kind
    lane: Lane
    block: str
    direction: Direction
    step: int
    start_s: float
    end_s: float
    num_bytes: int = 0
    wait_s: float = 0.0
    is_miss: bool = (
        False  # fetched on demand: the visit came in an order that the plan does not have
    )

    @staticmethod
    def of(op: Op, *, step: int, start_s: float, end_s: float) -> TraceOp:
        """An op of a plan as if it had run."""
        return TraceOp(
            op_id=op.id,
            kind=op.kind,
            lane=op.lane,
            block=op.block,
            direction=op.direction,
            step=step,
            start_s=start_s,
            end_s=end_s,
            num_bytes=op.num_bytes,
        )


def steps(ops: Iterable[TraceOp]) -> dict[int, list[TraceOp]]:
    """The ops of each step, steps in order."""
    grouped: dict[int, list[TraceOp]] = {}
    for op in ops:
        grouped.setdefault(op.step, []).append(op)
    return dict(sorted(grouped.items()))


def lane_seconds(ops: Iterable[TraceOp]) -> dict[Lane, float]:
    """Seconds in which each lane had work: overlapping ops counted once, compute without its waits."""
    by_lane: dict[Lane, list[tuple[float, float]]] = {}
    for op in ops:
        by_lane.setdefault(op.lane, []).append((op.start_s + op.wait_s, op.end_s))
    return {lane: covered_s(spans) for lane, spans in by_lane.items()}


def covered_s(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans, (start, end), runs."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def read_bytes(ops: Iterable[TraceOp]) -> int:
    """Bytes that came from NVMe."""
    return sum(op.num_bytes for op in ops if op.lane is Lane.NVME_READ)


def stall_seconds(ops: Iterable[TraceOp]) -> float:
    """Seconds in which compute stood still for weights."""
    return sum(op.wait_s for op in ops)


def json_lines(ops: Iterable[TraceOp]) -> Iterator[str]:
    """One JSON object a line, for `trace.jsonl` in the run's folder."""
    for op in ops:
        yield json.dumps(dataclasses.asdict(op))


def trace_from(text: str) -> list[TraceOp]:
    """Reads what `json_lines` wrote. Raises ValueError, KeyError or TypeError for anything else."""
    ops: list[TraceOp] = []
    for line in text.splitlines():
        raw: dict[str, Any] = json.loads(line)
        typed: dict[str, Any] = {
            "kind": Kind(raw["kind"]),
            "lane": Lane(raw["lane"]),
            "direction": Direction(raw["direction"]),
        }
        ops.append(TraceOp(**{**raw, **typed}))
    return ops
