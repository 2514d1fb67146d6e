"""The simulator against hand-made schedules, its bounds, and a walk of the same plan by another rule."""

import itertools
import random

import pytest

from ssdtune.schedule.choices import Request
from ssdtune.schedule.plan import BlockShape, Budgets, Kind, Lane, Op, Plan
from ssdtune.schedule.planner import make_plan, plain_orders
from ssdtune.schedule.simulate import simulate

MB = 10**6


def plan_of(
    num_blocks: int, num_slots: float, *, is_staged: bool = False, on_device: bool = False
) -> Plan:
    """Equal blocks of 1 MB with room for so many slots (and two buffers)."""
    shapes = tuple(
        BlockShape(name=f"layers.{i}", slot_bytes=MB, file_bytes=MB, is_staged=is_staged)
        for i in range(num_blocks)
    )
    room = int(num_slots * MB)
    buffered = 2 * MB if is_staged or on_device else 0
    budgets = Budgets(
        ram_bytes=buffered + (0 if on_device else room), device_bytes=room if on_device else 0
    )
    return make_plan(
        Request(
            blocks=shapes, orders=plain_orders(num_blocks), budgets=budgets, on_device=on_device
        )
    )


def seconds_of(plan: Plan, forward: float, backward: float, load: float, copy: float = 0.0):
    def one(op: Op) -> float:
        if op.kind is Kind.COMPUTE:
            return forward if op.direction == "F" else backward
        return load if op.kind is Kind.LOAD else copy

    return [one(op) for op in plan.sequences["train"].ops]


def test_a_plan_with_everything_resident_takes_its_compute() -> None:
    plan = plan_of(4, 4)
    found = simulate(plan.sequences["train"], seconds_of(plan, 1.0, 3.0, 100.0), between_s=0.5)
    assert found.step_s == pytest.approx(4 * 4 + 0.5)
    assert found.stall_s == {}
    assert found.bound_by is Lane.COMPUTE


def test_reading_hides_behind_longer_compute() -> None:
    plan = plan_of(8, 3)
    found = simulate(plan.sequences["train"], seconds_of(plan, 1.0, 2.0, 0.9))
    assert found.step_s == pytest.approx(8 * 3)
    assert found.busy_s[Lane.NVME_READ] == pytest.approx(0.9 * (16 - 2 * 3))


def test_a_step_bound_by_the_drive_takes_its_reading() -> None:
    plan = plan_of(8, 3)
    found = simulate(plan.sequences["train"], seconds_of(plan, 0.1, 0.1, 5.0))
    reading = 5.0 * (16 - 2 * 3)
    assert reading <= found.step_s <= 1.05 * reading
    assert found.bound_by is Lane.NVME_READ
    assert found.stall_s[Kind.LOAD] > 0.9 * reading
    assert sum(op.op.kind is Kind.LOAD for op in found.critical_path()) >= 8


def test_one_slot_overlaps_nothing() -> None:
    plan = plan_of(4, 1)
    found = simulate(plan.sequences["train"], seconds_of(plan, 1.0, 2.0, 1.0))
    num_loads = sum(op.kind is Kind.LOAD for op in plan.sequences["train"].ops)
    assert found.step_s == pytest.approx(4 * 3.0 + num_loads * 1.0)


def test_what_forward_lacks_backward_cannot_lend() -> None:
    """Balanced over the step, but forward is a quarter of the compute and half of the reading."""
    plan = plan_of(40, 3)
    load = 40 * 4.0 / (2 * (40 - 3))
    found = simulate(plan.sequences["train"], seconds_of(plan, 1.0, 3.0, load))
    assert found.one_pass_s == pytest.approx(160.0)
    assert found.two_pass_s == pytest.approx(37 * load + 120.0)
    assert found.step_s == pytest.approx(found.two_pass_s, rel=0.03)
    assert found.step_s > 1.2 * found.one_pass_s


@pytest.mark.parametrize("seed", range(30))
def test_no_schedule_beats_its_bound_and_every_op_waits_for_what_it_must(seed: int) -> None:
    rng = random.Random(seed)
    on_device = rng.random() < 0.5
    plan = plan_of(
        rng.randint(1, 12), rng.randint(1, 6), is_staged=rng.random() < 0.5, on_device=on_device
    )
    steps = plan.sequences["train"]
    seconds = [rng.random() for _ in steps.ops]
    found = simulate(steps, seconds, between_s=0.3)
    assert found.step_s >= max(found.busy_s.values()) - 1e-9
    assert found.step_s <= sum(seconds) + 0.3 + 1e-9
    lane_end: dict[Lane, float] = {}
    for each in found.ops:
        assert each.end_s == pytest.approx(each.start_s + seconds[each.op.id])
        assert each.start_s >= lane_end.get(each.op.lane, -1e9) - 1e-9
        lane_end[each.op.lane] = each.end_s
        for other in each.op.after:
            assert each.start_s >= found.ops[other].end_s - 1e-9
    stalls = sum(found.stall_s.values())
    assert found.step_s == pytest.approx(found.busy_s[Lane.COMPUTE] + 0.3 + stalls)


def test_the_critical_path_ends_with_the_step_and_has_no_gaps() -> None:
    plan = plan_of(8, 3)
    found = simulate(plan.sequences["train"], seconds_of(plan, 1.0, 1.0, 1.5))
    path = found.critical_path()
    assert path[-1].end_s == pytest.approx(max(op.end_s for op in found.ops))
    for before, after in itertools.pairwise(path):
        assert after.start_s == pytest.approx(before.end_s)


def test_a_large_step_is_simulated_in_a_tenth_of_a_second() -> None:
    import time

    plan = plan_of(96, 4, on_device=True)
    seconds = seconds_of(plan, 1.0, 3.0, 1.0, 0.2)
    simulate(plan.sequences["train"], seconds)
    start = time.process_time()
    simulate(plan.sequences["train"], seconds)
    assert time.process_time() - start < 0.1
