"""A plan is a value: it says what each lane does and waits for, and contradicts itself nowhere."""

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from ssdtune.errors import SSDTuneError
from ssdtune.schedule.choices import Request, smallest_budgets
from ssdtune.schedule.ops import make_ops
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
    Visit,
    reuse_distances,
)
from ssdtune.schedule.planner import make_plan, plain_orders
from ssdtune.schedule.saved_plan import plan_from
from ssdtune.schedule.validate import validate

F, B = Direction.FORWARD, Direction.BACKWARD


def shape(name: str, num_bytes: int = 100, *, is_staged: bool = False) -> BlockShape:
    """A block whose file bytes are a little more than its slot's; of one that is staged a part is wide codes."""
    return BlockShape(
        name=name,
        slot_bytes=num_bytes,
        file_bytes=num_bytes + 8,
        is_staged=is_staged,
        decoding=(("wide", num_bytes // 2),) if is_staged else (),
    )


def small_plan(**changes: Any) -> Plan:
    """Three blocks through two slots: a, c in place, b staged. Turned around without a fetch."""
    visits = (
        Visit(block=0, direction=F, slot=0, is_filled_for=False),
        Visit(block=1, direction=F, slot=1, is_filled_for=True, buffer=0),
        Visit(block=2, direction=F, slot=0, is_filled_for=True),
        Visit(block=2, direction=B, slot=0, is_filled_for=False),
        Visit(block=1, direction=B, slot=1, is_filled_for=False),
        Visit(block=0, direction=B, slot=0, is_filled_for=True),
    )
    blocks = (shape("a"), shape("b", is_staged=True), shape("c"))
    plan = Plan(
        blocks=blocks,
        tiers=(Tier.NVME,) * 3,
        slots=(100, 100),
        buffers=(108,),
        on_device=False,
        budgets=Budgets(ram_bytes=308),
        sequences={"train": StepPlan(visits=visits, ops=make_ops(visits, blocks, on_device=False))},
    )
    return dataclasses.replace(plan, **changes)


def with_visit(plan: Plan, v: int, **changes: Any) -> Plan:
    """Visit `v` changed, and the ops made from the visits."""
    visits = list(plan.sequences["train"].visits)
    visits[v] = dataclasses.replace(visits[v], **changes)
    try:
        ops = make_ops(visits, plan.blocks, on_device=plan.on_device)
    except IndexError:
        ops = plan.sequences["train"].ops
    return dataclasses.replace(plan, sequences={"train": StepPlan(visits=tuple(visits), ops=ops)})


def with_op(plan: Plan, op_id: int, **changes: Any) -> Plan:
    """Op `op_id` changed, all else as it was."""
    steps = plan.sequences["train"]
    ops = list(steps.ops)
    ops[op_id] = ops[op_id]._replace(**changes)
    return dataclasses.replace(
        plan, sequences={"train": StepPlan(visits=steps.visits, ops=tuple(ops))}
    )


def without_op(plan: Plan, op_id: int) -> Plan:
    """One op left out, the others numbered anew."""
    steps = plan.sequences["train"]
    kept = [op for op in steps.ops if op.id != op_id]
    new = {op.id: i for i, op in enumerate(kept)}
    ops = tuple(
        op._replace(
            id=new[op.id],
            after=tuple(new[a] for a in op.after if a in new),
            after_previous=tuple(new[a] for a in op.after_previous if a in new),
        )
        for op in kept
    )
    return dataclasses.replace(plan, sequences={"train": StepPlan(visits=steps.visits, ops=ops)})


# ------------------------------------------------------------------ ops


def test_the_ops_of_a_small_plan_are_these() -> None:
    """Written out by hand: (kind, lane, block, direction, bytes, after, after the previous step's)."""
    found = [
        (op.kind, op.lane, op.block, op.direction, op.num_bytes, op.after, op.after_previous)
        for op in small_plan().sequences["train"].ops
    ]
    read, cpu, compute = Lane.NVME_READ, Lane.CPU, Lane.COMPUTE
    assert found == [
        (Kind.COMPUTE, compute, "a", F, 0, (), ()),
        (Kind.LOAD, read, "b", F, 108, (), (2,)),  # the buffer: emptied last by the UNPACK before
        (Kind.UNPACK, cpu, "b", F, 100, (1,), (7,)),  # the slot: read last by b's backward
        (Kind.COMPUTE, compute, "b", F, 0, (2,), ()),
        (Kind.LOAD, read, "c", F, 108, (0,), ()),  # straight into the slot that a's visit has left
        (Kind.COMPUTE, compute, "c", F, 0, (4,), ()),
        (Kind.COMPUTE, compute, "c", B, 0, (), ()),
        (Kind.COMPUTE, compute, "b", B, 0, (), ()),
        (Kind.LOAD, read, "a", B, 108, (6,), ()),
        (Kind.COMPUTE, compute, "a", B, 0, (8,), ()),
    ]


def test_on_a_device_every_fill_is_an_upload_and_those_from_ram_are_nothing_else() -> None:
    visits = (
        Visit(block=0, direction=F, slot=0, is_filled_for=True, buffer=0),
        Visit(block=1, direction=F, slot=0, is_filled_for=True),
    )
    ops = make_ops(visits, (shape("file"), shape("ram")), on_device=True)
    assert [(op.kind, op.lane, op.block, op.num_bytes) for op in ops] == [
        (Kind.LOAD, Lane.NVME_READ, "file", 108),
        (Kind.UPLOAD, Lane.H2D, "file", 100),
        (Kind.COMPUTE, Lane.COMPUTE, "file", 0),
        (Kind.UPLOAD, Lane.H2D, "ram", 100),
        (Kind.COMPUTE, Lane.COMPUTE, "ram", 0),
    ]


def test_from_buffers_on_a_device_a_copy_within_it_fills_the_slot() -> None:
    """It takes nothing of the link, which only blocks that RAM keeps need."""
    visits = (
        Visit(block=0, direction=F, slot=0, is_filled_for=True, buffer=0),
        Visit(block=1, direction=F, slot=0, is_filled_for=True),
    )
    blocks = (shape("file"), shape("ram"))
    ops = make_ops(visits, blocks, on_device=True, buffers_on_device=True)
    assert [(op.kind, op.lane, op.block, op.num_bytes, op.after) for op in ops] == [
        (Kind.LOAD, Lane.NVME_READ, "file", 108, ()),
        (Kind.UNPACK, Lane.DEVICE_COPY, "file", 100, (0,)),
        (Kind.COMPUTE, Lane.COMPUTE, "file", 0, (1,)),
        (Kind.UPLOAD, Lane.H2D, "ram", 100, (2,)),
        (Kind.COMPUTE, Lane.COMPUTE, "ram", 0, (3,)),
    ]
    assert ops[0].after_previous == (1,), "the buffer is emptied first"


def test_read_bytes_are_those_of_one_steady_step() -> None:
    assert small_plan().sequences["train"].read_bytes == 3 * 108


def test_a_slots_last_reader_is_found_across_the_steps_end() -> None:
    """Against a search backwards through two steps written one after the other."""
    random_ = random.Random(0)
    for _ in range(200):
        slots = [random_.randrange(4) for _ in range(random_.randint(1, 12))]
        visits = [Visit(block=0, direction=F, slot=s, is_filled_for=False) for s in slots]
        twice = slots * 2
        expected = [
            next(d for d in range(1, len(slots) + 1) if twice[len(slots) + v - d] == slots[v])
            for v in range(len(slots))
        ]
        assert reuse_distances(visits) == expected


# ------------------------------------------------------------------ validation


def test_a_sound_plan_is_valid() -> None:
    validate(small_plan())


STEP = small_plan().sequences["train"]
CONTRADICTIONS: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "fewer tiers than blocks": (
        lambda p: dataclasses.replace(p, tiers=p.tiers[:2]),
        "3 blocks but 2 tiers",
    ),
    "a loss without tokens": (
        lambda p: dataclasses.replace(p, chunk_tokens=0),
        "chunk_tokens is 0",
    ),
    "more RAM than there is": (
        lambda p: dataclasses.replace(p, budgets=Budgets(ram_bytes=307)),
        "308 B of RAM, over the budget of 307 B: raise offload.ram",
    ),
    "more of the device than there is": (
        lambda p: dataclasses.replace(
            p, on_device=True, budgets=Budgets(ram_bytes=999, device_bytes=199)
        ),
        "200 B on the device, over the budget of 199 B: raise offload.vram",
    ),
    "buffers on a device that is none": (
        lambda p: dataclasses.replace(p, buffers_on_device=True),
        "buffers on a device, but its slots in RAM",
    ),
    "buffers and slots more than there is": (
        lambda p: dataclasses.replace(
            p,
            on_device=True,
            buffers_on_device=True,
            budgets=Budgets(ram_bytes=0, device_bytes=307),
        ),
        "slots and buffers need 308 B on the device, over the budget of 307 B: raise offload.vram",
    ),
    "a block that is none": (
        lambda p: with_visit(p, 0, block=3),
        "visit 0 names block 3, the plan has 3",
    ),
    "a negative block": (lambda p: with_visit(p, 0, block=-1), "visit 0 names block -1"),
    "a slot that is none": (
        lambda p: with_visit(p, 0, slot=2),
        "visit 0 names slot 2, the plan has 2",
    ),
    "a buffer that is none": (
        lambda p: with_visit(p, 1, buffer=1),
        "visit 1 names buffer 1, the plan has 1",
    ),
    "a block larger than its slot": (
        lambda p: dataclasses.replace(p, slots=(99, 100)),
        r"visit 0 \(a F\): 100 bytes do not fit slot 0 of 99",
    ),
    "a file larger than its buffer": (
        lambda p: dataclasses.replace(p, buffers=(107,)),
        r"visit 1 \(b F\): 108 bytes do not fit buffer 0 of 107",
    ),
    "a staged block without a buffer": (
        lambda p: with_visit(p, 1, buffer=None),
        r"visit 1 \(b F\) needs a buffer",
    ),
    "a buffer for a block read in place": (
        lambda p: with_visit(p, 2, buffer=0),
        r"visit 2 \(c F\) has no use for a buffer",
    ),
    "weights expected where others are": (
        lambda p: with_visit(p, 2, is_filled_for=False),
        r"visit 2 \(c F\) expects its weights in slot 0, which holds a",
    ),
    "weights expected that the step before has replaced": (
        lambda p: with_visit(p, 5, slot=1),
        r"visit 0 \(a F\) expects its weights in slot 0, which holds c",
    ),
    "an op numbered wrongly": (
        lambda p: with_op(p, 3, id=4),
        "op 3 waits for an op that does not come before",
    ),
    "an op that waits for a later one": (lambda p: with_op(p, 3, after=(2, 4)), "op 3 waits"),
    "an op that waits for itself": (lambda p: with_op(p, 3, after=(2, 3)), "op 3 waits"),
    "an op that waits for one that no step has": (
        lambda p: with_op(p, 1, after_previous=(2, 10)),
        "op 1 waits for an op that no step has",
    ),
    "a visit that is not computed": (
        lambda p: without_op(p, 5),
        "op 5 of its visits must be compute c F for visit 2",
    ),
    "a fill without its copy": (
        lambda p: without_op(p, 2),
        "op 2 of its visits must be unpack b F for visit 1 on cpu, 100 bytes, but is compute b F",
    ),
    "a fill that reads too little": (
        lambda p: with_op(p, 4, num_bytes=100),
        "load c F for visit 2 on nvme_read, 108 bytes, but is .* 100 bytes",
    ),
    "an op on another lane": (
        lambda p: with_op(p, 4, lane=Lane.H2D),
        "on nvme_read, .* but is .* on h2d",
    ),
    "an op of another block": (
        lambda p: with_op(p, 4, block="a"),
        "must be load c F .* but is load a F",
    ),
    "ops left over": (
        lambda p: dataclasses.replace(
            p,
            sequences={
                "train": StepPlan(visits=STEP.visits, ops=(*STEP.ops, STEP.ops[9]._replace(id=10)))
            },
        ),
        "op 10 of its visits must be no op",
    ),
    "compute that does not wait for its weights": (
        lambda p: with_op(p, 5, after=()),
        r"op 5 \(compute c F .*\) does not wait for op 4",
    ),
    "a slot refilled under its reader": (
        lambda p: with_op(p, 8, after=()),
        r"op 8 \(load a B .*\) does not wait for op 6",
    ),
    "a slot refilled under the reader of the step before": (
        lambda p: with_op(p, 2, after_previous=()),
        r"op 2 \(unpack b F .*\) does not wait for op 7 of the step before",
    ),
    "a buffer refilled under its copy": (
        lambda p: with_op(p, 1, after_previous=()),
        "does not wait for op 2 of the step before",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_named(name: str) -> None:
    break_, message = CONTRADICTIONS[name]
    with pytest.raises(PlanError, match=message) as caught:
        validate(break_(small_plan()))
    assert isinstance(caught.value, SSDTuneError)
    assert len(str(caught.value).splitlines()) <= 4


def test_ops_of_other_kinds_may_stand_among_those_of_the_visits() -> None:
    """Block inputs that go to NVMe and back; more waiting than is needed does no harm either."""
    plan = small_plan()
    store = STEP.ops[0]._replace(
        id=10, kind=Kind.STORE, lane=Lane.NVME_WRITE, num_bytes=5, after=(0,)
    )
    ops = (*STEP.ops[:5], STEP.ops[5]._replace(after=(4, 3)), *STEP.ops[6:], store)
    validate(dataclasses.replace(plan, sequences={"train": StepPlan(visits=STEP.visits, ops=ops)}))


# ------------------------------------------------------------------ sizes, text, JSON


def test_bytes_are_counted_where_they_lie() -> None:
    plan = small_plan()
    assert (plan.slot_bytes, plan.ram_bytes, plan.model_bytes) == (200, 308, 300)
    on_device = small_plan(on_device=True, tiers=(Tier.RAM, Tier.NVME, Tier.DEVICE))
    assert (
        on_device.ram_bytes == 108 + 108
    )  # the buffer, and the file bytes of the block kept in RAM

    assert (plan.device_bytes, on_device.device_bytes) == (0, 200)
    direct = dataclasses.replace(on_device, buffers_on_device=True)
    assert (direct.ram_bytes, direct.device_bytes) == (108, 200 + 108)


def device_plan(*, buffers_on_device: bool = False) -> Plan:
    blocks = tuple(shape(f"layers.{i}", 1000) for i in range(8))
    return make_plan(
        Request(
            blocks=blocks,
            orders=plain_orders(8),
            budgets=Budgets(ram_bytes=5000, device_bytes=5000),
            on_device=True,
            block_inputs=Tier.NVME,
            chunk_tokens=512,
            buffers_on_device=buffers_on_device,
        )
    )


def direct_plan() -> Plan:
    return device_plan(buffers_on_device=True)


def test_ops_for_buffers_elsewhere_contradict_the_plan() -> None:
    """The link would be planned for, and not used; or the other way round."""
    for plan, there in ((device_plan(), True), (direct_plan(), False)):
        wrong = dataclasses.replace(
            plan,
            buffers_on_device=there,
            budgets=Budgets(ram_bytes=10**6, device_bytes=10**6),
        )
        with pytest.raises(PlanError, match=r"must be (upload|unpack) .* but is (upload|unpack)"):
            validate(wrong)


@pytest.mark.parametrize("make", [small_plan, device_plan, direct_plan])
def test_json_gives_back_an_equal_plan(make: Callable[[], Plan]) -> None:
    plan = make()
    again = plan_from(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    op = again.sequences["train"].ops[0]
    assert isinstance(op.kind, Kind)
    assert isinstance(op.after, tuple)


def test_what_is_no_plan_is_refused() -> None:
    raw = json.loads(small_plan().to_json())
    cut = small_plan().to_json()[:-40]
    for text in (
        "",
        "[]",
        "3",
        cut,
        json.dumps({k: v for k, v in raw.items() if k != "slots"}),
        json.dumps({k: v for k, v in raw.items() if k != "buffers_on_device"}),
        json.dumps({**raw, "tiers": ["tape"] * 3}),
        json.dumps({**raw, "slots": ["large", "small"]}),
        json.dumps({**raw, "blocks": [{"name": "a"}] * 3}),
        json.dumps({**raw, "sequences": {"train": {"visits": [1], "ops": []}}}),
    ):
        with pytest.raises(PlanError, match="no plan"):
            plan_from(text)
    with pytest.raises(PlanError, match="do not fit slot"):
        plan_from(json.dumps({**raw, "slots": [1, 1]}))


def test_a_plan_reads_as_text() -> None:
    lines = list(device_plan().lines())
    assert len(lines) == 5
    assert "8 blocks" in lines[0]
    assert "on the device" in lines[1]
    assert "16 visits a step" in lines[2]
    assert "nvme" in lines[4]
    assert "512 tokens" in lines[4]
    assert "there too" not in lines[1]
    assert "there too · RAM" in list(direct_plan().lines())[1]


def test_smallest_budgets_count_a_buffer_only_where_bytes_are_copied() -> None:
    blocks = (shape("a", 100), shape("b", 60, is_staged=True))
    assert smallest_budgets(blocks, on_device=False) == Budgets(ram_bytes=100 + 68)
    assert smallest_budgets(blocks[:1], on_device=False) == Budgets(ram_bytes=100)
    assert smallest_budgets(blocks, on_device=True) == Budgets(ram_bytes=108, device_bytes=100)
    direct = smallest_budgets(blocks, on_device=True, buffers_on_device=True)
    assert direct == Budgets(ram_bytes=0, device_bytes=208)
