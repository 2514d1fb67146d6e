"""A trace is a list of what ran; what is read off it counts nothing twice."""

import dataclasses
import json
import random

import pytest

from ssdtune.schedule.plan import Direction, Kind, Lane
from ssdtune.schedule.trace import (
    UNPLANNED,
    TraceOp,
    json_lines,
    lane_seconds,
    read_bytes,
    stall_seconds,
    steps,
)


def op(lane: Lane, start: float, end: float, **more: object) -> TraceOp:
    values = {
        "op_id": 0,
        "kind": Kind.COMPUTE if lane is Lane.COMPUTE else Kind.LOAD,
        "lane": lane,
        "block": "layers.0",
        "direction": Direction.FORWARD,
        "step": 1,
        "start_s": start,
        "end_s": end,
        **more,
    }
    return TraceOp(**values)  # type: ignore[arg-type]


def test_ops_are_grouped_by_step_in_order() -> None:
    """Fills for the next step run before this one's last visit ends."""
    ops = [op(Lane.NVME_READ, 0, 1, step=s, op_id=i) for i, s in enumerate((2, 1, 3, 2, 1))]
    grouped = steps(ops)
    assert list(grouped) == [1, 2, 3]
    assert [o.op_id for o in grouped[1]] == [1, 4]
    assert [o.op_id for o in grouped[2]] == [0, 3]


def test_overlapping_work_of_a_lane_is_counted_once() -> None:
    ops = [
        op(Lane.NVME_READ, 0.0, 2.0),
        op(Lane.NVME_READ, 1.0, 3.0),
        op(Lane.NVME_READ, 1.5, 1.7),
        op(Lane.NVME_READ, 5.0, 6.0),
        op(Lane.CPU, 0.0, 0.5),
    ]
    assert lane_seconds(ops) == {Lane.NVME_READ: 4.0, Lane.CPU: 0.5}


def test_compute_that_waits_for_weights_is_no_work() -> None:
    ops = [op(Lane.COMPUTE, 0.0, 4.0, wait_s=3.0), op(Lane.COMPUTE, 4.0, 5.0)]
    assert lane_seconds(ops) == {Lane.COMPUTE: 2.0}
    assert stall_seconds(ops) == 3.0


def test_busy_seconds_equal_a_count_of_small_ticks() -> None:
    """Random spans on a grid of ticks: a tick is busy if any span covers it."""
    random_ = random.Random(0)
    for _ in range(100):
        spans = [(s := random_.randrange(50), s + random_.randrange(10)) for _ in range(8)]
        ticks = {t for start, end in spans for t in range(start, end)}
        found = lane_seconds([op(Lane.H2D, float(s), float(e)) for s, e in spans])
        assert found[Lane.H2D] == pytest.approx(len(ticks))


def test_only_reading_from_nvme_counts_as_read() -> None:
    ops = [
        op(Lane.NVME_READ, 0, 1, num_bytes=5),
        op(Lane.H2D, 0, 1, num_bytes=7),
        op(Lane.NVME_READ, 0, 1, num_bytes=11),
    ]
    assert read_bytes(ops) == 16


def test_a_line_of_json_holds_all_of_an_op() -> None:
    ops = [op(Lane.NVME_READ, 0.25, 1.5, op_id=UNPLANNED, num_bytes=3, is_miss=True)]
    (line,) = json_lines(ops)
    assert json.loads(line) == {
        **dataclasses.asdict(ops[0]),
        "kind": "load",
        "lane": "nvme_read",
        "direction": "F",
    }
