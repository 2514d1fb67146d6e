"""The plan search against brute force, long searches and the static policy. Seconds are made up: no clock is read."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import pytest

from ssdtune.schedule import counts as counts_module
from ssdtune.schedule import search as search_module
from ssdtune.schedule.choices import Choice, Request, room_for, skeletons, static_choice
from ssdtune.schedule.counts import BlockKind, best_counts
from ssdtune.schedule.hunt import Effort
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
from ssdtune.schedule.search import search
from ssdtune.schedule.simulate import Simulation, simulate
from ssdtune.schedule.validate import validate

MB = 10**6
WITHIN = 1.01


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a machine: blocks' bytes, seconds of a layer's forward, bytes a second of the lanes."""

    blocks: tuple[BlockShape, ...]
    forward_s: tuple[float, ...]
    read_rate: float
    h2d_rate: float
    budgets: Budgets
    on_device: bool

    @property
    def request(self) -> Request:
        return Request(
            blocks=self.blocks,
            orders=plain_orders(len(self.blocks), first_trained=1),
            budgets=self.budgets,
            on_device=self.on_device,
        )

    kind = "train"
    between_s = 0.0

    def steps(self, plan: Plan) -> StepPlan:
        return plan.sequences["train"]

    def op_seconds(self, steps: StepPlan) -> list[float]:
        found = []
        for op in steps.ops:
            if op.kind is Kind.COMPUTE:
                passes = 1.0 if op.direction is Direction.FORWARD else 2.5
                found.append(passes * self.forward_s[steps.visits[op.visit].block])
            elif op.kind is Kind.LOAD:
                found.append(op.num_bytes / self.read_rate)
            else:
                found.append(op.num_bytes / self.h2d_rate)
        return found

    def simulated(self, steps: StepPlan) -> Simulation:
        return simulate(steps, self.op_seconds(steps))

    def step_s(self, plan: Plan) -> float:
        return self.simulated(self.steps(plan)).step_s


def a_case(seed: int, num_layers: int, *, on_device: bool, resident: float) -> Case:
    """Embedding, layers, head. resident: share of the layers' bytes that there is room for, beside slots."""
    chance = random.Random(seed)
    layer = chance.randint(5, 20) * MB
    ends = [chance.randint(1, 4) * layer for _ in range(2)]
    sizes = [ends[0], *[layer] * num_layers, ends[1]]
    names = ["embed", *[f"layers.{i}" for i in range(num_layers)], "head"]
    blocks = tuple(
        BlockShape(name=n, slot_bytes=b, file_bytes=b) for n, b in zip(names, sizes, strict=True)
    )
    compute = chance.uniform(0.01, 0.1)
    forward = (0.1 * compute, *[compute] * num_layers, chance.uniform(1, 4) * compute)
    balance = chance.uniform(0.3, 3)  # reading a layer / its mean pass
    room = int(resident * num_layers * layer) + 3 * layer + sum(ends)
    if on_device:
        budgets = Budgets(ram_bytes=room + 4 * max(ends), device_bytes=room // 2 + 2 * max(ends))
    else:
        budgets = Budgets(ram_bytes=room)
    return Case(
        blocks=blocks,
        forward_s=forward,
        read_rate=layer / (balance * 1.75 * compute),
        h2d_rate=layer / (chance.uniform(0.1, 0.8) * compute),
        budgets=budgets,
        on_device=on_device,
    )


def all_choices(request: Request) -> Iterator[Choice]:
    """Every way to share slots with every set that stays and fits."""
    deep = dataclasses.replace(request, prefetch=4)
    num = len(request.blocks)
    places = "nvme ram slot".split() if request.on_device else "nvme slot".split()
    for classes, depth in skeletons(deep):
        static = static_choice(deep, classes, depth)
        if static is None:
            continue
        for homes in itertools.product(places, repeat=num):
            choice = dataclasses.replace(
                static,
                residents=frozenset(i for i in range(num) if homes[i] == "slot"),
                cached=frozenset(i for i in range(num) if homes[i] == "ram"),
            )
            if room_for(request, choice) is not None:
                yield choice


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("resident", [0.2, 0.6])
def test_small_models_are_planned_as_brute_force_would(seed: int, resident: float) -> None:
    case = a_case(seed, 5, on_device=False, resident=resident)
    request = case.request
    best = min(case.step_s(plan_of(request, layout_of(request, c))) for c in all_choices(request))
    found = search(request, case)
    assert found.simulation.step_s <= WITHIN * best
    assert found.simulation.step_s == pytest.approx(case.step_s(found.plan))


@pytest.mark.parametrize("seed", range(4))
def test_small_models_on_a_device_too(seed: int) -> None:
    case = a_case(seed, 3, on_device=True, resident=0.4)
    request = case.request
    best = min(case.step_s(plan_of(request, layout_of(request, c))) for c in all_choices(request))
    assert search(request, case).simulation.step_s <= WITHIN * best


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_a_longer_search_of_a_large_model_finds_nothing_much_better(
    seed: int, on_device: bool
) -> None:
    case = a_case(seed, 40 + 10 * seed, on_device=on_device, resident=0.3)
    found = search(case.request, case)
    effort = Effort(num_tries=800, patience=1_000)
    longer = search(case.request, case, effort)
    is_at_the_limit = found.simulation.step_s < 1.002 * found.simulation.busy_s[Lane.COMPUTE]
    assert is_at_the_limit or longer.num_tries > 2 * found.num_tries
    assert found.simulation.step_s <= WITHIN * longer.simulation.step_s


@pytest.mark.slow  # a thousand plans of a large model, twice
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("num_layers", "seed"), [(78, 3), (94, 10)])
def test_other_ways_through_a_large_model_find_nothing_much_better(
    num_layers: int, seed: int, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 80 and 96 blocks; the moves of a search are drawn, and these are drawn otherwise."""
    case = a_case(seed, num_layers, on_device=on_device, resident=0.3)
    found = search(case.request, case)
    assert found.num_tries > 100, "there is something to look for"
    for other in (1, 2):
        monkeypatch.setattr(search_module, "Random", lambda _, other=other: random.Random(other))
        longer = search(case.request, case, Effort(num_tries=1_000, patience=1_000)).simulation
        assert found.simulation.step_s <= WITHIN * longer.step_s


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_never_slower_than_the_static_policy_and_stays_in_the_budget(
    seed: int, on_device: bool
) -> None:
    case = a_case(100 + seed, 12, on_device=on_device, resident=0.1 * seed)
    found = search(case.request, case)
    validate(found.plan)
    assert found.plan.ram_bytes <= case.budgets.ram_bytes
    if on_device:
        assert found.plan.slot_bytes <= case.budgets.device_bytes
    assert found.simulation.step_s <= case.step_s(make_plan(case.request)) * (1 + 1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_where_visits_vary_a_slot_more_is_ready(seed: int) -> None:
    """Of what fits, three slots and more; a budget that holds only fewer is planned all the same."""
    case = a_case(seed, 10, on_device=False, resident=0.3)
    varied = dataclasses.replace(case.request, visits_vary=True)
    layers = [i for i, block in enumerate(case.blocks) if "layers" in block.name]

    def num_slots(request: Request, effort: Effort | None = None) -> int:
        visits = search(request, case, effort).plan.sequences["train"].visits
        return len({v.slot for v in visits if v.block in layers and v.is_filled_for})

    assert num_slots(varied) >= 3
    asked = Effort(depths=(1,))
    assert num_slots(varied, asked) == num_slots(case.request, asked) == 2
    least = Budgets(ram_bytes=max(block.slot_bytes for block in case.blocks))
    assert num_slots(dataclasses.replace(varied, budgets=least)) == 1


def test_equal_requests_have_equal_plans() -> None:
    case = a_case(7, 10, on_device=False, resident=0.4)
    assert search(case.request, case) == search(case.request, case)


def test_without_the_solver_greedy_counts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    case = a_case(3, 20, on_device=False, resident=0.4)
    with_solver = search(case.request, case)
    monkeypatch.setattr(counts_module, "best_counts", lambda *args, **more: None)
    without = search(case.request, case)
    assert without.simulation.step_s <= 1.02 * with_solver.simulation.step_s


def test_where_the_drive_is_the_limit_what_stays_is_spread() -> None:
    case = a_case(0, 24, on_device=False, resident=0.5)
    slow = dataclasses.replace(case, read_rate=case.read_rate / 4)
    tiers = search(slow.request, slow).plan.tiers[1:-1]
    gaps = [len(list(run)) for tier, run in itertools.groupby(tiers) if tier is Tier.NVME]
    assert max(gaps) <= 6, tiers


def test_a_budget_that_holds_nothing_names_the_smallest() -> None:
    case = a_case(0, 4, on_device=False, resident=0.0)
    tight = dataclasses.replace(case, budgets=Budgets(ram_bytes=MB))
    with pytest.raises(PlanError, match=r"smallest that works is \d+MB"):
        search(tight.request, tight)


def test_the_smallest_budget_is_planned() -> None:
    case = a_case(0, 4, on_device=False, resident=0.0)
    largest = max(b.slot_bytes for b in case.blocks)
    tight = dataclasses.replace(case, budgets=Budgets(ram_bytes=largest))
    assert len(search(tight.request, tight).plan.slots) == 1


# ------------------------------------------------------------------ the integer program

F, B = Direction.FORWARD, Direction.BACKWARD
COMPUTE = {(F, Lane.COMPUTE): 1.0, (B, Lane.COMPUTE): 2.0}
LAYERS = BlockKind(
    num=30,
    slot_bytes=10,
    file_bytes=10,
    streamed={**COMPUTE, (F, Lane.NVME_READ): 1.5, (B, Lane.NVME_READ): 1.5},
    cached=COMPUTE,
    resident=COMPUTE,
)
EMBEDDING = BlockKind(
    num=1,
    slot_bytes=100,
    file_bytes=100,
    streamed={(F, Lane.COMPUTE): 5.0, (F, Lane.NVME_READ): 30.0},
    cached={(F, Lane.COMPUTE): 5.0},
    resident={(F, Lane.COMPUTE): 5.0},
)


def counted(
    kinds: Sequence[BlockKind], rooms: Callable[[], tuple[int, int]], *, on_device: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pytest.importorskip("highspy")
    slot_room, ram_room = rooms()
    found = best_counts(kinds, slot_room=slot_room, ram_room=ram_room, on_device=on_device)
    assert found is not None
    return found.resident, found.cached


def test_counts_stay_where_they_save_most() -> None:
    """Forward reads 75 s and computes 35: the embedding saves 0.3 s a byte, a layer 0.15 and nothing in backward."""
    found = counted([LAYERS, EMBEDDING], lambda: (150, 150), on_device=False)
    assert found == ((5, 1), (0, 0))


def test_counts_use_ram_beside_a_device() -> None:
    found = counted([LAYERS, EMBEDDING], lambda: (50, 150), on_device=True)
    assert found == ((5, 0), (5, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Followed(Case):
    """Of which one step takes twice as long as its sums say."""

    slow: StepPlan

    def simulated(self, steps: StepPlan) -> Simulation:
        found = super().simulated(steps)
        return dataclasses.replace(found, step_s=2 * found.step_s) if steps == self.slow else found


def test_of_the_best_by_their_sums_the_one_that_is_fastest_when_followed_is_taken() -> None:
    case = a_case(1, 8, on_device=False, resident=0.4)
    best = search(case.request, case)
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    followed = Followed(**fields, slow=best.plan.sequences["train"])
    other = search(followed.request, followed)
    assert other.plan != best.plan
    assert other.simulation.step_s < 1.2 * best.simulation.step_s
