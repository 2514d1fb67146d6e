"""The planner keeps every budget, fetches as little as its slots allow, and never lets a slot be
overwritten while it is read. Each is checked by another route than the planner's own."""

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import pytest

from ssdtune.schedule.choices import Order, Request, size_classes, smallest_budgets
from ssdtune.schedule.plan import (
    BlockShape,
    Budgets,
    Direction,
    Kind,
    Lane,
    Op,
    Plan,
    PlanError,
    StepPlan,
    Tier,
)
from ssdtune.schedule.planner import assign_slots, make_plan, plain_orders
from ssdtune.sizes import parse_size

F, B = Direction.FORWARD, Direction.BACKWARD
NUM_RANDOM = 300


def layers(num: int, num_bytes: int = 1000, *, is_staged: bool = False) -> tuple[BlockShape, ...]:
    """Equal blocks."""
    return tuple(
        BlockShape(
            name=f"layers.{i}", slot_bytes=num_bytes, file_bytes=num_bytes, is_staged=is_staged
        )
        for i in range(num)
    )


def plan_of(
    blocks: tuple[BlockShape, ...],
    ram: int,
    *,
    device: int | None = None,
    buffers_on_device: bool = False,
    prefetch: int = 2,
    orders: dict[str, Order] | None = None,
) -> Plan:
    return make_plan(
        Request(
            blocks=blocks,
            orders=orders or plain_orders(len(blocks)),
            budgets=Budgets(ram_bytes=ram, device_bytes=device or 0),
            on_device=device is not None,
            buffers_on_device=buffers_on_device,
            prefetch=prefetch,
        )
    )


# ------------------------------------------------------------------ a grid of random requests


def random_order(random_: random.Random, num_blocks: int) -> Order:
    """Any visits in any order: repeated, skipped, both ways."""
    num_visits = random_.randint(1, 3 * num_blocks)
    return [(random_.randrange(num_blocks), random_.choice((F, B))) for _ in range(num_visits)]


def random_request(random_: random.Random) -> Request:
    """Blocks of one to four sizes, any budget that holds the largest, plain and wild orders."""
    num_blocks = random_.randint(1, 12)
    sizes = [random_.randint(1, 5000) for _ in range(random_.randint(1, 4))]
    blocks = []
    for i in range(num_blocks):
        size = random_.choice(sizes) + random_.choice((0, 0, random_.randint(0, 60)))
        is_staged = random_.random() < 0.3
        blocks.append(
            BlockShape(name=f"b{i}", slot_bytes=size, file_bytes=size + 7, is_staged=is_staged)
        )
    on_device, directly = random_.choice(((False, False), (True, False), (True, True)))
    least = smallest_budgets(blocks, on_device=on_device, buffers_on_device=directly)
    more = [random_.choice((0, random_.randint(0, 6000), random_.randint(0, 60000))) for _ in "ab"]
    orders: dict[str, Order] = dict(plain_orders(num_blocks, random_.randint(0, num_blocks)))
    if random_.random() < 0.4:
        orders["train"] = random_order(random_, num_blocks)
    return Request(
        blocks=tuple(blocks),
        orders=orders,
        budgets=Budgets(
            ram_bytes=least.ram_bytes + more[0],
            device_bytes=least.device_bytes + more[1] * on_device,
        ),
        on_device=on_device,
        buffers_on_device=directly,
        prefetch=random_.randint(0, 4),
    )


def random_plans() -> Iterator[tuple[Request, Plan]]:
    random_ = random.Random(0)
    for _ in range(NUM_RANDOM):
        request = random_request(random_)
        yield request, make_plan(request)


def test_every_budget_is_kept() -> None:
    """Counted here, block by block."""
    for request, plan in random_plans():
        in_ram, there = sum(plan.buffers), sum(plan.slots)
        if request.buffers_on_device:
            in_ram, there = 0, there + in_ram
        if request.on_device:
            assert there == plan.device_bytes <= request.budgets.device_bytes
            pairs = zip(request.blocks, plan.tiers, strict=True)
            in_ram += sum(block.file_bytes for block, tier in pairs if tier is Tier.RAM)
        else:
            assert plan.device_bytes == 0
            in_ram += there
        assert in_ram <= request.budgets.ram_bytes
        assert in_ram == plan.ram_bytes


def test_every_visit_finds_its_block_and_what_stays_is_read_once() -> None:
    """A replay of what slots hold, over three steps of each kind and changes between kinds."""
    for request, plan in random_plans():
        num_read: Counter[int] = Counter()
        for steps in plan.sequences.values():
            held: dict[int, int] = {}
            for turn in range(3):
                for visit in steps.visits:
                    is_here = held.get(visit.slot) == visit.block
                    assert is_here or visit.is_filled_for or turn == 0
                    if not is_here:
                        num_read[visit.block] += turn > 0
                        held[visit.slot] = visit.block
                    size = request.blocks[visit.block].slot_bytes
                    assert size <= plan.slots[visit.slot]
        home = Tier.DEVICE if request.on_device else Tier.RAM
        for block, tier in enumerate(plan.tiers):
            if tier is home:
                assert not num_read[block]


def ends(steps: Sequence[StepPlan], random_: random.Random) -> list[dict[int, tuple[float, float]]]:
    """When each op of each step begins and ends, all ops of random length, as early as they may.

    One pass: an op begins when its lane's last op and all that it waits for have ended.
    """
    lanes: dict[Lane, float] = {}
    spans: list[dict[int, tuple[float, float]]] = []
    for number, step in enumerate(steps):
        now: dict[int, tuple[float, float]] = {}
        for op in step.ops:
            awaited = [now[a][1] for a in op.after]
            if number:
                awaited += [spans[-1][a][1] for a in op.after_previous]
            start = max([lanes.get(op.lane, 0.0), *awaited])
            lanes[op.lane] = start + random_.choice((0.0, 0.1, random_.random(), 5.0))
            now[op.id] = (start, lanes[op.lane])
        spans.append(now)
    return spans


def writer(ops: Iterable[Op]) -> Op:
    """The op among a visit's that writes its slot: the last before COMPUTE."""
    return [op for op in ops if op.kind is not Kind.COMPUTE][-1]


def test_no_slot_or_buffer_is_overwritten_before_its_reader_has_ended() -> None:
    """Whatever the lanes' speeds: writes and reads of a slot alternate over three steps."""
    random_ = random.Random(1)
    for _, plan in random_plans():
        for step in plan.sequences.values():
            spans = ends([step] * 3, random_)
            slots: dict[int, float] = {}  # when the last read of what is in there has ended
            buffers: dict[int, float] = {}
            for span in spans:
                for v, visit in enumerate(step.visits):
                    ops = [op for op in step.ops if op.visit == v]
                    computed = span[ops[-1].id]
                    if visit.is_filled_for:
                        written = span[writer(ops).id]
                        assert written[0] >= slots.get(visit.slot, 0.0)
                        assert computed[0] >= written[1]
                    if visit.buffer is not None:
                        loaded = span[ops[0].id]
                        assert ops[0].kind is Kind.LOAD
                        assert loaded[0] >= buffers.get(visit.buffer, 0.0)
                        assert span[ops[1].id][0] >= loaded[1]
                        buffers[visit.buffer] = span[ops[1].id][1]
                    slots[visit.slot] = computed[1]


# ------------------------------------------------------------------ budgets


@pytest.mark.parametrize("where", ["ram", "device", "device, buffers too"])
@pytest.mark.parametrize("is_staged", [False, True])
def test_the_smallest_budget_works_and_a_byte_less_is_refused(where: str, is_staged: bool) -> None:
    """The message's numbers can be typed in as they stand."""
    blocks = (
        *layers(3, 1_234_567, is_staged=is_staged),
        BlockShape(name="embed", slot_bytes=7_654_321, file_bytes=7_660_000, is_staged=is_staged),
    )
    on_device, directly = where != "ram", "buffers" in where
    least = smallest_budgets(blocks, on_device=on_device, buffers_on_device=directly)
    request = Request(
        blocks=blocks,
        orders=plain_orders(4),
        budgets=least,
        on_device=on_device,
        buffers_on_device=directly,
    )
    make_plan(request)
    for field in ("ram_bytes", "device_bytes")[directly : 1 + on_device]:
        short = dataclasses.replace(least, **{field: getattr(least, field) - 1})
        with pytest.raises(PlanError) as caught:
            make_plan(dataclasses.replace(request, budgets=short))
        message = str(caught.value)
        assert "embed" in message.splitlines()[0]
        assert len(message.splitlines()) <= 4
        key = {"ram_bytes": "offload.ram", "device_bytes": "offload.vram"}[field]
        found = re.search(rf"{key} is .*; the smallest that works is (\S+)", message)
        assert found is not None, message
        told = parse_size(found[1])
        assert isinstance(told, int)
        make_plan(dataclasses.replace(request, budgets=dataclasses.replace(short, **{field: told})))
        assert told < getattr(least, field) + 10**6


def test_no_blocks_is_no_plan() -> None:
    with pytest.raises(PlanError, match="no blocks"):
        plan_of((), 1000)


@pytest.mark.parametrize("device", [None, 20_000])
def test_more_memory_never_reads_more(device: int | None) -> None:
    blocks = (BlockShape(name="embed", slot_bytes=4000, file_bytes=4000), *layers(10))
    least = smallest_budgets(blocks, on_device=device is not None)
    reads = []
    for more in range(0, 20_000, 250):
        plan = plan_of(blocks, least.ram_bytes + more, device=device)
        reads.append(plan.sequences["train"].read_bytes)
    assert reads == sorted(reads, reverse=True)
    assert reads[-1] == 0


def test_a_model_that_fits_is_resident() -> None:
    plan = plan_of(layers(6), 6000)
    assert plan.tiers == (Tier.RAM,) * 6
    assert plan.sequences["train"].read_bytes == 0
    assert plan_of(layers(6), 5999).sequences["train"].read_bytes > 0


# ------------------------------------------------------------------ slots and prefetch


def test_blocks_of_like_size_share_slots() -> None:
    sizes = (400, 100, 81, 79, 390, 100)
    blocks = [BlockShape(name=str(n), slot_bytes=n, file_bytes=n) for n in sizes]
    assert [[sizes[i] for i in c] for c in size_classes(blocks)] == [
        [400, 390],
        [100, 100, 81],
        [79],
    ]


@pytest.mark.parametrize("prefetch", [0, 1, 2, 3])
def test_as_many_slots_as_fills_may_run_ahead_and_one(prefetch: int) -> None:
    plan = plan_of(layers(20), 1000 * (1 + prefetch), prefetch=prefetch)
    assert plan.slots == (1000,) * (1 + prefetch)


def test_slots_for_all_come_before_a_slot_for_each_size() -> None:
    """With one slot for each size nothing would be read while the only slot of a layer is in use."""
    blocks = (BlockShape(name="embed", slot_bytes=1300, file_bytes=1300), *layers(8))
    assert plan_of(blocks, 2600).slots == (1300, 1300)
    assert plan_of(blocks, 3300).slots == (1300, 1000, 1000)
    assert plan_of(blocks, 2599).slots == (1300, 1000)
    assert plan_of(blocks, 2299).slots == (1300,)


def test_staged_blocks_pass_as_many_buffers_as_fills_run_ahead() -> None:
    """In turn, each large enough for the largest of them; others pass none."""
    blocks = (*layers(4), *layers(4, 1100, is_staged=True))
    plan = plan_of(blocks, 10_000 - 2500, prefetch=2)
    assert plan.buffers == (1100, 1100)
    buffers = [v.buffer for v in plan.sequences["train"].visits if v.block >= 4 and v.is_filled_for]
    assert buffers == [i % 2 for i in range(len(buffers))]
    assert all(v.buffer is None for v in plan.sequences["train"].visits if v.block < 4)
    assert plan_of(blocks, 2200).buffers == (1100,)


# ------------------------------------------------------------------ reuse


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4])
def test_the_turn_around_and_the_wrap_save_two_fetches_a_slot(num_slots: int) -> None:
    """2 N - 2 S fetches a step with S slots, the blocks at both ends of the order."""
    plan = plan_of(layers(10), 1000 * num_slots, prefetch=num_slots - 1)
    step = plan.sequences["train"]
    assert step.read_bytes == (20 - 2 * num_slots) * 1000
    kept = [(v.block, v.direction) for v in step.visits if not v.is_filled_for]
    at_start = [(i, F) for i in range(num_slots)]
    at_turn = [(i, B) for i in reversed(range(10 - num_slots, 10))]
    assert kept == at_start + at_turn


def fewest_fetches(order: Order, num_slots: int) -> int:
    """Of a step in the long run, if one may choose with hindsight what to replace (Belady)."""
    many = [block for block, _ in order] * 6
    held: set[int] = set()
    counts = [0] * 6
    for i, block in enumerate(many):
        if block in held:
            continue
        counts[i // len(order)] += 1
        if len(held) == num_slots:
            next_use = {
                b: next((j for j in range(i, len(many)) if many[j] == b), 10**9) for b in held
            }
            held.remove(max(held, key=lambda b: next_use[b]))
        held.add(block)
    return counts[3]


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5, 6])
def test_no_order_of_replacing_reads_less_than_the_plan(num_blocks: int, num_slots: int) -> None:
    order = plain_orders(num_blocks)["train"]
    assigned = assign_slots(order, [range(num_slots)] * num_blocks)
    assert sum(is_filled for _, is_filled in assigned) == fewest_fetches(order, num_slots)


def test_a_slot_that_was_just_left_is_not_the_next_to_be_filled() -> None:
    """With S slots a fill may begin S - 1 visits before the visit that it is for."""
    for num_slots in (2, 3, 4):
        order = plain_orders(12)["train"]
        assigned = assign_slots(order, [range(num_slots)] * 12)
        for v, (slot, is_filled) in enumerate(assigned):
            if is_filled:
                recent = [assigned[v - back][0] for back in range(1, num_slots)]
                assert slot not in recent


def test_slots_that_swap_roles_every_step_are_still_a_plan_of_one_step() -> None:
    """Five blocks through two slots, forward only: where a block lies differs from step to step.

    Repeated as it is, the step must find every block or fill for it (validated with the plan).
    """
    plan = plan_of(layers(5), 2000, prefetch=1, orders={"forward": plain_orders(5)["forward"]})
    visits = plan.sequences["forward"].visits
    assert [v.slot for v in visits] in ([0, 1, 0, 1, 0], [1, 0, 1, 0, 1])
    assert [v.is_filled_for for v in visits] == [True] * 5


def test_evaluation_reads_what_is_not_resident_once() -> None:
    plan = plan_of(layers(10), 5000, prefetch=1)
    streamed = sum(tier is Tier.NVME for tier in plan.tiers)
    assert plan.sequences["forward"].read_bytes <= streamed * 1000


# ------------------------------------------------------------------ residents


def gaps(positions: Sequence[int], num: int) -> list[int]:
    """How many others lie between neighbours, the ends of the row counted as one gap."""
    ordered = sorted(positions)
    return [b - a - 1 for a, b in zip(ordered, [*ordered[1:], ordered[0] + num], strict=True)]


@pytest.mark.parametrize("num_resident", range(1, 17))
def test_residents_are_spread_evenly(num_resident: int) -> None:
    plan = plan_of(layers(20), (3 + num_resident) * 1000)
    resident = [i for i, tier in enumerate(plan.tiers) if tier is Tier.RAM]
    assert len(resident) == num_resident
    assert max(gaps(resident, 20)) - min(gaps(resident, 20)) <= 1


@pytest.mark.parametrize("num_cached", [0, 1, 3, 6, 10, 17])
def test_on_a_device_ram_keeps_blocks_spread_evenly(num_cached: int) -> None:
    plan = plan_of(layers(20), (2 + num_cached) * 1000, device=3000)
    cached = [i for i, tier in enumerate(plan.tiers) if tier is Tier.RAM]
    assert len(cached) == num_cached
    if num_cached > 1:
        assert max(gaps(cached, 20)) - min(gaps(cached, 20)) <= 1
    fills = Counter(
        (op.kind, op.block in {f"layers.{i}" for i in cached})
        for op in plan.sequences["train"].ops
        if op.kind is not Kind.COMPUTE
    )
    assert fills[Kind.LOAD, True] == 0
    assert fills[Kind.UPLOAD, False] == fills[Kind.LOAD, False]


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_buffers_on_the_device_take_the_place_of_slots(prefetch: int) -> None:
    """As many as fills run ahead; what RAM has is all for blocks that stay there, and goes through none."""
    num_buffers = max(1, prefetch)
    least = 1000 * (1 + prefetch + num_buffers)
    plan = plan_of(layers(20), 3500, device=least, buffers_on_device=True, prefetch=prefetch)
    assert plan.buffers == (1000,) * num_buffers
    assert plan.slots == (1000,) * (1 + prefetch)
    assert Counter(plan.tiers) == {Tier.RAM: 3, Tier.NVME: 17}
    in_ram = {b.name for b, t in zip(plan.blocks, plan.tiers, strict=True) if t is Tier.RAM}
    for op in plan.sequences["train"].ops:
        if op.kind is Kind.LOAD or op.lane is Lane.DEVICE_COPY:
            assert op.block not in in_ram
        elif op.kind is Kind.UPLOAD:
            assert op.block in in_ram


def test_on_a_device_residents_are_there_and_no_longer_in_ram() -> None:
    plan = plan_of(layers(8), 4000, device=6000)
    assert Counter(plan.tiers) == {Tier.DEVICE: 3, Tier.RAM: 2, Tier.NVME: 3}
    for visit in plan.sequences["train"].visits:
        if plan.tiers[visit.block] is Tier.DEVICE:
            assert not visit.is_filled_for


def test_the_last_few_stay_in_the_slots_that_they_would_share() -> None:
    """A budget for N - 1 blocks: two slots for the streamed would keep one more from staying."""
    plan = plan_of(layers(4), 4000, prefetch=1)
    assert Counter(plan.tiers) == {Tier.RAM: 4}
