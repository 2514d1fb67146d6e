"""Activations on NVMe in plans, predictions and the search: what they cost, what they are worth, where they fit."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

import pytest

from ssdtune.schedule.choices import Choice, Request, first_choice, room_for
from ssdtune.schedule.cost import Operator, Pricing, StepWork, Work
from ssdtune.schedule.holding import levels_of
from ssdtune.schedule.hunt import WORTH_WRITING
from ssdtune.schedule.memory import STAGING_BYTES, STORED, Fixed, Footprint, Passes, predict_peak_of
from ssdtune.schedule.plan import (
    BlockShape,
    Budgets,
    Direction,
    Kind,
    Lane,
    Plan,
    PlanError,
    StepPlan,
    Tier,
)
from ssdtune.schedule.planner import layout_of, make_plan, plain_orders, plan_of
from ssdtune.schedule.profile import OPERATORS, Profile
from ssdtune.schedule.saved_plan import plan_from
from ssdtune.schedule.saved_profile import profile_from
from ssdtune.schedule.search import search
from ssdtune.schedule.simulate import Simulation, simulate
from ssdtune.schedule.stored import with_stored_activations, with_stored_inputs, written_bytes
from ssdtune.schedule.validate import validate

MB = 10**6
NUM = 6  # an embedding and layers
WITHIN = 1.01


def request(
    nvme: int, memory: int = 0, *, bytes_each: int = 10 * MB, num: int = NUM, **more: object
) -> Request:
    """Equal blocks of 100 MB through three slots; all but the first keep `bytes_each`."""
    blocks = [
        BlockShape(name=f"b{i}", slot_bytes=100 * MB, file_bytes=100 * MB) for i in range(num)
    ]
    made = Request(
        blocks=tuple(blocks),
        orders=plain_orders(num, first_trained=1),
        budgets=Budgets(ram_bytes=300 * MB, activation_bytes=memory, nvme_activation_bytes=nvme),
        activation_bytes=(0, *[bytes_each] * (num - 1)),
    )
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of bytes a second; seconds of each block's forward. Backward takes twice that, and once more where it
    computes again. activation_bytes: of the request."""

    read: float
    write: float
    forward_s: tuple[float, ...]
    activation_bytes: tuple[int, ...]

    kind = "train"
    between_s = 0.0

    def steps(self, plan: Plan) -> StepPlan:
        return with_stored_activations(plan.sequences["train"], self.activation_bytes)

    def op_seconds(self, steps: StepPlan) -> list[float]:
        seconds = []
        for op in steps.ops:
            if op.kind is Kind.COMPUTE:
                visit = steps.visits[op.visit]
                times = 1 if op.direction is Direction.FORWARD else 2 if visit.keeps else 3
                seconds.append(times * self.forward_s[visit.block])
            else:
                rate = self.write if op.lane is Lane.NVME_WRITE else self.read
                seconds.append(op.num_bytes / rate)
        return seconds

    def simulated(self, steps: StepPlan) -> Simulation:
        return simulate(steps, self.op_seconds(steps))

    def step_s(self, plan: Plan) -> float:
        return self.simulated(self.steps(plan)).step_s


def a_machine(asked: Request, *, read: float = 1e9, write: float = 1e9) -> Machine:
    forward = (0.01, *[1.0] * (len(asked.blocks) - 1))
    return Machine(read, write, forward, asked.activation_bytes)


# ------------------------------------------------------------------ plans


def test_a_plan_stores_what_the_budget_holds_and_comes_back_from_json() -> None:
    plan = make_plan(request(nvme=35 * MB))
    assert len(plan.stored_blocks) == 3
    assert not plan.kept_blocks
    assert 0 not in plan.stored_blocks, "nothing goes back through an embedding"
    assert plan.nvme_activation_bytes == 30 * MB
    assert not any(v.keeps for v in plan.sequences["forward"].visits)
    assert plan_from(plan.to_json()) == plan
    assert any("wait on NVMe for backward (30.0 MB), within 35.0 MB" in x for x in plan.lines())


def test_what_memory_holds_is_not_stored() -> None:
    plan = make_plan(request(nvme=20 * MB, memory=25 * MB))
    assert (len(plan.kept_blocks), len(plan.stored_blocks)) == (2, 2)
    assert not plan.kept_blocks & plan.stored_blocks


def test_where_bytes_are_not_known_all_may_and_the_budget_decides() -> None:
    plan = make_plan(request(nvme=35 * MB, activation_bytes=()))
    assert plan.stored_blocks == frozenset(range(1, NUM))


def with_places(plan: Plan, places: dict[int, Tier | None]) -> Plan:
    """By position of the training step's visits, where they keep instead."""
    train = plan.sequences["train"]
    visits = [
        dataclasses.replace(v, keeps=places.get(i, v.keeps)) for i, v in enumerate(train.visits)
    ]
    steps = dataclasses.replace(train, visits=tuple(visits))
    return dataclasses.replace(plan, sequences={**plan.sequences, "train": steps})


def test_a_plan_over_its_budget_or_of_two_minds_is_refused() -> None:
    plan = make_plan(request(nvme=50 * MB))
    less = dataclasses.replace(plan.budgets, nvme_activation_bytes=49 * MB)
    with pytest.raises(PlanError, match=r"raise offload\.nvme_activations"):
        validate(dataclasses.replace(plan, budgets=less))
    last = len(plan.sequences["train"].visits) - 1
    with pytest.raises(PlanError, match="b1 stay in some visits only"):
        validate(with_places(plan, {last: None}))
    with pytest.raises(PlanError, match="b1 stay in several places"):
        validate(with_places(plan, {last: Tier.DEVICE}))
    with pytest.raises(PlanError, match="b1 are to stay in RAM"):
        validate(with_places(plan, {1: Tier.RAM, last: Tier.RAM}))


# ------------------------------------------------------------------ the step


def test_a_stored_block_goes_out_after_its_forward_and_comes_back_before_its_backward() -> None:
    asked = request(nvme=30 * MB)
    plan = make_plan(asked)
    plain = plan.sequences["train"]
    steps = with_stored_activations(plain, asked.activation_bytes)
    names = {plan.blocks[i].name for i in plan.stored_blocks}
    out = [op for op in steps.ops if op.kind is Kind.STORE_ACTIVATIONS]
    back = [op for op in steps.ops if op.kind is Kind.FETCH_ACTIVATIONS]
    assert {op.block for op in out} == {op.block for op in back} == names
    assert len(steps.ops) == len(plain.ops) + len(out) + len(back)
    assert {op.num_bytes for op in (*out, *back)} == {10 * MB}
    assert written_bytes(steps) == 30 * MB
    for op in out:
        assert [steps.ops[a].kind for a in op.after] == [Kind.COMPUTE]
    for op in back:
        assert Kind.STORE_ACTIVATIONS in {steps.ops[a].kind for a in op.after}
        assert any(op.id in other.after for other in steps.ops if other.kind is Kind.COMPUTE)


def test_beside_inputs_on_nvme_both_go_their_way() -> None:
    asked = request(nvme=30 * MB)
    steps = with_stored_inputs(make_plan(asked).sequences["train"], 7 * MB)
    both = with_stored_activations(steps, asked.activation_bytes)
    assert [op.id for op in both.ops] == list(range(len(both.ops)))
    assert all(a < op.id for op in both.ops for a in op.after)
    kinds = [op.kind for op in both.ops]
    assert kinds.count(Kind.STORE) == NUM - 1
    assert kinds.count(Kind.STORE_ACTIVATIONS) == 3


def test_on_a_device_they_pass_the_link() -> None:
    asked = request(
        nvme=30 * MB,
        on_device=True,
        budgets=Budgets(ram_bytes=300 * MB, device_bytes=300 * MB, nvme_activation_bytes=30 * MB),
    )
    steps = with_stored_activations(
        make_plan(asked).sequences["train"], asked.activation_bytes, on_device=True
    )
    lanes = [
        op.lane for op in steps.ops if op.kind is Kind.STORE_ACTIVATIONS or op.lane is Lane.D2H
    ]
    assert lanes == [Lane.D2H, Lane.NVME_WRITE] * 3


def test_without_any_or_without_their_bytes_the_step_is_as_it_was() -> None:
    steps = make_plan(request(nvme=30 * MB)).sequences["train"]
    assert with_stored_activations(steps, ()) is steps
    steps = make_plan(request(nvme=0)).sequences["train"]
    assert with_stored_activations(steps, request(nvme=0).activation_bytes) is steps


# ------------------------------------------------------------------ time and memory


def a_profile() -> Profile:
    """A FLOP takes a nanosecond; a byte one as it is read, two as it is written, a tenth as it is copied."""
    rates = {"nvme_read": 1e-9, "nvme_write": 2e-9, "unpack": 1e-10, "h2d": 1e-9, "d2h": 1e-9}
    content = {
        "name": "made up",
        "operators": {"float32": {kind: [[1, 1e-9], [10**9, 1.0]] for kind in OPERATORS}},
        "transfers": {name: [[1, s], [10**9, s * 10**9]] for name, s in rates.items()},
    }
    return profile_from(content, "here")


def a_pricing(asked: Request) -> Pricing:
    """A layer's forward takes a second, its backward three, or two where it does not compute again."""
    seconds = {1: Work({Operator("matmul", 1e9): 1}), 3: Work({Operator("matmul", 3e9): 1})}
    passes = {
        (block, direction): [seconds[1 if direction is Direction.FORWARD else 3]]
        for block, direction in asked.orders["train"]
    }
    behind = {block: [Work({Operator("matmul", 2e9): 1})] for block in range(1, NUM)}
    work = StepWork(
        passes={"train": passes, "forward": passes},
        between=Work({}),
        dtype="float32",
        behind=behind,
    )
    return Pricing(work, a_profile(), num_micro_batches=1, activation_bytes=asked.activation_bytes)


def test_a_step_pays_for_writing_reading_and_copying_and_not_for_computing_again() -> None:
    asked = request(nvme=50 * MB)
    pricing = a_pricing(asked)
    step = pricing.simulation(make_plan(asked))
    plain = pricing.simulation(make_plan(request(nvme=0)))
    num = NUM - 1
    busy = {lane: step.busy_s[lane] - plain.busy_s.get(lane, 0.0) for lane in step.busy_s}
    copied = 2 * num * 10 * MB * 1e-10
    assert busy[Lane.NVME_WRITE] == pytest.approx(num * 10 * MB * 2e-9)
    assert busy[Lane.NVME_READ] == pytest.approx(num * 10 * MB * 1e-9)
    assert busy[Lane.COMPUTE] == pytest.approx(copied - num * 1.0)


FOOTPRINT = Footprint(
    kept_bytes=MB,
    hidden_bytes=MB,
    held_bytes=MB,
    workspace_bytes=20 * MB,
    loss_bytes=MB,
    forward_bytes=9 * MB,
    activation_bytes=(0, *[5 * MB] * (NUM - 1)),
    how="made up",
)
FIXED = Fixed(base_bytes=0, resident_bytes=0, trained_bytes=0, gradient_bytes=0, optimizer_bytes=0)


@pytest.mark.parametrize("budget", [50 * MB, 30 * MB])
def test_the_peak_has_them_on_the_drive_and_a_ring_in_ram(budget: int) -> None:
    asked = request(nvme=budget)
    plan, passes = make_plan(asked), Passes(num=2)
    peak = predict_peak_of(plan, FOOTPRINT, FIXED, passes)
    none = predict_peak_of(make_plan(request(nvme=0)), FOOTPRINT, FIXED, passes)
    assert peak.nvme == {STORED: budget}
    ring = peak.ram_bytes - none.ram_bytes
    assert STAGING_BYTES <= ring <= 1.1 * STAGING_BYTES
    step = a_pricing(asked).simulation(plan)
    levels = levels_of(plan, step, peak, FOOTPRINT, passes)
    on_drive = [level.num_bytes for level in levels[Tier.NVME]]
    assert max(on_drive) == budget
    assert on_drive[0] == on_drive[-1] == 0
    assert max(level.num_bytes for level in levels[Tier.RAM]) == peak.ram_bytes


# ------------------------------------------------------------------ the search


def test_a_fast_drive_is_used_and_a_slow_one_is_not() -> None:
    asked = request(nvme=10**9)
    fast = search(asked, a_machine(asked, read=1e10, write=1e10)).plan
    assert len(fast.stored_blocks) == NUM - 1
    slow = search(asked, a_machine(asked, read=1e10, write=1e5)).plan
    assert not slow.stored_blocks
    busy = search(asked, a_machine(asked, read=2e7, write=1e10)).plan
    assert not busy.stored_blocks, "the weights take all of its reading"


def test_memory_comes_before_the_drive() -> None:
    asked = request(nvme=10**9, memory=20 * MB)
    plan = search(asked, a_machine(asked, read=1e10, write=1e10)).plan
    assert (len(plan.kept_blocks), len(plan.stored_blocks)) == (2, NUM - 3)
    roomy = request(nvme=10**9, memory=10**9)
    plan = search(roomy, a_machine(roomy, read=1e10, write=1e10)).plan
    assert (len(plan.kept_blocks), len(plan.stored_blocks)) == (NUM - 1, 0), "as fast, and no wear"


def test_little_gain_is_not_worth_writing() -> None:
    """A block whose forward is a hundredth of the step's time stays off the drive."""
    asked = request(nvme=10**9)
    even = a_machine(asked, read=1e12, write=1e12)
    lopsided = dataclasses.replace(even, forward_s=(0.0, *[0.01] * (NUM - 2), 10.0))
    only = dataclasses.replace(asked, activation_bytes=(*asked.activation_bytes[:-1], 2 * 10**9))
    machine = dataclasses.replace(lopsided, activation_bytes=only.activation_bytes)
    assert not search(only, machine).plan.stored_blocks


def all_places(asked: Request) -> Iterator[Choice]:
    """The static choice with every way to keep, store and compute again that fits."""
    static = first_choice(asked)
    able = range(1, len(asked.blocks))
    for homes in itertools.product("again memory nvme".split(), repeat=len(able)):
        places = dict(zip(able, homes, strict=True))
        choice = dataclasses.replace(
            static,
            kept=frozenset(i for i in able if places[i] == "memory"),
            stored=frozenset(i for i in able if places[i] == "nvme"),
        )
        if room_for(asked, choice) is not None:
            yield choice


@pytest.mark.parametrize("seed", range(8))
def test_small_models_are_placed_as_brute_force_would(seed: int) -> None:
    """Blocks of different cost and size, budgets that hold some, drives about as fast as they must be."""
    chance = random.Random(seed)
    num = 6
    sizes = (0, *[chance.randint(2, 12) * MB for _ in range(num - 1)])
    total = sum(sizes)
    asked = request(
        nvme=int(chance.uniform(0.3, 1.0) * total),
        memory=int(chance.uniform(0.0, 0.6) * total),
        num=num,
        activation_bytes=sizes,
    )
    forward = (0.01, *[chance.uniform(0.2, 1.0) for _ in range(num - 1)])
    balance = chance.uniform(0.3, 3.0)
    machine = Machine(
        read=100 * MB / (balance * 1.2),
        write=max(sizes) / chance.uniform(0.2, 2.0),
        forward_s=forward,
        activation_bytes=sizes,
    )
    plans = [plan_of(asked, layout_of(asked, choice)) for choice in all_places(asked)]
    fastest = min(map(machine.step_s, plans))
    without = min(machine.step_s(plan) for plan in plans if not plan.stored_blocks)
    best = fastest if fastest < (1 - WORTH_WRITING) * without else without
    found = search(asked, machine)
    assert found.simulation.step_s <= WITHIN * best
    assert found.simulation.step_s == pytest.approx(machine.step_s(found.plan))
