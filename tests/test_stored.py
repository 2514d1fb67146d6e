"""Block inputs on the drive, in the simulator's eyes."""

from __future__ import annotations

from ssdtune.schedule.choices import Request
from ssdtune.schedule.plan import BlockShape, Budgets, Direction, Kind, Lane, Plan, Tier
from ssdtune.schedule.planner import make_plan, plain_orders
from ssdtune.schedule.simulate import simulate
from ssdtune.schedule.stored import with_stored_inputs

MB = 10**6
NUM = 8


def a_plan(ram: int = 40) -> Plan:
    blocks = tuple(
        BlockShape(name=f"layers.{i}", slot_bytes=10 * MB, file_bytes=10 * MB) for i in range(NUM)
    )
    orders = plain_orders(NUM, first_trained=1)
    return make_plan(Request(blocks=blocks, orders=orders, budgets=Budgets(ram_bytes=ram * MB)))


def seconds(steps, *, store_s: float, fetch_s: float, load_s: float = 0.0) -> list[float]:
    of = {Kind.STORE: store_s, Kind.FETCH: fetch_s, Kind.LOAD: load_s, Kind.COMPUTE: 1.0}
    return [of[op.kind] for op in steps.ops]


def test_every_block_that_comes_back_is_stored_and_fetched_once() -> None:
    plain = a_plan().sequences["train"]
    steps = with_stored_inputs(plain, 700)
    stores = [op for op in steps.ops if op.kind is Kind.STORE]
    fetches = [op for op in steps.ops if op.kind is Kind.FETCH]
    assert [op.block for op in stores] == [f"layers.{i}" for i in range(1, NUM)]
    assert [op.block for op in fetches] == [f"layers.{i}" for i in range(NUM - 1, 0, -1)]
    assert {op.num_bytes for op in [*stores, *fetches]} == {100}
    assert {op.lane for op in stores} == {Lane.NVME_WRITE}
    assert len(steps.ops) == len(plain.ops) + 2 * (NUM - 1)


def test_ids_and_references_hold() -> None:
    steps = with_stored_inputs(a_plan().sequences["train"], 700)
    assert [op.id for op in steps.ops] == list(range(len(steps.ops)))
    assert all(a < op.id for op in steps.ops for a in op.after)
    for op in steps.ops:
        if op.kind is Kind.COMPUTE and op.direction is Direction.BACKWARD:
            kinds = {steps.ops[a].kind for a in op.after}
            assert Kind.FETCH in kinds
        if op.kind is Kind.FETCH:
            stored = [steps.ops[a] for a in op.after if steps.ops[a].kind is Kind.STORE]
            assert [s.block for s in stored] == [op.block]


def test_without_bytes_the_step_stays_as_it_is() -> None:
    steps = a_plan().sequences["train"]
    assert with_stored_inputs(steps, 0) is steps
    forward = a_plan().sequences["forward"]
    assert with_stored_inputs(forward, 700) is forward


def test_free_moves_cost_nothing() -> None:
    steps = with_stored_inputs(a_plan().sequences["train"], 700)
    assert simulate(steps, seconds(steps, store_s=0, fetch_s=0)).step_s == 2 * NUM - 1


def test_a_slow_drive_holds_backward_up() -> None:
    """Fetches of 3 s beside visits of 1 s: backward is as long as its fetches, less what ran ahead."""
    steps = with_stored_inputs(a_plan().sequences["train"], 700)
    found = simulate(steps, seconds(steps, store_s=0.1, fetch_s=3.0))
    assert found.stall_s[Kind.FETCH] > 0
    assert NUM + 3 * (NUM - 1) - 3 <= found.step_s <= NUM + 3 * (NUM - 1) + 2


def test_stores_that_are_slow_delay_the_fetches() -> None:
    steps = with_stored_inputs(a_plan().sequences["train"], 700)
    found = simulate(steps, seconds(steps, store_s=4.0, fetch_s=0.1))
    assert found.busy_s[Lane.NVME_WRITE] == 4.0 * (NUM - 1)
    assert found.step_s >= 4.0 * (NUM - 1), (
        "the last block's inputs are the last to be stored and the first needed"
    )


# ------------------------------------------------------------------ beside a device


def on_device(tier: Tier):
    steps = a_plan().sequences["train"]
    return with_stored_inputs(steps, 700, tier=tier, on_device=True)


def test_inputs_that_stay_where_compute_is_are_not_moved() -> None:
    plain = a_plan().sequences["train"]
    assert on_device(Tier.DEVICE) == plain
    assert with_stored_inputs(plain, 700, tier=Tier.RAM) is plain, "one memory"


def test_to_ram_and_back_they_go_over_the_link_each_way() -> None:
    ops = on_device(Tier.RAM).ops
    down = [op for op in ops if op.kind is Kind.DOWNLOAD_INPUT]
    up = [op for op in ops if op.kind is Kind.UPLOAD_INPUT]
    assert len(down) == len(up) == NUM - 1
    assert {op.lane for op in down} == {Lane.D2H}
    assert {op.lane for op in up} == {Lane.H2D}
    assert not any(op.lane is Lane.NVME_WRITE for op in ops)


def test_to_the_drive_they_pass_ram_in_order() -> None:
    """download -> store -> fetch -> upload -> backward's visit, for each block."""
    steps = on_device(Tier.NVME)
    before = {
        Kind.STORE: Kind.DOWNLOAD_INPUT,
        Kind.FETCH: Kind.STORE,
        Kind.UPLOAD_INPUT: Kind.FETCH,
    }
    for op in steps.ops:
        if op.kind in before:
            sources = [steps.ops[a] for a in op.after if steps.ops[a].kind is before[op.kind]]
            assert [source.block for source in sources] == [op.block]
