"""What a step holds over time: its most is the planned peak, on every tier; and it comes and goes as visits do."""

from __future__ import annotations

import random

import pytest

from ssdtune.schedule.choices import Request
from ssdtune.schedule.holding import Level, levels_of
from ssdtune.schedule.memory import (
    ACTIVATIONS,
    GRADIENTS,
    INPUTS,
    STAGING_BYTES,
    WORKSPACE,
    Fixed,
    Footprint,
    Passes,
    Peak,
    predict_peak_of,
)
from ssdtune.schedule.plan import BlockShape, Budgets, Direction, Kind, Plan, Tier
from ssdtune.schedule.planner import make_plan, plain_orders
from ssdtune.schedule.simulate import Simulation, simulate
from ssdtune.schedule.stored import with_stored_inputs

MB = 10**6
NUM, MICRO = 7, 3
KEPT = 5 * MB + 7  # not a multiple of the visits that come back


def a_footprint(*, loss: int, activations: bool) -> Footprint:
    return Footprint(
        kept_bytes=KEPT,
        hidden_bytes=MB,
        held_bytes=MB // 2,
        workspace_bytes=20 * MB,
        loss_bytes=loss,
        forward_bytes=9 * MB,
        activation_bytes=(0, *[4 * MB] * (NUM - 2), 0) if activations else (),
        how="made up",
    )


def a_plan(*, on_device: bool, tier: Tier, activation_bytes: int = 0) -> Plan:
    blocks = tuple(
        BlockShape(name=f"layers.{i}", slot_bytes=10 * MB, file_bytes=10 * MB) for i in range(NUM)
    )
    order = plain_orders(NUM, first_trained=1)
    order["train"] = [pair for pair in order["train"] if pair != (NUM - 1, Direction.BACKWARD)]
    return make_plan(
        Request(
            blocks=blocks,
            orders=order,
            budgets=Budgets(
                ram_bytes=45 * MB,
                device_bytes=45 * MB if on_device else 0,
                activation_bytes=activation_bytes,
            ),
            on_device=on_device,
            block_inputs=tier,
            activation_bytes=(0, *[MICRO * 4 * MB] * (NUM - 2), 0) if activation_bytes else (),
        )
    )


def a_step(plan: Plan, kind: str, seed: int) -> Simulation:
    steps = with_stored_inputs(
        plan.sequences[kind],
        MICRO * KEPT,
        tier=plan.block_inputs,
        on_device=plan.on_device,
    )
    chance = random.Random(seed)
    return simulate(steps, [chance.uniform(0.1, 2.0) for _ in steps.ops], between_s=0.5)


FIXED = Fixed(
    base_bytes=300 * MB,
    resident_bytes=2 * MB,
    trained_bytes=3 * MB,
    gradient_bytes=3 * MB,
    optimizer_bytes=6 * MB,
)


def held(
    plan: Plan, *, loss: int = MB, kind: str = "train", seed: int = 0, activations: bool = False
) -> tuple[dict[Tier, tuple[Level, ...]], Peak, Simulation]:
    footprint = a_footprint(loss=loss, activations=activations)
    passes = Passes(kind=kind, num=MICRO)
    peak = predict_peak_of(plan, footprint, FIXED, passes)
    step = a_step(plan, kind, seed)
    return levels_of(plan, step, peak, footprint, passes), peak, step


CASES = [
    (on_device, tier)
    for on_device in (False, True)
    for tier in (Tier.DEVICE, Tier.RAM, Tier.NVME)
    if on_device or tier is not Tier.RAM
]


@pytest.mark.parametrize(("on_device", "tier"), CASES)
@pytest.mark.parametrize("loss", [MB, 50 * MB])  # less than a block's workspace, and more
@pytest.mark.parametrize("kind", ["train", "forward"])
@pytest.mark.parametrize("seed", range(3))
def test_the_most_that_a_tier_holds_is_the_planned_peak(
    on_device: bool, tier: Tier, loss: int, kind: str, seed: int
) -> None:
    plan = a_plan(on_device=on_device, tier=tier)
    levels, peak, _ = held(plan, loss=loss, kind=kind, seed=seed)
    planned = {
        Tier.DEVICE: peak.device_bytes,
        Tier.RAM: peak.ram_bytes,
        Tier.NVME: sum(peak.nvme.values()),
    }
    assert {t: max(level.num_bytes for level in each) for t, each in levels.items()} == {
        t: n for t, n in planned.items() if n
    }


@pytest.mark.parametrize("budget", [40 * MB, 500 * MB])
def test_activations_grow_to_what_was_planned_and_go(budget: int) -> None:
    plan = a_plan(on_device=False, tier=Tier.DEVICE, activation_bytes=budget)
    levels, peak, _ = held(plan, activations=True)
    found = [level.parts[ACTIVATIONS] for level in levels[Tier.RAM]]
    assert max(found) == peak.ram[ACTIVATIONS] > 0
    assert found[0] == found[-1] == 0
    assert max(level.num_bytes for level in levels[Tier.RAM]) == peak.ram_bytes


def test_nothing_is_left_over_at_the_end_and_nothing_is_negative() -> None:
    levels, peak, step = held(a_plan(on_device=True, tier=Tier.NVME))
    for each in levels.values():
        assert all(n >= 0 for level in each for n in level.parts.values())
        assert [level.start_s for level in each] == sorted({level.start_s for level in each})
        last = each[-1]
        assert last.parts.get(INPUTS, 0) == last.parts.get(WORKSPACE, 0) == 0
        assert last.start_s <= step.step_s + 1e-9
    assert peak.ram["staging of block inputs"] == 0, "FIXED has none"
    assert STAGING_BYTES > 0


def test_inputs_come_one_by_one_and_go_in_reverse() -> None:
    """At the end of each visit so many inputs are kept as there are visits before it that come back."""
    plan = a_plan(on_device=False, tier=Tier.DEVICE)
    levels, _, step = held(plan)
    share = MICRO * KEPT // (NUM - 2)
    ends = [e.end_s for e in step.ops if e.op.kind is Kind.COMPUTE]

    def at(second: float) -> int:
        now = [lv for lv in levels[Tier.RAM] if lv.start_s < second - 1e-9][-1]
        return round(now.parts[INPUTS] / share)

    assert [at(end) for end in ends] == [0, 1, 2, 3, 4, 5, 5, 5, 4, 3, 2, 1]


def test_gradients_are_there_from_the_loss_on() -> None:
    levels, peak, step = held(a_plan(on_device=False, tier=Tier.DEVICE))
    loss = [
        e for e in step.ops if e.op.direction is Direction.FORWARD and e.op.kind is Kind.COMPUTE
    ]
    for level in levels[Tier.RAM]:
        begun = loss[-1].start_s <= level.start_s < step.step_s
        assert level.parts[GRADIENTS] == (peak.ram[GRADIENTS] if begun else 0)
