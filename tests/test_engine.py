"""The engine brings every block whole to its visit, whatever the order of visits, and says what it
waited for, read, and could not read. Real files, real reader threads, no model."""

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    B,
    Blocks,
    F,
    FakeKvikio,
    be_patient,
    check_slot,
    engine_threads,
    gated,
    make_engine,
    make_small_plan,
    run_step,
    wait_for,
    write_blocks,
)

from ssdtune.errors import SSDTuneError
from ssdtune.schedule import trace as traces
from ssdtune.schedule.plan import Kind, Lane, Plan, Visit
from ssdtune.schedule.planner import plain_orders
from ssdtune.schedule.trace import UNPLANNED, TraceOp
from ssdtune.swap import engine as engine_module
from ssdtune.swap.engine import TRACED_STEPS, Engine
from ssdtune.swap.fills import SwapError
from ssdtune.swap.storage import ThrottledStorage, choose_storage

KINDS = {
    "plain": ["plain"] * 7,
    "packed": ["packed"] * 7,
    "mixed": ["packed", "plain", "plain", "packed", "plain", "packed", "packed"],
}
SHAPES: dict[str, dict[str, Any]] = {  # how much memory: see make_engine
    "one slot": {"num_slots": 1.0, "prefetch": 0},
    "two slots": {"num_slots": 2.0, "prefetch": 1},
    "three slots, residents": {"num_slots": 5.0, "prefetch": 2},
    "all resident": {"num_slots": 40.0},
    "a device": {"num_slots": 0.0, "device_slots": 2.0, "prefetch": 1},
    "a device, some in RAM": {"num_slots": 3.0, "device_slots": 3.0},
    "a device, some resident": {"num_slots": 2.0, "device_slots": 5.0},
    "a device and cuFile": {"num_slots": 0.0, "device_slots": 2.0, "prefetch": 1, "kvikio": 1},
    "a device and cuFile, one slot": {
        "num_slots": 0,
        "device_slots": 1,
        "prefetch": 0,
        "kvikio": 1,
    },
    "a device and cuFile, some in RAM": {"num_slots": 3.0, "device_slots": 3.0, "kvikio": 1},
    "a device and cuFile, some resident": {"num_slots": 2.0, "device_slots": 5.0, "kvikio": 1},
}
MakeEngine = Callable[..., Engine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeEngine]:
    """`make_engine`, closed after the test."""
    made: list[Engine] = []

    def make_one(blocks: Blocks, **options: Any) -> Engine:
        if options.get("kvikio") == 1:
            options = {**options, "kvikio": FakeKvikio()}
        made.append(make_engine(blocks, **options))
        return made[-1]

    yield make_one
    for engine in made:
        engine.close()


def plain_blocks(folder: Path, num: int = 7) -> Blocks:
    return write_blocks(folder, ["plain"] * num)


def misses(engine: Engine) -> list[TraceOp]:
    return [op for op in engine.trace if op.is_miss]


# ------------------------------------------------------------------ the plan's order


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_planned_visits_find_their_blocks_without_a_miss(
    shape: str, kinds: str, tmp_path: Path, make: MakeEngine
) -> None:
    """In the steady steps the trace is the plan: every op once, in its kind, lane and bytes."""
    if "device" in shape and kinds != "packed":
        pytest.skip("on a device all blocks pass a buffer")
    blocks = write_blocks(tmp_path, KINDS[kinds])
    engine = make(blocks, **SHAPES[shape])
    for _ in range(4):
        run_step(engine, blocks)
    run_step(engine, blocks, "forward")
    run_step(engine, blocks)
    assert not misses(engine)
    planned = {op.id: op for op in engine.plan.sequences["train"].ops}
    by_step = traces.steps(engine.trace)
    for step in (3, 4):
        assert Counter(op.op_id for op in by_step[step]) == Counter(list(planned))
        for op in by_step[step]:
            wanted = planned[op.op_id]
            assert (op.block, op.direction, op.num_bytes) == (
                wanted.block,
                wanted.direction,
                wanted.num_bytes,
            )
            if wanted.kind is Kind.UPLOAD:  # on the CPU here
                assert (op.kind, op.lane) == (Kind.UNPACK, Lane.CPU)
            else:
                assert (op.kind, op.lane) == (wanted.kind, wanted.lane)


def test_fills_run_ahead_while_a_visit_lasts(tmp_path: Path, make: MakeEngine) -> None:
    """Three slots: during the first visit the next two blocks arrive, and no third is begun."""
    blocks = plain_blocks(tmp_path)
    storage = gated(blocks)
    engine = make(blocks, num_slots=3.0, storage=storage)
    assert engine.plan.slots == (engine.plan.slots[0],) * 3
    engine.begin_step("train")
    engine.enter(0, F)
    wait_for(lambda: sum(op.kind is Kind.LOAD for op in engine.trace) == 3)
    time.sleep(0.05)
    assert len(storage.asked) == 3
    engine.enter(1, F)
    wait_for(lambda: len(storage.asked) == 4)
    engine.leave()
    assert [op.block for op in engine.trace if op.kind is Kind.LOAD][:3] == [
        "layers.0",
        "layers.1",
        "layers.2",
    ]


def test_waiting_is_hidden_behind_longer_visits(tmp_path: Path, make: MakeEngine) -> None:
    """A drive that needs 20 ms a block, visits of 40 ms: only a step's first fills are waited for."""
    blocks = plain_blocks(tmp_path)
    per_block = blocks.recipes[0].file_bytes
    storage = ThrottledStorage(choose_storage(blocks.path).storage, per_block / 0.02)
    engine = make(blocks, num_slots=3.0, storage=storage)
    for _ in range(2):
        engine.begin_step("train")
        for visit in engine.plan.sequences["train"].visits:
            engine.enter(visit.block, visit.direction)
            time.sleep(0.04)
        engine.leave()
    second = traces.steps(engine.trace)[2]
    reading = sum(op.end_s - op.start_s for op in second if op.kind is Kind.LOAD)
    assert reading > 0.1
    assert traces.stall_seconds(second) < reading / 4


def test_fills_run_ahead_across_the_end_of_a_step(tmp_path: Path, make: MakeEngine) -> None:
    """What the next step's first visits need is there before it begins."""
    blocks = plain_blocks(tmp_path)
    order = plain_orders(7)["forward"]
    storage = gated(blocks)
    engine = make(blocks, num_slots=2.0, prefetch=1, orders={"forward": order}, storage=storage)
    run_step(engine, blocks, "forward")
    wait_for(lambda: sum(op.kind is Kind.LOAD for op in engine.trace) == 9)
    storage.gate.clear()  # nothing is read from here on
    engine.begin_step("forward")
    check_slot(engine, blocks, 0, engine.enter(0, F))
    storage.gate.set()
    loads = Counter(op.step for op in engine.trace if op.kind is Kind.LOAD)
    assert loads[0] + loads[1] == 7
    assert loads[2] == 2, "fills ahead are counted in the step that they are for"


def test_fills_pass_a_visit_whose_block_stays(tmp_path: Path, make: MakeEngine) -> None:
    """A tied embedding and head is visited last, and first again: what follows is filled while the head computes."""
    blocks = plain_blocks(tmp_path)
    plain = make(blocks, num_slots=4.0).plan
    users = Counter(plan_slot for plan_slot, _ in {(v.slot, v.block) for v in forward_of(plain)})
    tied = next(v.block for v in forward_of(plain) if users[v.slot] == 1)
    others = [(block, F) for block in range(7) if block != tied]
    orders = {"forward": [(tied, F), *others, (tied, F)]}
    engine = make(blocks, num_slots=4.0, orders=orders)
    for _ in range(2):
        run_step(engine, blocks, "forward")
    engine.begin_step("forward")
    for visit in forward_of(engine.plan):
        check_slot(engine, blocks, visit.block, engine.enter(visit.block, F))
    wait_for(lambda: sum(op.kind is Kind.LOAD and op.step == 4 for op in engine.trace) == 3)
    assert not misses(engine)


def forward_of(plan: Plan) -> Sequence[Visit]:
    return plan.sequences["forward"].visits


# ------------------------------------------------------------------ any order


Visits = list[tuple[int, Any]]


def disordered(random_: random.Random, visits: Visits, num_blocks: int) -> Visits:
    """Visits left out, repeated, turned round, put in reverse or replaced, here and there."""
    for _ in range(random_.choice((0, 0, 1, 3, 10))):
        i, j = sorted(random_.choices(range(len(visits)), k=2))
        visits[i:j] = random_.choice(
            (
                [],
                visits[i:j] * 2,
                [(block, random_.choice((F, B))) for block, _ in visits[i:j]],
                visits[i:j][::-1],
                [(random_.randrange(num_blocks), direction) for _, direction in visits[i:j]],
            )
        )
        if not visits:
            break
    return visits[: random_.choice((len(visits), random_.randint(0, 20)))]


def wander(random_: random.Random, engine: Engine, blocks: Blocks) -> None:
    """One step that keeps to the plan or does not, at any pace, perhaps broken off."""
    kind = random_.choice(("train", "train", "forward"))
    engine.begin_step(kind)
    planned = [(v.block, v.direction) for v in engine.plan.sequences[kind].visits]
    for block, direction in disordered(random_, planned, len(blocks.recipes)):
        slot = engine.enter(block, direction)
        check_slot(engine, blocks, block, slot)
        if random_.random() < 0.1:
            assert engine.enter(block, direction) == slot
        if random_.random() < 0.1:
            time.sleep(random_.random() * 0.003)
        check_slot(engine, blocks, block, slot)
        if random_.random() < 0.05:
            engine.leave()


@pytest.mark.parametrize("shape", SHAPES)
def test_any_order_of_visits_is_right(shape: str, tmp_path: Path, make: MakeEngine) -> None:
    """30 steps for each shape of memory, 330 in all; contents compared twice in every visit."""
    blocks = write_blocks(tmp_path, KINDS["packed" if "device" in shape else "mixed"])
    engine = make(blocks, **SHAPES[shape])
    random_ = random.Random(shape)
    for _ in range(30):
        wander(random_, engine, blocks)
    for _ in range(2):
        run_step(engine, blocks)
    assert not [op for op in misses(engine) if op.step >= engine.step - 1]


def test_a_visit_out_of_order_is_a_miss_and_the_walk_goes_on(
    tmp_path: Path, make: MakeEngine
) -> None:
    blocks = plain_blocks(tmp_path)
    engine = make(blocks, num_slots=2.0, prefetch=1)
    engine.begin_step("train")
    for block in (0, 1, 5, 2, 3, 4, 5, 6):
        check_slot(engine, blocks, block, engine.enter(block, F))
    assert {op.op_id for op in misses(engine)} == {UNPLANNED}
    found = [op.block for op in misses(engine)]
    assert found[0] == "layers.5"
    # 5's visit puts those after it behind compute; how far depends on how far the fills ahead had come by then.
    behind = iter([f"layers.{i}" for i in (2, 3, 4, 5)])
    assert all(name in behind for name in found[1:])


def test_what_a_miss_took_the_place_of_is_brought_back(tmp_path: Path, make: MakeEngine) -> None:
    """Ahead of its visit, as before."""
    blocks = plain_blocks(tmp_path)
    order = plain_orders(7)["forward"]
    engine = make(blocks, num_slots=2.0, prefetch=1, orders={"forward": order})
    engine.begin_step("forward")
    engine.enter(0, F)

    def loads() -> list[str]:
        return [op.block for op in engine.trace if op.kind is Kind.LOAD]

    wait_for(lambda: loads() == ["layers.0", "layers.1"])
    taken = next(v for v in engine.plan.sequences["forward"].visits if v.block == 1).slot
    block = next(
        v.block for v in engine.plan.sequences["forward"].visits if v.slot == taken and v.block != 1
    )
    engine.enter(block, B)  # the plan has no such visit
    engine.leave()
    wait_for(lambda: loads().count("layers.1") == 2)
    engine.enter(1, F)
    assert [op.block for op in misses(engine)] == [f"layers.{block}"]


def test_what_a_slot_still_holds_is_not_fetched_again(tmp_path: Path, make: MakeEngine) -> None:
    """An unplanned visit to a block that lies in a slot reads nothing."""
    blocks = plain_blocks(tmp_path)
    engine = make(blocks, num_slots=40.0)
    run_step(engine, blocks)
    before = len(engine.trace)
    engine.begin_step("forward")
    for block in (3, 3, 1, 6, 0):
        check_slot(engine, blocks, block, engine.enter(block, B))
    engine.leave()
    assert {op.kind for op in engine.trace[before:]} == {Kind.COMPUTE}
    assert {op.op_id for op in engine.trace[before:]} == {UNPLANNED}


def test_visits_from_several_threads_in_turn_are_right(tmp_path: Path, make: MakeEngine) -> None:
    """Backward calls from autograd's thread, forward from the user's."""
    blocks = write_blocks(tmp_path, KINDS["mixed"])
    engine = make(blocks, num_slots=3.0)
    errors: list[BaseException] = []
    turns = threading.Semaphore(1), threading.Semaphore(0)

    def visit(me: int) -> None:
        random_ = random.Random(me)
        try:
            for turn in range(40):
                assert turns[me].acquire(timeout=30)
                if turn % 10 == 0:
                    engine.begin_step(random_.choice(("train", "forward")))
                block = random_.randrange(7)
                check_slot(engine, blocks, block, engine.enter(block, random_.choice((F, B))))
                turns[1 - me].release()
        except BaseException as error:
            errors.append(error)
            turns[1 - me].release()

    threads = [threading.Thread(target=visit, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_following_another_order_has_no_miss(tmp_path: Path, make: MakeEngine) -> None:
    """From the next step on, with blocks left where they lie."""
    blocks = plain_blocks(tmp_path)
    engine = make(blocks, num_slots=3.0)
    run_step(engine, blocks)
    order = [(b, F) for b in (2, 0, 1, 3, 5, 4, 6)] + [(b, B) for b in (6, 4, 5, 3)]
    engine.follow(make_small_plan(blocks, 3.0, 2, {"train": order}))
    first = len(engine.trace)
    for _ in range(3):
        run_step(engine, blocks)
    assert not any(op.is_miss for op in engine.trace[first:])


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize("kinds", ["plain", "packed"])
@pytest.mark.parametrize("num_slots", [1.0, 3.0])
def test_a_failed_read_names_the_block_and_a_restored_file_is_read(
    num_slots: float, kinds: str, tmp_path: Path, make: MakeEngine
) -> None:
    """At once: not one failure more for each block that was tried ahead."""
    blocks = write_blocks(tmp_path, KINDS[kinds])
    engine = make(blocks, num_slots=num_slots)
    run_step(engine, blocks)
    os.truncate(blocks.path, len(blocks.content) // 2)
    engine.begin_step("train")
    failing = None
    for block in range(7):
        try:
            check_slot(engine, blocks, block, engine.enter(block, F))
        except SwapError as error:
            failing = block, error
            break
    assert failing is not None
    block, error = failing
    message = str(error)
    assert f"layers.{block}" in message
    assert str(blocks.path) in message
    assert "Restore" in message
    assert len(message.splitlines()) <= 4
    assert isinstance(error, SSDTuneError)
    assert error.__cause__ is not None
    time.sleep(0.05)  # more is tried ahead, and fails
    blocks.restore()
    for _ in range(2):
        run_step(engine, blocks)


def test_a_failed_visit_may_be_tried_again(tmp_path: Path, make: MakeEngine) -> None:
    blocks = plain_blocks(tmp_path)
    engine = make(blocks, num_slots=1.0, prefetch=0)
    os.truncate(blocks.path, 100)
    engine.begin_step("train")
    with contextlib.suppress(SwapError):  # read before the file was cut, perhaps
        engine.enter(0, F)
    with pytest.raises(SwapError, match=r"layers\.1"):
        engine.enter(1, F)
    blocks.restore()
    check_slot(engine, blocks, 1, engine.enter(1, F))
    assert not misses(engine)


def test_a_block_that_does_not_come_is_named_with_what_it_waits_for(
    tmp_path: Path, make: MakeEngine
) -> None:
    """And once the drive answers, the same visit succeeds."""
    blocks = plain_blocks(tmp_path)
    storage = gated(blocks)
    storage.gate.clear()
    engine = make(blocks, num_slots=2.0, storage=storage, timeout_s=0.3)
    engine.begin_step("train")
    try:
        with pytest.raises(SwapError, match=r"(?s)layers\.0.*weights\.bin.*ssdtune doctor"):
            engine.enter(0, F)
    finally:
        storage.gate.set()
    be_patient(engine)
    check_slot(engine, blocks, 0, engine.enter(0, F))
    run_step(engine, blocks)


@pytest.mark.parametrize("kinds", ["plain", "packed"])
def test_memory_that_a_late_read_may_write_is_not_used_again(
    kinds: str, tmp_path: Path, make: MakeEngine
) -> None:
    """One slot, or one buffer. A read that timed out ends while another block would be there."""
    blocks = write_blocks(tmp_path, KINDS[kinds])
    storage = gated(blocks)
    storage.gate.clear()
    engine = make(blocks, num_slots=1.0, prefetch=0, storage=storage, timeout_s=0.3)
    engine.begin_step("train")
    with pytest.raises(SwapError):
        engine.enter(0, F)
    wait_for(lambda: all(fill.is_issued() for fill in engine._claims.held.values()))
    engine.begin_step("train")
    try:
        with pytest.raises(SwapError, match=r"layers\.3"):
            engine.enter(3, F)
        num_asked = len(storage.asked)
    finally:
        storage.gate.set()
    assert num_asked <= 2, "nothing more is read into the same memory"
    be_patient(engine)
    engine.begin_step("train")
    slot = engine.enter(3, F)
    check_slot(engine, blocks, 3, slot)
    time.sleep(0.05)
    check_slot(engine, blocks, 3, slot)
    run_step(engine, blocks)


@pytest.mark.parametrize("again", ["the same visit", "a new step"])
def test_an_interrupted_wait_leaves_the_engine_usable(
    again: str, tmp_path: Path, make: MakeEngine
) -> None:
    """Ctrl-C in a notebook, while a block is waited for. The visit did not take place."""
    blocks = plain_blocks(tmp_path)
    storage = gated(blocks)
    storage.gate.clear()
    engine = make(blocks, num_slots=2.0, storage=storage)
    engine.begin_step("train")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            engine.enter(0, F)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    threading.Timer(0.1, storage.gate.set).start()
    if again == "the same visit":
        check_slot(engine, blocks, 0, engine.enter(0, F))
    run_step(engine, blocks)
    assert not misses(engine)
    computed = [op for op in engine.trace if op.kind is Kind.COMPUTE and op.step == 1]
    assert len(computed) == (again == "the same visit")
    assert traces.stall_seconds(engine.trace) > 0


def test_closing_ends_all_threads_and_further_visits_say_so(tmp_path: Path) -> None:
    before = engine_threads()
    blocks = plain_blocks(tmp_path)
    engine = make_engine(blocks)
    run_step(engine, blocks)
    assert len(engine_threads()) > len(before)
    engine.close()
    engine.close()
    assert engine_threads() == before
    with pytest.raises(SwapError, match=r"layers\.1.*closed"):
        engine.enter(1, F)


def test_closing_ends_a_wait_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even while the drive does not answer."""
    monkeypatch.setattr(engine_module, "CLOSING_S", 0.2)
    blocks = plain_blocks(tmp_path)
    storage = gated(blocks)
    storage.gate.clear()
    engine = make_engine(blocks, storage=storage)
    engine.begin_step("train")
    raised: list[SwapError] = []

    def visit() -> None:
        try:
            engine.enter(0, F)
        except SwapError as error:
            raised.append(error)

    thread = threading.Thread(target=visit)
    thread.start()
    time.sleep(0.05)
    begin = time.perf_counter()
    engine.close()
    thread.join(10)
    assert time.perf_counter() - begin < 5
    assert len(raised) == 1
    storage.gate.set()
    wait_for(lambda: not engine_threads())


# ------------------------------------------------------------------ reads outside visits, trace


@pytest.mark.parametrize("kinds", ["plain", "packed"])
@pytest.mark.parametrize("num_slots", [1.0, 40.0])
def test_a_tensor_is_read_outside_visits(
    num_slots: float, kinds: str, tmp_path: Path, make: MakeEngine
) -> None:
    """Fresh memory each time, from a slot that holds the block or from the file."""
    blocks = write_blocks(tmp_path, KINDS[kinds])
    engine = make(blocks, num_slots=num_slots)
    if num_slots > 7:
        run_step(engine, blocks)
    num_ops = len(engine.trace)
    for block in range(7):
        for index in (0, 1):
            for _ in range(2):
                found = engine.read(block, index)
                assert torch.equal(found, blocks.expected[block][index])
                assert found.is_contiguous()
                found.zero_()
    assert not misses(engine)
    if num_slots > 7:
        assert len(engine.trace) == num_ops, "what a slot holds is not read"
    run_step(engine, blocks)


def test_a_tensor_alone_is_read_alone(tmp_path: Path, make: MakeEngine) -> None:
    """Not with the rest of its block: the small one costs a page, or two if it lies across."""
    blocks = plain_blocks(tmp_path)
    engine = make(blocks, num_slots=1.0, prefetch=0)
    assert torch.equal(engine.read(5, 1), blocks.expected[5][1])
    alone = [op.num_bytes for op in engine.trace if op.block == "layers.5"]
    assert alone in ([4096], [8192])
    assert blocks.recipes[5].file_bytes >= 5 * 4096


def test_a_failed_read_outside_visits_names_the_tensor(tmp_path: Path, make: MakeEngine) -> None:
    blocks = plain_blocks(tmp_path)
    engine = make(blocks, num_slots=1.0, prefetch=0)
    os.truncate(blocks.path, 100)
    with pytest.raises(SwapError, match=r"6\.other"):
        engine.read(6, 1)


def test_a_slots_content_is_never_given_away_by_a_failed_fill(
    tmp_path: Path, make: MakeEngine
) -> None:
    """A fill that failed has ended as well: what its slot holds is anything but the block."""
    blocks = plain_blocks(tmp_path)
    engine = make(blocks, num_slots=2.0, prefetch=1)
    run_step(engine, blocks)
    os.truncate(blocks.path, 100)
    engine.begin_step("train")
    for block in range(3):
        with contextlib.suppress(SwapError):
            engine.enter(block, F)
    engine.leave()
    wait_for(lambda: any(fill.has_failed() for fill in engine._claims.held.values()))
    failed = next(fill.block for fill in engine._claims.held.values() if fill.has_failed())
    blocks.restore()
    assert torch.equal(engine.read(failed, 0), blocks.expected[failed][0])


def test_the_trace_keeps_the_last_steps(tmp_path: Path, make: MakeEngine) -> None:
    """In place: whoever holds the list, or appends to it, keeps seeing it."""
    blocks = plain_blocks(tmp_path)
    engine = make(blocks, num_slots=3.0)
    held = engine.trace
    sizes = []
    for _ in range(TRACED_STEPS + 8):
        run_step(engine, blocks)
        sizes.append(len(engine.trace))
    assert held is engine.trace
    by_step = traces.steps(held)
    assert min(by_step) == engine.step - TRACED_STEPS + 1
    assert sum(op.kind is Kind.COMPUTE for op in by_step[min(by_step)]) == 14
    assert max(sizes[-8:]) <= 1.1 * (TRACED_STEPS + 1) * sizes[0]


def test_slots_first_used_in_inference_serve_training(tmp_path: Path, make: MakeEngine) -> None:
    """Tensors made under inference mode could never be saved for backward."""
    blocks = write_blocks(tmp_path, KINDS["mixed"])
    engine = make(blocks, num_slots=40.0)
    with torch.inference_mode():
        run_step(engine, blocks, "forward")
        read = engine.read(0, 0)
    assert not read.is_inference()
    for block in range(7):
        slot = engine.enter(block, F)
        assert not any(t.is_inference() for t in engine.slots.tensors(block, slot))
