"""Reads and writes at one drive, and both ways of a link: how long they take beside each other, in a step's prediction
and in the search."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest

from ssdtune.machines import machine_from
from ssdtune.schedule.choices import Request
from ssdtune.schedule.cost import Operator, Pricing, StepWork, Work
from ssdtune.schedule.curve import Curve
from ssdtune.schedule.fluid import simulate_fluid
from ssdtune.schedule.plan import BlockShape, Budgets, Direction, Kind, Lane, Plan, StepPlan, Tier
from ssdtune.schedule.planner import make_plan, plain_orders
from ssdtune.schedule.profile import LINK_MIXED, MIXED, OPERATORS, SUSTAINED, Profile
from ssdtune.schedule.saved_profile import profile_from
from ssdtune.schedule.search import search
from ssdtune.schedule.simulate import simulate, step_seconds

MB = 10**6
NUM, BLOCK = 6, 100 * MB


def a_request(*, nvme: int = 0, activation_bytes: int = 0, slots: int = 3) -> Request:
    """Equal blocks of 100 MB; all but the first, an embedding, may keep their activations."""
    blocks = [BlockShape(name=f"b{i}", slot_bytes=BLOCK, file_bytes=BLOCK) for i in range(NUM)]
    return Request(
        blocks=tuple(blocks),
        orders=plain_orders(NUM, first_trained=1),
        budgets=Budgets(ram_bytes=slots * BLOCK, nvme_activation_bytes=nvme),
        activation_bytes=(0, *[activation_bytes] * (NUM - 1)),
    )


def a_profile(*, read: float = 1e9, write: float = 1e9, **more: float) -> Profile:
    """A FLOP takes a nanosecond, a copied byte next to nothing; bytes a second of the drive. more: other transfers'."""
    rates = {"nvme_read": read, "nvme_write": write, "unpack": 1e15, **more}
    content = {
        "name": "made up",
        "operators": {"float32": {kind: [[1, 1e-9], [10**9, 1.0]] for kind in OPERATORS}},
        "transfers": {name: [[1, 1 / rate], [10**9, 10**9 / rate]] for name, rate in rates.items()},
    }
    return profile_from(content, "here")


def with_overlap(profile: Profile, overlap: float) -> Profile:
    """In a second of both, so many seconds of reads alone and of writes alone are done."""
    a, b = sorted(profile.transfer(name).seconds(0.5e9) for name in ("nvme_read", "nvme_write"))
    mixed = Curve(((1e9, 2 * a / overlap + b - a),))
    return dataclasses.replace(profile, transfers={**profile.transfers, MIXED: mixed})


def a_pricing(profile: Profile, forward_s: float, **more: object) -> Pricing:
    """A block's forward takes so long, its backward three times that, or twice where it does not compute again."""

    def work(times: float) -> list[Work]:
        return [Work({Operator("matmul", times * forward_s * 1e9): 1})]

    orders = plain_orders(NUM, first_trained=1)["train"]
    passes = {(b, d): work(1 if d is Direction.FORWARD else 3) for b, d in orders}
    steps = StepWork(
        passes={"train": passes, "forward": passes},
        between=Work({}),
        dtype="float32",
        behind={block: work(2) for block in range(1, NUM)},
    )
    return Pricing(steps, profile, num_micro_batches=1, **more)  # type: ignore[arg-type]


def drive_s(steps: StepPlan, seconds: Sequence[float]) -> tuple[float, float]:
    """Of forward's reads and of its writes."""
    ops = [op for op in steps.ops if op.direction is Direction.FORWARD]
    lanes = (Lane.NVME_READ, Lane.NVME_WRITE)
    reads, writes = (sum(seconds[op.id] for op in ops if op.lane is lane) for lane in lanes)
    return reads, writes


def a_plan(**more: Any) -> Plan:
    return dataclasses.replace(make_plan(a_request(**more)), block_inputs=Tier.NVME)


# ------------------------------------------------------------------ a step


@pytest.mark.parametrize("overlap", [1.0, 4 / 3, 2.0, None])
@pytest.mark.parametrize("stored_bytes", [100 * MB, 1000 * MB])
def test_a_pass_that_the_drive_bounds_takes_what_the_drive_needs_for_both(
    overlap: float | None, stored_bytes: int
) -> None:
    """Weights are read while what backward needs is written; compute takes next to nothing."""
    plain = a_profile()
    shared = plain if overlap is None else with_overlap(plain, overlap)
    plan = a_plan()
    alone, beside = (
        a_pricing(profile, 1e-6, stored_bytes=stored_bytes) for profile in (plain, shared)
    )
    steps = beside.steps(plan)
    reads, writes = drive_s(steps, alone.op_seconds(steps))
    assert writes == pytest.approx(stored_bytes / 1e9)
    less, more = sorted((reads, writes))
    needed = more if overlap is None else 2 * less / overlap + more - less
    assert max(drive_s(steps, beside.op_seconds(steps))) == pytest.approx(needed)
    backward = beside.simulation(plan).busy_s[Lane.NVME_READ]
    assert beside.simulation(plan).step_s >= needed
    assert backward >= alone.simulation(plan).busy_s[Lane.NVME_READ]


def test_in_turns_both_take_what_they_take_one_after_the_other() -> None:
    plan, profile = a_plan(), with_overlap(a_profile(write=0.5e9), 1.0)
    pricing = a_pricing(profile, 1e-6, stored_bytes=500 * MB)
    steps = pricing.steps(plan)
    loads = sum(
        op.num_bytes
        for op in steps.ops
        if op.kind is Kind.LOAD and op.direction is Direction.FORWARD
    )
    assert max(drive_s(steps, pricing.op_seconds(steps))) == pytest.approx(loads / 1e9 + 1.0)


@pytest.mark.parametrize("seed", range(12))
def test_sums_over_a_pass_are_near_what_is_followed_moment_by_moment(seed: int) -> None:
    """Predictions know at every moment what is under way; the search, which tries hundreds of plans, only what a pass has
    of each."""
    chance = random.Random(seed)
    overlap = chance.choice((1.0, 1.2, 1.5))
    profile = with_overlap(a_profile(write=chance.uniform(0.5, 1.5) * 1e9), overlap)
    stored_bytes = int(chance.uniform(0.2, 1.5) * NUM * BLOCK)
    plan = a_plan(slots=chance.choice((3, 4)))
    forward_s = chance.uniform(0.3, 2.0) * BLOCK / 1e9
    shared = a_pricing(profile, forward_s, stored_bytes=stored_bytes)
    plain = dataclasses.replace(
        profile, transfers={k: v for k, v in profile.transfers.items() if k != MIXED}
    )
    pricing = a_pricing(plain, forward_s, stored_bytes=stored_bytes)
    steps = pricing.steps(plan)
    on_drive = [op.lane in (Lane.NVME_READ, Lane.NVME_WRITE) for op in steps.ops]
    followed = simulate_fluid(
        steps,
        pricing.op_seconds(steps),
        [{"drive": 1.0} if is_drive else {} for is_drive in on_drive],
        {"drive": overlap},
    )
    alone = simulate(steps, pricing.op_seconds(steps))
    found = shared.simulation(plan)
    assert found.step_s == pytest.approx(followed.step_s), "the prediction"
    assert found.stall_s == pytest.approx(followed.stall_s)
    spans = [e.end_s - e.start_s for e in found.ops if e.op.lane is Lane.NVME_WRITE]
    assert found.busy_s[Lane.NVME_WRITE] == pytest.approx(sum(spans))
    assert found.busy_s[Lane.NVME_WRITE] >= (1 - 1e-9) * alone.busy_s[Lane.NVME_WRITE]
    summed_s = step_seconds(steps, shared.op_seconds(steps))
    assert summed_s == pytest.approx(found.step_s, rel=0.1), alone.step_s


@pytest.mark.parametrize("overlap", [1.0, 4 / 3, 2.0, None])
def test_both_ways_of_a_devices_link_take_what_the_link_needs_for_both(
    overlap: float | None,
) -> None:
    """Weights go up while block inputs come down."""
    request = dataclasses.replace(
        a_request(), on_device=True, budgets=Budgets(ram_bytes=3 * BLOCK, device_bytes=3 * BLOCK)
    )
    plan = dataclasses.replace(make_plan(request), block_inputs=Tier.RAM)
    alone = {"h2d": 1e9, "d2h": 0.5e9}
    profile = a_profile(**alone)
    if overlap is not None:  # of 0.5 s alone, and of 1 s
        mixed = Curve(((1e9, 2 * 0.5 / overlap + 1.0 - 0.5),))
        profile = dataclasses.replace(profile, transfers={**profile.transfers, LINK_MIXED: mixed})
        assert profile.link_overlap == pytest.approx(overlap)
    pricing = a_pricing(profile, 1e-6, stored_bytes=600 * MB)
    steps = pricing.steps(plan)
    seconds = pricing.op_seconds(steps)
    for direction in Direction:
        up, down = (
            [op for op in steps.ops if op.lane is lane and op.direction is direction]
            for lane in (Lane.H2D, Lane.D2H)
        )
        less, more = sorted(
            (sum(op.num_bytes for op in up) / 1e9, sum(op.num_bytes for op in down) / 0.5e9)
        )
        needed = more if overlap is None else 2 * less / overlap + more - less
        taken = [sum(seconds[op.id] for op in ops) for ops in (up, down)]
        assert max(taken) == pytest.approx(needed)
        assert bool(down) is (direction is Direction.FORWARD)


def test_a_step_without_writes_is_as_it_was() -> None:
    plan = make_plan(a_request())
    plain, shared = (
        a_pricing(profile, 0.1).simulation(plan)
        for profile in (a_profile(), with_overlap(a_profile(), 1.0))
    )
    assert plain == shared


def test_what_is_written_in_every_step_goes_past_the_drives_cache() -> None:
    """Where that was measured."""
    plan = a_plan()
    of_cache, sustained = (
        a_pricing(a_profile(**more), 1e-6, stored_bytes=500 * MB).simulation(plan)
        for more in ({}, {SUSTAINED: 0.1e9})
    )
    assert of_cache.busy_s[Lane.NVME_WRITE] == pytest.approx(0.5)
    assert sustained.busy_s[Lane.NVME_WRITE] == pytest.approx(5.0)


def test_a_machine_that_is_put_together_is_taken_to_read_and_write_in_turns() -> None:
    profile = machine_from("rtx4090+990pro").profile
    assert profile is not None
    assert profile.drive_overlap == pytest.approx(1.0, rel=0.01)


# ------------------------------------------------------------------ the search


def test_fewer_activations_go_to_a_drive_that_has_no_time_for_them() -> None:
    """Beside reading, writing is free where the drive does both at once, and as long as computing again where it does
    not."""
    asked = a_request(nvme=10**9, activation_bytes=75 * MB)
    at_once, in_turns = (
        a_pricing(with_overlap(a_profile(), overlap), 0.07, activation_bytes=asked.activation_bytes)
        for overlap in (2.0, 1.0)
    )
    free, dear = (search(asked, pricing).plan for pricing in (at_once, in_turns))
    assert len(free.stored_blocks) > len(dear.stored_blocks)
    assert in_turns.simulation(dear).step_s < in_turns.simulation(free).step_s
    assert at_once.simulation(free).step_s < at_once.simulation(dear).step_s
