"""The working copy's writes in predictions: the bytes and lanes of real steps, their waits, and the time that they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import cut, make_pair
from test_zeroth_order import ESTIMATORS, SEED, batches, num_trained, streamed_step

from ssdtune.schedule.choices import Request
from ssdtune.schedule.compare import BACK, Prediction, compare
from ssdtune.schedule.cost import Moves, Operator, Pricing, StepWork, Work
from ssdtune.schedule.plan import BlockShape, Budgets, Direction, Kind, Lane, Plan, StepPlan, Tier
from ssdtune.schedule.planner import make_plan, plain_orders
from ssdtune.schedule.profile import OPERATORS, Profile
from ssdtune.schedule.saved_profile import profile_from
from ssdtune.schedule.simulate import simulate
from ssdtune.schedule.stores import with_stored_weights
from ssdtune.schedule.trace import TraceOp, lane_seconds
from ssdtune.zeroth_order import Fold, ZerothOrder

MB = 10**6
NUM = 7
Stream = Callable[..., Any]


def a_plan(slots: int = 2, *, cached: int | None = None) -> Plan:
    """Blocks of 1 MB. cached: of a device, how many of them RAM keeps."""
    blocks = [BlockShape(name=f"b{i}", slot_bytes=MB, file_bytes=MB) for i in range(NUM)]
    on_device = cached is not None
    ram = (1 + (cached or 0)) * MB if on_device else slots * MB
    return make_plan(
        Request(
            blocks=tuple(blocks),
            orders=plain_orders(NUM),
            budgets=Budgets(ram_bytes=ram, device_bytes=slots * MB if on_device else 0),
            on_device=on_device,
        )
    )


def a_profile(*, write: float | None = 1e6, read: float = 1e6) -> Profile:
    """Bytes a second of the drive; a FLOP takes a second. write: None: not measured."""
    rates = {"nvme_read": read, "unpack": 1e15, "h2d": 1e9, "d2h": 1e9}
    rates |= {} if write is None else {"nvme_write": write}
    content = {
        "operators": {"float32": {kind: [[0.001, 0.001], [1, 1.0]] for kind in OPERATORS}},
        "transfers": {name: [[1, 1 / rate], [10**9, 10**9 / rate]] for name, rate in rates.items()},
    }
    return profile_from(content, "made up")


def a_pricing(profile: Profile, moves: Moves, flop: float = 1.0) -> Pricing:
    one = [Work({Operator("matmul", flop): 1})]
    passes = {(i, Direction.FORWARD): one for i in range(NUM)}
    work = StepWork(passes={"forward": passes}, between=Work({}), dtype="float32", moves=moves)
    return Pricing(work, profile, kind="forward", num_micro_batches=1)


def stored(plan: Plan, every: int) -> StepPlan:
    return with_stored_weights(plan.sequences["forward"], plan, every)


# ------------------------------------------------------------------ the ops


def test_a_block_goes_back_while_it_is_computed_with_and_holds_its_slot() -> None:
    steps = stored(a_plan(), 1)
    found = simulate(steps, [1.0] * len(steps.ops))
    stores = [each for each in found.ops if each.op.kind is Kind.STORE_WEIGHTS]
    assert len(stores) == NUM
    assert {(op.op.lane, op.op.num_bytes) for op in stores} == {(Lane.NVME_WRITE, MB)}
    computed = {each.op.visit: each for each in found.ops if each.op.kind is Kind.COMPUTE}
    for each in stores:
        assert each.start_s == computed[each.op.visit].start_s
        assert computed[each.op.visit].op.after == steps.ops[each.op.id].after[:1], "none waits"
    slow = simulate(steps, [9.0 if op.kind is Kind.STORE_WEIGHTS else 1.0 for op in steps.ops])
    # Through two slots: the one is stored from while the other is filled; but the last block and the first share one.
    assert slow.step_s == pytest.approx(NUM * 9.0 + 1.0), "slots wait, across steps too"
    assert slow.busy_s[Lane.NVME_WRITE] == pytest.approx(NUM * 9.0)


@pytest.mark.parametrize(("every", "num"), [(2, 3), (3, 2), (7, 1), (10, 0)])
def test_a_step_writes_whole_blocks_and_the_mean_of_all_steps(every: int, num: int) -> None:
    stores = [op for op in stored(a_plan(), every).ops if op.kind is Kind.STORE_WEIGHTS]
    assert sum(op.num_bytes for op in stores) == pytest.approx(NUM * MB / every, abs=1)
    assert [op.num_bytes for op in stores].count(MB) == num
    visits = [op.visit for op in stores]
    assert visits == sorted(set(visits))


def test_what_stays_in_a_slot_does_not_go_back() -> None:
    plan = a_plan(slots=5)
    visits = plan.sequences["forward"].visits
    streamed = {plan.blocks[visit.block].name for visit in visits if visit.is_filled_for}
    stores = [op for op in stored(plan, 1).ops if op.kind is Kind.STORE_WEIGHTS]
    assert {op.block for op in stores} == streamed
    assert 0 < len(streamed) < NUM
    whole = a_plan(slots=NUM)
    assert stored(whole, 1) is whole.sequences["forward"]
    assert stored(plan, 0) is plan.sequences["forward"]


def test_a_device_gives_blocks_to_ram_first_and_one_at_a_time_to_the_drive() -> None:
    """Its stream copies them before it computes on; what RAM keeps goes no further."""
    plan = a_plan(cached=3)
    steps = stored(plan, 1)
    downs = [op for op in steps.ops if op.kind is Kind.DOWNLOAD]
    stores = [op for op in steps.ops if op.kind is Kind.STORE_WEIGHTS]
    assert [op.lane for op in downs] == [Lane.D2H] * NUM
    assert len(stores) == NUM - 3
    assert {plan.tiers[plan.sequences["forward"].visits[op.visit].block] for op in stores} == {
        Tier.NVME
    }
    computing = {op.visit: op for op in steps.ops if op.kind is Kind.COMPUTE}
    for op in downs:
        assert op.id in computing[op.visit].after
    found = simulate(steps, [5.0 if op.kind is Kind.STORE_WEIGHTS else 1.0 for op in steps.ops])
    staged = [op for op in downs if any(op.id in store.after for store in stores)]
    for down, before in zip(staged[1:], stores, strict=False):
        assert found.ops[down.id].start_s >= found.ops[before.id].end_s
    assert staged[0].after_previous == (stores[-1].id,)
    third = [op for op in stored(plan, 3).ops if op.lane in (Lane.D2H, Lane.NVME_WRITE)]
    for lane, num in ((Lane.NVME_WRITE, NUM - 3), (Lane.D2H, NUM)):
        num_bytes = sum(op.num_bytes for op in third if op.lane is lane)
        assert num_bytes == pytest.approx(num * MB / 3, abs=2)


# ------------------------------------------------------------------ their time


def test_writes_share_the_drive_and_the_step_is_as_long_as_they_take() -> None:
    """A second to read a block, two to write it, in turns: three for each."""
    profile = a_profile(write=0.5e6)
    both = {"nvme_mixed": dataclasses.replace(profile.transfer("nvme_read"), points=((2e6, 3.0),))}
    shared = dataclasses.replace(profile, transfers={**profile.transfers, **both})
    plan, moves = a_plan(), Moves(shifts={}, fold_steps=1)
    none = a_pricing(shared, dataclasses.replace(moves, fold_steps=0), 0.01).simulation(plan)
    found = a_pricing(shared, moves, 0.01).simulation(plan)
    assert none.step_s == pytest.approx(NUM * 1.0, rel=0.05)
    assert found.step_s == pytest.approx(NUM * 3.0, rel=0.01)
    assert found.bound_by is Lane.NVME_WRITE


def test_where_writing_was_never_measured_it_takes_no_time_and_is_there() -> None:
    plan, profile = a_plan(), a_profile(write=None)
    found = a_pricing(profile, Moves(shifts={}, fold_steps=1)).simulation(plan)
    assert found.busy_s[Lane.NVME_WRITE] == 0
    assert sum(e.op.num_bytes for e in found.ops if e.op.lane is Lane.NVME_WRITE) == NUM * MB


def test_a_trace_is_compared_by_all_that_goes_back() -> None:
    """In each step other blocks are due: none of them is a miss."""
    plan, moves = a_plan(), Moves(shifts={}, fold_steps=3)
    pricing = a_pricing(a_profile(), moves)
    prediction = Prediction.of(plan, pricing.simulation(plan), "forward")
    assert [op.kind for op, _ in prediction.moves] == [Kind.STORE_WEIGHTS] * 3
    ran = [
        TraceOp.of(op, step=1, start_s=span.start_s, end_s=span.end_s)
        for op, span in zip(prediction.ops, prediction.spans, strict=True)
    ]
    back = TraceOp.of(prediction.moves[0][0], step=1, start_s=2.0, end_s=3.5)
    others = [dataclasses.replace(back, block=f"b{i}", start_s=i, end_s=i + 1) for i in (1, 4)]
    found = compare(prediction, [*ran, *others], 1)
    (pair,) = [pair for pair in found.pairs if pair.op.kind is Kind.STORE_WEIGHTS]
    assert pair.op.block == BACK
    assert pair.measured_s == pytest.approx(2.0)
    assert pair.predicted_s == pytest.approx(NUM / 3)


# ------------------------------------------------------------------ real steps


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_writes_what_is_predicted_on_the_lanes_that_are(
    every: int, tmp_path: Path, stream: Stream
) -> None:
    """Of as many steps as all blocks need to go back, once the copy is there."""
    pair = make_pair("llama", tmp_path / "model", stream, adapt=lambda model: model)
    fold = Fold(tmp_path / "scratch", every)
    method = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED, fold=fold)
    engine = pair.streamed.ssdtune.engine
    first = every + 2  # the copy is made before the step `every`, counted from 0
    written, lanes = 0, set[Lane]()
    for number, batch in enumerate(batches("llama", first + every)):
        streamed_step(method, cut(batch, 2), num_trained(batch))
        engine = pair.streamed.ssdtune.engine
        engine.await_stores()
        if number >= first:
            ops = [op for op in engine.trace if op.step == engine.step]
            written += sum(op.num_bytes for op in ops if op.kind is Kind.STORE_WEIGHTS)
            lanes |= set(lane_seconds(ops))
    moves = method.moves(100)
    assert moves.fold_steps == every
    assert method.moves(every).fold_steps == 0, "such a run makes no copy"
    steps = a_pricing(a_profile(), moves).steps(engine.plan)
    stores = [op for op in steps.ops if op.kind is Kind.STORE_WEIGHTS]
    assert written == pytest.approx(every * sum(op.num_bytes for op in stores), abs=every)
    assert written > 0
    assert lanes == {op.lane for op in steps.ops}
    method.close()
